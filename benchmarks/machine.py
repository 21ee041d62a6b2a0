"""What the benchmarks say of where they ran, and of the checkpoints that they ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stlm.errors import UserError
from stlm.training.checkpoints import code_version


def machine() -> dict[str, Any]:
    """Where this ran, with which versions."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lm_eval", "transformers", "tokenizers", "tiktoken")},
        "code": code_version()["git"],
    }


def default_checkpoints() -> list[Path]:
    """The last checkpoints of the baselines of `desk` (a trained BPE) and `paper` (GPT-2's vocabulary)."""
    runs = [Path(f"results/{study}/runs/baseline") for study in ("desk", "paper")]
    found = [max(run.glob("checkpoints/step-*"), default=None) for run in runs]
    missing = [run for run, checkpoint in zip(runs, found, strict=True) if checkpoint is None]
    if missing:
        raise UserError(
            f"{missing[0]}: no checkpoint; run: stlm train {missing[0].parts[1]} baseline (docs/log.md has "
            "models of paper's shape that take minutes), or name checkpoints with --model"
        )
    return [checkpoint for checkpoint in found if checkpoint is not None]


def label(checkpoint: Path) -> str:
    """STUDY/RUN/step-N of a checkpoint in results/STUDY/runs/RUN/checkpoints, RUN/step-N of one elsewhere."""
    run = checkpoint.absolute().parent.parent
    study = f"{run.parent.parent.name}/" if run.parent.name == "runs" else ""
    return f"{study}{run.name}/{checkpoint.name}"
