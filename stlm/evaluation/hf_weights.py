"""What the weights of a folder of `transformers` must be, once a model has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from stlm.errors import UserError
from stlm.evaluation.hf_folder import weight_files

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_kinds(model: nn.Module, folder: Path) -> None:
    """UserError where a weight is stored as whole numbers: transformers converts them without a word."""
    names = [name for name, _ in model.named_parameters()]
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                kind = file.get_slice(name).get_dtype()
                # Some files leave out the part of the name that the base model has.
                if kind not in _FLOATS and any(own == name or own.endswith(f".{name}") for own in names):
                    raise UserError(
                        f"{path}: the tensor {name} is of {kind}; expected {', '.join(_FLOATS)} (quantized "
                        "weights are not read)"
                    )


def check_finite(model: nn.Module, folder: Path) -> None:
    """UserError where a weight is NaN or infinite, naming the tensor and the file that has it."""
    wrong = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if not wrong:
        return
    place = next(_not_finite(folder), f"{folder}: the weight {wrong[0]}")
    raise UserError(f"{place} has NaN or infinite values ({len(wrong)} of the model's tensors have): damaged")


def _not_finite(folder: Path) -> Iterator[str]:
    """The files and tensors, under the names that they have there, which may not be the model's."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if not torch.isfinite(file.get_tensor(name).float()).all():
                    yield f"{path}: the tensor {name}"
