"""Files of a mirror and of a published model are inputs: both engines see what changes in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from test_scheduling import program
from tiny_llama import ENTRY, write_gguf

PARAMS = {
    "corpora": """\
books:
  description: text files of a mirror
  licence: mine
  sources: [{kind: mirror, path: corpora/books, files: {train: "part/*.txt"}, lines: 1000}]
other:
  description: of the same mirror, edited by nobody
  licence: mine
  sources: [{kind: mirror, path: corpora/other, files: {train: a.txt}}]
""",
    "benchmarks": "{}\n",
    "vocabularies": "{}\n",
    "models": json.dumps(
        {
            "tiny": {key: value for key, value in ENTRY.items() if key != "name"}
            | {"sources": [{"kind": "mirror", "path": "models/tiny", "files": {"model.gguf": "model.gguf"}}]}
        }
    ),
    "own": """\
description: a study of two corpora and two published models
corpus: books
tokenizer: bytes
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 64, context: 64}
training: {steps: 10, batch_size: 4, accumulation: 1, warmup_steps: 2}
evaluation: {benchmarks: []}
published:
  model: {folder: ../model}
  parent: {model: tiny}
variants:
  baseline: {}
  elsewhere: {corpus: other}
""",
}
# In place of `stlm`: fetches and looks at files as the real one does; of the other stages writes outputs that
# depend on the content of what dvc.yaml says they read, in no time; records say of what.
STAND_IN = """#!{python}
import hashlib, json, sys
from pathlib import Path

