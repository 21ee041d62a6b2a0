"""Assign GPUs to a job: `python -m stlm.gpus COUNT COMMAND...` takes COUNT GPUs and becomes the command.

For the jobs that one Snakemake runs on one machine. The GPUs are those of ``CUDA_VISIBLE_DEVICES`` if it is
set, otherwise all that nvidia-smi lists. A job holds a lock on each of its GPUs, which is released when its
process ends, however it ends. If there are more jobs than GPUs, the least used GPUs are shared: no job waits.
On a cluster the scheduler assigns devices: its jobs are not started in this way.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from stlm.errors import UserError
from stlm.files import disk_errors

FOLDER = Path(".snakemake/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus() -> list[str]:
    """The GPUs that a program started here may use, in the notation of ``CUDA_VISIBLE_DEVICES``."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return _listed()
    found: list[str] = []
    for device in map(str.strip, named.split(",")):
        if device in ("", "-1"):  # CUDA reads no further
            break
        if device not in found:
            found.append(device)
    return found


def _listed() -> list[str]:
    """The UUIDs that nvidia-smi lists: of GPUs, or of the parts of a split GPU (MIG)."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    listed = subprocess.run([program, "-L"], capture_output=True, encoding="utf-8", errors="replace")
    found: list[str] = []
    whole = None
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: (\S+)\)", listed.stdout, re.MULTILINE):
        if kind == "GPU":
            whole = uuid
        elif found and found[-1] == whole:
            found.pop()
        found.append(uuid)
    return found


def take(wanted: int, devices: Sequence[str], folder: Path = FOLDER) -> list[str]:
    """Take ``wanted`` of ``devices``, the least used first; they are released when this process ends.

    The process may become another program (exec). Raises ``UserError`` if there are too few.
    """
    if wanted > len(devices):
        raise UserError(
            f"{wanted} processes need a GPU each, found {len(devices)} ({', '.join(devices)}): choose "
            f"processes={len(devices)} or fewer"
        )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        # The number of jobs on a device is the number of its first lock file that is free.
        places = [(*_first_free(folder, device), device) for device in devices]
        chosen = sorted(places, key=lambda place: place[0])[:wanted]
        for place in places:
            if place in chosen:
                os.set_inheritable(place[1], True)
            else:
                os.close(place[1])
    return [device for _, _, device in chosen]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other jobs from choosing at the same time."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_free(folder: Path, device: str) -> tuple[int, int]:
    """The number of jobs that use a device, and a lock file that is now locked for one more."""
    for place in count():
        name = re.sub(r"[^\w.-]", "_", device)
        file = os.open(folder / f"{name}.{place}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            return place, file
    raise AssertionError("count() ends")


def main() -> int:
    """Take GPUs and become the command; returns status 2 if that fails."""
    wanted, command = int(sys.argv[1]), sys.argv[2:]
    try:
        if devices := gpus():
            os.environ[VISIBLE] = ",".join(take(wanted, devices))
        os.execvp(command[0], command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
