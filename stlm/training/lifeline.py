"""Ends a process of a group when another process is lost, whatever it is doing at that moment.

A gloo exchange fails as soon as a process is lost (stlm.training.distributed). But a process may be doing
something else: waiting, uninterruptibly, for a GPU that waits for the lost process, or computing for a long
time. A thread, which waits for a neighbour's farewell message, notices that case.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

LOST = (
    "a process of this training ended without a word (killed, or out of memory?); the same command goes on "
    "from what is saved"
)
# Seconds in which the process can notice the loss and end properly; torchrun kills it after 30.
GRACE = 15.0
_FOREVER = timedelta(days=3650)
# torch raises these if a connection is closed, or if this process has left the group.
_CLOSED = (RuntimeError, ValueError)


class Exit:
    """Ends Python immediately, with `status`, if that is set when Python exits.

    Python's cleanup would wait for GPUs that wait for a lost process, and gloo's threads would abort it.
    Create it before other exit handlers are registered: it then runs after them.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.status is None:
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.status)


class Lifeline:
    """A thread that waits for the next process's farewell, as the previous process waits for this one's.

    If the next process ends without a farewell, or reports that a later process was lost, this process has
    `GRACE` seconds to begin to end. After that it ends immediately with status 2; it prints the message if
    `reports` returns True.
    """

    def __init__(self, rank: int, size: int, reports: Callable[[], bool]) -> None:
        self._group = dist.new_group(backend="gloo")
        self._before, self._next = (rank - 1) % size, (rank + 1) % size
        self._reports = reports
        self._released = threading.Event()
        self._sent: dist.Work | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Declare that this process ends by itself, in any way."""
        self._released.set()

    def farewell(self) -> bool:
        """Say farewell to the previous process; returns whether the next process said farewell, too."""
        self.release()
        with suppress(*_CLOSED):  # the other process is gone already
            self._say(lost=False)
            self._sent.wait(timedelta(seconds=GRACE))
        self._thread.join(GRACE)
        return not self._thread.is_alive()

    def _say(self, lost: bool) -> None:
        self._sent = dist.isend(torch.tensor([float(lost)]), self._before, group=self._group)

    def _wait(self) -> None:
        heard = torch.zeros(1)
        try:
            dist.irecv(heard, self._next, group=self._group).wait(_FOREVER)
            if not heard:
                return
        except _CLOSED:
            pass
        with suppress(*_CLOSED):
            self._say(lost=True)
        if self._released.wait(GRACE):
            return
        if self._reports():
            with suppress(OSError):
                os.write(sys.__stderr__.fileno(), f"error: {LOST}\n".encode())
        os._exit(2)
