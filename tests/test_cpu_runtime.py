"""What the process sets before torch is loaded, and what it leaves to the user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def faults(**environment: str) -> tuple[int, str]:
    """Page faults of allocating 64 MiB again and again, and the policy of waiting, in a new process."""
    program = """
import os, resource
from stlm.cpu_runtime import tune_process
tune_process()
import numpy as np
for _ in range(3):
    np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ["OMP_WAIT_POLICY"])
"""
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    count, policy = result.stdout.split()
    return int(count), policy


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_serves_the_next_tensors():
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB."""
    assert faults()[0] < 32


def test_what_the_user_set_stays():
    count, policy = faults(OMP_WAIT_POLICY="ACTIVE", MALLOC_TOP_PAD_="131072")
    assert policy == "ACTIVE"
    if sys.platform == "linux":
        assert count >= 10 * 32
