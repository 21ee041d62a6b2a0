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

from stlm.model.counts import build_on_meta
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run


class SeriesActivation(Technique):
    """Feed-forward networks whose activation is a learned sum of copies of it, each shifted and scaled: every
    hidden unit of every layer has its own scales and shifts (Wang et al. 2023, PanGu-pi). Training starts
    from the plain activation: the first copy has the scale 1 and the shift 0, the others the scale 0."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "batches", "cache", "compile", "drafts", "packing", "sharing"}
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
        if not hasattr(build_on_meta(run.model).blocks[0].ffn, "activation"):
            raise ValueError(f"terms: model.ffn: {run.model.ffn} has no activation to replace")

    def shifts(self) -> list[float]:
        """The shifts at the start, all different: equal copies would have equal gradients."""
        steps = self.terms // 2
        return [(-1) ** i * self.spread * ((i + 1) // 2) / max(1, steps) for i in range(self.terms)]

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. No weight is renamed."""
        if self.neutral():
            return
        for block in model.blocks:
            block.ffn.activation = Series(block.ffn.activation, model.config.ffn_width, self.shifts())

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: a further term keeps its shifted and its activated units."""
        return 2 * (self.terms - 1) * run.model.layers * run.model.ffn_width * narrow


class Series(nn.Module):
    """The sum [..., F] of scaled activations of hidden units [..., F], each shifted."""

    parameter_group = "series activation"

    def __init__(self, activation: Callable[[Tensor], Tensor], hidden: int, shifts: list[float]) -> None:
        super().__init__()
        self.activation, self.terms = activation, len(shifts)
        # Flat, T F numbers each: optimizers treat vectors as gains, without weight decay and without Muon.
        self.scale = nn.Parameter(
            torch.tensor([float(not t) for t in range(self.terms) for _ in range(hidden)])
        )
        self.shift = nn.Parameter(torch.tensor([b for b in shifts for _ in range(hidden)]))

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of x."""
        scale_TF, shift_TF = (vector.to(x.dtype).view(self.terms, -1) for vector in (self.scale, self.shift))
        y = scale_TF[0] * self.activation(x + shift_TF[0])
        for scale_F, shift_F in zip(scale_TF[1:], shift_TF[1:], strict=True):
            y = y + scale_F * self.activation(x + shift_F)
        return y
