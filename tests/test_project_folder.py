"""Commands outside the project say where to stand."""

from __future__ import annotations

import pytest

from stlm.cli import main
from stlm.project import folder_hint


def test_inside_there_is_nothing_to_say(project):
    assert folder_hint() == ""


@pytest.mark.parametrize(
    "command",
    [
        "study smoke",
        "fetch blimp",
        "tokenize synthetic bytes",
        "train smoke baseline",
        "evaluate smoke baseline",
        "contamination smoke",
        "report smoke",
        "compare smoke/baseline smoke/sincos",
        "generate smoke/baseline text",
        "export smoke/baseline elsewhere",
        "use smoke",
        "sync",
        "fingerprint blimp",
    ],
)
def test_below_the_project_its_top_folder_is_named(project, monkeypatch, capsys, command):
    below = project / "results" / "smoke"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert f"this is {below}: run it in the project's top folder, {project}" in error
    assert not list(below.iterdir())


def test_elsewhere_the_missing_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "smoke", "baseline"]) == 2
    assert f"this is {tmp_path}, which has no folder params/" in capsys.readouterr().err
