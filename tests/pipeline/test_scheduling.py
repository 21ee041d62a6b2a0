"""Where there are GPUs, trainings and evaluations each have their own, and CPU work runs beside them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

# In place of `stlm`: makes a verb's outputs and notes when it was at work, and with how many threads.
STAND_IN = """#!{python}
import json, os, sys, time
from pathlib import Path

begin = time.time()
verb, *names = sys.argv[1:3] if sys.argv[1] in ("fetch", "report", "contamination") else sys.argv[1:4]
if verb == os.environ.get("STOPPED"):
    sys.exit(143)
time.sleep({{"contamination": 3.0, "train": 1.0}}.get(verb, 0.2))
run = Path("results", names[0], "runs", names[-1])
outputs = {{
    "fetch": ["data/raw/" + names[0] + "/"],
    "tokenize": ["data/tokens/" + "/".join(names) + "/"],
    "train": [f"{{run}}/{{part}}" for part in
              ("checkpoints/", "curve.csv", "watch.csv", "train.json")],
    "evaluate": [run / name for name in ("items.parquet", "documents.parquet", "evaluation.json")],
    "contamination": [f"results/{{names[0]}}/contaminat{{end}}" for end in ("ed-items.parquet", "ion.json")],
    "report": [f"results/{{names[0]}}/{{part}}" for part in
               ("tables/", "plots/", "records/", "typeset/", "training/", "cards/", "metrics.json")],
}}[verb]
for output in map(str, outputs):
    Path(output).mkdir(parents=True) if output.endswith("/") else Path(output).write_text(verb)
job = {{"verb": verb, "begin": begin, "end": time.time(), "threads": int(os.environ["OMP_NUM_THREADS"]),
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "name": names[-1]}}
with open("jobs.jsonl", "a") as file:
    file.write(json.dumps(job) + "\\n")
"""


TORCHRUN = """#!/bin/sh
while [ "$1" != stlm ]; do shift; done
shift
exec stlm "$@"
"""


def listing(gpus: int) -> str:
    """A stand-in for nvidia-smi on a machine with so many."""
    lines = [f"GPU {number}: A card (UUID: GPU-{number})" for number in range(gpus)]
    return "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines)


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def jobs(fresh, tmp_path):
    """Runs the study of `fresh` with stand-ins for `stlm` and `nvidia-smi`; what was at work when."""

    def run(*arguments: str, gpu: bool, status: int = 0, gpus: int = 0, seeds: int = 1) -> list[dict]:
        folder, bin_folder = tmp_path / "project", tmp_path / "bin"
        shutil.copytree(fresh.folder, folder, symlinks=True)
        bin_folder.mkdir()
        # The workflow looks for `stlm` beside the Python that runs Snakemake.
        python = bin_folder / "python"
        python.symlink_to(sys.executable)
        program(bin_folder / "stlm", STAND_IN.format(python=sys.executable))
        if gpu:
            program(bin_folder / "nvidia-smi", listing(gpus))
            program(bin_folder / "torchrun", TORCHRUN)
        with (folder / "params/smoke.yaml").open("a") as file:
            file.write(f"seeds: {list(range(seeds))}\n")
        packages = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [str(python), "-m", "snakemake", "all", "--config", "set=training.log_every=3", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": packages, "PATH": f"{bin_folder}{os.pathsep}/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "MissingOutputException" not in done.stdout + done.stderr
        return [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]

    return run


def test_the_status_of_a_stopped_training_is_not_lost_behind_its_log(jobs, monkeypatch):
    monkeypatch.setenv("STOPPED", "train")
    done = jobs("--cores", "2", gpu=False, status=1)
    assert {job["verb"] for job in done} <= {"fetch", "tokenize", "contamination"}


def test_several_processes_of_a_run_take_a_gpu_each(fresh, tmp_path, monkeypatch):
    program(tmp_path / "nvidia-smi", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    project = fresh.copy(tmp_path / "project")
    wanted = ("--config", "processes=2", "--resources", "gpu=4", "--cores", "8")
    printed = project.run("snakemake", "-n", "--printshellcmds", *wanted, "all")
    assert "torchrun --standalone --nproc_per_node=2 -m stlm train smoke learned 2>&1" in printed
    (block,) = (b for b in printed.split("rule ") if b.startswith("train:") and "run=learned" in b)
    assert "gpu=2" in block


def beside(one: list[dict], other: list[dict]) -> int:
    """How many pairs of jobs were at work at the same time."""
    return sum(
        a is not b and a["begin"] < b["end"] and b["begin"] < a["end"]
        for i, a in enumerate(one)
        for b in (other[i + 1 :] if one is other else other)
    )


def test_on_one_gpu_trainings_take_turns_and_cpu_work_runs_beside(jobs):
    done = jobs("--cores", "2", gpu=True)
    on_gpu = [job for job in done if job["verb"] in ("train", "evaluate")]
    on_cpu = [job for job in done if job["verb"] not in ("train", "evaluate")]
    assert len(on_gpu) == 4
    assert beside(on_gpu, on_gpu) == 0
    assert beside(on_gpu, on_cpu) > 0
    assert {job["threads"] for job in on_gpu} == {1}


def test_on_two_gpus_two_train_at_a_time(jobs):
    done = jobs("--cores", "6", "--resources", "gpu=2", gpu=True)
    on_gpu = [job for job in done if job["verb"] in ("train", "evaluate")]
    assert beside(on_gpu, on_gpu) > 0
    assert {job["threads"] for job in done if job["verb"] == "train"} == {2}


def overlapping(jobs: list[dict]) -> list[tuple[dict, dict]]:
    """The pairs of jobs that were at work at the same time."""
    return [
        (a, b)
        for i, a in enumerate(jobs)
        for b in jobs[i + 1 :]
        if a["begin"] < b["end"] and b["begin"] < a["end"]
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_at_the_same_time_see_gpus_of_their_own(jobs, monkeypatch, processes):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    wanted = ("--cores", "10", "--resources", "gpu=4")
    done = jobs(*wanted, f"--config=processes={processes}", gpu=True, gpus=4, seeds=2)
    trains = [job for job in done if job["verb"] == "train"]
    on_gpu = trains + [job for job in done if job["verb"] == "evaluate"]
    assert len(on_gpu) == 8
    assert {len(job["devices"].split(",")) for job in trains} == {processes}
    pairs = overlapping(on_gpu)
    assert len(overlapping(trains)) >= 4 // processes - 1
    for a, b in pairs:
        assert not set(a["devices"].split(",")) & set(b["devices"].split(",")), (a, b)
    assert all(job["devices"] is None for job in done if job["verb"] not in ("train", "evaluate"))


@pytest.mark.parametrize(
    "processes", ["-2", "two", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("0", "1.5", "true"))]
)
def test_a_number_of_processes_that_is_none_is_refused_in_a_line(fresh, processes):
    printed = fresh.run("snakemake", "-n", "all", f"--config=processes={processes}", status=2)
    (line,) = (line for line in printed.splitlines() if line.startswith("error"))
    assert line.lower().startswith(
        f"error: --config processes={processes}: expected a whole number of 1 or more"
    )
    assert "Traceback" not in printed


def test_without_a_gpu_runs_share_the_cores(jobs):
    done = jobs("--cores", "4", gpu=False)
    trains = [job for job in done if job["verb"] == "train"]
    assert beside(trains, trains) == 1
    assert {job["threads"] for job in trains} == {2}
