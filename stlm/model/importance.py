"""How much the parts of a trained model matter on a text: layers, heads, hidden units, the residual stream.

Shapes: N rows, M = L + 1 tokens of a row (the last is a target alone), B rows at a time, L length, D width, H
query heads, X inputs of a matrix, Y its outputs. Models of dense matrices only (`stlm.study.start`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.layout import CausalRows
from stlm.model.transformer import Transformer

# Tokens in a forward pass, and in one with gradients, whose activations of all layers are kept.
TOKENS, TOKENS_WITH_GRADIENTS = 4096, 1024


def _batches(rows_NM: Tensor, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    return rows_NM.split(max(1, tokens // rows_NM.shape[1]))


@contextmanager
def _measuring(model: Transformer) -> Iterator[ExitStack]:
    """The model in evaluation mode, its parameters without gradients; hooks on the stack are removed."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        with ExitStack() as stack:
            yield stack
    finally:
        model.train(was_training)
        for parameter, value in trains.items():
            parameter.requires_grad_(value)


def subset(model: Transformer, layers: Sequence[int]) -> Transformer:
    """The model with some of its blocks, in order, and their value embeddings; weights are shared with it."""
    first = len(model.blocks) - len(model.value_embeddings)
    other = model.view()
    other.blocks = nn.ModuleList([model.blocks[layer] for layer in layers])
    other.value_embeddings = nn.ModuleList(
        [model.value_embeddings[layer - first] for layer in layers if layer >= first]
    )
    return other


@torch.no_grad()
def mean_loss(model: Transformer, rows_NM: Tensor) -> float:
    """The mean cross-entropy of the rows' tokens after the first, in nats."""
    with _measuring(model):
        losses = [len(rows) * model.loss(rows[:, :-1], rows[:, 1:]).item() for rows in _batches(rows_NM)]
    return sum(losses) / len(rows_NM)


@torch.no_grad()
def influence(model: Transformer, rows_NM: Tensor) -> list[float]:
    """1 - the mean cosine of each block's input and output (ShortGPT, Men et al. 2024, equation 1)."""
    sums = torch.zeros(len(model.blocks), dtype=torch.float64)

    def add(number: int, args: tuple[Tensor, ...], out_BLD: Tensor) -> None:
        sums[number] += F.cosine_similarity(args[0], out_BLD, dim=-1).double().sum().cpu()

    with _measuring(model) as stack:
        for number, block in enumerate(model.blocks):
            stack.callback(
                block.register_forward_hook(lambda _, args, out, number=number: add(number, args, out)).remove
            )
        for rows in _batches(rows_NM):
            model.hidden(rows[:, :-1])
    return (1 - sums / rows_NM[:, 1:].numel()).tolist()


@torch.no_grad()
def removals(model: Transformer, rows_NM: Tensor, count: int) -> list[tuple[int, float]]:
    """Leave out `count` layers, one after another, each time that without which the loss is lowest.

    Returns each layer and the loss without it and those before, in nats. It takes about half a forward pass
    for each layer that is left, each time: the passes share what comes before the layer in question.
    """
    kept, found = list(range(len(model.blocks))), []
    with _measuring(model):
        for _ in range(count):
            losses = _losses_without_each(subset(model, kept), rows_NM)
            place = min(range(len(kept)), key=losses.__getitem__)
            found.append((kept.pop(place), losses[place]))
    return found


def _losses_without_each(model: Transformer, rows_NM: Tensor) -> list[float]:
    """The mean loss without each of the model's blocks."""
    count = len(model.blocks)
    sums = [0.0] * count
    for rows in _batches(rows_NM):
        tokens_BL, targets_BL = rows[:, :-1], rows[:, 1:]
        layout = CausalRows(tokens_BL.shape[1])
        before = _before_blocks(model, tokens_BL, layout)
        for place in range(count):
            other = subset(model, [layer for layer in range(count) if layer != place])
            x_BLD = other.continued(before[place], tokens_BL, layout, place) if count > 1 else before[0]
            x_ND = other.finish(x_BLD).flatten(0, 1)
            sums[place] += len(rows) * other.hidden_loss(x_ND, tokens_BL, targets_BL).item()
    return [loss / len(rows_NM) for loss in sums]


