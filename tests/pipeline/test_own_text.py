"""docs/own-text.md: its commands, run as they stand there but for the time that they take."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest

WORDS = ["the", "old", "man", "found", "a", "lantern", "near", "our", "river", "and", "she", "carried", "it"]


def commands(page: Path) -> list[list[str]]:
    """The commands of all blocks of shell, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def write_texts(folder: Path) -> None:
    """120 files of some 600 bytes each."""
    folder.mkdir()
    rng = random.Random(0)
    for number in range(120):
        sentences = (" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(14))
        (folder / f"{number}.txt").write_text(" ".join(sentences))


def short(command: list[str]) -> list[str]:
    """The same command, so that it takes no time: the engine that `make all` starts; the least study."""
    if command[:2] == ["make", "all"]:
        (study,) = (word.removeprefix("STUDY=") for word in command[2:])
        return ["snakemake", "--cores", "2", "all", "--config", f"study={study}"]
    if command[:2] == ["stlm", "new"] and "--minutes" not in command:
        return [*command, "--minutes", "0.1"]
    return command


def leave_out(params: Path, first: str, last: str) -> None:
    """Remove a study's variants from `first` up to `last`, which stays, if they are still there."""
    text = params.read_text()
    if f"\n  {first}:\n" not in text:
        return  # another `stlm new` of the page has left the study as it was
    before, after = text.index(f"\n  {first}:\n"), text.index(f"\n  {last}:\n")
    params.write_text(text[:before] + text[after:])


@pytest.mark.engine
@pytest.mark.slow
def test_the_page_works(fresh, root: Path, tmp_path: Path) -> None:
    project = fresh.copy(tmp_path / "project")
    write_texts(project.folder / "texts")
    listed = commands(root / "docs" / "own-text.md")
    assert {tuple(command[:2]) for command in listed} == {
        ("stlm", "new"),
        ("stlm", "study"),
        ("make", "all"),
        ("stlm", "generate"),
    }
    for command in listed:
        process = project.start(*short(command))
        printed = process.communicate(timeout=1200)[0]  # the whole study, on a busy machine, too
        assert process.returncode == 0, printed
        if command[:2] == ["stlm", "new"]:
            assert "Found:" in printed and "Chosen:" in printed and "Run it: make all STUDY=" in printed
            # The first and the last, which differs most, stand for the five.
            leave_out(project.folder / "params" / "mytext.yaml", "learned", "fast")
    study = project.folder / "results" / "mytext"
    runs = {"baseline", "fast"}
    assert {path.stem for path in (study / "cards").glob("*.md")} == runs
    assert "Language: English (en)." in (study / "cards" / "fast.md").read_text()
    for run in runs:
        train = json.loads((study / "runs" / run / "train.json").read_text())
        assert train["corpus"] == "mytext" and train["steps"] == 50
