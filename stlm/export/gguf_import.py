"""`stlm import`: a GGUF file becomes a published model of the project, under a name."""

from __future__ import annotations

import glob
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stlm.corpora.config import GGUF, LlamaShape
from stlm.corpora.fetch import fetch
from stlm.corpora.gguf_file import GgufError, GgufFile
from stlm.errors import UserError, shortened
from stlm.files import disk_errors, sha256, write_text
from stlm.model.llama import NotLlamaError, read_llama_config
from stlm.study.catalogues import (
    PARAMS,
    append_entry,
    load_benchmarks,
    load_corpora,
    load_models,
    load_vocabularies,
)

RAW = Path("data/raw")
# Where a file may say who published it, the most exact first.
_ORIGINS = (
    *("general.source.url", "general.url", "general.source.repo_url", "general.repo_url"),
    *("general.organization", "general.author"),
)


@dataclass(frozen=True)
class Known:
    """What the command line says of a model; None: what the file says."""

    licence: str | None = None
    origin: str | None = None
    prefix: str | None = None
    training_tokens: int | None = None


def import_gguf(path: Path, name: str, known: Known, force: bool = False) -> str:
    """Write the model in the file `path` to data/raw/`name`, and its entry to params/models.yaml; a report.

    The entry pins the file's SHA-256, so that `stlm fetch` gives the same model again. Raises UserError,
    before anything is written, for a name that is taken, a file that is no plain Llama, and for what neither
    file nor command line says; with `force`, a model of this name is replaced.
    """
    _check_name(name, force)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{str(path)!a}: this name is not UTF-8, as params/models.yaml is; rename it"
        ) from None
    with disk_errors(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a GGUF file")
    try:
        file = GgufFile(path)
        entry = _entry(path, file, known)
    except (GgufError, NotLlamaError) as error:
        raise UserError(f"{path}: {error}") from None
    models = PARAMS / "models.yaml"
    before = models.read_text(encoding="utf-8") if models.is_file() else ""
    written = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=110)
    text = append_entry(before, name, written)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PARAMS
        copy.mkdir()
        (copy / models.name).write_text(text, encoding="utf-8")
        validated = load_models(Path(folder))[name]
    fetch(validated, RAW / name)
    write_text(models, text)
    return (
        f"wrote {RAW / name} and its entry in {models}: a model of {validated.model.layers} layers of width "
        f"{validated.model.width}, {validated.model.vocab_size:,} tokens, a text begins with "
        f"{validated.prefix}; `stlm generate {RAW / name} PROMPT` writes text with it"
    )


def _check_name(name: str, force: bool) -> None:
    taken = dict.fromkeys(load_corpora(), "corpus") | dict.fromkeys(load_benchmarks(), "benchmark")
    taken |= dict.fromkeys(load_vocabularies(), "vocabulary")
    if name in taken:
        raise UserError(f"{name!r} is the name of a {taken[name]}, which has {RAW / name}; choose another")
    if name in load_models() and not force:
        raise UserError(f"{name!r} is a model in params/models.yaml already; --force replaces it")


def _entry(path: Path, file: GgufFile, known: Known) -> dict[str, Any]:
    """The model's entry in params/models.yaml."""
    config = read_llama_config(file.config)
    described = file.get("general.description") or file.get("general.name") or f"a Llama from {path.name}"
    origins = [value for key in _ORIGINS if (value := file.get(key))]
    folder = Path(os.path.abspath(path)).parent  # a link keeps its own name
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return {
        "description": shortened(" ".join(str(described).split()), 200),
        "licence": known.licence or _needed(file.get("general.license"), "licence", path, "general.license"),
        "origin": known.origin or (origins[0] if origins else f"the file {path.name}"),
        "training_tokens": known.training_tokens
        or _needed(file.get("stlm.training_tokens"), "training-tokens", path, "stlm.training_tokens"),
        "prefix": known.prefix or _prefix(path, file),
        "model": {key: getattr(config, key) for key in LlamaShape.model_fields},
        "sources": [
            {
                "kind": "folder",
                "path": str(folder),
                "files": {GGUF: glob.escape(path.name)},
                "sha256": {path.name: sha256(path)},
            }
        ],
    }


def _needed(value: Any, flag: str, path: Path, key: str) -> Any:
    if not value:
        raise UserError(f"{path}: does not say it ({key}); give --{flag}")
    return value


def _prefix(path: Path, file: GgufFile) -> str:
    """The token that starts a text: the one that llama.cpp adds, or the only one that ends and starts."""
    special = {key: token for key, token in file.tokenizer_config().items() if key.endswith("_token")}
    if file.starts_with is not None:
        return file.starts_with
    if special.get("bos_token") and special.get("bos_token") == special.get("eos_token"):
        return special["bos_token"]
    named = ", ".join(f"{key} {token}" for key, token in special.items())
    raise UserError(
        f"{path}: does not say which token texts began with in training (tokenizer.ggml.add_bos_token); give "
        f"--prefix TOKEN (its special tokens: {named or 'none'})"
    )
