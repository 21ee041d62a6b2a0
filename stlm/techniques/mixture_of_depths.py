"""Mixture of depths: a block works on some of the tokens, which a learned router chooses.

Raposo et al. (2024), "Mixture-of-Depths: Dynamically allocating compute in transformer-based language
models".

Shapes: B batch, L length, D width, K chosen tokens of a row, H width of the predictor, N flat positions,
X any width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.activations import block_activations
from stlm.model.flops import forward_flops
from stlm.model.layout import Layout, Selection
from stlm.model.projection import INITIAL_STD
from stlm.model.rotary import Rotary, angles_at
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.objective import Forward


class MixtureOfDepths(Technique):
    """Blocks that a router sends some tokens through; the others pass by (Raposo et al. 2024). Training takes
    the tokens with the highest scores of each row, inference those whose score passes a threshold."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "cache", "compile", "drafts", "packing", "sharing"}
    )
    figures: ClassVar[tuple[str, ...]] = ("share",)

    capacity: float = Field(
        0.125, gt=0, le=1, description="Share of a row's tokens that a routed block takes; 1: no routing."
    )
    every: int = Field(2, ge=1, description="Every so many blocks one is routed.")
    first: int = Field(2, ge=1, description="The first routed block, counted from 1.")
    threshold: Literal["auxiliary", "predictor"] = Field(
        "auxiliary",
        description="What inference decides by: `auxiliary`, the router, which a binary cross-entropy trains "
        "to put the chosen tokens above 0.5; `predictor`, a small network, which learns the router's choice "
        "and sends it no gradient.",
    )
    weight: float = Field(0.1, gt=0, description="Weight of that binary cross-entropy in the loss.")

    def neutral(self) -> bool:
        """Whether all tokens pass through all blocks, with weight 1: then no block is wrapped."""
        return self.capacity == 1

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        if self.first > run.model.layers:
            raise ValueError(
                f"first: found {self.first}, expected at most the {run.model.layers} of model.layers"
            )

    def build(self, model: Transformer) -> None:
        """See `Technique.build`."""
        if self.neutral():
            return
        for number in range(self.first - 1, len(model.blocks), self.every):
            model.blocks[number] = RoutedBlock(model.blocks[number], model.config.width, self)

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: a routed block keeps what the chosen tokens need, and for
        all tokens its output and the router's normalized input, in float32."""
        routed = len(range(self.first - 1, run.model.layers, self.every))
        block = block_activations(run.model, narrow)
        return routed * (8 * run.model.width - (1 - self.capacity) * block)

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The weighted mean of the blocks' cross-entropies, in nats: the part "router"."""
        if not forward.model.training:  # evaluation chooses by the threshold: there is nothing to learn
            return {}
        _ = forward.hidden_ND  # the blocks' cross-entropies are those of this forward pass
        losses = [block.take_loss() for block in routed_blocks(forward.model)]
        return {"router": self.weight * torch.stack(losses).mean()} if losses else {}

    def validated(
        self, model: Transformer, tokens_BL: Tensor, targets_BL: Tensor, counted_BL: Tensor
    ) -> dict[str, Tensor]:
        """See `Technique.validated`. `share`: of the counted tokens, those that routed blocks took."""
        taken = [block.chosen_BL & counted_BL for block in routed_blocks(model)]
        if not taken:
            return {}
        count = counted_BL.sum() * len(taken)
        return {"share": torch.stack([torch.stack(taken).sum(), count]).double()}


