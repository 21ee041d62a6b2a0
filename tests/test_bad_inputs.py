"""The inputs of benchmarks/bad_inputs.py: a fixed part of them here, all of them in its committed result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import topics

# All take some minutes.
EVERY = 8
CASES = topics()
NAMES = [f"{topic}: {case.name}" for topic, of_topic in CASES.items() for case in of_topic[::EVERY]]


@pytest.fixture(scope="module")
def measured(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of the fixed part, in a process of its own: it forks."""
    output = tmp_path_factory.mktemp("bad") / "bad_inputs.json"
    command = [sys.executable, "benchmarks/bad_inputs.py", "--every", str(EVERY), "--output", str(output)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert output.exists(), done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_input_is_told_in_a_few_lines(name, measured):
    assert name not in measured["failed"], measured["failed"][name]


def test_the_committed_result_is_of_these_inputs_and_has_no_traceback(root):
    content = json.loads((root / "results/benchmarks/bad_inputs.json").read_text(encoding="utf-8"))
    assert content["inputs"] >= 300
    assert content["tracebacks"] == content["hangs"] == 0
    assert content["failed"] == {}
    names = {topic: {case.name for case in of_topic} for topic, of_topic in CASES.items()}
    assert {topic: set(of_topic) for topic, of_topic in content["topics"].items()} == names
