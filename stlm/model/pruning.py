"""Which weights of a matrix are set to zero, and what the others then are.

Shapes: Y outputs, X inputs, R rows or groups that are compared within, M weights of a group; a matrix [Y, X]
maps x to x W^T. Moments [X, X] are the means of x x^T over the tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stlm.model.flops import forward_flops
from stlm.model.importance import moments_by_block, second_moments
from stlm.model.projection import Dense
from stlm.model.transformer import Transformer

# SparseGPT's columns whose zeros are chosen at a time (128 in the paper, whose models are much wider), and
# what is added to the diagonal of the moments, a share of its mean (as in the paper's code).
_COLUMNS, _DAMPING = 32, 0.01
# The matrices outside of the blocks, by their names in settings.
_OUTER = {"embedding": "embedding", "head": "output"}


class Choice(NamedTuple):
    """How many weights are zero, and among which the smallest are chosen.

    `pattern`: (N, M), at most N of M successive weights of a row stay; otherwise `sparsity` is their share in
    each row, in each matrix, or in all matrices together (`scope`: row, matrix or global).
    """

    sparsity: float
    scope: str = "row"
    pattern: tuple[int, int] | None = None

    def keep(self, scores_YX: Tensor) -> Tensor:
        """bool [Y, X]: the weights that stay, of one matrix. Of equal scores the first go."""
        if self.pattern is not None:
            kept, group = self.pattern
            scores_RM = scores_YX.reshape(-1, group)
            return _without_lowest(scores_RM, group - kept).view(scores_YX.shape)
        rows_RX = scores_YX if self.scope == "row" else scores_YX.reshape(1, -1)
        return _without_lowest(rows_RX, round(self.sparsity * rows_RX.shape[1])).view(scores_YX.shape)


def _without_lowest(scores_RX: Tensor, count: int) -> Tensor:
    lowest = scores_RX.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores_RX, dtype=torch.bool).scatter_(1, lowest, False)


def read_pattern(text: str) -> tuple[int, int]:
    """The numbers of a pattern `N:M`; raises ValueError for others than 1 <= N < M."""
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
    kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= kept < group:
        raise ValueError(f"pattern: {text!r}: expected N:M with 1 <= N < M, of M weights N stay, such as 2:4")
    return kept, group


def cubic(step: int, begin: int, end: int, final: float) -> float:
    """The sparsity at a step: 0 at `begin`, rising fast at first, `final` at `end` (Zhu and Gupta 2017,
    "To prune, or not to prune", equation 1)."""
    left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
    return final * (1 - left**3)


def wanda_scores(weight_YX: Tensor, moment_XX: Tensor) -> Tensor:
    """|W| times the root mean square of each input (Sun et al. 2023, "A simple and effective pruning approach
    for large language models", equation 1)."""
    return weight_YX.abs().double() * moment_XX.diagonal().sqrt()


def sparsegpt(weight_YX: Tensor, moment_XX: Tensor, choice: Choice) -> Tensor:
    """The pruned matrix, its other weights changed to make up for those that are gone (Frantar and Alistarh
    2023, "SparseGPT", algorithm 1).

    Columns go one after another. A weight's error is made up for by the columns after it, with the inverse
    of the moments of these. Zeros are chosen for `_COLUMNS` columns at a time, or for a group of a pattern,
    by the error that is left, w^2 / [H^-1]. They are chosen among all columns that are left, not as many in
    every `_COLUMNS` of them as in the paper: inputs differ in size.
    """
    w_YX, columns = weight_YX.to(torch.float64, copy=True), weight_YX.shape[1]
    h_XX = moment_XX.double().clone()
    h_XX.diagonal().add_(_DAMPING * h_XX.diagonal().mean() or 1.0)
    # Row i of this factor is, of the inverse of the moments of the columns from i on, the first row divided
    # by the root of its first number.
    factor_XX = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h_XX)), upper=True)
    scale_X = factor_XX.diagonal()
    kept_YX = torch.ones_like(w_YX, dtype=torch.bool)
    size = _COLUMNS if choice.pattern is None else choice.pattern[1]
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        scores_YX = (w_YX / scale_X).abs()
        if choice.pattern is not None:
            keep_YC = choice.keep(scores_YX[:, begin:end])
        else:  # what was chosen before counts, and stays chosen
            scores_YX[:, :begin] = torch.where(kept_YX[:, :begin], torch.inf, -1.0)
            keep_YC = choice.keep(scores_YX)[:, begin:end]
        kept_YX[:, begin:end] = keep_YC
        errors_YC = torch.zeros_like(w_YX[:, begin:end])
        for column in range(begin, end):
            gone_Y = w_YX[:, column].masked_fill(keep_YC[:, column - begin], 0.0)
            errors_YC[:, column - begin] = error_Y = gone_Y / scale_X[column]
            w_YX[:, column:end] -= error_Y[:, None] * factor_XX[column, column:end]
        w_YX[:, begin:end].masked_fill_(~keep_YC, 0.0)  # without rounding
        w_YX[:, end:] -= errors_YC @ factor_XX[begin:end, end:]
    return w_YX.to(weight_YX.dtype)


class Matrix(NamedTuple):
    """A matrix to prune. `layer`: its block's number, or None; `rows`: of the matrices that it joins."""

    layer: int | None
    name: str
    module: nn.Module
    rows: tuple[int, ...]

    @property
    def weight(self) -> nn.Parameter:
        """Its parameter [Y, X]."""
        return self.module.weight


