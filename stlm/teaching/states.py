"""A loss by which a student's hidden states imitate its teacher's. Shapes: N positions, D and E widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from stlm.teaching.config import StatesConfig

if TYPE_CHECKING:
    from stlm.training.objective import Forward


class StateProjections(nn.Module):
    """Linear maps from the student's residual stream to the teacher's; training alone uses them."""

    parameter_group = "state projections"
    # Nothing but training reads the weights: they are not parameters of the model, and nothing inherits them.
    training_only: ClassVar[bool] = True

    def __init__(self, layers: Iterable[int], width: int, teacher_width: int) -> None:
        super().__init__()
        maps = {str(layer): nn.Linear(width, teacher_width, bias=False) for layer in layers}
        self.maps = nn.ModuleDict(maps)

    def forward(self, layer: int, x_ND: Tensor) -> Tensor:
        return self.maps[str(layer)](x_ND)

    def flops(self, length: float) -> float:
        """None in a forward pass of the model: see `Distillation.extra_flops_per_token`."""
        return 0.0


def imitation(config: StatesConfig, forward: Forward, teacher: Mapping[int, Tensor]) -> Tensor:
    """The weighted loss, the mean over pairs of layers.

    `teacher`: its states [N, E] after its layers, from 1. Call it before `forward.hidden_ND` is computed.
    """
    last = len(forward.model.blocks)
    kept = forward.residuals([layer - 1 for layer in config.students])
    by_layer = dict(zip([layer for layer in config.students if layer < last], kept, strict=False))
    losses = []
    for theirs, own in config.layers:
        state_ND = by_layer.get(own, kept[-1]).flatten(0, 1)
        if config.width is not None:
            state_ND = forward.model.state_projections(own, state_ND)
        losses.append(states_loss(state_ND, teacher[theirs], config.loss))
    return config.weight * torch.stack(losses).mean()


def states_loss(student_ND: Tensor, teacher_ND: Tensor, kind: str) -> Tensor:
    """The mean over positions of a distance of hidden states, float32: see `StatesConfig.loss`."""
    student_ND, teacher_ND = student_ND.float(), teacher_ND.float()
    if kind == "cosine":
        return (1 - torch.cosine_similarity(student_ND, teacher_ND, dim=1)).mean()
    lengths_N = teacher_ND.square().sum(dim=1).clamp(min=1e-12)
    return ((student_ND - teacher_ND).square().sum(dim=1) / lengths_N).mean()
