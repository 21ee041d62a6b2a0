"""What a folder of `transformers` must have to be scored, and digests of what it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stlm.errors import UserError
from stlm.files import sha256


def check_files(folder: Path) -> None:
    """UserError for a folder without a readable config.json and whole safetensors."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json; expected a folder of transformers with safetensors and tokenizer"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); get the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}; expected an object with `model_type`")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no weights as *.safetensors{_found(folder)}; other formats are not read")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes, truncated or no safetensors ({error}); get it again"
            ) from None


def _found(folder: Path) -> str:
    return f" (found {', '.join(sorted(file.name for file in folder.iterdir()))})"


def foreign(folder: Path, what: str, error: Exception, wanted: str = "") -> UserError:
    """What to say where a library fails on the folder; `wanted`: what it should have had."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return UserError(f"{folder}: transformers cannot load it, {what}: {reason}{wanted}{_found(folder)}")


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """UserError where files of the tokenizer are missing: transformers makes an empty one without a word."""
    named = getattr(tokenizer, "vocab_files_names", None) or {}
    # Others that a class names, of normalization and the like, may be missing.
    needed = [named[kind] for kind in ("vocab_file", "merges_file") if kind in named]
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "tekken.json"))
    absent = [] if whole else [name for name in needed if not (folder / name).is_file()]
    if absent or not tokenizer("a text", add_special_tokens=False)["input_ids"]:
        wanted = "tokenizer.json" + (f", or {' and '.join(needed)}" if needed else "")
        raise UserError(
            f"{folder}: no tokenizer: {type(tokenizer).__name__} "
            + (f"lacks {' and '.join(absent)}" if absent else "makes no token of a text")
            + f"; expected {wanted}{_found(folder)}"
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
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if not torch.isfinite(file.get_tensor(name).float()).all():
                    yield f"{path}: the tensor {name}"


def weights_sha256(folder: Path) -> str:
    """A digest of all the weights and the configuration: of the files' names and digests."""
    return _digest([*folder.glob("*.safetensors"), folder / "config.json"])


def tokenizer_sha256(folder: Path) -> str:
    """A digest of all that a tokenizer may be made of: the folder's other JSON, text and model files."""
    kinds = ("*.json", "*.txt", "*.model")
    return _digest([f for kind in kinds for f in folder.glob(kind) if f.name != "config.json"])


def _digest(files: Iterable[Path]) -> str:
    lines = "\n".join(f"{file.name} {sha256(file)}" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
