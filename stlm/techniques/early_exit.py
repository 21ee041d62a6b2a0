"""Early exit: layer dropout and a loss at every exit (LayerSkip, Elhoushi et al. 2024, section 4.1).

Blocks count from 1: the paper's layer l is block l + 1. Shapes: B rows of a batch, R of them kept, L
positions, D width, X the values' width, N flat positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stlm.model.activations import block_activations
from stlm.model.block import Block
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.model.layout import Layout
from stlm.model.rotary import Rotary
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.objective import Forward


class EarlyExit(Technique):
    """Blocks that rows of a batch skip in training, the deeper the more often, and a loss after many of them:
    the first blocks with the norm and the head are language models, which evaluation scores as `exit-1`,
    `exit-2` and so on (LayerSkip, Elhoushi et al. 2024)."""

    supports = frozenset(
        {"attention_within", "batches", "cache", "drafts", "export", "packing", "sharing", "start_from"}
    )
    replaces_next_token = True

    p_max: float = Field(
        0.1, ge=0, le=1, description="Share of rows that skip the last block in training; 0: none skip any."
    )
    p_schedule: Literal["exponential", "constant"] = Field(
        "exponential",
        description="The share over training: from 0 to `p_max`, or the same at all steps.",
    )
    scale: float = Field(
        0.2,
        ge=0,
        description="Weight of the exits' losses against the last block's; 0: they have none. All weights "
        "together are 1.",
    )
    exits: tuple[int, ...] | None = Field(
        None,
        description="Blocks with an exit, from 1; null: all but the last, which has the model's head. The "
        "weight of block 1 is 0.",
    )
    curriculum: Literal["rotational", "gradual"] | None = Field(
        "rotational",
        description="Exits that have a loss: every `period`-th in turn, or from the deepest on one more at a "
        "time, all from half of the training on; null: all at all steps.",
    )
    period: int | None = Field(
        None, ge=1, description="Steps of a rotation; null: as many as there are exits, one at a step."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> EarlyExit:
        if self.period is not None and self.curriculum != "rotational":
            raise ValueError(f"period: {self.period}: only the curriculum rotational has one")
        if self.exits is not None and (not self.exits or len(set(self.exits)) < len(self.exits)):
            raise ValueError(f"exits: {list(self.exits)}: expected numbers of blocks, each once")
        return self

    def neutral(self) -> bool:
        """See `Technique.neutral`."""
        return self.p_max == 0 and self.scale == 0

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        layers = run.model.layers
        if layers == 1:
            raise ValueError("exits: model.layers is 1, and the last block's exit is the model itself")
        for block in self.exits or ():
            if not 1 <= block < layers:
                raise ValueError(
                    f"exits: {block}: expected blocks from 1 to {layers - 1}; the exit of the last, "
                    f"{layers}, is the model itself"
                )
        if self.scale and self.blocks(layers) == [1]:
            raise ValueError("exits: [1]: the weight of block 1 is 0; add a later one, or set scale: 0")

    def blocks(self, layers: int) -> list[int]:
        """The blocks with an exit, in order, without the last."""
        return sorted(self.exits) if self.exits is not None else list(range(1, layers))

    # Layer dropout

    def skipped(self, block: int, layers: int) -> float:
        """The share of rows that skip a block at the schedule's height: p_max (e^(l ln2 / (L - 1)) - 1), of
        the paper's layer l of L.
        """
        return self.p_max * (2 ** ((block - 1) / max(1, layers - 1)) - 1)

    def growth(self, step: int, steps: int) -> float:
        """The schedule's height at a step from 1, of `steps`: e^((step - 1) ln2 / (steps - 1)) - 1, or 1."""
        if self.p_schedule == "constant" or steps == 1:
            return 1.0
        return 2 ** ((step - 1) / (steps - 1)) - 1

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. No weight is added or renamed."""
        if not self.p_max:
            return
        layers = len(model.blocks)
        for number, block in enumerate(model.blocks):
            model.blocks[number] = SkippedBlock(block, self.skipped(number + 1, layers))

    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.before_step`."""
        for block in model.blocks:
            if isinstance(block, SkippedBlock):
                block.skipped = block.most * self.growth(step, steps)

    # Losses of exits

    def enabled(self, step: int, steps: int, layers: int) -> list[int]:
        """The blocks, without the last, whose exits have a loss at a step from 1."""
        blocks = self.blocks(layers)
        if self.curriculum == "rotational":
            period = self.period or len(blocks)
            return blocks[(step - 1) % period :: period]
        if self.curriculum == "gradual":
            # One more every steps / (2 exits) steps.
            count = (step - 1) * 2 * len(blocks) // steps
            return blocks[max(0, len(blocks) - count) :]
        return blocks

    def weights(self, step: int, steps: int, layers: int) -> dict[int, float]:
        """Block -> weight of its exit's loss, of those above 0, the last block's at the end; their sum is 1.

        Before they are divided by their sum: of the paper's layer l `scale` times the sum of 0 to l; of the
        last, the layer before it's plus the number of layers before it.
        """
        own = {block: self.scale * block * (block - 1) / 2 for block in self.enabled(step, steps, layers)}
        own[layers] = layers - 1 + self.scale * (layers - 1) * (layers - 2) / 2
        total = sum(own.values())
        return {block: weight / total for block, weight in own.items() if weight}

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """See `Technique.objective`. One norm and one head serve all exits."""
        if not self.scale:
            return {"next_token": forward.next_token_loss()}
        model = forward.model
        *exits, last = self.weights(forward.step, forward.steps, len(model.blocks)).items()
        *residuals, _ = forward.residuals(after=[block - 1 for block, _ in exits])
        exits_loss = torch.zeros((), device=forward.tokens_BL.device)
        for (_, weight), x_BLD in zip(exits, residuals, strict=True):
            x_ND = model.finish(x_BLD).flatten(0, 1)
            loss = model.hidden_loss(x_ND, forward.tokens_BL, forward.targets_BL)
            exits_loss = exits_loss + weight * loss
        # Both at every step, so that their means over the steps of a curve's row add up to the loss.
        return {"next_token": last[1] * forward.next_token_loss(), "exits": exits_loss}

    # Cost and evaluation

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: the exits' heads, without what rows skip on average."""
        model, layers, steps = build_on_meta(run.model), run.model.layers, run.training.steps
        head = forward_flops(model.output, 1)
        if model.embedding_up is not None:
            head += 2 * model.embedding_up.numel()
        # The exit of block 1 has no loss.
        trained = [block for block in self.blocks(layers) if self.scale and block > 1]
        heads = sum(self.steps_enabled(block, steps, layers) for block in trained) / steps
        skipped = sum(
            self.skipped(number, layers) * forward_flops(block, run.model.context) / run.model.context
            for number, block in enumerate(model.blocks, 1)
        )
        return TRAINING_PASSES * (heads * head - self.mean_growth(steps) * skipped)

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: each exit's gradient of the head, kept until the backward pass."""
        return 4 * self._exits_at_once(run) * run.model.vocab_size * run.model.width

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: each exit's gradient of its input, less what rows skip."""
        added = self._exits_at_once(run) * narrow * run.model.width
        if self.p_schedule != "constant":  # at the first step none is skipped
            return added
        skipped = sum(self.skipped(block + 1, run.model.layers) for block in range(run.model.layers))
        return added - skipped * block_activations(run.model, narrow)

    def _exits_at_once(self, run: Run) -> int:
        """The largest number of exits, without the last block's, that have a loss in one step."""
        layers, steps = run.model.layers, run.training.steps
        # A rotation repeats, and the gradual curriculum ends with all exits.
        first = range(1, min(steps, self.period or layers) + 1)
        return max(len(self.weights(step, steps, layers)) - 1 for step in (*first, steps))

    def steps_enabled(self, block: int, steps: int, layers: int) -> int:
        """How many of the steps the block's exit has a loss in: those of `enabled`, counted."""
        blocks = self.blocks(layers)
        place = blocks.index(block)
        if self.curriculum == "rotational":
            period = self.period or len(blocks)
            return max(0, -((place % period - steps) // period))
        if self.curriculum == "gradual":
            return steps + (place - len(blocks)) * steps // (2 * len(blocks))
        return steps

    def mean_growth(self, steps: int) -> float:
        """The mean of `growth` over the steps: of a geometric series."""
        if self.p_schedule == "constant" or steps == 1:
            return 1.0
        ratio = 2 ** (1 / (steps - 1))
        return (ratio**steps - 1) / (ratio - 1) / steps - 1

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """See `Technique.readouts`."""
        return {f"exit-{block}": first_blocks(model, block) for block in self.blocks(len(model.blocks))}


class SkippedBlock(Block):
    """A block that rows of a batch skip in training, each with a probability: then they pass to the bit.

    It is made of the modules of another, under the same names. `most`: the probability at the height of the
    schedule; `skipped`: now.
    """

    plain_in_evaluation: ClassVar[bool] = True

    def __init__(self, block: Block, most: float) -> None:
        nn.Module.__init__(self)  # Block's would draw new weights
        self.__dict__.update(block.__dict__)
        self.most = self.skipped = most

    def forward(
        self,
        x_BLD: Tensor,
        rope: Rotary | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        added_BLX: Tensor | None = None,
    ) -> Tensor:
        """As `Block.forward`."""
        if not self.training or not self.skipped:
            return super().forward(x_BLD, rope, layout, rows_N, added_BLX)
        # Drawn on the CPU: a GPU need not be waited for, and the rows are the same on every device.
        kept_R = (torch.rand(len(x_BLD)) >= self.skipped).nonzero()[:, 0].to(x_BLD.device)
        y_BLD = x_BLD
        if len(kept_R):
            if rope is not None and rope[0].dim() == 4:  # angles of each row
                rope = rope[0][kept_R], rope[1][kept_R]
            added_RLX = None if added_BLX is None else added_BLX[kept_R]
            y_RLD = super().forward(x_BLD[kept_R], rope, layout.rows(kept_R), None, added_RLX)
            y_BLD = x_BLD.index_copy(0, kept_R, y_RLD)
        return y_BLD if rows_N is None else y_BLD.flatten(0, 1)[rows_N]


def first_blocks(model: Transformer, layers: int) -> Transformer:
    """The model of the first blocks and the norm and head of `model`, whose weights it shares."""
    config = model.config
    tables = max(0, layers - (config.layers - config.value_embeddings))
    first = model.view()
    first.blocks = nn.ModuleList(list(model.blocks)[:layers])
    first.value_embeddings = nn.ModuleList(list(model.value_embeddings)[:tables])
    # Which weights blocks share is seen on the weights; the layers that it is said of are not all there.
    first.config = config.model_copy(update={"layers": layers, "value_embeddings": tables, "sharing": None})
    return first
