"""Published models in Llama's layout as models of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from stlm.errors import UserError
from stlm.evaluation.hf_folder import check_files, read_config, weight_files
from stlm.model.config import ModelConfig
from stlm.model.llama import NotLlamaError, check_llama_weights, from_llama, read_llama_config
from stlm.model.transformer import Transformer


def published_config(folder: Path) -> ModelConfig:
    """The configuration of ours that computes what the model in a folder of `transformers` does.

    Only config.json is read. Raises UserError if it is no plain Llama, naming the key.
    """
    folder = Path(folder)
    try:
        return read_llama_config(read_config(folder))
    except NotLlamaError as error:
        raise UserError(f"{folder}/config.json: not a plain Llama: {error}") from None


def load_published(folder: Path, device: str | torch.device = "cpu") -> Transformer:
    """Load the model in a folder of `transformers` as ours, in float32 and evaluation mode.

    Its logits are those of transformers, except for rounding. Nothing of the folder is run. Raises UserError
    if a file is missing or damaged, and if the model is no plain Llama, naming key or tensor.
    """
    folder = Path(folder)
    check_files(folder)
    try:
        return read_llama(folder).to(device)
    except NotLlamaError as error:
        raise UserError(f"{folder}: not a plain Llama: {error}") from None


def read_llama(folder: Path, context: int | None = None) -> Transformer:
    """`load_published` for a folder whose files are intact (`check_files`), without texts for users.

    `context` bounds the sequences; None: as the model states. Raises NotLlamaError for other models, and
    UserError for a longer context than the model's.
    """
    config = read_llama_config(read_config(folder))
    if context is not None:
        if context > config.context:
            raise UserError(f"context: {context} is longer than the {config.context} positions of {folder}")
        config = config.model_copy(update={"context": context})
    weights = {}
    for path in weight_files(folder):
        weights |= load_file(path)
    check_llama_weights(config, weights)
    return from_llama(config, weights)
