"""The inputs of benchmarks/bad_inputs.py: a fixed part of them here, all of them in its committed result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import topics

# All take some minutes.
EVERY = 16
CASES = topics()
NAMES = [f"{topic}: {case.name}" for topic, of_topic in CASES.items() for case in of_topic[::EVERY]]


def measure(root: Path, output: Path, every: int) -> dict:
    """The result of a fixed part, one input in `every`, in a process of its own: it forks."""
    command = [sys.executable, "benchmarks/bad_inputs.py", "--every", str(every), "--output", str(output)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert output.exists(), done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return measure(root, tmp_path_factory.mktemp("bad") / "bad_inputs.json", EVERY)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_input_is_told_in_a_few_lines(name, measured):
    assert name not in measured["failed"], measured["failed"][name]


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_all_bad_inputs_are_told_in_a_few_lines(root: Path, tmp_path: Path):
    assert measure(root, tmp_path / "bad_inputs.json", 1)["failed"] == {}


def test_the_committed_result_is_of_these_inputs_and_has_no_traceback(root):
    content = json.loads((root / "results/benchmarks/bad_inputs.json").read_text(encoding="utf-8"))
    assert content["inputs"] >= 300
    assert content["tracebacks"] == content["hangs"] == 0
    assert content["failed"] == {}
    names = {topic: {case.name for case in of_topic} for topic, of_topic in CASES.items()}
    assert {topic: set(of_topic) for topic, of_topic in content["topics"].items()} == names
