"""Recurrent depth: a group of blocks that the residual stream passes several times, with one set of weights.

Dehghani et al. (2019), "Universal transformers", arXiv 1807.03819; Geiping et al. (2025), "Scaling up
test-time compute with latent reasoning: A recurrent depth approach", arXiv 2502.05171: the number of passes
is drawn in training and chosen at inference.

Shapes: B batch, L length, D width, N flat positions, X the values' width.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from stlm.model.activations import block_activations
from stlm.model.block import Block
from stlm.model.byte_config import MOST_LAYERS
from stlm.model.counts import TRAINING_PASSES, build_on_meta, grouped_parameters
from stlm.model.flops import children_flops, forward_flops
from stlm.model.layout import Layout
from stlm.model.rotary import Rotary
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.distributed import Group


class RecurrentDepth(Technique):
    """A group of blocks that the residual stream passes several times, with the same matrices each time
    (Dehghani et al. 2019, "Universal transformers"). The number of passes may be drawn for each training step
    (Geiping et al. 2025); evaluation scores the last checkpoint at other numbers as `passes-1`, `passes-2`
    and so on, and `stlm generate --readout passes-N` writes with any."""

    supports: ClassVar[frozenset[str]] = frozenset({"attention_within", "cache", "packing", "sharing"})

    first: int = Field(2, ge=1, description="The first block of the group, counted from 1.")
    blocks: int = Field(1, ge=1, description="How many blocks the group has.")
    passes: int = Field(
        2,
        ge=1,
        description="Passes through the group: at inference and, unless they are drawn, in training; 1: the "
        "plain model.",
    )
    drawn: tuple[int, int] | None = Field(
        None,
        description="The least and the most passes of a training step. Steps come in laps; each lap takes "
        "every number once, in an order drawn from the seed. null: `passes` at all steps.",
    )
    norms: Literal["shared", "each"] = Field(
        "shared",
        description="Whether all passes use the same gains of the group's norms, or each has its own, equal "
        "at the start.",
    )
    scored: tuple[int, ...] | None = Field(
        None,
        description="Numbers of passes at which evaluation scores the last checkpoint, too; null: all up to "
        "the most in training. More need `norms: shared`.",
    )

    _seed: int | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keys_fit(self) -> RecurrentDepth:
        if self.drawn is not None and not 1 <= self.drawn[0] < self.drawn[1]:
            raise ValueError(
                f"drawn: {list(self.drawn)}: expected the least number, at least 1, and a larger one"
            )
        if self.scored is not None and (min(self.scored, default=1) < 1 or _twice(self.scored)):
            raise ValueError(f"scored: {list(self.scored)}: expected numbers of at least 1, each once")
        if self.norms == "each":
            for key, numbers in (("passes", [self.passes]), ("scored", self.scored or ())):
                if (found := max(numbers, default=1)) > self.trained:
                    raise ValueError(
                        f"{key}: {found}: with norms: each, training has gains for {self.trained} passes; "
                        "expected no more, or norms: shared"
                    )
        return self

    @property
    def trained(self) -> int:
        """The most passes of a training step."""
        return self.passes if self.drawn is None else self.drawn[1]

    def neutral(self) -> bool:
        """Whether the stream passes the group once: then no block is added."""
        return self.passes == 1 and self.drawn is None

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        layers, tables = run.model.layers, run.model.value_embeddings
        end = self.first + self.blocks - 1
        if self.first > layers:
            raise ValueError(f"first: found {self.first}, expected at most the {layers} of model.layers")
        if end > layers:
            raise ValueError(
                f"blocks: {self.blocks}, from block {self.first} on, reach block {end} of {layers}; expected "
                f"at most {layers - self.first + 1}"
            )
        if end > layers - tables:
            raise ValueError(
                f"blocks: block {end} is passed several times, but model.value_embeddings: {tables} has a "
                f"table for one pass of it; expected a group that ends with block {layers - tables} or before"
            )
        for key, numbers in (
            ("passes", [self.passes]),
            ("drawn", self.drawn or ()),
            ("scored", self.scored or ()),
        ):
            if max(numbers, default=1) > self.most(layers):
                raise ValueError(
                    f"{key}: {max(numbers)}: expected at most {self.most(layers)}, as a model has no more "
                    f"than {MOST_LAYERS:,} layers, passes included"
                )

    def most(self, layers: int) -> int:
        """The most passes that a model of so many layers can have at inference."""
        if self.norms == "each":
            return self.trained
        return 1 + (MOST_LAYERS - layers) // self.blocks

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. Each pass of a block is a block of its own, which shares its parameters."""
        if self.neutral():
            return
        before, group, after = self._parts(model)
        passes = [
            Pass(block if number == 1 else self._again(block), number, self.passes)
            for number in range(1, max(self.passes, self.trained) + 1)
            for block in group
        ]
        model.blocks = nn.ModuleList([*before, *passes, *after])

    def _parts(self, model: Transformer) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """The blocks before the group, those of all built passes through it, and those after it."""
        blocks, begin = list(model.blocks), self.first - 1
        end = begin + self.blocks + len(blocks) - model.config.layers
        return blocks[:begin], blocks[begin:end], blocks[end:]

    def _again(self, block: nn.Module) -> nn.Module:
        """A copy of a block with the same parameters, or with new gains of its norms."""
        own = self.norms == "each"
        shared = {id(p): p for p, group in grouped_parameters(block) if not (own and group == "norms")}
        return copy.deepcopy(block, shared)

    # Training

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`: the seed that draws the passes."""
        self._seed = run.seed

    def passes_at(self, seed: int, step: int) -> int:
        """The passes of a training step, from 1."""
        if self.drawn is None:
            return self.passes
        numbers = range(self.drawn[0], self.drawn[1] + 1)
        lap, place = divmod(step - 1, len(numbers))

        def ticket(number: int) -> bytes:
            return hashlib.blake2b(f"{seed} {lap} {number}".encode(), digest_size=8).digest()

        return sorted(numbers, key=ticket)[place]

    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.before_step`."""
        assert self.drawn is None or self._seed is not None, "training begins with prepare"
        passes = self.passes_at(self._seed, step)
        for block in model.blocks:
            if isinstance(block, Pass):
                block.passes_in_training = passes

    def mean_passes(self, seed: int, steps: int) -> float:
        """The mean passes of the training steps."""
        if self.drawn is None:
            return self.passes
        count = self.drawn[1] - self.drawn[0] + 1
        whole, rest = divmod(steps, count)
        last = sum(self.passes_at(seed, step) for step in range(steps - rest + 1, steps + 1))
        return (whole * sum(range(self.drawn[0], self.drawn[1] + 1)) + last) / steps

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: the model is counted at `passes`, training has others."""
        further = self.mean_passes(run.seed, run.training.steps) - self.passes
        group = list(build_on_meta(run.model).blocks)[self.first - 1 :][: self.blocks]
        flops = sum(forward_flops(block, run.model.context) for block in group)
        return TRAINING_PASSES * further * flops / run.model.context

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: gradients go through all passes of a step."""
        lap = 1 if self.drawn is None else 1 + self.drawn[1] - self.drawn[0]
        first = range(1, 1 + min(lap, run.training.steps))
        most = max(self.passes_at(run.seed, step) for step in first)
        return (most - 1) * self.blocks * block_activations(run.model, narrow)

    # Inference

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """See `Technique.readouts`."""
        numbers = self.scored
        if numbers is None:
            numbers = range(1, self.trained + 1)
        others = [number for number in numbers if number != self.passes]  # those are the model itself
        return {f"passes-{number}": self.with_passes(model, number) for number in others}

    def readout(self, model: Transformer, name: str) -> nn.Module | None:
        """See `Technique.readout`: any number of passes."""
        found = re.fullmatch("passes-([1-9][0-9]{0,5})", name)
        if found is None or int(found[1]) > self.most(model.config.layers):
            return None
        return self.with_passes(model, int(found[1]))

    def with_passes(self, model: Transformer, passes: int) -> Transformer:
        """The model with another number of passes at inference, and the same weights."""
        before, built, after = self._parts(model)
        first = built[: self.blocks]
        # Without gains of their own, further passes are the first one again.
        group = built + first * (passes - len(built) // self.blocks)
        chosen = [
            Pass(block, 1 + place // self.blocks, passes)
            for place, block in enumerate(group[: passes * self.blocks])
        ]
        other = model.view()
        other.blocks = nn.ModuleList([*before, *chosen, *after])
        return other


class Pass(Block):
    """A block in one of several passes, whose `number` counts from 1; it is skipped where fewer passes are
    made. `passes`: how many are made at inference.

    It is made of the modules of another block, under the same names.
    """

    def __init__(self, block: nn.Module, number: int, passes: int) -> None:
        nn.Module.__init__(self)  # Block's would draw new weights
        self.__dict__.update(block.__dict__)
        self._number, self._passes = number, passes
        self.passes_in_training = passes

    def flops(self, length: float) -> float:
        """Forward FLOPs at inference."""
        return children_flops(self, length) if self._number <= self._passes else 0.0

    def forward(
        self,
        x_BLD: Tensor,
        rope: Rotary | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        added_BLX: Tensor | None = None,
    ) -> Tensor:
        """As `Block.forward`."""
        if self._number <= (self.passes_in_training if self.training else self._passes):
            return super().forward(x_BLD, rope, layout, rows_N, added_BLX)
        return x_BLD if rows_N is None else x_BLD.flatten(0, 1)[rows_N]


def _twice(numbers: tuple[int, ...]) -> bool:
    return len(set(numbers)) < len(numbers)