class RoutedBlock(nn.Module):
    """A block for some of the tokens: x + sigmoid(r(x)) (block(x) - x) at the chosen ones, x at the others.

    The router r is linear in the normalized residual stream, in float32. Training chooses the `capacity` x L
    tokens of each row with the highest r, which looks at the whole row. Evaluation chooses each token by
    itself, and so causally: those with r > 0, or those that the predictor expects to be chosen.
    """

    parameter_groups: ClassVar[dict[str, str]] = {
        "router": "router",
        "router_bias": "router",
        "predictor_up": "router",
        "predictor": "router",
        "predictor_bias": "router",
    }

    def __init__(self, block: nn.Module, width: int, technique: MixtureOfDepths) -> None:
        super().__init__()
        self.block, self.capacity = block, technique.capacity
        # Vectors: optimizers treat them as gains, without weight decay and without Muon.
        self.router, self.router_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.router, std=INITIAL_STD)
        self.predictor_up = self.predictor = self.predictor_bias = None
        if technique.threshold == "predictor":
            hidden = max(1, width // 4)
            self.predictor_up = nn.Parameter(torch.empty(hidden, width))
            self.predictor = nn.Parameter(torch.empty(hidden))
            self.predictor_bias = nn.Parameter(torch.zeros(1))
            nn.init.normal_(self.predictor_up, std=INITIAL_STD)
            nn.init.normal_(self.predictor, std=INITIAL_STD)
        # Of the last forward pass: in training the cross-entropy, in evaluation which tokens were chosen.
        self.loss: Tensor | None = None
        self.chosen_BL: Tensor | None = None

    @property
    def active_shares(self) -> dict[str, float]:
        """See `stlm.model.counts`; inference is near `capacity`."""
        return {"block": self.capacity}

    def chosen(self, length: float) -> int:
        """How many of a row's tokens training chooses."""
        # Rounded, as 0.1 x 30 is a little more than 3 in floating point.
        return max(1, math.ceil(round(self.capacity * length, 6)))

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence: router and predictor for all tokens, the block for the chosen ones."""
        scores = self.router.numel()
        if self.predictor is not None:
            scores += self.predictor_up.numel() + self.predictor.numel()
        return 2 * scores * length + forward_flops(self.block, self.chosen(length))

    def take_loss(self) -> Tensor:
        """The cross-entropy of the last forward pass in training, which is then forgotten."""
        loss, self.loss = self.loss, None
        assert loss is not None, "no forward pass in training since the last loss was taken"
        return loss

    def forward(
        self,
        x_BLD: Tensor,
        rope: Rotary | None,
        layout: Layout,
        rows_N: Tensor | None = None,
        added_BLX: Tensor | None = None,
    ) -> Tensor:
        """As `Attention.forward`."""
        router_BL, decision_BL = self._scores(x_BLD)
        selection = self._choose_top(router_BL) if self.training else self._choose_above(decision_BL)
        if self.training:
            chosen_BL = torch.zeros_like(router_BL).scatter(1, selection.index_BS, 1.0)
            self.loss = F.binary_cross_entropy_with_logits(decision_BL, chosen_BL)
        # Also where no token is chosen: a cache counts what each layer holds.
        selected = layout.select(selection)
        if selection.index_BS.shape[1]:
            x_BKD = selection.take(x_BLD)
            y_BKD = self.block(
                x_BKD,
                None if rope is None else angles_at(rope, selection.index_BS),
                selected,
                added_BLX=None if added_BLX is None else selection.take(added_BLX),
            )
            weight_BK1 = selection.take(router_BL.sigmoid()[..., None])
            x_BLD = selection.add_to(x_BLD, weight_BK1 * (y_BKD - x_BKD))
        return x_BLD if rows_N is None else x_BLD.flatten(0, 1)[rows_N]

    def _scores(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits [B, L], and those that decide in evaluation; float32 under autocast too."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            normal_BLD = F.rms_norm(x_BLD.float(), x_BLD.shape[-1:])
            router_BL = F.linear(normal_BLD, self.router[None], self.router_bias)[..., 0]
            if self.predictor is None:
                return router_BL, router_BL
            hidden_BLH = F.silu(F.linear(normal_BLD.detach(), self.predictor_up))
            return router_BL, F.linear(hidden_BLH, self.predictor[None], self.predictor_bias)[..., 0]

    def _choose_top(self, router_BL: Tensor) -> Selection:
        """The tokens of each row with the highest logits, in their order."""
        index_BK = router_BL.topk(self.chosen(router_BL.shape[1]), dim=1, sorted=False).indices
        return Selection(index_BK.sort(dim=1).values)

    def _choose_above(self, decision_BL: Tensor) -> Selection:
        """The tokens whose probability of being chosen is above one half."""
        self.chosen_BL = decision_BL > 0
        return Selection.of(self.chosen_BL)


def routed_blocks(model: Transformer) -> list[RoutedBlock]:
    """The routed blocks of a model, in their order."""
    return [block for block in model.blocks if isinstance(block, RoutedBlock)]
