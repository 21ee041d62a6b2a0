"""The catalogues in params/ for all studies: corpora and mixes, benchmarks, vocabularies, models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from stlm.corpora.config import BenchmarkEntry, CorpusEntry, ModelEntry, VocabularyEntry
from stlm.errors import UserError, nearest
from stlm.study.strict import read_yaml, validate

PARAMS = Path("params")
CATALOGUES = ("corpora", "benchmarks", "vocabularies", "models")
_Model = TypeVar("_Model", bound=BaseModel)


def _catalogue(root: Path, name: str, model: type[_Model]) -> dict[str, _Model]:
    path = root / PARAMS / f"{name}.yaml"
    content = read_yaml(path)
    spelled: dict[str, str] = {}
    for key in map(str, content):
        other = spelled.setdefault(key.casefold(), key)
        if other != key:
            raise UserError(
                f"{PARAMS}/{name}.yaml: {other} and {key} differ only in capital letters, but on many disks "
                "their folders would be one; rename one of them"
            )
    return {
        key: validate(
            model, {"name": key, **value} if isinstance(value, dict) else value, f"{PARAMS}/{name}.yaml", key
        )
        for key, value in content.items()
    }


def load_corpora(root: Path = Path()) -> dict[str, CorpusEntry]:
    """The corpora and mixes by name, from params/corpora.yaml."""
    corpora = _catalogue(root, "corpora", CorpusEntry)
    for name, entry in corpora.items():
        for component in entry.mix or {}:
            if component not in corpora or corpora[component].mix:
                plain = [key for key, other in corpora.items() if not other.mix]
                raise UserError(
                    f"params/corpora.yaml: {name}.mix.{component}: no such corpus{nearest(component, plain)}"
                )
    return corpora


def load_benchmarks(root: Path = Path()) -> dict[str, BenchmarkEntry]:
    """The benchmarks by name, from params/benchmarks.yaml."""
    return _catalogue(root, "benchmarks", BenchmarkEntry)


def load_vocabularies(root: Path = Path()) -> dict[str, VocabularyEntry]:
    """The published vocabularies by name, from params/vocabularies.yaml."""
    return _catalogue(root, "vocabularies", VocabularyEntry)


def load_models(root: Path = Path()) -> dict[str, ModelEntry]:
    """The published models by name, from params/models.yaml; none in a project without that file."""
    return _catalogue(root, "models", ModelEntry) if (root / PARAMS / "models.yaml").is_file() else {}


def append_entry(before: str, name: str, entry: str) -> str:
    """`before`, the text of a catalogue, with the entry at its end, or in place of the old one."""
    lines = before.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    start = next((n for n, line in enumerate(lines) if _key(line) == name), None)
    if start is None:
        return "".join(lines) + entry
    end = start + 1
    # The entry continues while lines are indented or empty; an unindented comment belongs to the next entry.
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith((" ", "\t"))):
        end += 1
    return "".join([*lines[:start], entry, *lines[end:]])


def _key(line: str) -> str | None:
    """The unindented key of a line; None if there is none."""
    match = re.match(r"""(["']?)([\w-]+)\1\s*:""", line)
    return match[2] if match else None
