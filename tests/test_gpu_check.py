"""The checks of a GPU's first day: each by itself, skipped by name without a GPU, written as they go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
# In a process of its own: the checks are forks, and this one has threads.
CHECKS = """
import os, sys, time
sys.path.insert(0, "benchmarks")
import gpu_check
from gpu_check import Check, Skip
from pathlib import Path

def fails():
    assert 1 > 2, "one is no more"

def hangs():
    time.sleep(600)

gpu_check.CHECKS.clear()
gpu_check.CHECKS |= {
    "fails": Check(fails), "hangs": Check(hangs, 1), "dies": Check(os.abort),
    "a hundred GPUs": Check(dict, gpus=100), "works": Check(lambda: {"answer": 42}),
}
output = Path(sys.argv[1])
sys.exit(gpu_check.all_checks(list(gpu_check.CHECKS), 60.0, 1.0, output))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HOME)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=HOME, env=environment, capture_output=True, text=True
    )


def test_a_bad_check_stops_no_other(tmp_path):
    done = run("-c", CHECKS, str(tmp_path / "gpu.json"))
    assert done.returncode == 1, done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    checks = content["checks"]
    assert "one is no more" in checks["fails"]["why"]
    assert "not done after 1 s" in checks["hangs"]["why"]
    assert "ended with status -6" in checks["dies"]["why"]
    assert checks["a hundred GPUs"] | {"seconds": 0} == {
        "result": "skipped",
        "why": "needs 100 GPUs, found 0",
        "seconds": 0,
    }
    assert checks["works"]["figures"] == {"answer": 42}
    assert content["summary"] == {"failed": 3, "ok": 1, "skipped": 1}
    assert (content["device"], content["gpus"]) == ("cpu", 0)


@pytest.mark.slow
def test_a_check_on_the_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    names = ("head and loss", "NCCL, one process")
    flags = [flag for name in names for flag in ("--check", name)]
    done = run("benchmarks/gpu_check.py", *flags, "--patience", "5", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(output.read_text())["checks"]
    assert [checks[name]["result"] for name in names] == ["ok", "skipped"]
    assert run("benchmarks/gpu_check.py", "--check", names[0]).returncode == 2, (
        "the whole result would be replaced"
    )
