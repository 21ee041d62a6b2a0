"""How the process uses the machine: threads that wait, and memory. Needs no torch, and goes before it.

What is set here is speed alone; results are the same without. A variable that the user has set stays.
"""

from __future__ import annotations

import ctypes
import os
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def tune_process() -> None:
    """Prepare this process for training and scoring on a CPU. Call it before torch is imported.

    OpenMP's threads wait asleep for one another, not awake: waiting awake, their default, costs several times
    the speed as soon as anything else runs (benchmarks/openmp_wait.py). Memory that tensors free is kept for
    the next ones, in large pages: a step allocates and frees what it did the step before, and fetching it
    from the system anew, a page of 4 KiB at a time, took a third of the time (benchmarks/training.py).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Only glibc has these; a user who sets one of its variables knows better.
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)
            mallopt(_M_TOP_PAD, 64 << 20)
