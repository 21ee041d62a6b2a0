"""Commands of `stlm` as forked children of a process that has imported everything: they start at once."""

from __future__ import annotations

import gc
import importlib
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bad.case import Case

REPOSITORY = Path(__file__).resolve().parent.parent.parent
_MEMORY = 3 << 30  # beyond what the importing process has mapped; the small project needs a tenth of it
_FILE_SIZE = 256 << 20
NOBODY = 65534
_MODULES = (
    "stlm.cli",
    "stlm.corpora.fetch",
    "stlm.docs_pages.readmes",
    "stlm.evaluation.contamination",
    "stlm.evaluation.evaluate",
    "stlm.evaluation.published",
    "stlm.export.export",
    "stlm.generation.generate",
    "stlm.study.listing",
    "stlm.new.new",
    "stlm.recording",
    "stlm.report.build",
    "stlm.report.pairwise",
    "stlm.study.sizes",
    "stlm.tokens.tokenize",
    "stlm.training.loop",
    "transformers.models.llama.modeling_llama",
)


def prepare() -> None:
    """Import what commands import, once. Nothing is computed: threads do not survive a fork."""
    ours = ("STLM_", "WANDB_", "PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    # One thread, no network, no mirror, no GPU, and the code of this repository.
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    os.environ.clear()
    os.environ.update({**kept, **fixed, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"})
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@dataclass
class Child:
    """A command that was started. Its streams are the files `1` and `2` in `folder`."""

    process: int
    folder: Path

    def poll(self, wait: bool = False) -> int | None:
        """The exit status, a signal's number below zero; None while it runs."""
        ended, status = os.waitpid(self.process, 0 if wait else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def kill(self) -> None:
        """End the command and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def printed(self) -> tuple[str, str]:
        """What went to stdout and stderr."""
        stdout, stderr = ((self.folder / name).read_bytes().decode(errors="replace") for name in ("1", "2"))
        return stdout, stderr


def start(case: Case, place: Path, folder: Path) -> Child:
    """Fork a child that runs the command of `case` in `place`, streams in `folder`. Call `prepare` before."""
    (folder / "stdin").write_bytes(case.stdin or b"")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + _MEMORY
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        try:
            _become(case, place, folder, memory)
            _run(case.arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(121)
    return Child(process, folder)


def _become(case: Case, place: Path, folder: Path, memory: int) -> None:
    """Take the streams, the folder, the rights and the limits of the command."""
    os.setsid()
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "1", writing), (2, "2", writing)):
        descriptor = os.open(folder / name, flags, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(place)
    os.environ.update(case.env)
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    if case.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if case.process or case.output or any(key.startswith(("PYTHON", "LC_", "LANG")) for key in case.env):
        _replace(case)


def _replace(case: Case) -> None:
    """Become a new Python, with the streams that the case asks for."""
    for descriptor in (1, 2) if case.both else (1,):
        if case.output == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        elif case.output == "closed":
            os.close(descriptor)
    command = [sys.executable, "-m", "stlm", *case.arguments]
    os.execv(sys.executable, [os.fsencode(text) for text in command])


def _run(arguments: Sequence[str]) -> None:
    """Run the command and end with its status, as the script `stlm` does; never returns."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    status = 1
    try:
        from stlm.cli import main

        status = main(arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
