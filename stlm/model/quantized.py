"""A model whose matrices have few values each: which ones, how they are made so, and how they are stored.

The matrices stay float32 parameters, and hold weights of their grids (stlm.model.quantizers) to the bit. So
whatever reads a model reads a quantized one: scoring, generation, export. Checkpoints hold codes and scales.

Shapes: Y outputs, X inputs, G groups of a row, N rows of text, M = L + 1 tokens, B rows at a time, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Size, Tensor, nn

from stlm.model.importance import moments_by_block
from stlm.model.quantizers import Grid, Kind, gptq, pack, unpack
from stlm.model.transformer import Transformer

# What a checkpoint has of a quantized matrix, after its name.
_CODES, _SCALES, _ZEROS = ".codes", ".scales", ".zeros"
# A module's buffers may not have dots in their names.
_SEPARATOR = "/"


class Quantized(nn.Module):
    """The grids of a model's quantized matrices, by name; it changes no forward pass.

    With `trained`, each matrix has a remainder, what its exact weight has beyond the rounded one. Both are
    part of the state that a run resumes from, and not of checkpoints.
    """

    # A run that starts from the weights begins with their values, on no grid.
    training_only: ClassVar[bool] = True

    def __init__(self, kinds: Mapping[str, Kind], trained: bool = False) -> None:
        super().__init__()
        self.kinds, self.trained = dict(kinds), trained

    def set(self, name: str, grid: Grid) -> None:
        """Keep the grid of a matrix."""
        self._keep(name + _SCALES, grid.scale_YG1[..., 0])
        if grid.kind.zero_points:
            self._keep(name + _ZEROS, grid.zero_YG1[..., 0])

    def _keep(self, name: str, tensor: Tensor) -> None:
        name = name.replace(".", _SEPARATOR)
        if name in self._buffers:
            self._buffers[name].copy_(tensor)
        else:
            self.register_buffer(name, tensor.contiguous())

    def _kept(self, name: str) -> Tensor | None:
        return self._buffers.get(name.replace(".", _SEPARATOR))

    def grid(self, name: str) -> Grid:
        """The grid of a matrix."""
        return Grid.restored(self.kinds[name], self._kept(name + _SCALES), self._kept(name + _ZEROS))

    @torch.no_grad()
    def round(self, model: nn.Module) -> None:
        """Round each matrix, with what remained of the last rounding, to its nearest grid; keep what remains.

        In a training that diverged, weights and scales may be NaN or infinite: see `check`.
        """
        parameters = dict(model.named_parameters())
        for name, kind in self.kinds.items():
            weight_YX, rest_YX = parameters[name], self._kept(name)
            exact_YX = weight_YX.detach().clone() if rest_YX is None else weight_YX + rest_YX
            grid = Grid.of(exact_YX, kind)
            weight_YX.copy_(grid.rounded(exact_YX))
            self.set(name, grid)
            if self.trained:
                self._keep(name, exact_YX - weight_YX)

    def check(self) -> None:
        """Raise ValueError, with the matrix's name, where weights were too large for a scale."""
        for name in self.kinds:
            with _named(name):
                self.grid(name).checked()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a matrix's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The matrices of a model that can be quantized, shared ones once: name, weights, and whether it is in a
    block; otherwise it is an embedding or the head. Positions are none of them."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.startswith("positions."):
            yield name, parameter, name.startswith("blocks.")


@torch.no_grad()
def quantize_by_text(model: Transformer, quantized: Quantized, rows_NM: Tensor) -> None:
    """Quantize a model by GPTQ, block after block: each block's matrices see the inputs that the quantized
    blocks before give them on a text. Matrices beyond the blocks are rounded first. Raises ValueError, with
    the matrix's name, where weights are too large for a scale.

    It takes two passes of the text through the blocks. The blocks may not share matrices.
    """
    within = {name for name, _, in_block in matrices(model) if in_block}
    outside = Quantized({name: kind for name, kind in quantized.kinds.items() if name not in within})
    outside.round(model)
    outside.check()
    for name in outside.kinds:
        quantized.set(name, outside.grid(name))
    places = [
        {
            name: module
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear) and (name := f"blocks.{number}.{path}.weight") in quantized.kinds
        }
        for number, block in enumerate(model.blocks)
    ]

    def change(number: int, moments: dict[str, Tensor]) -> None:
        for name, module in places[number].items():
            with _named(name):
                grid, weight_YX = gptq(module.weight, moments[name], quantized.kinds[name])
            module.weight.copy_(weight_YX)
            quantized.set(name, grid)

    moments_by_block(model, rows_NM, places, change)


def relative_errors(model: nn.Module, before: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """|W - W'| / |W| (Frobenius) between weights `before` and the model's, of all together and of each."""
    after = dict(model.named_parameters())
    squares = {
        name: ((after[name] - weight).square().sum().item(), weight.square().sum().item())
        for name, weight in before.items()
    }
    lost, whole = (sum(column) for column in zip(*squares.values(), strict=True))
    share = {name: math.sqrt(part / all_) if all_ else 0.0 for name, (part, all_) in squares.items()}
    return math.sqrt(lost / whole) if whole else 0.0, share


def packed(weights: Mapping[str, Tensor], quantized: Quantized) -> dict[str, Tensor]:
    """What a checkpoint stores of weights: of each quantized matrix its codes, scales and zeros."""
    stored = {name: weight for name, weight in weights.items() if name not in quantized.kinds}
    for name, kind in quantized.kinds.items():
        grid = quantized.grid(name)
        stored[name + _CODES] = pack(grid.read(weights[name].to(grid.scale_YG1.device)), kind)
        stored[name + _SCALES] = grid.scale_YG1[..., 0].cpu().half()
        if kind.zero_points:
            stored[name + _ZEROS] = pack(grid.zero_YG1[..., 0], kind)
    return stored


def unpacked(
    stored: Mapping[str, Tensor], kinds: Mapping[str, Kind], shapes: Mapping[str, Size]
) -> tuple[dict[str, Tensor], Quantized]:
    """The weights that `packed` made, float32, and their grids. `shapes` are those of all parameters.

    Raises ValueError where what is stored does not fit.
    """
    tensors, weights, quantized = dict(stored), {}, Quantized(kinds)
    for name, kind in kinds.items():
        Y, X = shapes[name]
        G = kind.groups(X)
        rows = 1 if kind.ternary else Y
        codes_YX = _unpack(tensors, name + _CODES, kind, (Y, X))
        scale_YG = _take(tensors, name + _SCALES, torch.float16, (rows, G)).float()
        zero_YG = _unpack(tensors, name + _ZEROS, kind, (Y, G)).float() if kind.zero_points else None
        grid = Grid.restored(kind, scale_YG, zero_YG)
        weights[name] = grid.values(codes_YX)
        quantized.set(name, grid)
    return tensors | weights, quantized


def _take(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"no tensor {name}")
    found = tensors.pop(name)
    if (found.dtype, tuple(found.shape)) != (dtype, shape):
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} {[*shape]}")
    return found


def _unpack(tensors: dict[str, Tensor], name: str, kind: Kind, shape: tuple[int, int]) -> Tensor:
    found = _take(tensors, name, torch.uint8, (shape[0], kind.packed_bytes(shape[1])))
    codes = unpack(found, kind, shape[1])
    if (codes > kind.top).any():
        raise ValueError(f"{name} has codes above {kind.top}")
    return codes
