"""What the benchmarks say of where they ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import stlm
from stlm.provenance import commit_of, processor_name

# The commit of the package and of these scripts, `-dirty` where either differs; found when all begins.
CODE = commit_of(Path(stlm.__file__).parent, "benchmarks")


def machine() -> dict[str, Any]:
    """Where this ran, with which versions."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lm_eval", "transformers", "tokenizers", "tiktoken")},
        "code": CODE,
    }
