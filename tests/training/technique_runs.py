"""Runs with made-up techniques, which are in no file of stlm/techniques/."""

from __future__ import annotations

from stlm.study.runs import Run
from stlm.techniques.base import Technique


def with_techniques(run: Run, **techniques: Technique) -> Run:
    return run.model_copy(update={"techniques": techniques})
