"""Checks the weights in a `transformers` folder after a model has loaded them."""

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
    """Raise UserError if a weight is stored as integers: transformers would convert it silently."""
    names = [name for name, _ in model.named_parameters()]
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                kind = file.get_slice(name).get_dtype()
                # Some files omit the base model's part of the name.
                if kind not in _FLOATS and any(
                    parameter == name or parameter.endswith(f".{name}") for parameter in names
                ):
                    raise UserError(
                        f"{path}: the tensor {name} is of {kind}; expected {', '.join(_FLOATS)} (quantized "
                        "weights are not read)"
                    )


def check_finite(model: nn.Module, folder: Path) -> None:
    """Raise UserError if a weight is NaN or infinite, naming the tensor and its file."""
    wrong = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if not wrong:
        return
    place = next(_not_finite(folder), f"{folder}: the weight {wrong[0]}")
    raise UserError(f"{place} has NaN or infinite values ({len(wrong)} of the model's tensors have): damaged")


def _not_finite(folder: Path) -> Iterator[str]:
    """Yield the files and tensors, under their names in the file, which may differ from the model's."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if not torch.isfinite(file.get_tensor(name).float()).all():
                    yield f"{path}: the tensor {name}"
