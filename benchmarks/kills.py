"""Do whole pipelines that are killed and started again end as ones that never were?

    python benchmarks/kills.py --kills 20

A tiny study (two runs, synthetic text) goes through both engines, `snakemake all` and `dvc repro`. First
undisturbed; then, for each kill, from the start in a fresh folder: SIGKILL to all its processes at once, at
a random moment (seeded), and the same command again, which must come to its end. Moments are spread evenly
over the undisturbed duration. Every fifth kill is aimed at the writing of DVC's records instead: with
Snakemake, at the recording at its end; with DVC, at dvc.lock, which DVC writes in place after each stage.

Compared, bit by bit, is all that holds no wall-clock time: data, tokens, weights, curves, scores of items,
evaluations, tables, plots, DVCLive's metrics, the manifests, and the digests in dvc.lock. Of the pages that
do (cards, tables of cost, curves of speed), another report is compared, written once all times in train.json
and curve.csv are set to 1. `dvc status` must be clean, and no half-written file be left in data/ or results/.

The engines run side by side, on a core each. Commit nothing meanwhile: checkpoints name the commit.

Where a kill meets DVC in the middle of writing dvc.lock, or its own lock, DVC reads it no more. The file is
then deleted, as docs/engines.md says; this is counted (`lock_deleted`).

Writes results/benchmarks/kills.json after each kill, and goes on from it where code and settings are as then.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import psutil
import pyarrow.parquet as pq
import yaml
from command import command
from machine import machine

from stlm.errors import UserError
from stlm.files import read_json, write_json
from stlm.provenance import code_version

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("results/benchmarks/kills.json")
ENGINES = {"snakemake": ("--cores", "1", "all"), "dvc": ("repro",)}
AIMED = 5  # every so many kills one is aimed at DVC's records
# DVC's files that it writes in place -> what it says of one that a kill cut short.
CUT_SHORT = {
    "dvc.lock": r"dvc\.lock' (is invalid|validation failed)|unable to read: 'dvc\.lock'",
    ".dvc/tmp/rwlock": r"Unable to read RWLock-file",
}
TRIES = 4  # to kill, where the pipeline had ended before
# Wall-clock times: keys of JSON, columns of CSV, and rows of tables of these names are left out.
TIMES = re.compile(r"seconds|tokens_per_second|hours|duration|per_second|utilization", re.IGNORECASE)
# Of the report: these show times in their text, or have digests of those that do.
TIMED = re.compile(
    r"/(cards/.*\.md|(efficiency|equal-cost)\.\w+|training/[^/]*\.html|tables/checksum\.json)$"
)
NOT_COMPARED = {".git", ".dvc", ".snakemake", ".state", "logs", "workflow", "profiles", "params"}
CORPORA = """\
synthetic:
  description: stories of a grammar
  licence: Apache-2.0
  sources: [{kind: synthetic, seed: 0, size: 300}]
"""
BENCHMARKS = """\
synthetic_pairs:
  description: minimal pairs
  licence: Apache-2.0
  columns: [sentence_good, sentence_bad, UID, linguistics_term]
  sources: [{kind: synthetic, part: pairs, seed: 1, size: 4}]
"""
STUDY = """\
description: a study for kills
corpus: synthetic
tokenizer: bpe-300
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 64, context: 64, dropout: 0.1}
training:
  steps: 30
  batch_size: 4
  accumulation: 1
  learning_rate: 1.0e-3
  min_learning_rate: 1.0e-4
  warmup_steps: 2
  checkpoints: [15]
  validate_every: 10
  validation_bytes: 7000
  log_every: 2
  save_every: 3
evaluation: {benchmarks: [synthetic_pairs], modes: [paper]}
variants:
  baseline:
  learned:
    model: {positions: learned}
"""
WRITING = Lock()
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{
        f"GIT_{who}_{what}": f"{what.lower()}@example.org"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each engine; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: both")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Kill, compare and write; 1 where anything differs."""
    settings = {"seed": options.seed, "study": yaml.safe_load(STUDY), "code": _code()}
    try:
        content = read_json(options.output)
    except UserError:
        content = {}
    if {key: content.get(key) for key in settings} != settings:
        content = {**settings, "machine": machine(), "left_out": TIMES.pattern, "engines": {}}
    engines = options.engine or list(ENGINES)
    # Resolved: processes are told apart by their folders.
    with (
        tempfile.TemporaryDirectory(dir=Path(tempfile.gettempdir()).resolve()) as temporary,
        ThreadPoolExecutor(len(engines)) as side_by_side,
    ):
        fresh = Place.fresh(Path(temporary) / "fresh")
        for done in [side_by_side.submit(_of_engine, content, each, fresh, options) for each in engines]:
            done.result()
    for engine, found in content["engines"].items():
        print(
            json.dumps({"engine": engine, **{k: found[k] for k in ("killed", "identical", "lock_deleted")}})
        )
    return 0 if all(found["identical"] for found in content["engines"].values()) else 1


