"""A tiny project of its own, in which both engines really run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

PARAMS = {
    "corpora": """\
synthetic:
  description: stories of a grammar
  licence: Apache-2.0
  sources: [{kind: synthetic, seed: 0, size: 300}]
copied:
  description: for the tests of the mirror
  licence: Apache-2.0
  sources: [{kind: mirror, path: copied, files: {train: train.parquet}}]
""",
    "benchmarks": """\
synthetic_pairs:
  description: minimal pairs
  licence: Apache-2.0
  columns: [sentence_good, sentence_bad, UID, linguistics_term]
  sources: [{kind: synthetic, part: pairs, seed: 1, size: 4}]
""",
    "vocabularies": f"""\
gpt2:
  description: listed, and used by no run
  licence: MIT
  sha256: {{encoder.json: {"a" * 64}}}
  sources: [{{kind: mirror, path: gpt2, files: {{encoder.json: encoder.json}}}}]
""",
    "smoke": """\
description: a study that trains within a second
corpus: synthetic
tokenizer: bytes
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 64, context: 64}
training:
  steps: 10
  batch_size: 4
  accumulation: 1
  learning_rate: 1.0e-3
  min_learning_rate: 1.0e-4
  warmup_steps: 2
  checkpoints: [5]
  validate_every: 5
  validation_bytes: 7000
  log_every: 2
  save_every: 5
  watch_every: 0
evaluation: {benchmarks: [synthetic_pairs], modes: [paper]}
variants:
  baseline:
  learned:
    model: {positions: learned}
""",
}
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "author",
    "GIT_AUTHOR_EMAIL": "author@example.org",
    "GIT_COMMITTER_NAME": "author",
    "GIT_COMMITTER_EMAIL": "author@example.org",
}


@dataclass(frozen=True)
class Project:
    """A folder with a study, and the engines run in it as a user runs them."""

    folder: Path

    def start(self, *command: str, **options) -> subprocess.Popen[str]:
        """Start a command of this Python's environment (or git) in the folder."""
        scripts = Path(sys.executable).parent
        inherited = {key: value for key, value in os.environ.items() if key != "STLM_MIRROR"}
        return subprocess.Popen(
            [str(scripts / command[0]) if command[0] != "git" else "git", *command[1:]],
            cwd=self.folder,
            env={**inherited, **GIT, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command, check its exit status; what it printed, both streams together."""
        process = self.start(*command)
        printed = process.communicate(timeout=1500)[0]
        assert process.returncode == status, f"{' '.join(command)}: {process.returncode}\n{printed}"
        return printed

    def snakemake(self, *arguments: str, status: int = 0) -> list[str]:
        """The commands that Snakemake ran, or with -n would run."""
        printed = self.run("snakemake", "--cores", "1", "--printshellcmds", *arguments, status=status)
        return sorted(re.findall(r"^Shell command: (stlm .*?) 2>&1 \|", printed, re.MULTILINE))

    def repro(self) -> list[str]:
        """The commands that `dvc repro` ran."""
        return sorted(re.findall(r"^> (stlm .*)$", self.run("dvc", "repro"), re.MULTILINE))

    def edit(self, old: str, new: str, file: str = "params/smoke.yaml") -> None:
        """Replace a text, which must be there, in a file."""
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def commit(self, message: str) -> None:
        """Commit all that git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    def clone(self, folder: Path) -> Project:
        """A git clone, which has what is committed."""
        self.run("git", "clone", "--quiet", str(self.folder), str(folder))
        return Project(folder)

    def copy(self, folder: Path) -> Project:
        """The same project in another folder, time stamps included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)


@pytest.fixture(scope="session")
def fresh(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project as cloned: the repository's workflow and a study of two variants; nothing has run."""
    folder = tmp_path_factory.mktemp("engines") / "fresh"
    project = Project(folder)
    for name in ("workflow", "profiles", ".dvc"):
        shutil.copytree(
            root / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("cache", "tmp", "config.local"),
        )
    for name in ("Snakefile", ".gitignore", ".dvcignore"):
        shutil.copy(root / name, folder / name)
    (folder / "params").mkdir()
    for name, text in PARAMS.items():
        (folder / "params" / f"{name}.yaml").write_text(text)
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    project.run("stlm", "use", "smoke")
    project.commit("a study")
    return project


@pytest.fixture(scope="session")
def by_snakemake(fresh: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after `snakemake all` and a commit; not to be changed. One worker makes it for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made, finished = folder / "made_by_snakemake", folder / "made_by_snakemake.finished"
    with FileLock(folder / "made_by_snakemake.lock"):
        if not finished.exists():
            shutil.rmtree(made, ignore_errors=True)  # of a worker that failed
            project = fresh.copy(made)
            project.snakemake("all")
            project.commit("results")
            finished.touch()
    return Project(made).copy(fresh.folder.parent / "by_snakemake")


@pytest.fixture(scope="session")
def by_dvc(fresh: Project) -> Project:
    """The project after `dvc repro`; not to be changed."""
    project = fresh.copy(fresh.folder.parent / "by_dvc")
    project.repro()
    return project


@pytest.fixture
def done(by_snakemake: Project, tmp_path: Path) -> Project:
    """A copy, to change, of the project after `snakemake all` and a commit."""
    return by_snakemake.copy(tmp_path / "project")
