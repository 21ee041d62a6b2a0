"""Thoughts: parts of a text, each encoded as one vector, predicted from those before it, and written.

A core transformer over the vectors of sentences, as in Large Concept Models (LCM team 2024, arXiv
2412.08821), between an encoder and a decoder that work within a thought. The relative over chunks of bytes is
`stlm.model.byte_transformer`.

Where thoughts end is a function of the tokens so far, so nothing needs to say it. At every token there is one
distribution of the next: the model's probabilities are those of a language model over tokens.

Shapes: B rows, L tokens of a row, F = B L of all rows, T = F tokens in the order of a packing, N thoughts of
all rows, K thoughts of a row at most, D width, Z numbers of a latent, V vocabulary, X any width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.errors import UserError
from stlm.model.block import NORMS
from stlm.model.config import ModelConfig
from stlm.model.flops import forward_flops
from stlm.model.latents import Codes, UnitVectors
from stlm.model.layout import CausalRows, Layout
from stlm.model.packed_chunks import Packing
from stlm.model.projection import INITIAL_STD
from stlm.model.transformer import Transformer

Pool = Literal["mean", "last", "attention"]


class Cut:
    """Where the thoughts of rows end: `ends_BL` marks the last token of each.

    `count_B`: the thoughts that end in each row. `through_BL`: those that have ended with each token, it
    included; `before_BL`: before it, and so the number, from 0, of the thought that it belongs to.
    """

    def __init__(self, ends_BL: Tensor) -> None:
        self.ends_BL = ends_BL
        self.through_BL = ends_BL.long().cumsum(dim=1)
        self.before_BL = self.through_BL - ends_BL.long()
        self.count_B = self.through_BL[:, -1]

    @classmethod
    def of(cls, tokens_BL: Tensor, ends_V: Tensor, length: int) -> Cut:
        """Thoughts that end with a token of which `ends_V` is above 0, or after `length` tokens."""
        marked_BL = ends_V[tokens_BL] > 0
        place_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        last_BL = torch.where(marked_BL, place_L, -1).cummax(dim=1).values
        before_BL = F.pad(last_BL[:, :-1], (1, 0), value=-1)
        # Tokens since the last mark before, this one included; a thought that is cut for its length lets the
        # next begin at a multiple of it.
        return cls(marked_BL | ((place_L - before_BL) % length == 0))

    @cached_property
    def slots(self) -> int:
        """K: the most thoughts that end in a row, at least 1. A GPU is waited for."""
        return max(1, int(self.count_B.max()))

    def read(self) -> Packed:
        """The tokens packed as they are read: a thought's tokens together."""
        return Packed(F.pad(self.ends_BL[:, :-1], (1, 0), value=True), causal=False)

    def written(self) -> Packed:
        """The tokens packed by the thought to which the next token belongs: a thought's last token stands at
        the place from which the next one is begun."""
        begins_BL = self.ends_BL.clone()
        begins_BL[:, 0] = True
        return Packed(begins_BL, causal=True)

    def by_row(self, x_NX: Tensor) -> Tensor:
        """[B, K, X]: what each thought has, in the order of `read`'s thoughts, at its number in its row.

        Beyond a row's `count_B` stands what belongs to others.
        """
        begun_B = self.before_BL[:, -1] + 1
        first_B = begun_B.cumsum(dim=0) - begun_B
        number_BK = first_B[:, None] + torch.arange(self.slots, device=x_NX.device)
        return F.embedding(number_BK.clamp(max=len(x_NX) - 1), x_NX)

    def ended(self, counted_BL: Tensor | None = None) -> Tensor:
        """[B, K]: which places of `by_row` hold a thought that has ended. With `counted_BL`, its last token
        must be marked there."""
        slots = self.slots
        if counted_BL is None:
            return torch.arange(slots, device=self.count_B.device) < self.count_B[:, None]
        found_BK = torch.zeros(len(self.count_B), slots, dtype=torch.long, device=self.count_B.device)
        places_BL = self.before_BL.clamp(max=slots - 1)
        return found_BK.scatter_add(1, places_BL, (self.ends_BL & counted_BL).long()) > 0


