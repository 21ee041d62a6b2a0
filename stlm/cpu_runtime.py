"""How the process uses the machine: waiting threads, and memory. Needs no torch, and must run before it.

This affects only speed, not results. A variable that the user has set is kept.
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

    OpenMP's threads wait for one another awake for a moment (1,000 turns, microseconds), then asleep. By
    default they stay awake long, and steps take several times as long as soon as anything else runs. Sleeping
    at once costs a fifth of the speed of small models on an idle machine (benchmarks/openmp_wait.py).

    Memory that tensors free is kept for the next ones, in large pages: each step allocates and frees the same
    memory as the last, and getting it from the system again, in pages of 4 KiB, takes time
    (benchmarks/training.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Only glibc has these settings; a variable that the user sets takes precedence.
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)
            mallopt(_M_TOP_PAD, 64 << 20)
