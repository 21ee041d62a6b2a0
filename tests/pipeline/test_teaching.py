"""The stage `teach`, driven by both engines: for runs with `taught` alone, and before their training."""

from __future__ import annotations

import json

import pytest
from test_engines import LEARNED, dvc_jobs, snakemake_jobs

pytestmark = pytest.mark.engine

ASK = "stlm teach smoke student"
STUDENT = """\
  student:
    techniques: {distillation: {teacher: learned, taught: {tokens: 2}}}
  narrow:
    model: {width: 16}
    techniques: {distillation: {teacher: learned, taught: {tokens: 2}}}
"""


def test_both_engines_ask_the_teacher_once_and_know_of_each_other(done):
    """Students are added to a study that has run: their teacher is there."""
    project = done
    project.edit(LEARNED, LEARNED + STUDENT)
    project.run("stlm", "use", "smoke")
    jobs = snakemake_jobs(project)
    assert jobs == dvc_jobs(project)
    assert [command for command in jobs if "teach" in command] == [ASK]
    read, (folder,) = jobs[ASK]
    assert read == {"data/tokens/synthetic/bytes", "results/smoke/runs/learned/checkpoints"}
    readers = [command for command, (inputs, _) in jobs.items() if folder in inputs]
    assert sorted(readers) == ["stlm train smoke narrow", "stlm train smoke student"]
    ran = project.snakemake("all")
    assert ASK in ran and "stlm train smoke learned" not in ran
    assert json.loads((project.folder / folder / "meta.json").read_text())["positions"] > 0
    assert "up to date" in project.run("dvc", "status")
    record = json.loads((project.folder / "results/smoke/runs/narrow/train.json").read_text())
    assert record["prepared"]["distillation"]["folder"] == folder
    # With another weight the student is trained again, and the teacher is not asked.
    project.edit("{tokens: 2}}}\n  narrow", "{tokens: 2}, weight: 0.9}}\n  narrow")
    would = project.snakemake("-n", "all")
    assert "stlm train smoke student" in would and "stlm train smoke narrow" not in would
    assert ASK not in would
