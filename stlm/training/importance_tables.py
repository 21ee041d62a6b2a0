"""`stlm importance STUDY RUN`: what matters in the model that a run starts from, and cuts of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.model.cut import choose
from stlm.model.cutting import cut, short, spread
from stlm.model.importance import first_order, influence, removals, second_moments, subset, unit_scores
from stlm.model.inherit_config import Measure
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.study.start import is_cut
from stlm.text_table import text_table
from stlm.tokens.batches import ValidationSet
from stlm.training.dependencies import Dependency
from stlm.training.inherited import calibration_rows, with_tokens

MEASURES = get_args(Measure)


def importance_tables(run: Run, counts: Sequence[int] = (), with_loss: bool = False) -> str:
    """The importance of layers, heads and hidden units on the run's text, and bits per byte after cuts.

    `counts`: numbers of layers to cut to, by each way; default: three quarters, a half and a third of them.
    `with_loss` measures `loss` too, which takes about half of the layers' squared number of forward passes.
    Trains and writes nothing. Raises UserError where the run starts from nothing, or its text is missing.
    """
    if "start" not in run.dependencies:
        raise UserError(f"run {run.name} starts from new weights (training.start_from): nothing is inherited")
    origin = Dependency.read(run, "start")
    rows_NM, validation = calibration_rows(run), _validation(run)
    model = with_tokens(run, origin)
    layers = len(model.blocks)
    counts = list(counts) or [layers * 3 // 4, layers // 2, layers // 3, run.model.layers]
    counts = sorted({max(1, count) for count in counts}, reverse=True)
    for count in counts:
        if count > layers:
            raise UserError(f"--layers: {count}: {origin.name} has {layers}")
    gone = removals(model, short(rows_NM), layers - min(counts)) if with_loss else []
    scores = influence(model, rows_NM)
    parts = [
        f"run {run.name} starts from {origin.name}: {layers} layers, width {model.config.width}, "
        f"{model.config.heads} heads ({model.config.kv_heads} of keys and values), {model.config.ffn_width} "
        f"hidden units, {model.config.vocab_size:,} tokens",
        f"measured on {rows_NM[:, 1:].numel():,} tokens of the training text; bits per byte are of "
        f"{validation.n_bytes:,} bytes of the validation text, right after the cut",
        "",
        *_part_tables(run, model, rows_NM, scores, [layer for layer, _ in gone]),
        "",
        *_layer_cuts(model, scores, [layer for layer, _ in gone], counts, validation),
    ]
    if is_cut(run.model, model.config):
        smaller = cut(model, run.model, run.training.inherit, rows_NM).model
        parts += [
            "",
            f"the run's model, cut as training.inherit says: {bits_per_byte(smaller, validation):.4f}",
        ]
    return "\n".join(parts)


def _validation(run: Run) -> ValidationSet:
    size = min(run.training.validation_bytes, run.training.inherit.bytes)
    return ValidationSet(run.tokens_folder, run.model.context, size)


@torch.no_grad()
def bits_per_byte(model: Transformer, validation: ValidationSet) -> float:
    """Bits per byte of the validation text, as training measures them."""
    nats = 0.0
    for batch in validation.batches(8):
        tokens_BL, targets_BL, mask_BL = map(torch.from_numpy, batch)
        nats += model.loss(tokens_BL, targets_BL, mask_BL).item()
    return nats / math.log(2) / validation.n_bytes


def _part_tables(
    run: Run, model: Transformer, rows_NM: Tensor, scores: Sequence[float], gone: Sequence[int]
) -> list[str]:
    """A line a layer: its influence and what its best hidden units have of all; then its heads' shares."""
    config = model.config
    outs = {f"{number}": block.attention.out for number, block in enumerate(model.blocks)}
    downs = {f"{number}": block.ffn.down for number, block in enumerate(model.blocks)}
    units, heads = _scores(model, rows_NM, downs, 1), _scores(model, rows_NM, outs, config.head_width)
    best = run.model.ffn_width if run.model.ffn_width < config.ffn_width else config.ffn_width // 2
    layers = [["layer", "influence", *(["left out as"] if gone else []), *MEASURES]]
    groups = [["layer", *MEASURES]]
    for number, influenced in enumerate(scores):
        place = str(gone.index(number) + 1) if number in gone else "–"
        held = [units[measure][number].topk(best).values.sum() for measure in MEASURES]
        held = [part / units[measure][number].sum() for part, measure in zip(held, MEASURES, strict=True)]
        shares = [heads[measure][number] / heads[measure][number].sum() for measure in MEASURES]
        left_out = [place] if gone else []
        layers.append([str(number), f"{influenced:.4f}", *left_out, *(f"{100 * part:.1f}" for part in held)])
        groups.append([str(number), *(" ".join(f"{100 * part:.0f}" for part in row) for row in shares)])
    return [
        f"layers; and of all scores of hidden units, by each measure, the share of the best {best:,} in %:",
        *text_table(layers, left=set()),
        "",
        "heads' shares in a layer in %, by each measure:",
        *text_table(groups, left=set()),
    ]


def _scores(
    model: Transformer, rows_NM: Tensor, modules: dict[str, nn.Module], unit: int
) -> dict[str, list[Tensor]]:
    """Measure -> for each layer the scores of its units, which are `unit` inputs of a module each."""
    moments = second_moments(model, rows_NM, modules)
    first = first_order(model, rows_NM, modules, dict.fromkeys(modules, unit))
    return {
        measure: [
            unit_scores(measure, module.weight.detach(), moments[name], unit, first[name])
            for name, module in modules.items()
        ]
        for measure in MEASURES
    }


def _layer_cuts(
    model: Transformer,
    scores: Sequence[float],
    gone: Sequence[int],
    counts: Sequence[int],
    validation: ValidationSet,
) -> list[str]:
    """Bits per byte of the model with fewer layers, chosen in each way."""
    total = len(model.blocks)
    ways = {
        "first": lambda count: list(range(count)),
        "spread": lambda count: spread(total, count),
        "influence": lambda count: choose(torch.tensor(scores), count),
    }
    if gone:
        ways["loss"] = lambda count: sorted(set(range(total)) - set(gone[: total - count]))
    lines = [
        ["layers left", *ways],
        [f"{total}", f"{bits_per_byte(model, validation):.4f}", *[""] * (len(ways) - 1)],
    ]
    for count in counts:
        if count < total:
            bits = [bits_per_byte(subset(model, way(count)), validation) for way in ways.values()]
            lines.append([f"{count}", *(f"{value:.4f}" for value in bits)])
    return text_table(lines, left=set())
