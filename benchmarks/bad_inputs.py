"""Does any input end in a traceback, a hang or a message that says nothing?

    python benchmarks/bad_inputs.py

Gives `stlm` the inputs of benchmarks/bad/, one by one, each in a copy of its own of a small project: damaged
files, names that are none, arguments out of range, outputs that cannot be written. Counts tracebacks, exit
statuses and lines of the messages. An input passes where the exit status is the one expected, the message
matches, is short and no traceback, and, where the command refused, no file of the project has changed.

A command runs in a forked child of a process that has imported everything, so that an input takes a fraction
of a second; in a process of its own where the start or the end of Python matters. Time and memory of each are
limited: an input that hangs, or takes all memory, fails.

Writes results/benchmarks/bad_inputs.json; the exit status is 1 where an input failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad
from bad.case import Case
from bad.child import NOBODY, prepare, start
from bad.project import build
from command import command

from stlm.files import write_json

OUTPUT = Path("results/benchmarks/bad_inputs.json")
LINES = 16
"""A message of more lines is none: argparse's usage of the longest verb has 8."""
# The last ones are Rust's and C's.
_TRACEBACK = re.compile(
    r"Traceback \(most recent call last\)|Exception ignored|Fatal Python error|panicked at|terminate called"
)
# What a refused command may leave: caches, locks and logs.
_NOT_CONTENT = (".state", ".dvc", ".git", ".snakemake", ".locks", "logs")


@dataclass
class Outcome:
    """How a case ended. `faults`: why it failed, none where it passed."""

    topic: str
    case: Case
    status: int
    message: str
    lines: int
    faults: list[str]
    printed: str = ""

    def record(self) -> dict[str, Any]:
        """As results/benchmarks/bad_inputs.json has it."""
        shown = (text if len(text) <= 60 else f"{text[:40]}... ({len(text)})" for text in self.case.arguments)
        arguments = " ".join(shown).encode(errors="backslashreplace").decode()
        found = {"arguments": arguments, "status": self.status, "lines": self.lines}
        return found | {"message": self.message} | ({"faults": self.faults} if self.faults else {})


def topics(names: Sequence[str] = ()) -> dict[str, list[Case]]:
    """The cases by topic: all of benchmarks/bad/, or the topics named. Names are unique in a topic."""
    found: dict[str, list[Case]] = {}
    for module in sorted(name for _, name, _ in pkgutil.iter_modules(bad.__path__)):
        if module not in ("case", "child", "project") and (not names or module in names):
            found[module] = importlib.import_module(f"bad.{module}").cases()
    counted = Counter((topic, case.name) for topic, cases in found.items() for case in cases)
    if twice := [": ".join(key) for key, count in counted.items() if count > 1]:
        raise ValueError(f"cases of one name: {', '.join(twice)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topic", action="append", default=[], help="of benchmarks/bad/; default: all")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names it is found in")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth case alone; default: 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: a job a processor")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="of a case; default: 120"
    )
    parser.add_argument("--project", type=Path, help="a folder to make the small project in, or where it is")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Run the cases, print what failed, write the counts; 1 where any failed."""
    cases = [
        (topic, case)
        for topic, of_topic in topics(options.topic).items()
        for case in of_topic[:: options.every]
        if re.search(options.only, case.name)
    ]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as temporary:
        os.chmod(temporary, 0o755)  # for commands that run as nobody
        project = options.project or Path(temporary) / "project"
        prepare()
        if not project.exists():
            build(project)
        built = time.perf_counter()
        outcomes = list(Pool(project, Path(temporary), options.jobs, options.timeout).run(cases))
    print(
        f"{len(cases)} inputs in {time.perf_counter() - built:.0f} s, their project in {built - begin:.0f} s",
        file=sys.stderr,
    )
    content = summary(outcomes)
    write_json(options.output, content)
    print(json.dumps({key: value for key, value in content.items() if key != "topics"}, indent=2))
    return 1 if content["failed"] else 0


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The counts, and every input with its status and message. Holds no time: two runs write the same."""
    by_topic: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        by_topic.setdefault(outcome.topic, {})[outcome.case.name] = outcome.record()
    verbs = Counter(outcome.case.arguments[0][:40] if outcome.case.arguments else "" for outcome in outcomes)
    return {
        "command": "benchmarks/bad_inputs.py",
        "inputs": len(outcomes),
        "tracebacks": sum("traceback" in outcome.faults for outcome in outcomes),
        "hangs": sum("hang" in outcome.faults for outcome in outcomes),
        "statuses": _counted(outcome.status for outcome in outcomes),
        "lines": _counted(outcome.lines for outcome in outcomes if outcome.status == 2),
        "verbs": dict(sorted(verbs.items())),
        "failed": {f"{own.topic}: {own.case.name}": own.faults for own in outcomes if own.faults},
        "topics": by_topic,
    }


