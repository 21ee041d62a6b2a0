"""Checkpoints: folders with the weights (safetensors) and a ``config.json`` that describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.files import atomic_directory, read_json, sha256, write_record
from stlm.integrity import Listed, check_files
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_counts
from stlm.model.transformer import Transformer
from stlm.provenance import code_version
from stlm.remedy import next_command
from stlm.study.runs import Run
from stlm.study.strict import validate
from stlm.techniques.base import Technique
from stlm.techniques.registry import load_techniques
from stlm.tokens.tokenizer import Tokenizer
from stlm.training.checkpoint_names import WEIGHTS, checkpoints_by_step

FORMAT = 1
_AGAIN = "delete the run's results and train again, or dvc pull"


class _Description(BaseModel):
    """The keys of a checkpoint's config.json that all readers need; the file has more."""

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    weights_sha256: str
    model: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint at ``step``; names sort by step."""
    return f"step-{step:07d}"


def last_checkpoint(run: Run, other: str) -> Path:
    """The last checkpoint's folder of another run of `run`'s study; raises ``UserError`` if there is none."""
    folder = run.folder.with_name(other)
    found = checkpoints_by_step(folder)
    if not found:
        raise UserError(f"{folder / 'checkpoints'}: no checkpoint; run: stlm train {run.study} {other}")
    return found[max(found)]


def save_checkpoint(folder: Path, model: Transformer, description: dict[str, Any]) -> str:
    """Write a checkpoint folder atomically and return the weights' SHA-256.

    A weight that is used in several places (a tied head, shared layers) is stored once, under its first
    name. Raises ``UserError`` if writing fails.
    """
    with atomic_directory(folder) as temporary:
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        for technique in model.techniques:
            weights = technique.packed(model, weights)
        try:
            save_file(weights, temporary / WEIGHTS)
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS}: cannot write the weights: {error}") from None
        digest = sha256(temporary / WEIGHTS)
        content = {"format": FORMAT, "model": model.config.model_dump(), **description}
        if model.techniques:
            content["techniques"] = {
                technique.key(): technique.model_dump(mode="json") for technique in model.techniques
            }
        write_record(temporary / "config.json", {**content, "weights_sha256": digest, "code": code_version()})
    return digest


def check_checkpoints(folder: Path, kept: Iterable[Mapping[str, Any]]) -> None:
    """Compare the checkpoints in `folder` with a run's records: `folder` and `weights_sha256` of each.

    Raises ``UserError`` if one is missing or damaged.
    """
    for checkpoint in kept:
        path = folder / checkpoint["folder"]
        check_files([Listed(path / WEIGHTS, checkpoint["weights_sha256"])])
        read_json(path / "config.json")


def read_description(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config, and the whole ``config.json`` with step, tokens and weights_sha256.

    Raises ``UserError`` naming the key that is missing, has the wrong type or describes no model.
    """
    path = Path(folder) / "config.json"
    description = read_json(path)
    if isinstance(description, dict) and "model_type" in description:
        raise UserError(f"{path}: of a published model of transformers; expected a checkpoint of a run")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint's description of format {FORMAT}")
    known = {key: description[key] for key in _Description.model_fields if key in description}
    validate(_Description, known, str(path))
    config = validate(ModelConfig, description["model"], str(path), "model")
    if config.vocab_size is None:
        raise UserError(f"{path}: model.vocab_size: this key is missing")
    return config, description


def load_checkpoint(folder: Path, device: str | torch.device = "cpu") -> tuple[Transformer, dict[str, Any]]:
    """Load a checkpoint folder: the model in evaluation mode, and the content of ``config.json``.

    Raises ``UserError`` if a file is missing, truncated or altered, if the weights do not fit the described
    model, and if a weight is NaN or infinite.
    """
    folder = Path(folder)
    config, description = read_description(folder)
    techniques = read_techniques(folder, description)
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{path}: no such file; train the run again, or dvc pull")
    damaged = f"{path}: the weights are damaged; {next_command(path) or _AGAIN}"
    digest = sha256(path)
    if digest != description["weights_sha256"]:
        raise UserError(
            f"{damaged} (SHA-256 {digest[:12]}..., expected {description['weights_sha256'][:12]}...)"
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{damaged} ({str(error).splitlines()[0]})") from None
    model = _model_of(config, techniques, weights, path)
    return model.to(device).eval(), description


def read_techniques(folder: Path, description: Mapping[str, Any]) -> list[Technique]:
    """The techniques of a checkpoint, read from its ``config.json`` (``description``)."""
    content, file = description.get("techniques", {}), str(folder / "config.json")
    if not isinstance(content, dict):
        raise UserError(f"{file}: techniques: expected names and keys, found {type(content).__name__}")
    return list(load_techniques(content, file, "techniques").values())


def _model_of(
    config: ModelConfig, techniques: Sequence[Technique], weights: dict[str, Tensor], path: Path
) -> Transformer:
    """The described model with the `weights` of the file `path`; raises ``UserError`` if they do not fit."""

    def misfit(reason: str) -> UserError:
        return UserError(f"{path}: not the weights of the model in config.json: {reason}; {_AGAIN}")

    on_meta, packed = build_on_meta(config, tuple(techniques)), {}
    try:
        for technique in reversed(techniques):
            packed[technique] = weights
            weights = technique.unpacked(on_meta, weights)
    except ValueError as error:
        raise misfit(str(error)) from None
    # Compare the counts first: a model of another size may be too large to build.
    stored, described = (
        sum(map(Tensor.numel, weights.values())),
        parameter_counts(config, tuple(techniques)).in_training,
    )
    if stored != described:
        raise misfit(f"{stored:,} numbers, expected {described:,}")
    model = build_model(config, techniques)
    wanted = dict(model.named_parameters())
    for name in [*wanted, *weights]:
        if name not in weights:
            raise misfit(f"no tensor {name}")
        if name not in wanted:
            raise misfit(f"a tensor {name}, which it does not have")
        found, parameter = weights[name], wanted[name]
        if (found.shape, found.dtype) != (parameter.shape, parameter.dtype):
            raise misfit(
                f"{name} is {found.dtype} {list(found.shape)}, "
                f"expected {parameter.dtype} {list(parameter.shape)}"
            )
        if not torch.isfinite(found).all():
            raise UserError(f"{path}: the tensor {name} has NaN or infinite values; {_AGAIN}")
    # A weight that is used in several places is stored under its first name.
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights[name] = weights[first.setdefault(parameter, name)]
    model.load_state_dict(weights)
    for technique in techniques:
        technique.loaded(model, packed[technique])
    return model


def check_fits(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ``UserError`` if the tokenizer of the checkpoint `folder` has another size than the model.

    A byte-level model reads the bytes of any tokenizer's tokens.
    """
    size = model.config.vocab_size
    if model.config.bytes is None and size != tokenizer.vocab_size:
        raise UserError(
            f"{folder}: the model has {size:,} tokens, its tokenizer {tokenizer.name} "
            f"{tokenizer.vocab_size:,}; {_AGAIN}"
        )
