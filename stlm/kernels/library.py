"""Compiles the C files of this folder for the machine, once, and calls them on torch's tensors.

Needs Linux and a C compiler with OpenMP (`cc`, or what CC names). Otherwise, and with STLM_KERNELS=0, there
are no kernels, and the callers use torch's operations: slower, the same up to rounding. A run records which.
STLM_KERNELS_MARCH=haswell, or another processor that the compiler knows, compiles for that one.
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
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.files import atomic_path
from stlm.integrity import check_seal, seal

_NAMES = ("kernels.c", "attention.c", "scoring.c", "inference.c")
SOURCES = tuple(Path(__file__).parent / name for name in _NAMES)
_HEADER = Path(__file__).parent / "elements.h"
SWITCH = "STLM_KERNELS"
MARCH = "STLM_KERNELS_MARCH"
# None of these flags lets the compiler reorder sums or ignore NaN. If the processor can, a product and a sum
# are rounded once (fused multiply-add).
FLAGS = (
    *("-std=gnu11", "-O3", f"-march={os.environ.get(MARCH) or 'native'}"),
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"),
)
if platform.machine() == "x86_64":
    # For AMD's Zen gcc splits chains of fused multiply-adds, in some places and not in others: the same sum
    # would be rounded otherwise from one function to the next.
    FLAGS += ("-mprefer-vector-width=512", "--param=avoid-fma-max-bits=0")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Kinds of arguments: an integer, a float, an array.
_KINDS = {"i": ctypes.c_int64, "f": ctypes.c_float, "a": ctypes.c_void_p}
_SIGNATURES = {
    "rms_norm": "iiaafaa",
    "rms_norm_backward": "iiaaaaaai",
    "swiglu": "iiaa",
    "swiglu_backward": "iiaaa",
    "cross_entropy": "iiaafia",
    "attention": "iiiiiaaaiaaa",
    "attention_backward": "iiiiiaaaiaaa",
    "trie_attention": "iiiiiiiiiiaaiaaafa",
    "log_sum": "iiaiaaa",
    "add_norm": "iiaaafaa",
}


class Kernels:
    """The functions for one element type; arrays are contiguous tensors, or None.

    A function is None if the processor lacks its instructions.
    """

    def __init__(self, library: ctypes.CDLL, kind: str) -> None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, f"{name}_{kind}", None)
            if function is not None:
                arrays = [place for place, letter in enumerate(signature) if letter == "a"]
                function = _on_tensors(_declared(function, signature), arrays)
            setattr(self, name, function)
        # Number of elements of the attention weights of one head, by sequence length.
        self.attention_weights = library.attention_weights
        self.attention_weights.argtypes, self.attention_weights.restype = [ctypes.c_int64], ctypes.c_int64
        # For generation, in float32; their arguments are addresses (stlm.model.inference).
        self.read_tokens = self.make_screen = None
        if kind == "float32":
            self.read_tokens = _declared(library.read_tokens, "aaiiiaaaaiaai")
            self.make_screen = _declared(library.make_screen, "iiaa")


def _declared(function: Any, signature: str) -> Any:
    function.argtypes = [_KINDS[letter] for letter in signature]
    function.restype = None
    return function


def _on_tensors(function: Callable[..., None], arrays: list[int]) -> Callable[..., None]:
    """`function` that accepts tensors, or None, at the positions `arrays`; kept cheap for frequent calls."""

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
    """The kernels for the element type of `x`, if it is on a CPU that has them.

    During compilation of a graph there are none: the compiler fuses torch's operations.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return kernels().by_type.get(x.dtype)


class Found(NamedTuple):
    """The kernels by element type; if there are none, the reason."""

    by_type: dict[torch.dtype, Kernels]
    why_none: str = ""


@cache
def kernels() -> Found:
    """The kernels of this machine, compiled if no process has done so before."""
    if os.environ.get(SWITCH) == "0":
        return Found({}, f"{SWITCH}=0")
    try:
        library = ctypes.CDLL(str(compiled()))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        telling = next((line for line in lines if "error" in line), lines[0] if lines else str(error))
        return Found({}, f"{error.cmd[0]}: {telling.strip()}")
    except (OSError, ValueError, RuntimeError, UserError, subprocess.TimeoutExpired) as error:
        return Found({}, str(error))
    return Found({dtype: Kernels(library, kind) for dtype, kind in TYPES.items()})


def compiled() -> Path:
    """The library for this machine in the user's cache, compiled if it is missing or damaged."""
    openmp, compiler = _openmp_of_torch(), os.environ.get("CC") or "cc"
    texts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (*SOURCES, _HEADER)]
    user = str(os.getuid())
    key = "\n".join([*texts, compiler, *FLAGS, openmp, torch.__version__, _processor(), user])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "stlm" / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not _is_whole(path):
        command = shlex.split(compiler)
        if not command or shutil.which(command[0]) is None:
            raise OSError(f"no C compiler ({compiler})")
        with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as folder:
            objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
            for source, target in zip(SOURCES, objects, strict=True):
                _run(*command, *FLAGS, "-c", str(source), "-o", target)
            # Linked to torch's OpenMP, so that both use one pool of threads.
            _run(*command, "-shared", "-Wl,-z,defs", *objects, openmp, "-lm", "-lc", "-o", str(temporary))
            ctypes.CDLL(str(temporary))  # a library that does not load is not kept
            seal(temporary)
    if path.stat().st_uid != os.getuid():
        raise OSError(f"{path}: belongs to another user")
    return path


def _is_whole(path: Path) -> bool:
    """Whether the library exists and is intact: nothing else would detect wrong results."""
    try:
        check_seal(path)
    except UserError:
        return False
    return True


def _run(*command: str) -> None:
    # In a separate session: a stop signal is meant for the run, not for its compiler.
    subprocess.run(command, check=True, capture_output=True, timeout=300, start_new_session=True)


def _openmp_of_torch() -> str:
    """The path of the GNU OpenMP library that torch has loaded."""
    if sys.platform != "linux":
        raise OSError(f"not on {sys.platform}")
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    found = {Path(line.split(maxsplit=5)[-1]) for line in lines if "/libgomp" in line}
    if not found:
        raise OSError("torch has no libgomp")
    # Other packages bring copies; torch's is in its folder, or in the neighbouring torch.libs.
    folder = Path(torch.__file__).resolve().parent  # as the system names it, whatever links lead there
    homes = (folder, folder.with_name("torch.libs"))
    return str(min(found, key=lambda path: (not any(path.is_relative_to(home) for home in homes), path)))


def _processor() -> str:
    """The processor's instruction set, which determines -march=native."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
