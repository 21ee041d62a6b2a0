"""How a process of a group ends when another is gone, whatever it does at that moment.

An exchange by gloo fails as soon as a process is gone (stlm.training.distributed). But a process may be
elsewhere: waiting for a GPU that waits for the lost one, where nothing interrupts it, or at long work of its
own. There a thread, which waits for a neighbour's farewell, notices.
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
# Seconds for the process to notice by itself and to end in order; torchrun kills after 30.
GRACE = 15.0
_FOREVER = timedelta(days=3650)
# What torch raises where a connection is closed, and where this process has left the group itself.
_CLOSED = (RuntimeError, ValueError)


class Exit:
    """Ends Python at once, with `status`, where that is set by its end.

    What Python would clean up waits for GPUs that wait for a lost process, and threads of gloo abort it.
    Made before others register what they do at the end, it comes after them.
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
    """A thread that waits for the farewell of the next process, as the one before waits for this one's.

    Where the next one ends without it, or says that one after it did, and this one has not begun to end
    `GRACE` seconds later, it ends here and now with status 2; the message is told if `tells` says so.
    """

    def __init__(self, rank: int, size: int, tells: Callable[[], bool]) -> None:
        self._group = dist.new_group(backend="gloo")
        self._before, self._next = (rank - 1) % size, (rank + 1) % size
        self._tells = tells
        self._released = threading.Event()
        self._sent: dist.Work | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """This process ends by itself, in any way."""
        self._released.set()

    def farewell(self) -> bool:
        """Part in peace; whether the next one did, too."""
        self.release()
        with suppress(*_CLOSED):  # it is gone already
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
        if self._tells():
            with suppress(OSError):
                os.write(sys.__stderr__.fileno(), f"error: {LOST}\n".encode())
        os._exit(2)
