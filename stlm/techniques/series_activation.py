"""Series activation: a feed-forward network's activation is a learned sum of shifted and scaled ones.

Wang et al. (2023), "PanGu-pi: Enhancing language model architectures via nonlinearity compensation", arXiv
2312.17276: sigma_s(x) = a_1 sigma(x + b_1) + ... + a_n sigma(x + b_n).

Shapes: B batch, L length, D width, F hidden units, T terms; "..." any positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.flops import children_flops
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, "Primer", section 4)."""
    return F.relu(x).square()


# The sigma of each kind of `model.ffn`; SwiGLU's is the gate's, before it is multiplied with the other half.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "gelu": F.gelu, "relu2": squared_relu}


class SeriesActivation(Technique):
    """Feed-forward networks whose activation is a learned sum of copies of it, each shifted and scaled: every
    hidden unit of every layer has its own scales and shifts (Wang et al. 2023, PanGu-pi). Training starts
    from the plain activation: the first copy has the scale 1 and the shift 0, the others the scale 0."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "cache", "compile", "packing", "sharing"}
    )

    terms: int = Field(
        3, ge=1, le=16, description="Copies in the sum; 1: the plain activation, with nothing learned."
    )
    spread: float = Field(
        0.5, gt=0, description="Shifts of the other copies start on both sides of 0, at most so far from it."
    )

    def neutral(self) -> bool:
        """Whether the sum is the plain activation: then no network is changed."""
        return self.terms == 1

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        if run.model.ffn not in ACTIVATIONS:
            raise ValueError(
                f"terms: found model.ffn: {run.model.ffn}, expected one of {', '.join(ACTIVATIONS)}"
            )

    def shifts(self) -> list[float]:
        """The shifts at the start, all different: equal copies would have equal gradients."""
        steps = self.terms // 2
        return [(-1) ** i * self.spread * ((i + 1) // 2) / max(1, steps) for i in range(self.terms)]

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. No weight is renamed."""
        if self.neutral():
            return
        for block in model.blocks:
            block.ffn = SeriesFFN(block.ffn, ACTIVATIONS[model.config.ffn], self.shifts())


class SeriesFFN(nn.Module):
    """A feed-forward network with the matrices of another, and a series in the place of its activation."""

    parameter_groups: ClassVar[dict[str, str]] = {"scale": "series activation", "shift": "series activation"}

    def __init__(self, ffn: nn.Module, activation: Callable[[Tensor], Tensor], shifts: list[float]) -> None:
        super().__init__()
        # Optimizers and shared layers know the matrices by these names.
        for name, matrix in ffn.named_children():
            self.add_module(name, matrix)
        self.activation, self.terms = activation, len(shifts)
        hidden = ffn.down.in_features
        # Flat, T F numbers each: optimizers treat vectors as gains, without weight decay and without Muon.
        self.scale = nn.Parameter(
            torch.tensor([float(not t) for t in range(self.terms) for _ in range(hidden)])
        )
        self.shift = nn.Parameter(torch.tensor([b for b in shifts for _ in range(hidden)]))

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence: the matrices'. Vectors are left out, as those of norms are."""
        return children_flops(self, length)

    def series(self, x: Tensor) -> Tensor:
        """The sum [..., F] of the scaled activations of x [..., F] shifted, in the dtype of x."""
        scale_TF, shift_TF = (own.to(x.dtype).view(self.terms, -1) for own in (self.scale, self.shift))
        y = scale_TF[0] * self.activation(x + shift_TF[0])
        for scale_F, shift_F in zip(scale_TF[1:], shift_TF[1:], strict=True):
            y = y + scale_F * self.activation(x + shift_F)
        return y

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[..., D] of [..., D]."""
        if hasattr(self, "gate_up"):
            gate, up = self.gate_up(x_BLD).chunk(2, dim=-1)
            return self.down(self.series(gate) * up)
        return self.down(self.series(self.up(x_BLD)))
