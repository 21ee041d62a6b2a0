"""Checks what a `transformers` folder needs in order to be scored, and digests its files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stlm.errors import UserError
from stlm.files import sha256

# The names under which transformers looks for weights: one file, or an index of several.
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "get the model again"


def check_files(folder: Path) -> None:
    """Raise UserError unless the folder has a readable config.json and all listed safetensors, intact."""
    content = read_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no weights as *.safetensors{_found(folder)}; other formats are not read")
    files = weight_files(folder)
    stored: dict[str, set[str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                stored[path.name] = set(file.keys())
        except (SafetensorError, OSError) as error:
            size = f"{path.stat().st_size:,} bytes, " if path.is_file() else ""
            raise UserError(f"{path}: {size}truncated or no safetensors ({error}); get it again") from None
    layers, tensors = content.get("num_hidden_layers"), sum(map(len, stored.values()))
    if isinstance(layers, int) and layers > max(tensors, 1000):
        # Reported before a model of so many layers is built. Shared layers have no tensors of their own.
        raise UserError(
            f"{folder}/config.json: num_hidden_layers: {layers}, but the weights are {tensors} tensors; "
            f"{_AGAIN}"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json. Raises UserError if there is none, or it names no model."""
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "no such folder"
        raise UserError(f"{folder}: {what}; expected a folder of transformers with safetensors and tokenizer")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json; expected a folder of transformers with safetensors and tokenizer"
        )
    content = _json_object(path)
    if not isinstance(content.get("model_type"), str):
        raise UserError(f"{path}: model_type: {content.get('model_type')!r}: expected a name; {_AGAIN}")
    return content


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {_AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}; expected an object with `model_type`")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers reads weights. Raises UserError if a listed one is missing."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        raise UserError(f"{folder}: neither {_WEIGHTS} nor {_INDEX}{_found(folder)}; {_AGAIN}")
    listed = _json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
        raise UserError(f"{index}: weight_map: expected the names of tensors, each with its file; {_AGAIN}")
    names = sorted(set(listed.values()))
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        shown = ", ".join(absent[:3])
        raise UserError(f"{index}: lists {shown}, not in the folder{_found(folder)}; {_AGAIN}")
    return [folder / name for name in names]


def stored_numbers(folder: Path) -> int | None:
    """The number of values in the weights' files, by their headers; None if they cannot be read.

    It is about the number of parameters: a matrix with two uses may be stored twice.
    """
    try:
        total = 0
        for path in weight_files(folder):
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (UserError, SafetensorError, OSError):
        return None
    return total


@contextmanager
def loading(folder: Path, what: str, wanted: str = "") -> Iterator[None]:
    """Turn any exception that a library raises on unsuitable files into a UserError about `what`.

    A library in Rust may panic, which in Python is not even an Exception.
    """
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
            raise
        raise foreign(folder, what, error, wanted) from None


def _found(folder: Path) -> str:
    return f" (found {', '.join(sorted(file.name for file in folder.iterdir()))})"


def foreign(folder: Path, what: str, error: BaseException, wanted: str = "") -> UserError:
    """The error if a library fails on the folder; `wanted`: what the folder should have had."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    if isinstance(error, LookupError | ZeroDivisionError | AttributeError | TypeError):
        reason = f"{type(error).__name__}: {reason}"  # the message alone is not informative
    return UserError(f"{folder}: transformers cannot load it, {what}: {reason}{wanted}{_found(folder)}")


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise UserError if tokenizer files are missing: transformers silently makes an empty tokenizer."""
    named = getattr(tokenizer, "vocab_files_names", None) or {}
    # Other files that a class names, for example for normalization, may be missing.
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


def weights_sha256(folder: Path) -> str:
    """A digest of all weights and the configuration, from the names and digests of their files."""
    return _digest([*folder.glob("*.safetensors"), folder / "config.json"])


def tokenizer_sha256(folder: Path) -> str:
    """A digest of all files that may define a tokenizer: the other JSON, text and model files."""
    kinds = ("*.json", "*.txt", "*.model")
    return _digest([f for kind in kinds for f in folder.glob(kind) if f.name != "config.json"])


def _digest(files: Iterable[Path]) -> str:
    lines = "\n".join(f"{file.name} {sha256(file)}" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
