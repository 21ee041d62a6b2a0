"""Initializes a model with another model's weights, cutting matrices to a lower rank where needed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stlm.model.projection import LowRank, factorize, projections
from stlm.model.transformer import Transformer


class Truncation(NamedTuple):
    """What cutting matrices W to a rank lost, |W - U V| / |W| (Frobenius): of all matrices, and of each."""

    error: float
    by_matrix: dict[str, float]


@torch.no_grad()
def inherit(model: Transformer, source: Transformer) -> Truncation:
    """Give `model` the weights of `source`; the models may differ in ranks, adapters and techniques only, and
    in parts that change nothing at first.

    Where only `model` has low rank, its factors come from the truncated singular value decomposition, the
    nearest product of that rank (Eckart and Young 1936). Weights that `source` lacks are left as they are.
    """
    given, parameters = source.state_dict(), dict(model.named_parameters())
    for technique in model.techniques:
        given = technique.inherited(model, given)
    squares: dict[str, tuple[float, float]] = {}

    def cut(name: str, weight_YX: Tensor, left_YR: Tensor, right_RX: Tensor) -> None:
        weight_YX = weight_YX.to(left_YR.device)
        for target, factor in zip((left_YR, right_RX), factorize(weight_YX, len(right_RX)), strict=True):
            target.copy_(factor)
        lost, whole = (weight_YX - left_YR @ right_RX).square().sum(), weight_YX.square().sum()
        squares[name] = lost.item(), whole.item()

    for name, matrix in projections(model):
        if isinstance(matrix, LowRank) and f"{name}.weight" in given:
            weight_YX = given.pop(f"{name}.weight")
            if f"{name}.left.weight" in parameters:  # a shared matrix is cut at its first place
                cut(name, weight_YX, matrix.left.weight, matrix.right.weight)
    if model.embedding_up is not None and source.embedding_up is None:
        table_VD, head_VD = given.pop("embedding.weight"), given.pop("output.weight")
        cut("embedding", table_VD, model.embedding.weight, model.embedding_up)
        if model.output_down is not None:
            cut("output", head_VD, model.output.weight, model.output_down.T)
    unknown = model.load_state_dict(given, strict=False).unexpected_keys
    assert not unknown, f"the models differ in more than ranks, adapters and techniques: {unknown}"
    lost, whole = (sum(column) for column in zip(*squares.values(), strict=True)) if squares else (0.0, 1.0)
    return Truncation(
        math.sqrt(lost / whole), {name: math.sqrt(part / all_) for name, (part, all_) in squares.items()}
    )