def _of_engine(content: dict[str, Any], engine: str, fresh: Place, options: argparse.Namespace) -> None:
    """All kills of one engine, those left out that an earlier call has made."""
    found = content["engines"].setdefault(engine, {"kills": []})
    plain = fresh.copy(f"{engine}-plain")
    if "files" not in found:
        begin = time.perf_counter()
        plain.finish(engine)
        found |= {"seconds": round(time.perf_counter() - begin, 1), "files": plain.written()}
    for number in range(len(found["kills"]), options.kills):
        draw = random.Random(f"{options.seed} {engine} {number}")
        # Every kill of an earlier or smaller series stays where it was: golden-ratio steps spread evenly.
        moment = (number * 0.618034 + draw.random() * 0.05) % 1 * found["seconds"]
        for attempt in range(TRIES):
            place = fresh.copy(f"{engine}-{number}-{attempt}")
            kill = place.kill(engine, draw, None if number % AIMED == 2 else moment)
            if kill["killed"]:
                break
            moment *= 0.85  # it was faster than the undisturbed one, and had ended
        lock_deleted = place.finish(engine)
        status, left, written = place.status(), place.leavings(), place.written()
        names = sorted(written.keys() | found["files"].keys())
        kill |= {
            "lock_deleted": lock_deleted,
            "differing": [name for name in names if written.get(name) != found["files"].get(name)],
            "status": status,
            "left": left,
        }
        found["kills"].append(kill)
        kills = found["kills"]
        found |= {
            "killed": sum(each["killed"] for each in kills),
            "lock_deleted": sum(each["lock_deleted"] for each in kills),
            "identical": not any(each["differing"] or each["status"] or each["left"] for each in kills),
        }
        print(f"{engine} {number + 1}: {json.dumps(kill)}", file=sys.stderr)
        with WRITING:
            write_json(options.output, content)
        if not (kill["differing"] or kill["status"] or kill["left"]):
            shutil.rmtree(place.root)
        else:
            kept = Path(tempfile.mkdtemp(prefix="kills-")) / place.root.name
            shutil.move(place.root, kept)
            print(f"the folder is kept: {kept}", file=sys.stderr)


