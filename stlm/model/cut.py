"""Smaller models made of the weights of a larger one: fewer tokens, layers, heads, hidden units, less width.

Each function returns a new model; the given one is left as it is. Where nothing is left out, the new weights
equal the old ones to the bit.

What a matrix no longer reads can be made up for by what it still reads (`moments`): the new matrix predicts
the old outputs W x from the inputs z that are left with the least squared error on the text that the moments
were measured on, W' = W E[x z^T] E[z z^T]^-1 (He et al. 2017, "Channel pruning", section 3.1; the same
correction as in Hassibi and Stork 1993, "Optimal brain surgeon"). Inputs that are zero, or independent of the
rest, change nothing. A ridge shrinks the correction, as there are so many units that thousands of tokens can
be fitted by chance.

Shapes: V vocabulary, D width, d the width that is left, H heads, K key/value heads, E head width, X inputs,
Y outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer

# Added to the diagonal of the moments of heads' and hidden units' outputs, a share of its mean. On SmolLM2,
# with the moments of 4,096 tokens, 10 gives away a part of what refitting gains, and 1e-4 all of it where a
# third of the hidden units is cut (docs/inheriting.md).
RIDGE = 1.0


def rebuilt(model: Transformer, sizes: Mapping[str, Any], weights: dict[str, Tensor]) -> Transformer:
    """A model of `model`'s config with other sizes, and these weights, a shared one under each name."""
    config = ModelConfig.model_validate(model.config.model_dump() | sizes)
    with torch.random.fork_rng(devices=[]):
        other = Transformer(config)
    other.load_state_dict(weights)
    return other.to(model.embedding.weight.device).train(model.training)


@torch.no_grad()
def cut_vocabulary(model: Transformer, ids: Tensor) -> Transformer:
    """The model of the tokens `ids` [v], in this order."""
    weights = dict(model.state_dict())
    for name in ("embedding.weight", "output.weight", *_tables(model)):
        weights[name] = weights[name][ids]
    return rebuilt(model, {"vocab_size": len(ids)}, weights)


@torch.no_grad()
def cut_context(model: Transformer, context: int) -> Transformer:
    """The model for rows of at most `context` tokens, with the first of its positions if it learned them."""
    weights = dict(model.state_dict())
    if model.config.positions == "learned":
        weights["positions.weight"] = weights["positions.weight"][:context]
    return rebuilt(model, {"context": context}, weights)


def _tables(model: Transformer) -> list[str]:
    return [f"value_embeddings.{number}.weight" for number in range(len(model.value_embeddings))]


@torch.no_grad()
def cut_layers(model: Transformer, layers: Sequence[int], value_embeddings: int | None = None) -> Transformer:
    """The model of these layers, in order. The stream is not rescaled: what is left out adds nothing to it.

    `value_embeddings`: how many of the last layers have tables then; a layer without one gets zeros. None:
    those that had one.
    """
    given = model.state_dict()
    weights = {
        name: tensor
        for name, tensor in given.items()
        if not name.startswith(("blocks.", "value_embeddings."))
    }
    for place, layer in enumerate(layers):
        start = f"blocks.{layer}."
        weights |= {
            f"blocks.{place}.{name.removeprefix(start)}": tensor
            for name, tensor in given.items()
            if name.startswith(start)
        }
    first = len(model.blocks) - len(model.value_embeddings)
    count = sum(layer >= first for layer in layers) if value_embeddings is None else value_embeddings
    config = model.config
    for number, layer in enumerate(layers[len(layers) - count :]):
        table = given.get(f"value_embeddings.{layer - first}.weight")
        if table is None:
            table = given["embedding.weight"].new_zeros(
                config.vocab_size, config.kv_heads * config.head_width
            )
        weights[f"value_embeddings.{number}.weight"] = table
    return rebuilt(model, {"layers": len(layers), "value_embeddings": count}, weights)


