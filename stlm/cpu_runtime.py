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

    OpenMP's threads wait awake for one another a moment (1,000 turns, microseconds), then asleep. Their
    default, awake for long, costs several times the speed as soon as anything else runs; asleep at once
    costs a fifth of it in small models on an idle machine (benchmarks/openmp_wait.py). Memory that tensors
    free is kept for the next ones, in large pages: a step allocates and frees what the step before did, and
    fetching it from the system anew, a page of 4 KiB at a time, takes time (benchmarks/training.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Only glibc has these; a user who sets one of its variables knows better.
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)
            mallopt(_M_TOP_PAD, 64 << 20)
