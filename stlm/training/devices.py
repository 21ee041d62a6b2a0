"""The device and precision of training: CUDA if available, otherwise the CPU."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from stlm.kernels import library
from stlm.training.config import TrainingConfig


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; without that, autocast is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class Device:
    """A device with its precision, as recorded in ``train.json``."""

    device: torch.device
    precision: str
    compiled: bool

    def autocast(self) -> AbstractContextManager:
        """The context for the forward pass."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products outside autocast, such as an optimizer's."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @property
    def kernels(self) -> bool:
        """Whether training runs the kernels of stlm.kernels: a compiled graph has its own kernels."""
        return self.device.type == "cpu" and not self.compiled and bool(library.kernels().by_type)

    @property
    def arithmetic(self) -> str:
        """A description of the precision and the kind of operations."""
        if self.compiled:
            return f"{self.precision}, compiled"
        if self.device.type == "cpu" and not self.kernels:
            return f"{self.precision}, without kernels ({library.kernels().why_none})"
        return self.precision

    @property
    def name(self) -> str:
        """The name of the hardware."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu ({platform.machine()})"


def choose_device(config: TrainingConfig) -> Device:
    """The device and precision for a recipe, with its ``auto`` settings resolved."""
    cuda = torch.cuda.is_available()
    precision = config.precision
    if precision == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_multiplies_bfloat16()
        )
        precision = "bfloat16" if native else "float32"
    if cuda and precision == "bfloat16":
        # Products that autocast leaves in float32 may use the tensor cores too.
        torch.set_float32_matmul_precision("high")
    compiled = cuda if config.compile == "auto" else config.compile
    return Device(torch.device("cuda" if cuda else "cpu"), precision, compiled)


def compiler_error(error: Exception) -> str:
    """The line of a torch.compile error that explains the failure."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of some errors names the backend only.
    informative = [line for line in lines if not (line.startswith("backend=") and line.endswith("raised:"))]
    return informative[0] if informative else type(error).__name__
