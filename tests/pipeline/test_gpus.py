"""Which GPUs a job takes, with processes that really hold them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stlm.gpus import gpus

HOLDER = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); sys.stdin.read()"


class Job:
    """A job that says which GPUs it sees, and then waits."""

    def __init__(self, folder: Path, count: int, visible: str | None) -> None:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible or ""}
        if visible is None:
            del env["CUDA_VISIBLE_DEVICES"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stlm.gpus", str(count), sys.executable, "-c", HOLDER],
            cwd=folder,
            env={**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sees(self) -> list[str]:
        return self.process.stdout.readline().strip().split(",")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path):
    """Starts jobs, which end with the test."""
    started = []

    def start(count: int = 1, visible: str | None = "0,1,2,3") -> Job:
        started.append(Job(tmp_path, count, visible))
        return started[-1]

    yield start
    for job in started:
        job.kill()


def test_four_jobs_at_once_see_four_gpus(start):
    jobs = [start() for _ in range(4)]
    assert sorted(job.sees()[0] for job in jobs) == ["0", "1", "2", "3"]


def test_jobs_of_two_processes_see_two_each(start):
    first, second = start(2), start(2)
    assert sorted(first.sees() + second.sees()) == ["0", "1", "2", "3"]


def test_a_killed_job_gives_its_gpu_back(start):
    jobs = [start(visible="MIG-a,MIG-b") for _ in range(2)]
    seen = [job.sees() for job in jobs]
    jobs[0].kill()
    assert start(visible="MIG-a,MIG-b").sees() == seen[0]


def test_more_jobs_than_gpus_share_them_evenly(start):
    jobs = [start(visible="0,1") for _ in range(4)]
    assert sorted(job.sees()[0] for job in jobs) == ["0", "0", "1", "1"]


def test_more_processes_than_gpus_are_refused(start):
    job = start(3, "4,7")
    printed = job.process.communicate()[1]
    assert job.process.returncode == 2
    assert printed == "error: 3 processes need a GPU each, found 2 (4, 7): choose processes=2 or fewer\n"


def test_where_no_gpu_is_to_be_seen_the_job_runs_as_it_is(start):
    assert start(2, "").sees() == [""]


@pytest.mark.parametrize(("named", "found"), [("1, 3", ["1", "3"]), ("2,2,-1,0", ["2"]), ("-1", [])])
def test_named_gpus_are_the_pool(monkeypatch, named, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus() == found


def test_parts_of_a_split_gpu_are_listed_in_its_place(monkeypatch, tmp_path):
    listing = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa)
  MIG 3g.40gb     Device  0: (UUID: MIG-bb)
  MIG 3g.40gb     Device  1: (UUID: MIG-cc)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-dd)
"""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat << END\n{listing}END\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert gpus() == ["MIG-bb", "MIG-cc", "GPU-dd"]
