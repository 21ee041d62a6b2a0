"""Matrices as codes of few bits and scales: how they are rounded, packed and restored.

A weight is (code - zero) * scale. A scale, and a zero if it is not the middle, belong to a group of inputs of
one output, or to the whole matrix. Scales are float16. A code minus its zero has at most 9 bits and a scale
11, so their product is exact in float32: the codes can be read off the restored weights.

Shapes: Y outputs, X inputs, G groups of a row, S inputs of a group, P bytes of a row; a scale of the
whole matrix is [1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Added to the Hessian's diagonal, as a share of its mean (Frantar et al. 2022, section 3.3).
DAMPING = 0.01
# Columns after which GPTQ updates all that are left, where groups do not say it.
_COLUMNS = 128
# The least scale that has an inverse; as float16, it is 0.
_LEAST = 2.0**-126
# Codes of three values in a byte: 3^5 = 243.
_TRITS = 5


class Kind(NamedTuple):
    """A kind of codes: their `bits`, 1.6 for the three values of `ternary`, and how a scale is chosen.

    `group`: the inputs that share a scale, fewer at the end of a row that it does not divide; None: all of an
    output, or the whole matrix if it is ternary.
    `zero_points`: each group has a zero of its own, so that its codes span its least to its largest weight.
    Otherwise they are symmetric, as GGUF's Q8_0 and Q4_0: with 8 bits the largest weight is 127 scales, with
    fewer the one farthest from 0 is -2^(bits - 1) scales, which may be negative.
    """

    bits: float
    group: int | None = None
    zero_points: bool = False

    @property
    def ternary(self) -> bool:
        """Whether codes have three values (BitNet b1.58, Ma et al. 2024)."""
        return self.bits == TERNARY

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 if self.ternary else 2 ** int(self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of zero where groups have none of their own."""
        return 1 if self.ternary else 2 ** (int(self.bits) - 1)

    def groups(self, inputs: int) -> int:
        """The groups of a row of so many inputs."""
        return 1 if self.group is None else -(-inputs // self.group)

    def split(self, x_YX: Tensor, groups: int) -> Tensor:
        """Numbers of a matrix by group [Y, G, S]; the last group is filled up with zeros."""
        if groups == 1:
            return x_YX[:, None]
        missing = groups * self.group - x_YX.shape[1]
        return (F.pad(x_YX, (0, missing)) if missing else x_YX).unflatten(1, (groups, -1))

    def packed_bytes(self, numbers: int) -> int:
        """The bytes of a row of so many packed codes."""
        return -(-numbers // _TRITS) if self.ternary else -(-numbers * int(self.bits) // 8)


# The bits of a code of three values, packed.
TERNARY = 1.6


@dataclass(frozen=True)
class Grid:
    """The weights that a matrix may have: the scales, the zeros, and how codes are chosen.

    `scale_YG1` is rounded to float16. `factor_YG1` is what weights are multiplied with before they are
    rounded: for symmetric codes the inverse of the scale before that rounding, as in GGUF.
    """

    kind: Kind
    scale_YG1: Tensor
    factor_YG1: Tensor
    zero_YG1: Tensor

    @classmethod
    def of(cls, weight_YX: Tensor, kind: Kind) -> Grid:
        """The grid of a matrix, or of one group of its columns."""
        w_YGS = kind.split(weight_YX.float(), kind.groups(weight_YX.shape[1]))
        zero_YG1 = torch.full_like(w_YGS[..., :1], kind.middle)
        if kind.ternary:
            scale = w_YGS.abs().mean().reshape(1, 1, 1)
            zero_YG1 = zero_YG1[:1, :1]
        elif kind.zero_points:
            low = w_YGS.amin(dim=-1, keepdim=True).clamp(max=0)
            high = w_YGS.amax(dim=-1, keepdim=True).clamp(min=0)
            scale = (high - low) / kind.top
        elif kind.bits == 8:
            scale = w_YGS.abs().amax(dim=-1, keepdim=True) / 127
        else:
            farthest = w_YGS.abs().argmax(dim=-1, keepdim=True)
            scale = w_YGS.gather(-1, farthest) / -kind.middle
        stored = scale.half().float()
        if kind.zero_points:
            scale = stored
            zero_YG1 = (-low * _inverse(scale)).round().clamp(0, kind.top)
        return cls(kind, stored, _inverse(scale), zero_YG1)

    def checked(self) -> Grid:
        """The grid itself. Raises ValueError where a scale is infinite; a GPU is waited for."""
        if not self.scale_YG1.isfinite().all():
            raise ValueError("weights too large for a scale in float16, which reaches 65,504")
        return self

    def _split(self, x_YX: Tensor) -> Tensor:
        return self.kind.split(x_YX.float(), self.scale_YG1.shape[1])

    def codes(self, weight_YX: Tensor) -> Tensor:
        """The codes, float32, of the nearest weights of the grid [Y, X], or of some columns of one group."""
        x_YGS = self._split(weight_YX) * self.factor_YG1
        if self.kind.bits == 8 and not self.kind.zero_points:
            # Halves are rounded away from 0. In float32, adding 128 first would round twice.
            below = x_YGS.abs().floor()
            codes = x_YGS.sign() * (below + (2 * (x_YGS.abs() - below)).floor()) + self.zero_YG1
        else:
            codes = (x_YGS + (self.zero_YG1 + 0.5)).floor()
        return codes.clamp(0, self.kind.top).flatten(1)[:, : weight_YX.shape[1]]

    def values(self, codes_YX: Tensor) -> Tensor:
        """The weights, float32, of codes."""
        codes_YGS = self._split(codes_YX)
        return ((codes_YGS - self.zero_YG1) * self.scale_YG1).flatten(1)[:, : codes_YX.shape[1]]

    def rounded(self, weight_YX: Tensor) -> Tensor:
        """The nearest weights of the grid, float32."""
        return self.values(self.codes(weight_YX))

    def read(self, weight_YX: Tensor) -> Tensor:
        """The codes of weights of the grid, exactly."""
        w_YGS = self._split(weight_YX)
        codes_YGS = (w_YGS * _inverse(self.scale_YG1)).round() + self.zero_YG1
        return codes_YGS.flatten(1)[:, : weight_YX.shape[1]]

    @classmethod
    def restored(cls, kind: Kind, scale_YG: Tensor, zero_YG: Tensor | None) -> Grid:
        """The grid of stored scales, and of stored zeros where groups have them."""
        scale_YG1 = scale_YG[..., None].float()
        middle_YG1 = torch.full_like(scale_YG1, kind.middle)
        zero_YG1 = middle_YG1 if zero_YG is None else zero_YG[..., None].float()
        return cls(kind, scale_YG1, _inverse(scale_YG1), zero_YG1)

    @classmethod
    def joined(cls, grids: list[Grid]) -> Grid:
        """The grid of a matrix whose groups of columns have these, in order."""
        tensors = ((grid.scale_YG1, grid.factor_YG1, grid.zero_YG1) for grid in grids)
        return cls(grids[0].kind, *(torch.cat(parts, dim=1) for parts in zip(*tensors, strict=True)))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that would be infinite."""
    return torch.where(scale.abs() < _LEAST, torch.zeros_like(scale), 1 / scale)


def gptq(weight_YX: Tensor, moment_XX: Tensor, kind: Kind) -> tuple[Grid, Tensor]:
    """Round a matrix so that its outputs change little (Frantar et al. 2022, "GPTQ", algorithm 1).

    Columns are rounded in order, and what each loses is made up for by those after it, as the second moments
    E[x x^T] of the inputs (`moment_XX`) say. A group's scale is of its weights as they are when it is its
    turn. Returns the grid and the weights, float32. Raises ValueError where a scale is infinite.
    """
    device, (Y, X) = weight_YX.device, weight_YX.shape
    factor_XX = _inverse_factor(moment_XX.to(device))
    left_YX, done_YX = weight_YX.double(), torch.empty(Y, X, device=device)
    step, grids = kind.group or _COLUMNS, []
    for begin in range(0, X, step):
        end = min(begin + step, X)
        if kind.group is not None or not begin:
            grids.append(Grid.of(left_YX[:, begin : end if kind.group else X], kind))
        error_YS = left_YX.new_empty(Y, end - begin)
        for place in range(begin, end):
            done_YX[:, place] = grids[-1].rounded(left_YX[:, place : place + 1])[:, 0]
            error_Y = (left_YX[:, place] - done_YX[:, place]) / factor_XX[place, place]
            left_YX[:, place + 1 : end] -= error_Y[:, None] * factor_XX[place, place + 1 : end]
            error_YS[:, place - begin] = error_Y
        left_YX[:, end:] -= error_YS @ factor_XX[begin:end, end:]
    return Grid.joined(grids).checked(), done_YX


def _inverse_factor(moment_XX: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments, float64."""
    moment_XX = moment_XX.double().clone()
    diagonal_X = moment_XX.diagonal()
    # An input that is always 0 says nothing of its weights.
    diagonal_X[diagonal_X == 0] = 1.0
    diagonal_X += DAMPING * diagonal_X.mean()
    inverse_XX = torch.cholesky_inverse(torch.linalg.cholesky(moment_XX))
    return torch.linalg.cholesky(inverse_XX, upper=True)


def pack(codes_YX: Tensor, kind: Kind) -> Tensor:
    """Codes as bytes [Y, P], uint8: bit after bit from the lowest, or five of three values in a byte."""
    codes = codes_YX.cpu().to(torch.uint8).numpy()
    if kind.ternary:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % _TRITS))).reshape(len(codes), -1, _TRITS)
        return torch.from_numpy((codes * _POWERS).sum(axis=-1, dtype=np.uint8))
    bits = np.unpackbits(codes[..., None], axis=-1, count=int(kind.bits), bitorder="little")
    return torch.from_numpy(np.packbits(bits.reshape(len(codes), -1), axis=-1, bitorder="little"))


