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
import gc
import importlib
import io
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad
from bad.case import Case
from bad.project import build, environment
from command import command

from stlm.files import write_json

OUTPUT = Path("results/benchmarks/bad_inputs.json")
LINES = 16
"""A message of more lines is none: argparse's usage of the longest verb has 8."""
_MEMORY = 3 << 30  # beyond what the importing process has mapped; the small project needs a tenth of it
_FILE_SIZE = 256 << 20
# The last ones are Rust's and C's.
_TRACEBACK = re.compile(
    r"Traceback \(most recent call last\)|Exception ignored|Fatal Python error|panicked at|terminate called"
)
# What a refused command may leave: caches, locks and logs.
_NOT_CONTENT = (".state", ".dvc", ".git", ".snakemake", "logs")
_NOBODY = 65534


@dataclass
class Outcome:
    """How a case ended. `faults`: why it failed, none where it passed."""

    topic: str
    case: Case
    status: int
    message: str
    lines: int
    faults: list[str]

    def record(self) -> dict[str, Any]:
        """As results/benchmarks/bad_inputs.json has it."""
        arguments = [text if len(text) <= 60 else f"{text[:40]}... ({len(text)})" for text in self.case.arguments]
        found = {"arguments": " ".join(arguments), "status": self.status, "lines": self.lines}
        return found | {"message": self.message} | ({"faults": self.faults} if self.faults else {})


