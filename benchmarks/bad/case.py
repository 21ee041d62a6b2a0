"""One bad input: what is run, what is spoilt before it, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Case:
    """A command of `stlm` in a copy of the small project (`bad.project`), and how it must end.

    `name`: unique in its topic, says what is wrong. `arguments`: of `stlm`, the verb first. `spoil`: damages
    the copy, the command's working folder, which it is given (absolute). `expects`: a regular expression that
    the output (stdout and stderr together) must match. `status`: the exit status expected, 0 for what must be
    accepted.
    `stdin`: what the command reads there; nothing by default.

    `output`: where stdout (and with `both`, stderr) goes: `full` is a disk without space, `closed` no file at
    all. Such a case, and one with `process`, is a new process; the others are forked children of one that has
    imported everything. `unprivileged`: the command may not read what permissions forbid, even where the
    benchmark is run by root.
    """

    name: str
    arguments: tuple[str, ...]
    spoil: Callable[[Path], None] | None = None
    expects: str = ""
    status: int = 2
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes | None = None
    output: Literal["", "full", "closed"] = ""
    both: bool = False
    process: bool = False
    unprivileged: bool = False


def put(path: str, content: str | bytes) -> Callable[[Path], None]:
    """A `spoil` that writes a file of the project, whatever was there."""

    def spoil(project: Path) -> None:
        target = project / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    """A `spoil` that replaces a text, which must be there, in a file of the project."""

    def spoil(project: Path) -> None:
        target = project / path
        text = target.read_text(encoding="utf-8")
        if old not in text:
            raise LookupError(f"{path} has no {old!r}")
        target.write_text(text.replace(old, new), encoding="utf-8")

    return spoil
