"""Where and in which arithmetic to train: CUDA where there is one, the CPU otherwise."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from stlm.kernels import library
from stlm.training.config import TrainingConfig


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products; without them autocast is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class Device:
    """A device with its arithmetic, as recorded in ``train.json``."""

    device: torch.device
    precision: str
    compiled: bool

    def autocast(self) -> AbstractContextManager:
        """The context in which the forward pass runs."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def dtype(self) -> torch.dtype:
        """Of products outside autocast, such as an optimizer's."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @property
    def kernels(self) -> bool:
        """Whether training runs kernels of ours (stlm.kernels): a graph that is compiled has its own."""
        return self.device.type == "cpu" and not self.compiled and bool(library.kernels().by_type)

    @property
    def arithmetic(self) -> str:
        """In words: the precision, and what the operations are."""
        if self.compiled:
            return f"{self.precision}, compiled"
        if self.device.type == "cpu" and not self.kernels:
            return f"{self.precision}, without kernels ({library.kernels().why_none})"
        return self.precision

    @property
    def name(self) -> str:
        """The hardware's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu ({platform.machine()})"


def choose_device(config: TrainingConfig) -> Device:
    """The device and arithmetic for a recipe, its ``auto`` settings decided."""
    cuda = torch.cuda.is_available()
    precision = config.precision
    if precision == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_multiplies_bfloat16()
        )
        precision = "bfloat16" if native else "float32"
    if cuda and precision == "bfloat16":
        # What autocast leaves in float32 may use the tensor cores too.
        torch.set_float32_matmul_precision("high")
    compiled = cuda if config.compile == "auto" else config.compile
    return Device(torch.device("cuda" if cuda else "cpu"), precision, compiled)


def compiler_error(error: Exception) -> str:
    """The line of an error of torch.compile that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first of some names the backend alone.
    telling = [line for line in lines if not (line.startswith("backend=") and line.endswith("raised:"))]
    return telling[0] if telling else type(error).__name__
