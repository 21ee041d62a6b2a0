"""The decoder of the paper's Table 1 and its variants: embedding, blocks (`stlm.model.block`), norm, head.

Tensor names carry their shape: B batch, L length, D width, R rank of a factorized embedding, E head width, N
flat positions, X any width, V vocabulary. ``x_BLD`` is [batch, length, width].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.added_embeddings import AddedEmbeddings
from stlm.model.block import NORMS, Attention, Block
from stlm.model.config import ModelConfig
from stlm.model.dropout import Dropout
from stlm.model.flops import children_flops, forward_flops
from stlm.model.head_loss import head_loss
from stlm.model.layout import CausalRows, Layout, Stretched
from stlm.model.projection import (
    INITIAL_STD,
    block_matrices,
    output_scale,
    projections,
    share,
)
from stlm.model.rotary import Rotary, rope_tables


def sinusoidal_table(context: int, width: int) -> Tensor:
    """Fixed positions [L, D] (Vaswani et al. 2017, section 3.5): sines at even, cosines at odd dimensions."""
    if torch.get_default_device().type == "meta":  # skips arithmetic on tensors without values
        return torch.empty(context, width)
    wavelengths_d = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_Ld = torch.arange(context, dtype=torch.float64)[:, None] / wavelengths_d
    return torch.stack([angle_Ld.sin(), angle_Ld.cos()], dim=-1).flatten(1).float()


def _in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x W in float32, whatever the precision: the residual stream and the scores stay in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ weight


class Transformer(nn.Module):
    """A decoder-only language model: token ids in, next-token logits out."""

    parameter_groups: ClassVar[dict[str, str]] = {
        "embedding": "token embedding",
        "embedding_up": "token embedding",
        "positions": "positions",
        "value_embeddings": "value embeddings",
        "norm": "norms",
        "output_down": "head",
        "output": "head",
    }

    # Whether inference must say where answers begin (`Layout.answers`); only rows of one sequence say so.
    reads_answers = False
    # Whether inference must say where the scored part of a row begins. `Layout.answers` then has the index of
    # the last token of the prefix before it, of which no token is predicted.
    reads_prefixes = False
    # Whether rows with answers take several passes, which `inserted_embeddings.hidden` computes.
    thinks = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("a Transformer needs a config with its vocab_size")
        self.config = config
        # The techniques that `stlm.model.build.build_model` added to the model.
        self.techniques: tuple[Any, ...] = ()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_rank or config.width)
        # They map a factorized table to the residual stream and, for an untied head, back.
        self.embedding_up = self.output_down = None
        if config.embedding_rank is not None:
            self.embedding_up = nn.Parameter(torch.empty(config.embedding_rank, config.width))
            if not config.tied:
                self.output_down = nn.Parameter(torch.empty(config.width, config.embedding_rank))
        # What a technique inserts into the rows, such as `stlm.techniques.pauses.PauseEmbeddings`. The next
        # token is predicted after it.
        self.inserted_embeddings: nn.Module | None = None
        # Tokens that are read and never predicted: see `add_tokens`.
        self.added_embeddings: AddedEmbeddings | None = None
        # How a technique leads the rows through the blocks, such as `stlm.model.thoughts.Thoughts`; None: one
        # after another. Called with the model and the arguments of `residuals`.
        self.route: nn.Module | None = None
        self.make_positions(config.context)
        # Tables of embeddings added to the last layers' values (Zhou et al. 2024, "Value Residual Learning",
        # and Jordan et al. 2024, modded-nanogpt): the token itself reaches attention past the blocks before.
        self.value_embeddings = nn.ModuleList(
            [
                nn.Embedding(config.vocab_size, config.kv_heads * config.head_width)
                for _ in range(config.value_embeddings)
            ]
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        for part, sources in config.source_layers.items():
            for block, source in zip(self.blocks, sources, strict=True):
                share(getattr(self.blocks[source], part), getattr(block, part))
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.output = nn.Linear(self.embedding.embedding_dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.embedding.weight
        self._initialize()

    def make_positions(self, places: int) -> None:
        """Make a table of so many positions, on the model's device; learned ones are not initialized."""
        config, device = self.config, self.embedding.weight.device
        if config.positions == "learned":
            self.positions = nn.Embedding(places, config.width)
        elif config.positions == "sinusoidal":
            table_LD = sinusoidal_table(places, config.width)
            self.register_buffer("sinusoids_LD", table_LD.to(device), persistent=False)
        else:
            cos_LE, sin_LE = rope_tables(places, config.head_width, config.rope_theta)
            self.register_buffer("cos_LE", cos_LE.to(device), persistent=False)
            self.register_buffer("sin_LE", sin_LE.to(device), persistent=False)

    @torch.no_grad()
    def insert(self, embeddings: nn.Module) -> None:
        """Insert vectors into the rows from now on, which get further positions.

        `embeddings` has four methods. `stretch(layout, tokens_BL)` returns the longer rows, or None where
        the layout needs no room; `vectors()`, what is inserted [C, D]; `longest(tokens)`, the most places
        that so many tokens take; `length(tokens)`, those that they take in evaluation, an int or a mean. A
        model that `thinks` needs a fifth: `hidden(model, tokens_BL, layout, rows_N)`, which replaces that of
        the model where rows have answers. Learned positions of the context keep their values; the further
        ones are drawn like them.
        """
        self.inserted_embeddings = embeddings
        learned_LD = self.positions.weight if self.config.positions == "learned" else None
        self.make_positions(self.most_places)
        if learned_LD is not None and not learned_LD.is_meta:
            nn.init.normal_(self.positions.weight, std=INITIAL_STD)
            self.positions.weight[: len(learned_LD)] = learned_LD

    def add_tokens(self, count: int) -> int:
        """Add `count` tokens that may stand in inputs and are never predicted; returns the first one's id.

        Their ids follow those of the vocabulary, which the head and the probability of a text are still of.
        Their value embeddings are zero. Not for byte-level models.
        """
        assert self.config.bytes is None, "a byte-level model reads chunks"
        assert self.added_embeddings is None, "tokens have been added already"
        vocabulary = self.config.vocab_size
        self.added_embeddings = AddedEmbeddings(count, vocabulary, self.config.width)
        return vocabulary

    @property
    def most_places(self) -> int:
        """The longest row in the blocks: the context, with all that is inserted."""
        inserted, context = self.inserted_embeddings, self.config.context
        return context if inserted is None else inserted.longest(context)

    def view(self) -> Transformer:
        """A model with the same modules and weights; replacing modules of one does not change the other."""
        other = copy.copy(self)
        for name in ("_modules", "_parameters", "_buffers"):
            setattr(other, name, dict(getattr(self, name)))
        return other

    def _initialize(self) -> None:
        """Normal(0, 0.02); projections into the residual stream are scaled by 1/sqrt(2 layers) (GPT-2).

        With `zero_init` these projections are zero (Zhang et al. 2019, "Fixup"; Yang et al. 2022, muP). Value
        embeddings and adapters are zero: a model with them starts as the one without. Low-rank factors are
        initialized so that their product has the variance of a dense matrix.
        """
        if self.norm.weight.is_meta:  # the factors would need values
            return
        matrices, started = dict(projections(self)), set()
        for name, parameter in self.named_parameters():
            owner = name.removesuffix(".weight").removesuffix(".left").removesuffix(".right")
            if owner in matrices and owner not in started:
                started.add(owner)
                scale = 1.0
                if owner.endswith(("attention.out", "ffn.down")):
                    scale = output_scale(self.config)
                matrices[owner].initialize(INITIAL_STD * scale)
            elif name in ("embedding_up", "output_down"):
                nn.init.normal_(parameter, std=1 / math.sqrt(self.config.embedding_rank))
            elif parameter.dim() == 2 and not name.startswith("blocks."):
                scale = 0.0 if name.startswith("value_embeddings.") else 1.0
                nn.init.normal_(parameter, std=INITIAL_STD * scale)
        for matrix in matrices.values():
            if matrix.adapter is not None:
                matrix.adapter.initialize()

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence of `length` tokens, including its logits."""
        factors = 0
        if self.embedding_up is not None:
            # One product after the look-up and one before the head, by the transpose or by `output_down`.
            factors = 4 * self.embedding_up.numel() * length
        inserted = self.inserted_embeddings
        if self.route is not None:
            blocks = self.route.flops_through(self.blocks, length)
        else:
            blocks = forward_flops(self.blocks, length if inserted is None else inserted.length(length))
        return factors + blocks + children_flops(self, length, without=("blocks", "route"))

    def matrix_parts(self) -> dict[tuple[int, ...], list[nn.Parameter]]:
        """The matrices of the blocks, and of children that say `trained_as_blocks`: see `block_matrices`."""
        further = [child for child in self.children() if getattr(child, "trained_as_blocks", False)]
        return block_matrices(nn.ModuleList([self.blocks, *further]))

    def schedule_dropout(self, factor: float) -> None:
        """From now on, multiply the configured dropout probabilities by `factor`, between 0 and 1."""
        for module in self.modules():
            if isinstance(module, Dropout) and module.p:
                module.schedule(factor, self.embedding.weight.device)
            elif isinstance(module, Attention) and module.dropout:
                module.scheduled, module.dropout_now = True, module.dropout * factor

    def hidden(self, tokens_BL: Tensor, layout: Layout | None = None, rows_N: Tensor | None = None) -> Tensor:
        """The head's inputs [B, L, D] for token ids [B, L]: the residual stream after the last norm, or its
        projection [B, L, R] if the embedding is factorized.

        `layout` says how sequences lie in the rows, none longer than the context; None: one sequence in each
        row. A `Cache` must have been extended by L. With `rows_N`, indices into the flattened [B L], only
        those positions are returned, [N, D] or [N, R], and the last block's feed-forward network skips the
        others.
        """
        if self.thinks and layout is not None and layout.answers is not None:
            return self.inserted_embeddings.hidden(self, tokens_BL, layout, rows_N)
        return self.finish(self.residuals(tokens_BL, layout, rows_N)[-1])

    def read_vectors(self, x_BLD: Tensor, layout: Layout) -> Tensor:
        """The residual stream [B, L, D] after the last block, given vectors in place of tokens' embeddings.

        There may be no value embeddings, which are tokens'.
        """
        assert not self.value_embeddings, "only tokens have value embeddings"
        assert self.route is None, "the blocks are not passed one after another"
        x_BLD, rope = self._placed(x_BLD, layout)
        return self._through(0, x_BLD, rope, None, layout)[-1]

    def finish(self, x_BLD: Tensor) -> Tensor:
        """The head's input for the residual stream [..., D], after any block."""
        x_BLD = self.norm(x_BLD)
        if self.embedding_up is None:
            return x_BLD
        return _in_float32(x_BLD, self.embedding_up.T if self.output_down is None else self.output_down)

    def residuals(
        self,
        tokens_BL: Tensor,
        layout: Layout | None = None,
        rows_N: Tensor | None = None,
        after: Collection[int] = (),
    ) -> list[Tensor]:
        """The residual stream [B, L, D] after each block in `after`, numbered from 0, and after the last.

        Arguments as in `hidden`; `rows_N` applies to the last block.
        """
        L, longest = tokens_BL.shape[1], self.config.context
        assert layout is not None or L <= longest, f"{L} tokens do not fit the context of {longest}"
        layout = CausalRows(L) if layout is None else layout
        if self.route is not None:
            assert self.inserted_embeddings is None, "a route leads tokens alone through the blocks"
            return [self.route(self, tokens_BL, layout, rows_N, after)]
        stretched = None
        if self.inserted_embeddings is not None:
            stretched = self.inserted_embeddings.stretch(layout, tokens_BL)
        if stretched is not None:
            layout, rows_N = stretched.layout, stretched.rows(rows_N)
        x_BLD, rope = self._embed(tokens_BL, layout, stretched)
        return self._through(0, x_BLD, rope, tokens_BL, layout, rows_N, after, stretched)

    def continued(
        self, x_BLD: Tensor, tokens_BL: Tensor, layout: Layout, block: int, end: int | None = None
    ) -> Tensor:
        """The residual stream [B, L, D] after the last block, given that after the first `block` of them.

        `end`: after the first `end` blocks instead.

        `layout` and the tokens are those of the pass through the first blocks. Nothing may be inserted.
        """
        assert self.inserted_embeddings is None, "the rows would be longer than the tokens"
        assert self.route is None, "the blocks are not passed one after another"
        return self._through(block, x_BLD, self.rope(layout), tokens_BL, layout, end=end)[-1]

    def _through(
        self,
        first: int,
        x_BLD: Tensor,
        rope: Rotary | None,
        tokens_BL: Tensor | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        after: Collection[int] = (),
        stretched: Stretched | None = None,
        end: int | None = None,
    ) -> list[Tensor]:
        """`residuals` from block `first` on, given the stream before it (with `stretched`, longer rows).

        `tokens_BL` are read by value embeddings alone. `end`: the block before which to stop; None: none.
        """
        last = (len(self.blocks) if end is None else end) - 1
        without = len(self.blocks) - len(self.value_embeddings)
        kept = []
        for number in range(first, last + 1):
            block = self.blocks[number]
            added_BLX = self._look_up_values(number - without, tokens_BL) if number >= without else None
            if added_BLX is not None and stretched is not None:
                added_BLX = stretched.spread(added_BLX)
            x_BLD = block(x_BLD, rope, layout.layer(number), rows_N if number == last else None, added_BLX)
            if number in after and number < last:
                kept.append(x_BLD)
        kept.append(x_BLD)
        if stretched is None:
            return kept
        return [x if x.dim() == 2 else stretched.take(x) for x in kept]  # [N, D]: `rows_N` took them

    def _look_up_values(self, table: int, tokens_BL: Tensor) -> Tensor:
        """The value embeddings [B, L, X] of one of the tables; zeros for added tokens."""
        added = self.added_embeddings
        if added is None:
            return self.value_embeddings[table](tokens_BL)
        return added.without(self.value_embeddings[table](added.in_vocabulary(tokens_BL)), tokens_BL)

    def _embed(
        self, tokens_BL: Tensor, layout: Layout, stretched: Stretched | None
    ) -> tuple[Tensor, Rotary | None]:
        """The residual stream [B, L, D] before the first block, and the rotary angles of the positions.

        With `stretched` rows L is their length, and `layout` is theirs.
        """
        x_BLD = self.token_vectors(tokens_BL)
        if stretched is not None:
            x_BLD = stretched.spread(x_BLD, self.inserted_embeddings.vectors())
        return self._placed(x_BLD, layout)

    def _placed(self, x_BLD: Tensor, layout: Layout) -> tuple[Tensor, Rotary | None]:
        """Embeddings [B, L, D] with what is added for their positions, and the rotary angles of these."""
        positions = layout.positions
        if self.config.positions == "learned":
            x_BLD = x_BLD + self.positions.weight[positions]
        elif self.config.positions == "sinusoidal":
            # The embedding starts with a standard deviation of 0.02, the sinusoids with 0.7: unscaled, they
            # would drown it. Vaswani et al. multiply the embedding by sqrt(width) for the same reason.
            x_BLD = x_BLD * math.sqrt(self.config.width) + self.sinusoids_LD[positions]
        return self.dropout(x_BLD), self.rope(layout)

    def token_vectors(self, tokens_BL: Tensor) -> Tensor:
        """The embeddings [B, L, D] of tokens, without positions."""
        added = self.added_embeddings
        x_BLD = self.embedding(tokens_BL if added is None else added.in_vocabulary(tokens_BL))
        if self.embedding_up is not None:
            x_BLD = _in_float32(x_BLD, self.embedding_up)
        return x_BLD if added is None else added.put(x_BLD, tokens_BL)

    def rope(self, layout: Layout) -> Rotary | None:
        """The rotary angles [L, 1, E] or [B, L, 1, E] of a layout's positions, the same for all heads."""
        if self.config.positions != "rope":
            return None
        return tuple(table[layout.positions].unsqueeze(-2) for table in (self.cos_LE, self.sin_LE))

    def head(self, x_BLD: Tensor, vocabulary: slice | None = None) -> Tensor:
        """Logits [..., V] for residual vectors [..., D], over all or a part of the vocabulary."""
        if vocabulary is None:
            return self.cap(self.output(x_BLD))
        return self.cap(F.linear(x_BLD, self.output.weight[vocabulary]))

    def logit(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """The logit [N] of one token for each residual vector [N, D]."""
        return self.cap((x_ND * self.output.weight[tokens_N]).sum(dim=-1))

    def cap(self, logits: Tensor) -> Tensor:
        """Bound logits of any shape as configured (Gemma 2, 2024, section 2): c tanh(logit / c)."""
        bound = self.config.logit_softcap
        return torch.tanh(logits / bound) * bound if bound else logits

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each of ``tokens_BL`` [B, L]."""
        return self.head(self.hidden(tokens_BL))

    def hidden_loss(self, x_ND: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32, given `hidden` of the tokens, flattened."""
        return head_loss(x_ND, self.output.weight, targets_BL.flatten(), self.config.logit_softcap)

    def loss(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        mask_BL: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, float32: the mean over all targets or, with a mask, the masked sum."""
        x_ND = self.hidden(tokens_BL, layout).flatten(0, 1)
        if mask_BL is None:
            return self.hidden_loss(x_ND, tokens_BL, targets_BL)
        losses_N = F.cross_entropy(self.head(x_ND).float(), targets_BL.flatten(), reduction="none")
        return (losses_N * mask_BL.flatten()).sum()
