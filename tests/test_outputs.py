"""Who keeps a stage's outputs: .gitignore, git and the engines agree with stlm/outputs.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stlm.outputs import CONTAMINATION, EVALUATION, METRICS, REPORT, TRAINING, Output

STUDY = "results/toy"
PLACES = {
    f"{STUDY}/runs/first": (*TRAINING, *EVALUATION),
    f"{STUDY}/published/model": EVALUATION,
    STUDY: (*CONTAMINATION, *REPORT, METRICS),
}
LISTED = [(folder, output) for folder, outputs in PLACES.items() for output in outputs]
# What the committed results may come to, for each study on average: 800 files and 15 MB for nine studies.
FILES, BYTES = 89, 1_667_000


@pytest.mark.parametrize(("folder", "output"), LISTED, ids=lambda value: getattr(value, "name", value))
def test_git_ignores_what_dvc_keeps(root: Path, folder: str, output: Output):
    path = f"{folder}/{output.name}" + ("/file" if output.is_folder else "")
    done = subprocess.run(["git", "check-ignore", path], cwd=root, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a clone of the repository")
    assert (done.stdout.strip() == "") == output.in_git


def test_the_results_in_git_are_few_and_small(root: Path):
    done = subprocess.run(["git", "ls-files", "-z", "results"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone of the repository")
    files = [root / name for name in done.stdout.split("\0") if name]
    studies = len({path.relative_to(root).parts[1] for path in files} - {"benchmarks"})
    assert len(files) <= FILES * studies
    assert sum(path.stat().st_size for path in files if path.is_file()) <= BYTES * studies
    kept = {".csv", ".json", ".md", ".svg", ".parquet"}
    assert {path.suffix for path in files} <= kept