class Packed:
    """The tokens [B, L] of some rows by thought, in one row without padding (`Packing`).

    `first_N`: the first token of each thought in the flattened [F]; `index_T`: the token at each place.
    """

    def __init__(self, begins_BL: Tensor, causal: bool) -> None:
        """`begins_BL` marks each thought's first token; that of a row is one."""
        self.first_N = begins_BL.flatten().nonzero()[:, 0]
        end_1 = self.first_N.new_tensor([begins_BL.numel()])
        self.packing = packing = Packing(torch.diff(self.first_N, append=end_1), causal)
        self.index_T = self.first_N[packing.order_N][packing.chunk_T] + packing.place_T

    def take(self, x_FX: Tensor) -> Tensor:
        """[T, X] of the flattened rows."""
        # F.embedding instead of indexing: on a CPU, the gradient of indexing is added number by number.
        return F.embedding(self.index_T, x_FX)

    def put_back(self, x_TX: Tensor, rows_N: Tensor | None = None) -> Tensor:
        """The flattened rows [F, X], or those at `rows_N`."""
        place_F = self.index_T.argsort()
        return F.embedding(place_F if rows_N is None else place_F[rows_N], x_TX)

    def in_order(self, x_NX: Tensor) -> Tensor:
        """What each thought has, given by length as the packing does, in the order of the text."""
        return F.embedding(self.packing.order_N.argsort(), x_NX)

    def spread(self, x_NX: Tensor) -> Tensor:
        """[T, X]: what each thought has, given in the order of the text, at all of its places."""
        return F.embedding(self.packing.order_N[self.packing.chunk_T], x_NX)


class Pooling(nn.Module):
    """One vector for each thought, from the encoder's normalized stream."""

    def __init__(self, config: ModelConfig, pool: Pool) -> None:
        super().__init__()
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.score = None
        self._last = pool == "last"
        if pool == "attention":
            self.score = nn.Linear(config.width, 1, bias=False)
            nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.width))

    def forward(self, x_TD: Tensor, packed: Packed) -> Tensor:
        """[N, D], in the order of the text."""
        x_TD, packing = self.norm(x_TD), packed.packing
        if self.score is not None:
            return packed.in_order(packing.weighted(x_TD, self.score(x_TD)))
        return packed.in_order(packing.last(x_TD) if self._last else packing.mean(x_TD))


class Averages(nn.Module):
    """The encoder's blocks and pooling as moving averages: no gradient trains them, without dropout."""

    parameter_group, one_group = "target encoder", True

    def __init__(self, blocks: Sequence[nn.Module], pooling: Pooling) -> None:
        super().__init__()
        # Copied together: layers that share weights still do.
        self.parts = copy.deepcopy(nn.ModuleList([*blocks, pooling])).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Averages:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, blocks: Sequence[nn.Module], pooling: Pooling, decay: float) -> None:
        """Each average becomes `decay` times itself plus 1 - `decay` times the encoder's weight."""
        now = nn.ModuleList([*blocks, pooling]).parameters()
        torch._foreach_lerp_(list(self.parts.parameters()), [p.detach() for p in now], 1 - decay)


class Passed(NamedTuple):
    """What a forward pass leaves for losses and metrics.

    `thought_BKD`: the core's normalized output after each thought, from which the next is predicted;
    `latent_BKZ`: the thoughts' latents; `x_FD`: the tokens' embeddings. In [B, K] those marked by `cut.ended`
    are real.
    """

    cut: Cut
    thought_BKD: Tensor
    latent_BKZ: Tensor
    x_FD: Tensor