class Place:
    """A project folder that a pipeline runs in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def fresh(cls, root: Path) -> Place:
        """A clone of the repository's workflow, with the study; nothing has run."""
        root.mkdir(parents=True)
        for name in ("workflow", "profiles", ".dvc"):
            ignore = shutil.ignore_patterns("cache", "tmp", "config.local")
            shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignore)
        for name in ("Snakefile", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, root / name)
        (root / "params").mkdir()
        files = {"corpora": CORPORA, "benchmarks": BENCHMARKS, "vocabularies": "{}\n", "smoke": STUDY}
        for name, text in files.items():
            (root / "params" / f"{name}.yaml").write_text(text)
        place = cls(root)
        place._run("git", "init", "--quiet", "--initial-branch", "main")
        place._run("stlm", "use", "smoke")
        place._run("git", "add", "--all")
        place._run("git", "commit", "--quiet", "--message", "a study")
        return place

    def copy(self, name: str) -> Place:
        """The same folder beside it."""
        shutil.copytree(self.root, self.root.parent / name, symlinks=True)
        return Place(self.root.parent / name)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        scripts = Path(sys.executable).parent
        return subprocess.Popen(
            [str(scripts / words[0]) if words[0] != "git" else "git", *words[1:]],
            cwd=self.root,
            env={
                **{key: value for key, value in os.environ.items() if key != "STLM_MIRROR"},
                **GIT,
                "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                "OMP_NUM_THREADS": "1",
            },
            stdout=(self.root.parent / f"{self.root.name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _run(self, *words: str) -> None:
        if status := self._start(*words).wait():
            raise UserError(f"{' '.join(words)} ended with status {status}: {self.log()[-3000:]}")

    def log(self) -> str:
        """What the commands have printed."""
        return (self.root.parent / f"{self.root.name}.log").read_text(errors="replace")

    def kill(self, engine: str, draw: random.Random, seconds: float | None) -> dict[str, Any]:
        """Start the engine and kill it and all its jobs, after `seconds` or, of None, at DVC's records."""
        begin = time.perf_counter()
        process = self._start(engine, *ENGINES[engine])
        if seconds is None:
            self._until_recording(engine, process, draw)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._no_job_is_left()
        return {
            "aimed": seconds is None,
            "killed": killed,
            "seconds": round(time.perf_counter() - begin, 2),
            "during": self._at_work(engine),
        }

    def _until_recording(self, engine: str, process: subprocess.Popen[bytes], draw: random.Random) -> None:
        """Wait for the recording at the end; with DVC, for one of its writes of dvc.lock."""
        if engine == "snakemake":
            while process.poll() is None and not self._records(process.pid):
                time.sleep(0.05)
            time.sleep(draw.random() * 2)
            return
        lock, writes, seen = self.root / "dvc.lock", draw.randint(1, 8), None
        while process.poll() is None and writes:
            found = lock.stat().st_mtime_ns if lock.exists() else None
            if found != seen:
                seen, writes = found, writes - 1
                if writes:
                    time.sleep(0.5)  # the writes of one stage are one
                    seen = lock.stat().st_mtime_ns
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.02)

    @staticmethod
    def _records(pid: int) -> bool:
        try:
            children = psutil.Process(pid).children(recursive=True)
            return any("stlm.dvc_command" in child.cmdline() for child in children)
        except psutil.Error:
            return False

    def _no_job_is_left(self) -> None:
        """Wait until all processes have gone; one that outlives its engine would go on writing."""
        for _ in range(300):
            here = [p for p in psutil.process_iter(["cwd", "cmdline"]) if p.info["cwd"] == str(self.root)]
            if not here:
                return
            time.sleep(0.1)
        raise UserError(f"this job outlived the kill: {' '.join(here[0].info['cmdline'] or [])}")

    def _at_work(self, engine: str) -> str:
        """The last command that the log tells of."""
        told = self.log()
        if engine == "dvc":
            return (re.findall(r"^> (stlm .*)$", told, re.MULTILINE) or ["start"])[-1]
        if re.search(r"100%\) done", told):
            return "recording"
        jobs = re.findall(r"^(?:local)?rule (\w+):", told, re.MULTILINE)
        return (jobs or ["start"])[-1]

    def finish(self, engine: str) -> int:
        """Run the engine to its end; how many of DVC's own files, cut short, had to be deleted before."""
        waiting = dict(CUT_SHORT)
        while status := self._start(engine, *ENGINES[engine]).wait():
            found = [name for name, message in waiting.items() if re.search(message, self.log())]
            if not found:
                break
            for name in found:
                (self.root / name).unlink()
                del waiting[name]
        else:
            return len(CUT_SHORT) - len(waiting)
        raise UserError(f"{engine} ended with status {status}: {self.log()[-3000:]}")

    def status(self) -> list[str]:
        """The stages that `dvc status` finds changed."""
        scripts = Path(sys.executable).parent
        command = [str(scripts / "dvc"), "status", "--json"]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        return sorted(json.loads(done.stdout)) if not done.returncode else [done.stderr.strip()]

    def leavings(self) -> list[str]:
        """Half-written files and folders."""
        folders = [self.root / name for name in ("data", "results")]
        found = {
            path for folder in folders for kind in ("partial", "old") for path in folder.rglob(f"*.{kind}")
        }
        return sorted(str(path.relative_to(self.root)) for path in found)

    def written(self) -> dict[str, str]:
        """A digest of each file, wall-clock times left out; last, the report is written anew without them."""
        found = self._digests(lambda name: not TIMED.search(name))
        for run in (self.root / "results/smoke/runs").iterdir():
            record = read_json(run / "train.json")
            write_json(run / "train.json", {key: 1.0 if TIMES.search(key) else record[key] for key in record})
            curve = pd.read_csv(run / "curve.csv", dtype=str)
            curve.loc[:, [name for name in curve if TIMES.search(name)]] = "1.0"
            curve.to_csv(run / "curve.csv", index=False)
        self._run("stlm", "report", "smoke")
        again = self._digests(lambda name: bool(TIMED.search(name)))
        return found | {f"{name} (times set to 1)": digest for name, digest in again.items()}

    def _digests(self, wanted: Callable[[str], bool]) -> dict[str, str]:
        names = {path: str(path.relative_to(self.root)) for path in sorted(self.root.rglob("*"))}
        return {
            name: hashlib.sha256(_timeless(path)).hexdigest()
            for path, name in names.items()
            if path.is_file()
            and Path(name).parts[0] not in NOT_COMPARED
            and path.name != ".snakemake_timestamp"
            and not name.endswith(".partial")
            and wanted(name)
        }


def _timeless(path: Path) -> bytes:
    """The content of a file, without wall-clock times; of dvc.lock the digests of what holds none."""
    if path.suffix == ".csv":
        with path.open() as file:
            rows = [
                {key: value for key, value in row.items() if not TIMES.search(key)}
                for row in csv.DictReader(file)
                if not TIMES.search(next(iter(row.values())) or "")
            ]
        return json.dumps(rows).encode()
    if path.suffix == ".json":
        return json.dumps(_without_times(read_json(path))).encode()
    if path.suffix == ".parquet":
        return json.dumps(pq.read_table(path).to_pydict()).encode()
    if path.name == "dvc.lock":
        stages = yaml.safe_load(path.read_text())["stages"]
        listed = {
            name: {
                out["path"]: out.get("md5") for out in stage.get("outs", []) if _holds_no_time(out["path"])
            }
            for name, stage in sorted(stages.items())
        }
        return json.dumps(listed, sort_keys=True).encode()
    return path.read_bytes()


def _holds_no_time(path: str) -> bool:
    return path.endswith((".parquet", "checkpoints", "contamination.json")) or path.startswith("data/")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(below) for key, below in value.items() if not TIMES.search(key)}
    return [_without_times(below) for below in value] if isinstance(value, list) else value


def _code() -> str:
    """A digest of the code: kills of another version do not count."""
    digest = hashlib.sha256(str(code_version()["git"]).encode())
    for folder in ("stlm", "workflow"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