verb, *names = sys.argv[1:]
with open("ran.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if verb in ("fetch", "fingerprint", "use", "sync"):
    from stlm.cli import main
    sys.exit(main(sys.argv[1:]))
import yaml

stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values()
stage = next(s for s in stages if s["cmd"] == "stlm " + " ".join(sys.argv[1:]))
digest = hashlib.sha256()
for dep in stage["deps"]:
    for file in [Path(dep), *sorted(Path(dep).rglob("*"))]:
        if file.is_file() and not file.name.startswith("."):
            digest.update(file.read_bytes())
outs = [out for key in ("outs", "metrics") for out in stage.get(key, [])]
for out in [out if isinstance(out, str) else next(iter(out)) for out in outs]:
    path = Path(out) if Path(out).suffix else Path(out) / "made"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(digest.hexdigest())
    if path.name == "evaluation.json":
        from stlm.study.load import load_study
        study = load_study(names[0])
        record = {{"settings": study.evaluation.model_dump(mode="json"), "checkpoints": {{}}}}
        if names[1] in study.published:
            record |= {{"parameters": 9, "published": study.published[names[1]].settings}}
        path.write_text(json.dumps(record | {{"read": digest.hexdigest()}}))
    if path.name == "train.json":
        from stlm.study.load import load_study
        run = load_study(names[0]).run(names[1])
        record = run.model_dump(mode="json", include={{"variant", "label", "seed", "corpus", "tokenizer"}})
        record |= {{key: getattr(run, key).model_dump(mode="json") for key in ("model", "training", "data")}}
        record |= {{"run": run.name, "parameters": {{"total": 9, "embedding": 3, "non_embedding": 6}}}}
        record |= {{"steps": 10, "tokens": 640, "seconds": 1, "flops": 1, "device": "cpu"}}
        record |= {{"precision": "float32", "checkpoints": [], "read": digest.hexdigest()}}
        path.write_text(json.dumps(record))
"""
AFTER_BOOKS = [
    "contamination own",
    "evaluate own baseline",
    "evaluate own model",
    "evaluate own parent",
    "fetch books",
    "report own",
    "tokenize books bytes",
    "train own baseline",
]


class Project:
    """A project in which the engines run, beside its mirror and a published model."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.top, self.folder, self.mirror = folder, folder / "project", folder / "mirror"
        for name in ("workflow", "profiles", ".dvc"):
            ignored = shutil.ignore_patterns("cache", "tmp", "config.local")
            shutil.copytree(root / name, self.folder / name, symlinks=True, ignore=ignored)
        for name in ("Snakefile", ".gitignore", ".dvcignore"):
            shutil.copy(root / name, self.folder / name)
        (self.folder / "params").mkdir()
        for name, text in PARAMS.items():
            (self.folder / "params" / f"{name}.yaml").write_text(text)
        for path, text in {
            "mirror/corpora/books/part/a.txt": "Once upon a time.\nThere was a hen.\n",
            "mirror/corpora/books/part/b.txt": "The end.\n",
            "mirror/corpora/books/README.md": "Books.\n",
            "mirror/corpora/other/a.txt": "Another text.\n",
            "model/config.json": "{}",
            "model/model.safetensors": "weights",
            "model/README.md": "A model.\n",
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        self.gguf = write_gguf(self.mirror / "models/tiny/model.gguf")
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "python").symlink_to(sys.executable)
        program(self.bin / "stlm", STAND_IN.format(python=self.bin / "python"))
        self.run("git", "init", "--quiet")

    def run(self, *command: str, mirror: bool = True, status: int = 0) -> str:
        """Run an engine or `stlm`; what it printed."""
        inherited = {key: value for key, value in os.environ.items() if key != "STLM_MIRROR"}
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            **({"STLM_MIRROR": str(self.mirror)} if mirror else {}),
        }
        start = {"git": ["git"], "stlm": [str(self.bin / "stlm")]}.get(
            command[0], [str(self.bin / "python"), "-m", command[0]]
        )
        done = subprocess.run(
            [*start, *command[1:]],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def ran(self) -> list[str]:
        """The commands of `stlm` that have run since this was last asked."""
        log = self.folder / "ran.txt"
        lines = sorted(log.read_text().splitlines()) if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def snakemake(self, **options) -> str:
        return self.run("snakemake", "--cores", "2", "all", "--config", "study=own", **options)

    def status(self, **options) -> dict:
        return json.loads(self.run("dvc", "status", "--json", **options))

    def work(self) -> list[str]:
        """What has run, without looks at the files."""
        return [command for command in self.ran() if not command.startswith("fingerprint ")]


def edit_unseen(file: Path, old: str, new: str) -> None:
    """Edit in place, with the same size, and put the time of modification back."""
    assert len(old) == len(new)
    before = file.stat()
    with file.open("r+") as opened:
        text = opened.read()
        assert old in text
        opened.seek(0)
        opened.write(text.replace(old, new))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Project:
    """After `snakemake all`; the tests of this file go on from one another's state."""
    project = Project(tmp_path_factory.mktemp("sources"), root)
    project.snakemake()
    return project


@pytest.mark.engine
def test_snakemake_sees_what_changes_in_a_mirror(project):
    everything = project.ran()
    assert {"fetch books", "fetch other", "train own elsewhere", "evaluate own model"} <= set(everything)
    assert {"fetch tiny", "evaluate own parent"} <= set(everything)
    assert project.status() == {}, "both engines agree"
    part = project.mirror / "corpora/books/part"
    os.utime(part / "a.txt")
    (part.parent / "README.md").write_text("More about the books.\n")
    project.snakemake()
    assert project.ran() == [], "touched, and a file that is not read"
    (part / "extra.txt").write_text("One more.\n")
    edit_unseen(part / "a.txt", "hen", "fox")
    assert project.snakemake().count("results recorded in dvc.lock") == 1
    assert project.ran() == AFTER_BOOKS
    assert project.status() == {}
    (part / "b.txt").unlink()
    project.snakemake()
    assert project.ran() == AFTER_BOOKS
    assert project.status() == {}
    project.snakemake(mirror=False)
    assert project.ran() == [], "what was fetched stays, whether or not the mirror is named"


@pytest.mark.engine
def test_dvc_sees_what_changes_in_a_mirror(project):
    part = project.mirror / "corpora/books/part"
    assert project.status() == {}
    os.utime(part / "a.txt")
    assert project.status() == {}
    (part / "more.txt").write_text("And more.\n")
    assert list(project.status()) == ["fingerprint-books"]
    project.run("dvc", "repro")
    assert project.work() == AFTER_BOOKS
    assert project.status() == {}
    (part / "extra.txt").unlink()
    project.run("dvc", "repro")
    assert project.work() == AFTER_BOOKS
    (part.parent / "README.md").write_text("Even more about the books.\n")
    project.run("dvc", "repro")
    assert project.work() == [], "a file that is not read"
    assert "Data and pipelines are up to date" in project.run("dvc", "repro")
    project.run("stlm", "sync")
    assert project.ran() == ["sync"]
    project.snakemake()
    assert project.ran() == []


@pytest.mark.engine
def test_models_are_evaluated_again_when_their_files_change(project):
    """One in a folder; one of the catalogue, which is fetched again."""
    changed = ["evaluate own model", "evaluate own parent", "fetch tiny", "report own"]
    project.ran()  # what made the project, where this test is run alone
    edit_unseen(project.top / "model/model.safetensors", "weights", "Weights")
    (project.top / "model/README.md").write_text("A better model.\n")
    write_gguf(project.gguf, GGMLQuantizationType.F16)
    project.snakemake()
    assert project.ran() == changed
    assert project.status() == {}
    (project.top / "model/tokenizer.json").write_text("{}")
    write_gguf(project.gguf, GGMLQuantizationType.Q8_0)
    project.run("dvc", "repro")
    assert project.work() == changed
    record = json.loads((project.folder / "data/raw/tiny/source.json").read_text())
    assert record["stored"]["Q8_0"] == 15
    project.run("stlm", "sync")
    project.ran()


@pytest.mark.engine
def test_what_is_edited_meanwhile_or_not_fetched_is_not_recorded(project):
    lock = (project.folder / "dvc.lock").read_text()
    part = project.mirror / "corpora/books/part"
    (part / "late.txt").write_text("Too late.\n")
    (project.folder / "results/own/metrics.json").unlink()
    printed = project.snakemake(mirror=False)
    assert project.ran() == ["report own"]
    assert re.search(r"books: the files in .* have changed; they are fetched again where the mirror", printed)
    assert re.search("DVC: nothing recorded, the files of books are not those", printed)
    assert (project.folder / "dvc.lock").read_text() == lock
    printed = project.run("dvc", "repro", mirror=False, status=255)
    assert "books: the files in" in printed and "set STLM_MIRROR" in printed
    assert (project.folder / "data/raw/books/source.json").is_file(), "nothing was lost"
    project.ran()
    project.run("dvc", "repro")
    assert project.work() == AFTER_BOOKS


@pytest.mark.engine
def test_where_the_files_are_not_nothing_is_watched_and_all_is_up_to_date(project):
    project.mirror.rename(project.top / "gone")
    (project.top / "model").rename(project.top / "gone-model")
    project.run("stlm", "use", "own", mirror=False)
    assert project.status(mirror=False) == {}
    project.run("stlm", "sync", mirror=False)
    project.ran()
    project.snakemake(mirror=False)
    assert project.ran() == []
    assert project.status(mirror=False) == {}
