"""Cuts a trained model to the sizes of a smaller config, keeping what matters most on a text.

The order: layers, hidden units, then heads and width. Each choice is measured on the model that is left by
the ones before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stlm.model.config import ModelConfig
from stlm.model.cut import choose, choose_heads, cut_ffn, cut_layers, mask_heads
from stlm.model.flops import forward_flops
from stlm.model.importance import first_order, influence, removals, second_moments, unit_scores
from stlm.model.inherit_config import InheritConfig
from stlm.model.transformer import Transformer
from stlm.model.width import channel_scores, channels, components, cut_width, stream_moments


class Cut(NamedTuple):
    """A smaller model, and for train.json what it kept and why."""

    model: Transformer
    record: dict[str, Any]


class Chosen(NamedTuple):
    """The layers to keep, and what each layer's choice rests on: scores by layer, or the layers left out."""

    layers: list[int]
    record: dict[str, Any]


def cut(model: Transformer, config: ModelConfig, how: InheritConfig, rows_NM: Tensor) -> Cut:
    """The model with the layers, width, heads and hidden units of `config`; nothing else of it is read.

    `rows_NM`: the tokens of the text that importance is measured on. A model that has these sizes already is
    returned itself.
    """
    record: dict[str, Any] = {}
    if config.layers < model.config.layers:
        chosen = choose_layers(model, config.layers, how, rows_NM)
        value_embeddings = min(config.value_embeddings, config.layers)
        model = cut_layers(model, chosen.layers, value_embeddings)
        record["layers"] = chosen.record
    if config.ffn_width < model.config.ffn_width:
        model, record["ffn"] = _cut_units(model, config.ffn_width, how, rows_NM)
    if config.width < model.config.width:
        model, record["width"] = _cut_stream(model, config, how, rows_NM)
    return Cut(model, record)


def choose_layers(model: Transformer, count: int, how: InheritConfig, rows_NM: Tensor) -> Chosen:
    """`count` of the model's layers, chosen as `how.layers` says; see `InheritConfig`."""
    total = len(model.blocks)
    if how.layers == "influence":
        scores = influence(model, rows_NM)
        layers = choose(torch.tensor(scores), count)
        return Chosen(layers, {"kept": layers, "influence": [round(score, 5) for score in scores]})
    if how.layers == "loss":
        gone = removals(model, short(rows_NM), total - count)
        layers = sorted(set(range(total)) - {layer for layer, _ in gone})
        return Chosen(layers, {"kept": layers, "left_out": [[layer, round(loss, 5)] for layer, loss in gone]})
    if how.layers == "first":
        layers = list(range(count))
    elif how.layers == "spread":
        layers = spread(total, count)
    else:
        layers = list(how.layers)
    return Chosen(layers, {"kept": layers})


def measuring_flops(model: Transformer, config: ModelConfig, how: InheritConfig, rows_NM: Tensor) -> float:
    """The FLOPs of the passes over the text by which `cut` chooses, from the model's structure.

    Products of single matrices, by which what is cut is fitted, are left out.
    """
    length, layers, rows = rows_NM.shape[1] - 1, len(model.blocks), len(rows_NM)
    block, flops = forward_flops(model.blocks[0], length), 0.0
    head = forward_flops(model, length) - layers * block
    if config.layers < layers:
        if how.layers == "influence":
            flops += rows * layers * block
        elif how.layers == "loss":
            read = short(rows_NM)
            share = len(read) * (read.shape[1] - 1) / length
            for left in range(layers, config.layers, -1):
                # One pass through all layers; without layer p, one goes on after it, through left - 1 - p.
                flops += share * (left * head + (left + left * (left - 1) / 2) * block)
        layers = config.layers
    for smaller, measure, passes in (
        (config.ffn_width < model.config.ffn_width, how.ffn, 1),
        (config.width < model.config.width, how.heads, 2),
    ):
        if smaller:
            flops += passes * rows * layers * block
            flops += 3 * rows * (head + layers * block) if measure == "taylor" else 0.0
    return flops


def short(rows_NM: Tensor) -> Tensor:
    """A part of the text for `removals`, which reads it hundreds of times: 1,024 tokens, 128 to a row.

    On SmolLM2, half as many chose better layers than their influence did (docs/inheriting.md).
    """
    length = min(128, rows_NM.shape[1] - 1)
    count = 1024 // length
    return rows_NM[:: max(1, len(rows_NM) // count)][:count, : length + 1]


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` layers at even distances, the first and the last among them (of one, the first)."""
    return [round(place * (total - 1) / max(1, count - 1)) for place in range(count)]


def _cut_units(
    model: Transformer, count: int, how: InheritConfig, rows_NM: Tensor
) -> tuple[Transformer, dict[str, Any]]:
    modules = {f"{number}": block.ffn.down for number, block in enumerate(model.blocks)}
    moments = second_moments(model, rows_NM, modules)
    first = first_order(model, rows_NM, modules, dict.fromkeys(modules, 1)) if how.ffn == "taylor" else {}
    kept, shares = [], []
    for name, module in modules.items():
        scores_X = unit_scores(how.ffn, module.weight, moments[name], 1, first.get(name)).cpu()
        units = choose(scores_X, count)
        kept.append(units)
        shares.append(round((scores_X[units].sum() / scores_X.sum()).item(), 5))
    smaller = cut_ffn(model, kept, list(moments.values()) if how.refit else None)
    return smaller, {"measure": how.ffn, "share_of_scores_by_layer": shares}


def _cut_stream(
    model: Transformer, config: ModelConfig, how: InheritConfig, rows_NM: Tensor
) -> tuple[Transformer, dict[str, Any]]:
    old, modules = model.config, {f"{n}": block.attention.out for n, block in enumerate(model.blocks)}
    moments = second_moments(model, rows_NM, modules)
    E = old.head_width
    first = first_order(model, rows_NM, modules, dict.fromkeys(modules, E)) if how.heads == "taylor" else {}
    heads: list[Sequence[int]] = []
    kv_heads: list[Sequence[int]] = []
    scores: list[list[float]] = []
    for name, module in modules.items():
        scores_H = unit_scores(how.heads, module.weight, moments[name], E, first.get(name)).cpu()
        chosen = choose_heads(scores_H, old.kv_heads, config.heads, config.kv_heads)
        heads.append(chosen[0])
        kv_heads.append(chosen[1])
        scores.append([round(score, 5) for score in scores_H.tolist()])
    model = mask_heads(model, heads, list(moments.values()) if how.refit else None)
    stream = stream_moments(model, rows_NM)
    if how.width == "components":
        basis_Dd = components(stream)[:, : config.width]
        record = {"components": config.width}
    else:
        kept = choose(channel_scores(model, stream), config.width)
        basis_Dd, record = channels(kept, old.width), {"channels": kept}
    share = sum((basis_Dd.T @ moment @ basis_Dd).trace() for moment in stream.values()) / len(stream)
    record |= {"share_of_squares": round(share.item() / old.width, 5)}
    record |= {"heads": heads, "measure": how.heads, "scores": scores}
    return cut_width(model, basis_Dd, stream, heads, kv_heads, how.refit, config.tied), record