_POWERS = np.array([3**place for place in range(_TRITS)], np.uint8)


def unpack(packed_YP: Tensor, kind: Kind, inputs: int) -> Tensor:
    """The codes [Y, X], uint8, of bytes that `pack` made of so many inputs.

    Raises ValueError where there are bytes too many or too few.
    """
    packed, expected = packed_YP.numpy(), kind.packed_bytes(inputs)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != expected:
        raise ValueError(f"{packed.dtype} {list(packed.shape)}, expected uint8 in rows of {expected}")
    if kind.ternary:
        codes = (packed[..., None] // _POWERS % 3).reshape(len(packed), -1)[:, :inputs]
    else:
        bits = np.unpackbits(packed, axis=-1, count=inputs * int(kind.bits), bitorder="little")
        bits = bits.reshape(len(packed), inputs, int(kind.bits))
        codes = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(np.ascontiguousarray(codes))


def round_tokens(x: Tensor) -> Tensor:
    """Activations [..., X] rounded to 255 values of each token, symmetric about 0, up to its largest.

    The gradient is that of x (Bengio et al. 2013, "straight-through").
    """
    scale = x.detach().float().abs().amax(dim=-1, keepdim=True) / 127
    rounded = (x.detach().float() * _inverse(scale)).round() * scale
    return x + (rounded.to(x.dtype) - x.detach())