def matrices(model: Transformer, names: Collection[str]) -> list[Matrix]:
    """The matrices that `names` are of: a part of the blocks (attention, ffn), one matrix of it
    (attention.out), the embedding or the head. Raises ValueError for a name that is of none."""
    found, known = [], dict.fromkeys(_OUTER)
    for number, block in enumerate(model.blocks):
        for part in ("attention", "ffn"):
            module = getattr(block, part)
            for child, matrix in module.named_children():
                if not isinstance(matrix, Dense):
                    continue
                known |= dict.fromkeys((part, f"{part}.{child}"))
                if part in names or f"{part}.{child}" in names:
                    rows = getattr(module, "joint_rows", {}).get(child, (matrix.out_features,))
                    found.append(Matrix(number, f"{part}.{child}", matrix, tuple(rows)))
    for name in _OUTER:
        if name in names:
            module = getattr(model, _OUTER[name])
            found.append(Matrix(None, name, module, (len(module.weight),)))
    for name in names:
        if name not in known:
            raise ValueError(f"matrices: {name!r}: expected some of {', '.join(sorted(known))}")
    return found


@torch.no_grad()
def prune_smallest(chosen: Sequence[Matrix], choice: Choice, scores: Sequence[Tensor] | None = None) -> None:
    """Set to zero the weights of the lowest `scores`, by default those nearest to zero."""
    scores = [matrix.weight.abs() for matrix in chosen] if scores is None else scores
    for matrix, keep_YX in zip(chosen, keep_lists(chosen, choice, scores), strict=True):
        matrix.weight.masked_fill_(~keep_YX, 0.0)


def keep_lists(chosen: Sequence[Matrix], choice: Choice, scores: Sequence[Tensor]) -> list[Tensor]:
    """For each matrix, bool [Y, X]: the weights that stay."""
    if choice.scope == "global" and choice.pattern is None:
        flat = torch.cat([scores_YX.flatten() for scores_YX in scores])
        kept = choice.keep(flat[None])[0].split([scores_YX.numel() for scores_YX in scores])
        return [keep.view(scores_YX.shape) for keep, scores_YX in zip(kept, scores, strict=True)]
    return [
        torch.cat([choice.keep(part) for part in scores_YX.split(matrix.rows)])
        for matrix, scores_YX in zip(chosen, scores, strict=True)
    ]


@torch.no_grad()
def prune_measured(
    model: Transformer, method: str, chosen: Sequence[Matrix], choice: Choice, rows_NM: Tensor
) -> None:
    """Prune matrices of the blocks by `wanda` or `sparsegpt`, measured on the text's rows [N, L + 1].

    Block after block: the inputs of each are those that the pruned blocks before it give. Only for a global
    choice are all measured first.
    """
    if choice.scope == "global" and choice.pattern is None:
        modules = {str(number): matrix.module for number, matrix in enumerate(chosen)}
        moments = second_moments(model, rows_NM, modules)
        scores = [
            wanda_scores(matrix.weight, moment)
            for matrix, moment in zip(chosen, moments.values(), strict=True)
        ]
        prune_smallest(chosen, choice, scores)
        return

    def change(number: int, moments: dict[str, Tensor]) -> None:
        for matrix in (one for one in chosen if one.layer == number):
            moment_XX = moments[matrix.name]
            if method == "wanda":
                prune_smallest([matrix], choice, [wanda_scores(matrix.weight, moment_XX)])
                continue
            for part_YX in matrix.weight.split(matrix.rows):
                part_YX.copy_(sparsegpt(part_YX, moment_XX, choice))

    layers: dict[int, dict[str, nn.Module]] = {number: {} for number in range(len(model.blocks))}
    for matrix in chosen:
        layers[matrix.layer][matrix.name] = matrix.module
    moments_by_block(model, rows_NM, list(layers.values()), change)


def measuring_flops(model: Transformer, choice: Choice, rows_NM: Tensor) -> float:
    """The FLOPs of the passes through the blocks by which `prune_measured` measures, products of single
    matrices left out."""
    length = rows_NM.shape[1] - 1
    blocks = [forward_flops(block, length) for block in model.blocks]
    together = choice.scope == "global" and choice.pattern is None
    return len(rows_NM) * (sum(blocks) if together else blocks[0] + 2 * sum(blocks))


def sparsity_record(
    model: Transformer, chosen: Sequence[Matrix], layer_name: Callable[[int], str]
) -> dict[str, Any]:
    """The shares of weights that are zero: of the chosen matrices, of the model, and by layer and matrix."""
    by_layer: dict[str, dict[str, float]] = {}
    zeros = [int((matrix.weight == 0).sum()) for matrix in chosen]
    for matrix, count in zip(chosen, zeros, strict=True):
        layer = matrix.name if matrix.layer is None else layer_name(matrix.layer)
        by_layer.setdefault(layer, {})[matrix.name] = round(count / matrix.weight.numel(), 5)
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(matrix.weight.numel() for matrix in chosen)
    return {
        "matrices": round(sum(zeros) / max(1, pruned), 5),
        "model": round(sum(zeros) / total, 5),
        "by_layer": by_layer,
    }
