"""Several tokens at once: further heads predict the tokens after the next one, in training.

Gloeckle et al. (2024), "Better & faster large language models via multi-token prediction", arXiv 2404.19737:
parallel heads. DeepSeek-AI (2024), "DeepSeek-V3 technical report", arXiv 2412.19437, section 2.2: a chain of
heads. Aynetdinov and Akbik (2025), "Pre-training curriculum for multi-token prediction in language models",
arXiv 2505.22757.

The main head predicts the next token; head k, from 2, the k-th token after each position. Shapes: B rows, L
positions, S = L - k + 1 of them with a target of head k in the row, N = B S, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.activations import block_activations
from stlm.model.block import NORMS, Block
from stlm.model.config import ModelConfig
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.model.layout import CausalRows, Layout, Selection
from stlm.model.projection import INITIAL_STD, output_scale, projections
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.objective import Forward


class MultiToken(Technique):
    """Further heads, each a block of its own, predict the tokens after the next one in training (Gloeckle et
    al. 2024; DeepSeek-AI 2024). They share the model's norm and head. Scoring and export leave them out;
    `stlm generate --draft ahead-N` drafts with them."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "batches", "cache", "drafts", "export", "packing", "sharing", "start_from"}
    )

    heads: int = Field(
        2, ge=1, description="Tokens n predicted at each position; 1: the next one alone, the plain model."
    )
    kind: Literal["parallel", "chained"] = Field(
        "parallel",
        description="What a further head reads. `parallel`: the trunk's stream (Gloeckle et al.). "
        "`chained`: the stream of the head before it and the embedding of the token which that one predicts, "
        "joined by a matrix (DeepSeek-V3).",
    )
    trunk: int | None = Field(
        None,
        ge=1,
        description="Blocks before the further heads. null: with `parallel` all but the last, which is then "
        "the next token's own head, as in the paper; with `chained` all.",
    )
    weight: float | tuple[float, ...] = Field(
        1.0,
        description="Weight of the further heads' losses: of each, or a list with one for each. DeepSeek-V3 "
        "has 0.3 / (n - 1), later 0.1 / (n - 1).",
    )
    curriculum: Literal["forward", "reverse"] | None = Field(
        None,
        description="How many tokens are predicted during training (Aynetdinov and Akbik 2025). `forward`: "
        "from 1 to n; `reverse`: from n to 1; each number for as many steps. null: n at all steps.",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the steps that the curriculum covers; its last number goes on to the end.",
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> MultiToken:
        listed = isinstance(self.weight, tuple)
        if listed and len(self.weight) != self.heads - 1:
            raise ValueError(
                f"weight: found {len(self.weight)} of them, expected {self.heads - 1}, as many as there are "
                f"further heads with heads: {self.heads}, or one number for all"
            )
        if min(self.weight if listed else [self.weight], default=1.0) <= 0:
            raise ValueError(
                f"weight: found {list(self.weight) if listed else self.weight}, expected numbers above 0; "
                "without further heads, set heads: 1"
            )
        if self.curriculum is not None and self.heads == 1:
            raise ValueError(
                f"curriculum: found {self.curriculum} with heads: 1, which leaves nothing to grow or to "
                "fall; expected null, or at least 2 heads"
            )
        if self.curriculum is None and self.share != 1:
            raise ValueError(
                f"share: found {self.share} without a curriculum; expected 1, or curriculum: forward or "
                "reverse"
            )
        return self

    @property
    def further(self) -> range:
        """The numbers k of the further heads."""
        return range(2, self.heads + 1)

    @property
    def figures(self) -> tuple[str, ...]:
        """See `Technique.figures`: each further head's loss."""
        return tuple(map(_part, self.further))

    def neutral(self) -> bool:
        """Whether the next token alone is predicted: then nothing is added."""
        return self.heads == 1

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        layers, context, steps = run.model.layers, run.model.context, run.training.steps
        if self.trunk is not None and self.trunk > layers:
            raise ValueError(f"trunk: found {self.trunk}, expected at most the {layers} of model.layers")
        if self.heads > context:
            raise ValueError(
                f"heads: found {self.heads}, expected at most model.context, {context}: no position of a row "
                "has a target so far ahead"
            )
        for k in self.further:
            if not self.steps_of(k, steps):
                raise ValueError(
                    f"curriculum: found {self.curriculum}, by which head {k} of heads: {self.heads} is "
                    f"trained at none of the {steps} steps; expected fewer heads, a larger share than "
                    f"{self.share:g} or more training.steps"
                )

    def trunk_blocks(self, layers: int) -> int:
        """`trunk`, with its default resolved."""
        if self.trunk is not None:
            return self.trunk
        return layers if self.kind == "chained" else max(1, layers - 1)

    def weight_of(self, k: int) -> float:
        """The weight of head k's loss."""
        return self.weight[k - 2] if isinstance(self.weight, tuple) else self.weight

    def steps_of(self, k: int, steps: int) -> range:
        """The steps, from 1, of `steps` at which head k has a loss."""
        stage = self.share * steps / self.heads
        if self.curriculum == "forward":
            return range(1 + round((k - 1) * stage), steps + 1)
        if self.curriculum == "reverse":
            return range(1, 1 + round((self.heads - k + 1) * stage))
        return range(1, steps + 1)

    def tokens_at(self, step: int, steps: int) -> int:
        """How many tokens are predicted at a step, from 1, of `steps`."""
        return 1 + sum(step in self.steps_of(k, steps) for k in self.further)

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. The model's own modules are left as they are."""
        if not self.neutral():
            trunk = self.trunk_blocks(len(model.blocks))
            model.ahead = FurtherHeads(model.config, self.heads, trunk, self.kind == "chained")

    # Training

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `ahead_2`, `ahead_3`, ...: weighted mean losses over the positions with a target, 0 where
        the curriculum has none.

        Where attention is within documents, a token of the next document is no target; its end is one.
        """
        zero = torch.zeros((), device=forward.tokens_BL.device)
        # All of them at every step, so that their means over the steps of a curve's row add up to the loss.
        parts = {_part(k): zero for k in self.further}
        last = self.tokens_at(forward.step, forward.steps)
        if last == 1:
            return parts
        heads: FurtherHeads = forward.model.ahead
        x_BLD = forward.residuals([heads.trunk - 1])[0]
        counted = [_counted(forward.layout, k) for k in range(2, last + 1)]
        factors = _factors(forward, counted)
        states = heads.states(forward.model, x_BLD, forward.targets_BL, forward.layout, last)
        for (k, x_BSD), counted_BS, factor in zip(states, counted, factors, strict=True):
            x_ND = forward.model.finish(x_BSD).flatten(0, 1)
            targets_N = forward.targets_BL[:, k - 1 :].flatten()
            if counted_BS is not None:
                x_ND, targets_N = x_ND[counted_BS.flatten()], targets_N[counted_BS.flatten()]
            if len(targets_N):
                # One after the other, so that the logits of all heads never exist together.
                loss = forward.model.hidden_loss(x_ND, forward.tokens_BL, targets_N)
                parts[_part(k)] = self.weight_of(k) * factor * loss
        return parts

    def validated(
        self, model: Transformer, tokens_BL: Tensor, targets_BL: Tensor, counted_BL: Tensor
    ) -> dict[str, Tensor]:
        """See `Technique.validated`: each further head's loss in nats, a mean over its targets that count,
        without its weight."""
        if self.neutral():
            return {}
        found = {}
        x_BLD = model.residuals(tokens_BL, after=[model.ahead.trunk - 1])[0]
        for k, x_BSD in model.ahead.states(model, x_BLD, targets_BL, None, self.heads):
            logits_NV = model.head(model.finish(x_BSD)).flatten(0, 1).float()
            losses_N = F.cross_entropy(logits_NV, targets_BL[:, k - 1 :].flatten(), reduction="none")
            counted_N = counted_BL[:, k - 1 :].flatten().double()
            found[_part(k)] = torch.stack([(losses_N * counted_N).sum(), counted_N.sum()])
        return found

    # Cost

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: the further heads, averaged over the curriculum."""
        if self.neutral():
            return 0.0
        model, context, steps = build_on_meta(run.model, (self,)), run.model.context, run.training.steps
        flops = sum(
            len(self.steps_of(k, steps)) * model.ahead.head_flops(model, k, context) for k in self.further
        )
        return TRAINING_PASSES * flops / steps / context

    def _at_once(self, run: Run) -> range:
        """The further heads of the steps with the most of them."""
        steps = run.training.steps
        return range(2, max(self.tokens_at(step, steps) for step in (1, steps)) + 1)

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: each loss's gradient of the head, kept until the backward pass."""
        rows = run.model.embedding_rank or run.model.width
        return 4 * len(self._at_once(run)) * run.model.vocab_size * rows

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: what each head's block keeps, and its loss's gradient of the
        stream; in a chain also the two normalized inputs."""
        model = run.model
        kept = block_activations(model, narrow) + narrow * model.width
        if self.kind == "chained":
            kept += 2 * narrow * model.width
        return sum((model.context - k + 1) / model.context for k in self._at_once(run)) * kept


def _part(k: int) -> str:
    """The name of head k's loss."""
    return f"ahead_{k}"


def _counted(layout: Layout | None, k: int) -> Tensor | None:
    """Whether each position's k-th next token is a target of its document [B, S]; None: all are.

    The end of a text begins a document; predicted, it ends the one before. So the target is of the position's
    document, or its end, if all tokens before the target are of that document.
    """
    if layout is None or not isinstance(layout.positions, Tensor):
        return None
    positions_BL = layout.positions
    return positions_BL[:, k - 1 :] - positions_BL[:, : 1 - k] == k - 1


def _factors(forward: Forward, counted: list[Tensor | None]) -> list[Tensor | float]:
    """By what each head's mean loss over these rows is multiplied: the processes that share the rows of the
    micro-batch average their losses, and the result is to be the mean over all targets."""
    if counted[0] is None:
        return [1.0] * len(counted)
    amounts = [counted_BS.sum().float() for counted_BS in counted]
    own = torch.stack([torch.ones_like(amounts[0]), *amounts])
    everywhere = forward.sum_over_rows(own)
    return list(own[1:] * everywhere[0] / everywhere[1:].clamp(min=1))


class FurtherHeads(nn.Module):
    """The heads for the tokens after the next one: a block each and, in a chain, what it reads besides.

    `trunk`: how many blocks of the model come before them. `chained`: whether each reads the one before it.
    """

    parameter_group, one_group = "further heads", True
    # A run that starts from this one has no use for the weights; optimizers treat them as blocks'.
    inherited: ClassVar[bool] = False
    trained_as_blocks: ClassVar[bool] = True
    # Of a token in scoring and plain generation.
    active_shares: ClassVar[Mapping[str, float]] = {"blocks": 0.0, "joins": 0.0}

    def __init__(self, config: ModelConfig, heads: int, trunk: int, chained: bool) -> None:
        super().__init__()
        self.trunk, self.last, self.chained = trunk, heads, chained
        own = config.model_copy(update={"sharing": None, "lora": None})
        self.blocks = nn.ModuleList(_new_block(own) for _ in range(heads - 1))
        self.joins = nn.ModuleList(Join(config) for _ in range(heads - 1)) if chained else None

    def flops(self, length: float) -> float:
        """None in a forward pass of the model: see `MultiToken.extra_flops_per_token`."""
        return 0.0

    def head_flops(self, model: Transformer, k: int, length: int) -> float:
        """Forward FLOPs of head k and its logits in training, in a row of `length` tokens."""
        positions = length - k + 1
        flops = forward_flops(self.blocks[k - 2], positions) + forward_flops(model.output, positions)
        products = 0 if model.embedding_up is None else 1  # from and to a factorized embedding
        if self.joins is not None:
            flops += forward_flops(self.joins[k - 2], positions)
            products *= 2
        if products:
            flops += products * 2 * model.embedding_up.numel() * positions
        return flops

    def states(
        self, model: Transformer, x_BLD: Tensor, targets_BL: Tensor, layout: Layout | None, last: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield k and the residual stream [B, S, D] of each head from 2 to `last`, before the model's norm.

        `x_BLD` is the trunk's stream, `targets_BL` the next tokens; `layout` as in `Transformer.hidden`. Only
        positions whose target is in the row are computed.
        """
        B, L, _ = x_BLD.shape
        layout = CausalRows(L) if layout is None else layout
        state_BLD = x_BLD
        for k in range(2, last + 1):
            S = L - k + 1
            x_BSD = state_BLD[:, :S]
            if self.joins is not None:
                x_BSD = self.join(model, k, x_BSD, targets_BL[:, k - 2 : L - 1])
            first_BS = torch.arange(S, device=x_BLD.device).expand(B, S)
            own = layout.select(Selection(first_BS))
            x_BSD = self.blocks[k - 2](x_BSD, model.rope(own), own)
            if self.chained:
                state_BLD = x_BSD
            yield k, x_BSD

    def join(self, model: Transformer, k: int, state_BSD: Tensor, tokens_BS: Tensor) -> Tensor:
        """The input [B, S, D] of head k's block in a chain; `tokens_BS` are the (k-1)-th after each place."""
        return self.joins[k - 2](state_BSD, model.token_vectors(tokens_BS))


class Join(nn.Module):
    """A head's state and a token's embedding, each normalized, become one vector by a matrix (DeepSeek-V3,
    eq. 21)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.state_norm = norm(config.width, eps=config.norm_eps)
        self.embedding_norm = norm(config.width, eps=config.norm_eps)
        # Only the matrix reads them.
        self.state_norm.narrow = self.embedding_norm.narrow = True
        self.projection = nn.Linear(2 * config.width, config.width, bias=False)
        nn.init.normal_(self.projection.weight, std=INITIAL_STD)

    def forward(self, state_BSD: Tensor, embedding_BSD: Tensor) -> Tensor:
        both = torch.cat([self.state_norm(state_BSD), self.embedding_norm(embedding_BSD)], dim=-1)
        return self.projection(both).to(state_BSD.dtype)  # the stream is float32, under autocast too


def _new_block(config: ModelConfig) -> Block:
    """A block initialized as the model's are."""
    block = Block(config)
    if not block.attention_norm.weight.is_meta:
        for name, matrix in projections(block):
            into_stream = name in ("attention.out", "ffn.down")
            matrix.initialize(INITIAL_STD * (output_scale(config) if into_stream else 1.0))
    return block