def _before_blocks(model: Transformer, tokens_BL: Tensor, layout: CausalRows) -> list[Tensor]:
    """The residual stream [B, L, D] before each block."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:
            hook = block.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
            stack.callback(hook.remove)
        model.hidden(tokens_BL, layout)
    return found


def second_moments(
    model: Transformer, rows_NM: Tensor, modules: Mapping[str, nn.Module], normalized: bool = False
) -> dict[str, Tensor]:
    """The mean of x x^T [X, X], float64, over the tokens' inputs x of each module.

    `normalized`: of x divided by its root mean square.
    """
    # The kernels for scoring, which are used without gradients, would pass the norms by.
    with _measuring(model), torch.enable_grad(), _summing(modules, normalized) as sums:
        for rows in _batches(rows_NM):
            model.hidden(rows[:, :-1])
    tokens = rows_NM[:, 1:].numel()
    return {name: total.div_(tokens) for name, total in sums.items()}


@contextmanager
def _summing(modules: Mapping[str, nn.Module], normalized: bool = False) -> Iterator[dict[str, Tensor]]:
    """The sums of x x^T over the inputs x of each module that is called meanwhile."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x_NX = x.detach().flatten(0, -2).float()
        if normalized:
            x_NX = F.rms_norm(x_NX, x_NX.shape[-1:], eps=1e-30)
        product_XX = (x_NX.T @ x_NX).double()
        sums[name] = sums[name].add_(product_XX) if name in sums else product_XX

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            stack.callback(hook.remove)
        yield sums


def moments_by_block(
    model: Transformer,
    rows_NM: Tensor,
    modules: Sequence[Mapping[str, nn.Module]],
    change: Callable[[int, dict[str, Tensor]], None],
) -> None:
    """Call `change` for each block in order, with its number and the `second_moments` of its `modules`.

    The moments are measured on what `change` has made of the blocks before. The rows pass each block twice,
    and their residual stream is held.
    """
    batches, tokens = _batches(rows_NM), rows_NM[:, 1:].numel()
    layouts = [CausalRows(rows.shape[1] - 1) for rows in batches]
    with _measuring(model), torch.enable_grad():
        first = subset(model, [0])
        streams = [
            _before_blocks(first, rows[:, :-1], layout)[0]
            for rows, layout in zip(batches, layouts, strict=True)
        ]

        def after(place: int, number: int) -> Tensor:
            tokens_BL = batches[place][:, :-1]
            return model.continued(streams[place], tokens_BL, layouts[place], number, number + 1)

        for number, own in enumerate(modules):
            if own:
                with _summing(own) as sums:
                    for place in range(len(batches)):
                        after(place, number)
                with torch.no_grad():
                    change(number, {name: total.div_(tokens) for name, total in sums.items()})
            for place in range(len(batches)):
                streams[place] = after(place, number)


def first_order(
    model: Transformer, rows_NM: Tensor, modules: Mapping[str, nn.Module], unit: Mapping[str, int]
) -> dict[str, Tensor]:
    """The mean over tokens of |sum of x dl/dx|, for each unit of a module's inputs x: name -> [X / unit].

    l is the sum of all tokens' losses in nats, so this is the change of the loss if the unit were zero at one
    token, to first order (Molchanov et al. 2017, equation 8; Michel et al. 2019, equation 2). `unit`: the
    inputs that make one, the width of a head or 1.
    """
    sums: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        x.retain_grad()
        inputs[name] = x

    with _measuring(model) as stack, torch.enable_grad():
        stack.callback(model.embedding.register_forward_hook(lambda _, __, out: out.requires_grad_()).remove)
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            stack.callback(hook.remove)
        for rows in _batches(rows_NM, TOKENS_WITH_GRADIENTS):
            tokens_BL, targets_BL = rows[:, :-1], rows[:, 1:]
            (model.loss(tokens_BL, targets_BL) * targets_BL.numel()).backward()
            for name, x in inputs.items():
                change_NXU = (x.detach() * x.grad).flatten(0, -2).unflatten(-1, (-1, unit[name]))
                total_X = change_NXU.sum(dim=-1).abs().sum(dim=0).double()
                sums[name] = sums[name] + total_X if name in sums else total_X
            inputs.clear()
    tokens = rows_NM[:, 1:].numel()
    return {name: total / tokens for name, total in sums.items()}


def unit_scores(
    measure: str, weight_YX: Tensor, moment_XX: Tensor, unit: int, first: Tensor | None
) -> Tensor:
    """The importance [X / unit] of each unit of the inputs of a matrix; see `training.inherit.ffn`.

    `moment_XX`: the inputs' second moments, `first`: what `first_order` found, for `taylor`.
    """
    if measure == "taylor":
        assert first is not None
        return first
    size_X = weight_YX.double().square().sum(dim=0)
    mean_X = moment_XX.diagonal()
    squares_X = {"magnitude": size_X, "activation": mean_X, "wanda": size_X * mean_X}[measure]
    return squares_X.unflatten(0, (-1, unit)).sum(dim=1).sqrt()