def topics(names: Sequence[str] = ()) -> dict[str, list[Case]]:
    """The cases by topic: all of benchmarks/bad/, or the topics named. Names of cases are unique."""
    found: dict[str, list[Case]] = {}
    for module in sorted(name for _, name, _ in pkgutil.iter_modules(bad.__path__)):
        if module not in ("case", "project") and (not names or module in names):
            found[module] = importlib.import_module(f"bad.{module}").cases()
    counted = Counter(case.name for cases in found.values() for case in cases)
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(f"cases of one name: {', '.join(twice)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topic", action="append", default=[], help="of benchmarks/bad/; default: all")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names it is found in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: a job a processor")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of a case; default: 120")
    parser.add_argument("--project", type=Path, help="a folder to make the small project in, or where it is")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Run the cases, print what failed, write the counts; 1 where any failed."""
    cases = [
        (topic, case)
        for topic, of_topic in topics(options.topic).items()
        for case in of_topic
        if re.search(options.only, case.name)
    ]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as temporary:
        os.chmod(temporary, 0o755)  # for commands that run as nobody
        project = options.project or Path(temporary) / "project"
        if not project.exists():
            build(project)
        built = time.perf_counter()
        _prepare()
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
    verbs = Counter(outcome.case.arguments[0] if outcome.case.arguments else "" for outcome in outcomes)
    return {
        "command": "benchmarks/bad_inputs.py",
        "inputs": len(outcomes),
        "tracebacks": sum("traceback" in outcome.faults for outcome in outcomes),
        "hangs": sum("hang" in outcome.faults for outcome in outcomes),
        "statuses": _counted(outcome.status for outcome in outcomes),
        "lines": _counted(outcome.lines for outcome in outcomes if outcome.status == 2),
        "verbs": dict(sorted(verbs.items())),
        "failed": {outcome.case.name: outcome.faults for outcome in outcomes if outcome.faults},
        "topics": by_topic,
    }


def _counted(values: Iterator[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _prepare() -> None:
    """Import what commands import, once; a fork has it. Nothing is computed: threads do not survive a fork."""
    os.environ |= environment()
    for name in (
        "stlm.cli",
        "stlm.corpora.fetch",
        "stlm.documentation",
        "stlm.evaluation.contamination",
        "stlm.evaluation.evaluate",
        "stlm.evaluation.published",
        "stlm.export.export",
        "stlm.generation.generate",
        "stlm.listing",
        "stlm.new.new",
        "stlm.recording",
        "stlm.report.build",
        "stlm.report.pairwise",
        "stlm.sizes",
        "stlm.tokens.tokenize",
        "stlm.training.loop",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


class Pool:
    """Runs cases, several at a time, each in a copy of `project` below `temporary`."""

    def __init__(self, project: Path, temporary: Path, jobs: int, timeout: float) -> None:
        self.project, self.temporary, self.jobs, self.timeout = project, temporary, jobs, timeout
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self.memory = pages * resource.getpagesize() + _MEMORY

    def run(self, cases: Sequence[tuple[str, Case]]) -> Iterator[Outcome]:
        """The outcomes, in the order of `cases`."""
        waiting = list(enumerate(cases))[::-1]
        running: dict[int, tuple[int, Started]] = {}
        done: dict[int, Outcome] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                number, (topic, case) = waiting.pop()
                started = Started(topic, case, self.project, self.temporary / f"case-{number}", self.memory)
                running[started.process] = (number, started)
            for process, (number, started) in list(running.items()):
                late = time.monotonic() - started.begin > self.timeout
                if late:
                    os.killpg(process, signal.SIGKILL)
                ended, status = os.waitpid(process, 0 if late else os.WNOHANG)
                if ended:
                    del running[process]
                    done[number] = started.outcome(os.waitstatus_to_exitcode(status), late)
                    if faults := done[number].faults:
                        print(f"{started.topic}: {started.case.name}: {'; '.join(faults)}", file=sys.stderr)
            time.sleep(0.005)
        yield from (done[number] for number in sorted(done))


class Started:
    """A case whose command is running."""

    def __init__(self, topic: str, case: Case, project: Path, folder: Path, memory: int) -> None:
        self.topic, self.case, self.folder = topic, case, folder
        self.place = folder / "project"
        shutil.copytree(project, self.place, symlinks=True)
        if case.spoil is not None:
            case.spoil(self.place)
        (folder / "stdin").write_bytes(case.stdin or b"")
        self.before = _content(self.place)
        if case.unprivileged and os.geteuid() == 0:
            for path in (self.place, *self.place.rglob("*")):
                os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)
        self.begin = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            try:
                _child(case, folder, memory)
            finally:
                os._exit(121)

    def outcome(self, status: int, late: bool) -> Outcome:
        """What the ended command left, judged; its folder goes."""
        try:
            os.killpg(self.process, signal.SIGKILL)  # what it started may live on
        except ProcessLookupError:
            pass
        stdout, stderr = ((self.folder / name).read_bytes().decode(errors="replace") for name in ("1", "2"))
        stderr = stderr.replace(str(self.place), "PROJECT")
        lines = stderr.splitlines()
        case, printed = self.case, f"{stdout}\n{stderr}"
        faults = ["hang"] if late else []
        if _TRACEBACK.search(printed):
            faults.append("traceback")
        if status != case.status:
            faults.append(f"status {status}, expected {case.status}")
        if not re.search(case.expects, printed):
            faults.append(f"the message has no {case.expects!r}")
        if status == 2 and len(lines) > LINES:
            faults.append(f"{len(lines)} lines")
        if status == 2 and (wrote := _differences(self.before, _content(self.place))):
            faults.append(f"wrote {', '.join(wrote[:5])}")
        shutil.rmtree(self.folder, ignore_errors=True)
        message = next((line for line in lines if "error:" in line), lines[0] if lines else "")
        return Outcome(self.topic, case, status, message[:200], len(lines), faults)


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


def _child(case: Case, folder: Path, memory: int) -> None:
    """In the forked child: become the command, and never return."""
    os.setsid()
    place = folder / "project"
    for descriptor, path, flags in (
        (0, folder / "stdin", os.O_RDONLY),
        (1, folder / "1", os.O_WRONLY | os.O_CREAT),
        (2, folder / "2", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o666), descriptor)
    os.chdir(place)
    os.environ.update(case.env)
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, _FILE_SIZE), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    if case.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    if case.process or case.output or any(key.startswith(("PYTHON", "LC_", "LANG")) for key in case.env):
        _replace(case)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), encoding="utf-8", errors="backslashreplace"
    )
    status = 1
    try:
        from stlm.cli import main as stlm

        status = stlm(case.arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _replace(case: Case) -> None:
    """Become a new process, with the streams that the case asks for."""
    for descriptor in (1, 2) if case.both else (1,):
        if case.output == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        elif case.output == "closed":
            os.close(descriptor)
    arguments = [sys.executable, "-m", "stlm", *case.arguments]
    os.execv(sys.executable, [os.fsencode(text) for text in arguments])


if __name__ == "__main__":
    sys.exit(main())
