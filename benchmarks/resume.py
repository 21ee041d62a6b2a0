"""Does a run that is killed again and again end as one that never was?

    python benchmarks/resume.py --kills 50

Trains a small run without interruption, then the same run killed with SIGKILL, started again by the same
command, killed again. A kill comes at a random moment (seeded) of one of three kinds: between the start of
the process and its first step, while it trains, and inside a write (of the state, of a checkpoint or of the
results), for which the script watches for the temporary file of an atomic write. Whether a kill really cut a
write short is seen afterwards: its temporary file is still there. A killed run that comes to its end is
compared, and a new one is started, until all kills are spent; so every one of them counts.

Compared are all files of the run's folder: weights, curve.csv, watch.csv and train.json. Left out are
wall-clock times alone: the columns `seconds` and `tokens_per_second`, and the keys of the same names.

Writes results/benchmarks/resume.json.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from command import command
from machine import machine

from stlm.errors import UserError
from stlm.files import read_json, write_json

OUTPUT = Path("results/benchmarks/resume.json")
STUDY, RUN = "smoke", "baseline"
TIMES = ("seconds", "tokens_per_second")
# Small enough for a few minutes in all, and with all that has a state or a schedule: accumulation, dropout,
# an order of the data, two optimizers, rows that no save is due at, checkpoints.
RECIPE = {
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 4,
    "model.ffn_width": 128,
    "model.context": 64,
    "data.order": "length",
    "training.optimizer": "muon",
    "training.schedule": "wsd",
    "training.dropout_schedule": "triangular",
    "training.steps": 400,
    "training.batch_size": 4,
    "training.accumulation": 2,
    "training.checkpoints": [100, 200, 300],
    "training.log_every": 7,
    "training.validate_every": 100,
    "training.validation_bytes": 7000,
    "training.save_every": 8,
}
# Of a kill's moment; most of a run's writes are saves of the state.
KINDS = {"starting": 0.15, "training": 0.4, "writing": 0.45}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        help="a folder with the tokens of the study smoke; default: data",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Train, kill, compare, write; 1 where anything differs."""
    if not options.data.joinpath("tokens", "synthetic").is_dir():
        raise UserError(f"{options.data}/tokens/synthetic: no such folder; run: snakemake --cores 2 all")
    draw = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    differing: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        plain = Place(Path(temporary) / "plain", options.data)
        begin = time.perf_counter()
        plain.start().wait()
        expected, whole = plain.written(), time.perf_counter() - begin
        training = read_json(plain.folder / "train.json")["seconds"]
        runs = 0
        while len(kills) < options.kills:
            runs += 1
            killed = Place(Path(temporary) / f"killed-{runs}", options.data)
            while not killed.done:
                if len(kills) < options.kills:
                    kill = killed.live_and_die(draw, training)
                    kills += [kill] if kill else []
                else:
                    if status := killed.start().wait():
                        raise UserError(f"training ended with status {status}; its log: {killed.log()}")
                print(f"run {runs}, {len(kills)} kills, the last: {kills[-1:]}", file=sys.stderr)
            found = killed.written()
            differing |= {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
    content = {
        "command": f"benchmarks/resume.py --kills {options.kills} --seed {options.seed}",
        "kills": len(kills),
        "kinds": dict(Counter(kill["kind"] for kill in kills)),
        "during_a_write": dict(Counter(kill["wrote"] for kill in kills if kill["wrote"])),
        "runs_killed": runs,
        "identical": not differing,
        "files": {name: name not in differing for name in sorted({*expected, *differing})},
        "left_out": list(TIMES),
        "undisturbed": {"seconds": round(whole, 1), "of_training": training},
        "recipe": {"study": STUDY, "run": RUN, **RECIPE},
        "machine": machine(),
        "moments": kills,
    }
    write_json(options.output, content)
    print(json.dumps({key: content[key] for key in ("kills", "kinds", "during_a_write", "identical")}))
    return 0 if content["identical"] else 1


class Place:
    """A project folder in which the run is trained, again and again."""

    def __init__(self, root: Path, data: Path) -> None:
        shutil.copytree("params", root / "params")
        (root / "data").symlink_to(data.resolve())
        self.root = root
        self.folder = root / "results" / STUDY / "runs" / RUN
        self.state = root / ".state" / STUDY / RUN

    @property
    def done(self) -> bool:
        """Whether the last process came to its end."""
        return (self.folder / "train.json").exists() and not self.state.exists()

    def start(self) -> subprocess.Popen[bytes]:
        """`stlm train`, as a user would start it."""
        overrides = [
            part for key, value in RECIPE.items() for part in ("--set", f"{key}={json.dumps(value)}")
        ]
        code = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-m", "stlm", "train", STUDY, RUN, *overrides],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=(self.root / "log").open("ab"),
        )

    def live_and_die(self, draw: random.Random, training: float) -> dict[str, Any] | None:
        """Start a process and kill it; what is known of the moment, or None where it ended before that."""
        (kind,) = draw.choices(list(KINDS), KINDS.values())
        # Lives of this mean length reach the end of a run in about fifteen kills.
        life, patience = draw.uniform(0, training / 5), draw.random()
        begin, before = time.perf_counter(), set(self._partial())
        process = self.start()
        if kind == "starting":
            self._sleep(process, patience * 3.0)
        else:
            self._until_it_trains(process)
            self._sleep(process, life)
        if kind == "writing":
            while process.poll() is None and not self._partial().keys() - before:
                time.sleep(0.0002)
            time.sleep(patience * 0.005)
        process.send_signal(signal.SIGKILL)
        seconds = time.perf_counter() - begin
        status = process.wait()
        if status not in (0, -signal.SIGKILL):
            raise UserError(f"training ended with status {status} after a kill; its log: {self.log()}")
        if status == 0:
            return None
        wrote = [what for name, what in self._partial().items() if name not in before]
        return {"kind": kind, "seconds": round(seconds, 3), "wrote": wrote[0] if wrote else None}

    def log(self) -> str:
        """The end of what the processes told."""
        return (self.root / "log").read_text(errors="replace")[-2000:]

    def _until_it_trains(self, process: subprocess.Popen[bytes]) -> None:
        """Until DVCLive's folder is made, right before the first step, or the process has ended."""
        before = time.time()
        live = self.state / "output" / "dvclive"
        while process.poll() is None and not (live.exists() and live.stat().st_mtime >= before):
            time.sleep(0.002)

    @staticmethod
    def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return

    def _partial(self) -> dict[str, str]:
        """Names of temporary files of atomic writes, and what each is of."""
        places = {
            "state": self.state,
            "checkpoint": self.state / "output" / "checkpoints",
            "results": self.folder,
        }
        found = {}
        for what, folder in places.items():
            with suppress(FileNotFoundError):
                names = os.listdir(folder)
                found |= {name: what for name in names if name.endswith((".partial", ".old"))}
        return found

    def written(self) -> dict[str, str]:
        """A hash of each file of the run's folder, wall times left out; `UserError` where training failed."""
        if not self.done:
            raise UserError(f"training did not finish: {(self.root / 'log').read_text()[-2000:]}")
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(timeless(path)).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


def timeless(path: Path) -> bytes:
    """The content of a file, without wall-clock times."""
    if path.name == "curve.csv":
        with path.open() as file:
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
        return json.dumps(rows).encode()
    if path.name == "train.json":
        return json.dumps({k: v for k, v in read_json(path).items() if k not in TIMES}).encode()
    return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
