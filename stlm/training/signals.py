"""Signals that ask a run to stop: it finishes its step, saves its state and ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

# Sent by ctrl-C, `kill`, `scancel` and pre-emption, and by SLURM with `sbatch --signal=USR1@120`.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal and a launcher (torchrun) may both pass on the same signal.
_ECHO_SECONDS = 1.0


class StopSignals:
    """While entered, keep the first of `STOPPING` in `received`; another, a second later, ends at once.

    A signal that the process was told to ignore stays ignored. Outside the main thread, where Python allows
    no handlers, nothing changes. With ``verbose``, the first signal is acknowledged on stderr.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.received = 0
        self.verbose = verbose
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._when >= _ECHO_SECONDS:
                # Nothing to clean up: a file that is being written has not replaced the previous one yet.
                os._exit(128 + number)
            return
        self.received, self._when = number, time.monotonic()
        if self.verbose:
            # Not `print`: the signal may have interrupted one, and the buffer cannot be entered twice.
            text = f"\n{signal.Signals(number).name}: stopping after this step; again to end at once\n"
            with suppress(OSError):  # the reader, such as `tee`, may be gone; the state must still be saved
                os.write(sys.__stderr__.fileno(), text.encode())
