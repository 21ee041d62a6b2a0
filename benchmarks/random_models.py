"""Checkpoints with random weights: speed does not depend on what a model has learned."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from command import default_checkpoints, label

from stlm.errors import UserError
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.tokens.tokenizer import gpt2_tokenizer, load_tokenizer
from stlm.training.checkpoints import checkpoint_name, save_checkpoint

# With new embeddings (standard deviation 0.02) all tokens are about equally probable. With larger ones
# the probabilities of options differ as much as a trained model's, and bfloat16 leaves few near ties.
_EMBEDDING_SCALE = 3.0


def random_checkpoint(study: str, raw: Path, folder: Path) -> Path:
    """Write a checkpoint of the shape of `study`'s baseline, with its tokenizer, to `folder`/STUDY/; seed 0.

    GPT-2's vocabulary is read from `raw`/gpt2, others from the study's tokens.
    """
    own = load_study(study)
    run = own.run(own.baseline)
    if run.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer(raw / "gpt2")
    elif (run.tokens_folder / "tokenizer").is_dir():
        tokenizer = load_tokenizer(run.tokens_folder / "tokenizer")
    else:
        raise UserError(
            f"{run.tokens_folder / 'tokenizer'}: no tokenizer; run: stlm tokenize {run.corpus} "
            f"{run.tokenizer}"
        )
    torch.manual_seed(0)
    model = Transformer(run.model)
    with torch.no_grad():
        model.embedding.weight *= _EMBEDDING_SCALE
    checkpoint = folder / study / "random" / "checkpoints" / checkpoint_name(0)
    save_checkpoint(checkpoint, model, {"step": 0, "tokens": 0})
    tokenizer.save(checkpoint.parent / "tokenizer")
    return checkpoint


def add_random(parser: argparse.ArgumentParser) -> None:
    """--random, repeatable."""
    parser.add_argument(
        "--random",
        action="append",
        default=[],
        metavar="STUDY",
        help="a model of random weights, of the shape of STUDY's baseline (repeatable)",
    )


def chosen_models(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The checkpoints of --model and --random by name, otherwise the default ones; random ones are written to
    `folder`."""
    models = {label(checkpoint): checkpoint for checkpoint in options.model or []}
    for study in options.random:
        models[f"{study}, random weights"] = random_checkpoint(study, options.raw, folder)
    return models or {label(checkpoint): checkpoint for checkpoint in default_checkpoints()}
