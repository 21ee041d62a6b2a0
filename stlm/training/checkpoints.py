"""Checkpoints: a folder with the weights (safetensors) and a ``config.json`` that says all about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stlm.errors import UserError
from stlm.files import atomic_directory, read_json, sha256, write_record
from stlm.integrity import Listed, check_files
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.provenance import code_version
from stlm.study import Run
from stlm.training.locate import WEIGHTS

FORMAT = 1


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint at ``step``; names sort by step."""
    return f"step-{step:07d}"


def last_checkpoint(run: Run, other: str) -> Path:
    """The folder of the last checkpoint of another run of `run`'s study; a ``UserError`` if there is none."""
    parent = run.folder.with_name(other) / "checkpoints"
    folders = sorted(parent.glob("step-*"))
    if not folders:
        raise UserError(f"{parent}: no checkpoint; run: stlm train {run.study} {other}")
    return folders[-1]


def save_checkpoint(folder: Path, model: Transformer, description: dict[str, Any]) -> str:
    """Write a checkpoint folder atomically and return the weights' SHA-256.

    A weight with several places (a tied head, shared layers) is stored once, under the name of the first.
    Raises ``UserError`` where the disk fails.
    """
    with atomic_directory(folder) as temporary:
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        try:
            save_file(weights, temporary / WEIGHTS)
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS}: cannot write the weights: {error}") from None
        digest = sha256(temporary / WEIGHTS)
        content = {"format": FORMAT, "model": model.config.model_dump(), **description}
        write_record(temporary / "config.json", {**content, "weights_sha256": digest, "code": code_version()})
    return digest


def check_checkpoints(folder: Path, kept: Iterable[Mapping[str, Any]]) -> None:
    """Compare the checkpoints in `folder` with what a run says of them: `folder` and `weights_sha256` each.

    Raises ``UserError`` for one that is missing or damaged.
    """
    for checkpoint in kept:
        path = folder / checkpoint["folder"]
        check_files([Listed(path / WEIGHTS, checkpoint["weights_sha256"])])
        read_json(path / "config.json")


def load_checkpoint(folder: Path, device: str | torch.device = "cpu") -> tuple[Transformer, dict[str, Any]]:
    """Load a checkpoint folder: the model in evaluation mode, and the content of ``config.json``.

    Raises ``UserError`` for a missing, truncated or altered file.
    """
    folder = Path(folder)
    description = read_json(folder / "config.json")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{folder / 'config.json'}: not a checkpoint's description of format {FORMAT}")
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{path}: no such file; train the run again, or dvc pull")
    damaged = f"{path}: the weights are damaged; delete the run's results and train again, or dvc pull"
    digest = sha256(path)
    if digest != description.get("weights_sha256"):
        raise UserError(
            f"{damaged} (SHA-256 {digest[:12]}..., expected {str(description.get('weights_sha256'))[:12]}...)"
        )
    try:
        model = build_model(ModelConfig.model_validate(description["model"]))
        weights = load_file(path)
        stored: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first = stored.setdefault(parameter, name)
            weights[name] = weights[first]
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"{damaged} ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        raise UserError(f"{folder / 'config.json'}: model: {error.errors()[0]['msg']}") from None
    return model.to(device).eval(), description
