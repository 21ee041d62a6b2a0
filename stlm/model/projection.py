"""A block's matrices: dense or of low rank, with or without the layer's adapter.

Shapes: X inputs, Y outputs, R the rank; ``weight_YX`` maps x [..., X] to x W^T [..., Y].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.config import ModelConfig

# Standard deviation of a new weight (GPT-2).
INITIAL_STD = 0.02


def output_scale(config: ModelConfig) -> float:
    """Factor of the initial standard deviation of projections into the residual stream (GPT-2)."""
    return 0.0 if config.zero_init else 1 / math.sqrt(2 * config.layers)


class _UninitializedLinear(nn.Linear):
    """A linear layer that is created without drawing random numbers; its weights are set afterwards."""

    def reset_parameters(self) -> None:
        """Leave the weights undefined."""


class Adapter(nn.Module):
    """x A B, scaled: a low-rank change of a matrix, zero at first (LoRA, Hu et al. 2022, section 4.1)."""

    parameter_group = "adapters"

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        # Draws no random numbers, so the other weights start as in the model without adapters.
        self.a = _UninitializedLinear(inputs, rank, bias=False)
        self.b = _UninitializedLinear(rank, outputs, bias=False)
        self.scale = scale

    def initialize(self) -> None:
        """Initialize A with a normal that keeps the inputs' variance, and B with zeros."""
        nn.init.normal_(self.a.weight, std=1 / math.sqrt(self.a.in_features))
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale


class Dense(nn.Linear):
    """x W^T, plus the adapter's output if there is an adapter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.adapter: Adapter | None = None

    def initialize(self, std: float) -> None:
        """Initialize with a normal of mean zero."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.adapter is None else y + self.adapter(x)


class LowRank(nn.Module):
    """x V^T U^T: the matrix W [Y, X] is the product of `left`, U [Y, R], and `right`, V [R, X]."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.left = nn.Linear(rank, outputs, bias=False)
        self.right = nn.Linear(inputs, rank, bias=False)
        self.adapter: Adapter | None = None

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Cut a dense normal matrix to the rank (Khodak et al. 2021, "spectral initialization").

        The factors are scaled so that their product has the dense matrix's norm, and outputs the same
        variance. If `std` is zero, only U is zero: the product is zero and both factors can learn.
        """
        rank = self.right.out_features
        weight_YX = torch.empty(self.out_features, self.in_features, device=self.left.weight.device)
        nn.init.normal_(weight_YX, std=std or INITIAL_STD)
        left_YR, right_RX = factorize(weight_YX, rank)
        # Scaling both balanced factors by g scales the norm of their product by g^2.
        factor_scale = math.sqrt(weight_YX.norm() / (left_YR @ right_RX).norm())
        self.left.weight.copy_(left_YR * factor_scale if std else torch.zeros_like(left_YR))
        self.right.weight.copy_(right_RX * factor_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.right(x))
        return y if self.adapter is None else y + self.adapter(x)


def projection(config: ModelConfig, part: str, name: str) -> Dense | LowRank:
    """The matrix `name` of a block's `part`, dense or of low rank as `config` says; not yet initialized."""
    outputs, inputs = config.matrices[part][name]
    rank, lora = config.rank(part, name), config.adapters(part)
    matrix = Dense(inputs, outputs) if rank is None else LowRank(inputs, outputs, rank)
    if lora is not None:
        matrix.adapter = Adapter(inputs, outputs, lora.rank, lora.scale)
    return matrix


def projections(module: nn.Module) -> Iterator[tuple[str, Dense | LowRank]]:
    """Yield the names and matrices within `module`, shared ones at each of their places."""
    for name, child in module.named_modules():
        if isinstance(child, Dense | LowRank):
            yield name, child


def block_matrices(blocks: nn.Module) -> dict[tuple[int, ...], list[nn.Parameter]]:
    """The matrices of all blocks, grouped by the rows of the matrices that one parameter joins.

    A module that joins matrices says so in `joint_rows`: the name of a projection -> the rows of each. The
    key is empty for a parameter that is a single matrix. Shared parameters appear once, and those that no
    gradient trains do not appear.
    """
    rows_of = {
        parameter: rows
        for module in blocks.modules()
        for name, rows in getattr(module, "joint_rows", {}).items()
        for parameter in getattr(module, name).parameters()
        # A low-rank pair's input factor is one matrix: its rows are the rank.
        if parameter.dim() == 2 and len(parameter) == sum(rows)
    }
    parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in blocks.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            parts.setdefault(rows_of.get(parameter, ()), []).append(parameter)
    return parts


def share(source: nn.Module, other: nn.Module) -> None:
    """Make `other`, of the same kind as `source`, use its matrices; adapters and vectors are not shared."""
    for (_, shared), (_, target) in zip(projections(source), projections(other), strict=True):
        if isinstance(shared, Dense):
            target.weight = shared.weight
        else:
            target.left.weight, target.right.weight = shared.left.weight, shared.right.weight


def factorize(weight_YX: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of that rank (Eckart and Young 1936), as two balanced factors [Y, R] and [R, X]."""
    u_YM, s_M, v_MX = torch.linalg.svd(weight_YX.float(), full_matrices=False)
    root_R = s_M[:rank].sqrt()
    return u_YM[:, :rank] * root_R, root_R[:, None] * v_MX[:rank]
