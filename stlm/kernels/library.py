"""Compiles kernels.c for this machine, once, and calls it on torch's tensors.

Needs Linux and a C compiler with OpenMP (`cc`, or what CC names). Elsewhere, without one, or with
STLM_KERNELS=0 there are no kernels, and the callers take torch's operations: slower, the same up to rounding.
Which it is, is recorded with a run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.files import atomic_path

SOURCE = Path(__file__).parent / "kernels.c"
SWITCH = "STLM_KERNELS"
# Rounding is as written in the source: no flag here lets sums be taken in another order.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
if platform.machine() == "x86_64":
    FLAGS += ("-mprefer-vector-width=512",)
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Arguments of each function of kernels.c: a whole number, a float, an array.
_KINDS = {"i": ctypes.c_int64, "f": ctypes.c_float, "a": ctypes.c_void_p}
_SIGNATURES = {
    "rms_norm": "iiaafaa",
    "rms_norm_backward": "iiaaaaaai",
    "swiglu": "iiaa",
    "swiglu_backward": "iiaaa",
    "cross_entropy": "iiaafia",
    "split_heads": "iiiiiiaaaiaaa",
    "join_heads": "iiiiiiaaaaaia",
    "block_heads": "iiiiiiaai",
    "causal_softmax": "iiiiaiia",
    "causal_softmax_backward": "iiiiaa",
}


class Kernels:
    """The functions of kernels.c for one type of elements; arrays are contiguous tensors, or None."""

    def __init__(self, library: ctypes.CDLL, kind: str) -> None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, f"{name}_{kind}")
            function.argtypes = [_KINDS[letter] for letter in signature]
            function.restype = None
            arrays = [place for place, letter in enumerate(signature) if letter == "a"]
            setattr(self, name, _on_tensors(function, arrays))


def _on_tensors(function: Callable[..., None], arrays: list[int]) -> Callable[..., None]:
    """`function` with tensors, or None, where it takes `arrays`: a step calls it a hundred times."""

    def call(*arguments: Any) -> None:
        values = list(arguments)
        for place in arrays:
            array = values[place]
            if array is not None:
                if not array.is_contiguous():
                    raise ValueError(f"{function.__name__}: argument {place + 1} has gaps")
                values[place] = array.data_ptr()
        function(*values)

    return call


def kernels_for(x: Tensor) -> Kernels | None:
    """What works on elements of the type of `x`, if it is on a CPU for which there are kernels.

    A graph that is being compiled takes torch's operations, which the compiler fuses.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return kernels().by_type.get(x.dtype)


class Found(NamedTuple):
    """The kernels by type of elements; where there are none, why."""

    by_type: dict[torch.dtype, Kernels]
    why_none: str = ""


@cache
def kernels() -> Found:
    """Those of this machine; compiles them where no process has before."""
    if os.environ.get(SWITCH) == "0":
        return Found({}, f"{SWITCH}=0")
    try:
        library = ctypes.CDLL(str(compiled()))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return Found({}, f"{error.cmd[0]}: {lines[0] if lines else error}")
    except (OSError, RuntimeError, UserError, subprocess.TimeoutExpired) as error:
        return Found({}, str(error))
    return Found({dtype: Kernels(library, kind) for dtype, kind in TYPES.items()})


def compiled() -> Path:
    """The library for this machine, in the user's cache, compiled if it is not there yet."""
    openmp = _openmp_of_torch()
    source = SOURCE.read_bytes()
    key = "\n".join([*FLAGS, openmp, torch.__version__, _processor(), hashlib.sha256(source).hexdigest()])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "stlm" / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        compiler, *options = shlex.split(os.environ.get("CC") or "cc")
        if shutil.which(compiler) is None:
            raise OSError(f"no C compiler ({compiler})")
        with atomic_path(path) as temporary:
            target = temporary.with_suffix(".o")
            try:
                _run(compiler, *options, *FLAGS, "-c", str(SOURCE), "-o", str(target))
                # Linked to torch's own OpenMP, whose threads then serve both.
                _run(compiler, *options, "-shared", str(target), openmp, "-lm", "-o", str(temporary))
            finally:
                target.unlink(missing_ok=True)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def _openmp_of_torch() -> str:
    """The path of the OpenMP library, GNU's, that torch has loaded."""
    if sys.platform != "linux":
        raise OSError(f"not on {sys.platform}")
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    ours = sorted(path for path in found if Path(path).is_relative_to(Path(torch.__file__).parent.parent))
    if not (ours or found):
        raise OSError("torch has no libgomp")
    return (ours or sorted(found))[0]


def _processor() -> str:
    """What of the processor decides what -march=native means: its instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