class Thoughts(nn.Module):
    """How rows pass the blocks of a model of thoughts (`Transformer.route`).

    The first blocks are the encoder: each token attends to all of its thought, and the thought is pooled to a
    latent. The core's blocks read the latents of the thoughts that have ended, each attends to those up to
    itself, and its output says what the next thought is. The last blocks are the decoder, causal within the
    thought to be written: it begins with that output (`prefix`), or adds it to all of its tokens. What comes
    before the first end in a row is written without any.

    Angles of rotary positions count the tokens of a thought, in the core the thoughts of a row.
    """

    parameter_group = "thoughts"
    # Losses and metrics alone use them.
    active_shares: ClassVar[dict[str, float]] = {"predict": 0.0, "target": 0.0}

    def __init__(
        self,
        config: ModelConfig,
        encoder: int,
        decoder: int,
        length: int,
        mean_length: float,
        pool: Pool,
        prefix: bool,
        codes: tuple[int, int] | None,
    ) -> None:
        """`encoder`, `decoder`: their numbers of blocks. `length`: the most tokens of a thought.
        `mean_length`: the tokens of a thought at which FLOPs are counted. `codes`: numbers and levels; None:
        latents are vectors."""
        super().__init__()
        width, norm = config.width, NORMS[config.norm]
        self._encoder, self._decoder, self._prefix = encoder, decoder, prefix
        self._length, self.mean_length = length, mean_length
        # Which tokens end a thought, 1 or 0, as the tokenizer says: checkpoints need it.
        self.ends = nn.Parameter(torch.zeros(config.vocab_size), requires_grad=False)
        self.pooling = Pooling(config, pool)
        self.latents = UnitVectors(width) if codes is None else Codes(width, *codes)
        # Into the core and into the decoder: both begin with streams as small as embeddings are.
        self.think = nn.Linear(self.latents.numbers, width, bias=False)
        self.norm = norm(width, eps=config.norm_eps)
        self.give = nn.Linear(width, width, bias=False)
        for matrix in (self.think, self.give):
            nn.init.normal_(matrix.weight, std=INITIAL_STD / math.sqrt(matrix.in_features))
        # Where it is added: the decoder's input at a thought's beginning, what is given before the first one,
        # and a norm of what is added.
        self.start = self.without = self.given_norm = None
        if not prefix:
            self.start, self.without = (nn.Parameter(torch.empty(width)) for _ in range(2))
            for vector in (self.start, self.without):
                nn.init.normal_(vector, std=INITIAL_STD)
            self.given_norm = norm(width, eps=config.norm_eps)
        self.predict = nn.Linear(width, self.latents.predicted, bias=False)
        nn.init.normal_(self.predict.weight, std=INITIAL_STD)
        self.target: Averages | None = None
        self.passed: Passed | None = None

    def parts(self, blocks: nn.ModuleList) -> Iterator[list[nn.Module]]:
        """The encoder's blocks, the core's and the decoder's."""
        every, end = list(blocks), len(blocks) - self._decoder
        yield from (every[: self._encoder], every[self._encoder : end], every[end:])

    def flops_through(self, blocks: nn.ModuleList, length: float, mean_length: float | None = None) -> float:
        """Forward FLOPs of a row of `length` tokens without its head; `mean_length`: another."""
        encoder, core, decoder = self.parts(blocks)
        mean = min(mean_length or self.mean_length, length)
        thoughts = length / mean
        within = sum(forward_flops(block, mean) for block in (*encoder, *decoder))
        matrices = (self.think, self.give, getattr(self.latents, "into", None))
        return (
            thoughts * within
            + sum(forward_flops(block, thoughts) for block in core)
            + sum(forward_flops(matrix, thoughts) for matrix in matrices if matrix is not None)
            + forward_flops(self.pooling, length)
        )

    def forward(
        self,
        model: Transformer,
        tokens_BL: Tensor,
        layout: Layout,
        rows_N: Tensor | None = None,
        after: Collection[int] = (),
    ) -> Tensor:
        """The residual stream [B, L, D] after the last block, or [N, D] at the flat positions `rows_N`.

        Raises UserError for other layouts than rows of one sequence each, and for the streams `after` blocks:
        there is none with a place for each token.
        """
        if type(layout) is not CausalRows or after:
            what = "blocks of thoughts" if after else "other rows than those of one sequence each"
            raise UserError(f"techniques.next_thought does not support reading {what}")
        encoder, core, decoder = self.parts(model.blocks)
        cut = Cut.of(tokens_BL, self.ends, self._length)
        x_FD = model.token_vectors(tokens_BL).flatten(0, 1)
        latent_BKZ = self._read(model, encoder, self.pooling, cut, model.dropout(x_FD))
        thought_BKD = self._think(model, core, latent_BKZ)
        # Scoring and generation want no losses and no metrics.
        wanted = not torch.is_inference_mode_enabled()
        self.passed = Passed(cut, thought_BKD, latent_BKZ, x_FD) if wanted else None
        found_ND = self._write(model, decoder, cut, x_FD, thought_BKD, rows_N)
        return found_ND if rows_N is not None else found_ND.view(*tokens_BL.shape, -1)

    def _read(
        self, model: Transformer, blocks: Sequence[nn.Module], pooling: Pooling, cut: Cut, x_FD: Tensor
    ) -> Tensor:
        """The latents [B, K, Z] of the thoughts."""
        packed = cut.read()
        x_1TD, rope = packed.take(x_FD)[None], model.rope(packed.packing)
        for block in blocks:
            x_1TD = block(x_1TD, rope, packed.packing)
        return cut.by_row(self.latents(pooling(x_1TD[0], packed)))

    def _think(self, model: Transformer, blocks: Sequence[nn.Module], latent_BKZ: Tensor) -> Tensor:
        """[B, K, D]: what follows each thought, given it and those before."""
        x_BKD = model.dropout(self.think(latent_BKZ).float())
        layout = CausalRows(x_BKD.shape[1])
        rope = model.rope(layout)
        for block in blocks:
            x_BKD = block(x_BKD, rope, layout)
        return self.norm(x_BKD)

    def _write(
        self,
        model: Transformer,
        blocks: Sequence[nn.Module],
        cut: Cut,
        x_FD: Tensor,
        thought_BKD: Tensor,
        rows_N: Tensor | None,
    ) -> Tensor:
        """The decoder's stream [F, D], or [N, D] at `rows_N`."""
        packed = cut.written()
        L, K = cut.ends_BL.shape[1], thought_BKD.shape[1]
        given_MD = self.give(thought_BKD).float().flatten(0, 1)
        without_D = given_MD.new_zeros(given_MD.shape[-1]) if self.without is None else self.without
        # The thought of this number in its row is given what the core says after the one before it.
        number_N, row_N = cut.through_BL.flatten()[packed.first_N], packed.first_N // L
        index_N = torch.where(number_N > 0, row_N * K + number_N, 0)
        given_MD = torch.cat([without_D[None], given_MD])
        if self.given_norm is not None:
            given_MD = self.given_norm(given_MD)
        given_TD = packed.spread(F.embedding(index_N, given_MD))
        begins_T1 = cut.ends_BL.flatten()[packed.index_T][:, None]
        x_TD = packed.take(x_FD)
        if self._prefix:
            x_TD = torch.where(begins_T1, given_TD, x_TD)
        else:
            x_TD = torch.where(begins_T1, self.start, x_TD)
            # As large as the token's own vector: the matrix grows faster than embeddings do, and would drown
            # them.
            x_TD = x_TD + given_TD * x_TD.detach().square().mean(dim=-1, keepdim=True).sqrt()
        x_1TD, rope = model.dropout(x_TD)[None], model.rope(packed.packing)
        for block in blocks:
            x_1TD = block(x_1TD, rope, packed.packing)
        return packed.put_back(x_1TD[0], rows_N)

    def take(self) -> Passed:
        """What the last forward pass left, which is then forgotten."""
        passed, self.passed = self.passed, None
        assert passed is not None, "no forward pass since the last was taken"
        return passed

    @torch.no_grad()
    def targets(self, model: Transformer, passed: Passed) -> Tensor:
        """The latents [B, K, Z] by the moving averages. The embedding is the model's own."""
        *blocks, pooling = self.target.parts
        return self._read(model, blocks, pooling, passed.cut, passed.x_FD.detach())