def _counted(values: Iterator[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


class Pool:
    """Runs cases, several at a time, each in a copy of `project` below `temporary`."""

    def __init__(self, project: Path, temporary: Path, jobs: int, timeout: float) -> None:
        self.project, self.temporary, self.jobs, self.timeout = project, temporary, jobs, timeout

    def run(self, cases: Sequence[tuple[str, Case]]) -> Iterator[Outcome]:
        """The outcomes, in the order of `cases`."""
        waiting = list(enumerate(cases))[::-1]
        running: dict[int, Started] = {}
        done: dict[int, Outcome] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                number, (topic, case) = waiting.pop()
                running[number] = Started(topic, case, self.project, self.temporary / f"case-{number}")
            for number, started in list(running.items()):
                if (outcome := started.outcome(self.timeout)) is not None:
                    del running[number]
                    done[number] = outcome
                    if outcome.faults:
                        said = f"{outcome.topic}: {outcome.case.name}: {'; '.join(outcome.faults)}"
                        print(f"{said}\n{textwrap.indent(outcome.printed[-2000:], '    ')}", file=sys.stderr)
            time.sleep(0.005)
        yield from (done[number] for number in sorted(done))


class Started:
    """A case whose command is running."""

    def __init__(self, topic: str, case: Case, project: Path, folder: Path) -> None:
        self.topic, self.case, self.folder = topic, case, folder
        self.place = folder / "project"
        shutil.copytree(project, self.place, symlinks=True)
        if case.spoil is not None:
            case.spoil(self.place)
        self.before = _content(self.place)
        if case.unprivileged and os.geteuid() == 0:
            for path in (self.place, *self.place.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        self.begin = time.monotonic()
        self.child = start(case, self.place, folder)

    def outcome(self, timeout: float) -> Outcome | None:
        """What the command left, judged, and its folder gone; None while it runs."""
        late = time.monotonic() - self.begin > timeout
        if late:
            self.child.kill()
        status = self.child.poll(wait=late)
        if status is None:
            return None
        self.child.kill()  # what it started may live on
        stdout, stderr = (text.replace(str(self.place), "PROJECT") for text in self.child.printed())
        lines = stderr.splitlines()
        faults = ["hang"] if late else []
        if _TRACEBACK.search(f"{stdout}\n{stderr}"):
            faults.append("traceback")
        if status != self.case.status:
            faults.append(f"status {status}, expected {self.case.status}")
        if not re.search(self.case.expects, f"{stdout}\n{stderr}"):
            faults.append(f"the message has no {self.case.expects!r}")
        if status == 2 and len(lines) > LINES:
            faults.append(f"{len(lines)} lines")
        if status == 2 and (wrote := _differences(self.before, _content(self.place))):
            faults.append(f"wrote {', '.join(wrote[:5])}")
        shutil.rmtree(self.folder, ignore_errors=True)
        message = next((line for line in lines if "error:" in line), lines[0] if lines else "")
        return Outcome(self.topic, self.case, status, message[:200], len(lines), faults, stdout + stderr)


def _content(project: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a refused command must leave alone."""
    found = {}
    for folder, folders, files in os.walk(project):
        folders[:] = [name for name in folders if name not in _NOT_CONTENT]
        for name in files:
            path = os.path.join(folder, name)
            about = os.lstat(path)
            found[os.path.relpath(path, project)] = (about.st_size, about.st_mtime_ns)
    return found


def _differences(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


if __name__ == "__main__":
    sys.exit(main())