def choose_heads(scores_H: Tensor, kv_heads: int, heads: int, kept_kv: int) -> tuple[list[int], list[int]]:
    """The query heads to keep, in order, and the key/value heads that they read, by query heads' importance.

    Of `kv_heads` groups, `kept_kv` remain, and `heads / kept_kv` heads in each; a group counts the squares of
    the heads that it would keep. With as many key/value heads as query heads, the best query heads remain,
    each with a copy of its own of the key/value head that it reads.
    """
    scores_KG = scores_H.reshape(kv_heads, -1)
    size = scores_KG.shape[1]
    if heads == kept_kv:
        queries = choose(scores_H, heads)
        return queries, [query // size for query in queries]
    best_KG = scores_KG.argsort(dim=1, descending=True, stable=True)[:, : heads // kept_kv]
    value_K = scores_KG.gather(1, best_KG).square().sum(dim=1)
    groups = choose(value_K, kept_kv)
    return [k * size + g for k in groups for g in sorted(best_KG[k].tolist())], groups


def choose(scores_X: Tensor, count: int) -> list[int]:
    """The `count` units of the highest scores, in order; of equal ones the first."""
    return sorted(scores_X.argsort(descending=True, stable=True)[:count].tolist())


@torch.no_grad()
def mask_heads(
    model: Transformer,
    heads: Sequence[Sequence[int]],
    moments: Sequence[Tensor] | None = None,
    ridge: float = RIDGE,
) -> Transformer:
    """The model in which only these query heads of each layer write into the stream; its shapes are the same.

    A model's heads make up its width, so they are taken out together with it (`stlm.model.width.cut_width`).
    `moments`: of the inputs of each layer's output matrix [H E, H E], see above.
    """
    weights = dict(model.state_dict())
    for number, kept in enumerate(heads):
        name, columns = f"blocks.{number}.attention.out.weight", head_inputs(kept, model.config.head_width)
        moment_XX = None if moments is None else moments[number]
        masked_YX = torch.zeros_like(weights[name])
        masked_YX[:, columns] = fewer_inputs(weights[name], columns, moment_XX, ridge)
        weights[name] = masked_YX
    return rebuilt(model, {}, weights)


def head_inputs(heads: Sequence[int], E: int) -> Tensor:
    """The inputs, or rows, that belong to these heads, each E wide."""
    return (torch.tensor(heads)[:, None] * E + torch.arange(E)).flatten()


@torch.no_grad()
def cut_ffn(
    model: Transformer,
    units: Sequence[Sequence[int]],
    moments: Sequence[Tensor] | None = None,
    ridge: float = RIDGE,
) -> Transformer:
    """The model with these hidden units in each layer. `moments`: of all hidden units [F, F], see above."""
    weights = dict(model.state_dict())
    for number, kept in enumerate(units):
        kept, name = torch.tensor(kept), f"blocks.{number}.ffn"
        up = "gate_up" if model.config.ffn == "swiglu" else "up"
        into_YD = weights[f"{name}.{up}.weight"]
        rows = torch.cat([kept, kept + model.config.ffn_width]) if up == "gate_up" else kept
        weights[f"{name}.{up}.weight"] = into_YD[rows]
        moment_XX = None if moments is None else moments[number]
        weights[f"{name}.down.weight"] = fewer_inputs(weights[f"{name}.down.weight"], kept, moment_XX, ridge)
    return rebuilt(model, {"ffn_width": len(units[0])}, weights)


def fewer_inputs(weight_YX: Tensor, kept: Tensor, moment_XX: Tensor | None, ridge: float = RIDGE) -> Tensor:
    """The matrix that reads the inputs `kept` only, corrected for the others if their moments are given."""
    kept_Yx = weight_YX[:, kept]
    if moment_XX is None or len(kept) == weight_YX.shape[1]:
        return kept_Yx
    rest = torch.ones(weight_YX.shape[1], dtype=torch.bool).index_fill(0, kept, False).nonzero().squeeze(1)
    moment_XX = moment_XX.to(weight_YX.device)
    # From the inputs that are left to what the others would have been [rest, kept].
    others_RX = solve(moment_XX[kept][:, kept], moment_XX[rest][:, kept], ridge)
    return kept_Yx + (weight_YX[:, rest].double() @ others_RX).to(weight_YX.dtype)


def solve(moment_xx: Tensor, cross_Yx: Tensor, ridge: float) -> Tensor:
    """cross times the inverse of `moment_xx`, to which `ridge` times its mean diagonal is added; float64."""
    added = ridge * moment_xx.diagonal().mean() + torch.finfo(torch.float64).tiny
    ridged_xx = moment_xx + added * torch.eye(len(moment_xx), dtype=moment_xx.dtype, device=moment_xx.device)
    return torch.linalg.solve(ridged_xx, cross_Yx.T).T
