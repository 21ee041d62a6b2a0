"""Further language models within a trained one (such as each exit of a network), scored like the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from stlm.errors import UserError, nearest, shortened
from stlm.model.counts import parameter_groups
from stlm.model.flops import forward_flops
from stlm.model.transformer import Transformer
from stlm.training.checkpoints import read_description


def readouts_of(model: Transformer) -> dict[str, nn.Module]:
    """The readouts of all techniques of a model, by name."""
    found: dict[str, nn.Module] = {}
    for technique in model.techniques:
        found |= technique.readouts(model)
    return found


def find_readout(model: Transformer, name: str) -> nn.Module:
    """The readout `name` of a model; raises UserError, naming the nearest one, if there is none."""
    for technique in model.techniques:
        if (found := technique.readout(model, name)) is not None:
            return found
    known = readouts_of(model)
    if not known:
        raise UserError(f"{shortened(name)!r}: the model has no readouts")
    raise UserError(f"{shortened(name)!r} is no readout of the model{nearest(name, known)}")


def score_readouts(
    checkpoint: Path,
    load: Callable[[], Transformer],
    score: Callable[[str, Callable[[], nn.Module]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The results of a checkpoint's readouts by name; {} if it has none.

    Each has its `parameters` and `flops_per_token` (forward, in a text as long as the context) in addition to
    its scores. `load` returns the checkpoint's model; `score` takes a readout's name and a function that
    returns the readout, and returns the result. A model without techniques is not loaded.
    """
    if not read_description(checkpoint)[1].get("techniques"):
        return {}
    readouts = readouts_of(load())
    return {
        name: {**_cost(readout), **score(name, lambda readout=readout: readout)}
        for name, readout in readouts.items()
    }


def _cost(readout: nn.Module) -> dict[str, float]:
    context = readout.config.context
    return {
        "parameters": sum(parameter_groups(readout).values()),
        "flops_per_token": forward_flops(readout, context) / context,
    }
