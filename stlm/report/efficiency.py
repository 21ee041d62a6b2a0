"""Tokens, FLOPs and seconds that a variant needs to reach the baseline's final loss: table and plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stlm.report.curves import COSTS, Cost, Variant
from stlm.report.names import cost_text, count, rounded, seeds_label
from stlm.report.notes import curve_notes
from stlm.report.style import CHANCE, COST_LOOKS, figure, legend, legend_entry, variant_rows, write_data
from stlm.report.table import Table
from stlm.study.runs import Study

_DIGITS: dict[Cost, int | None] = {"tokens": None, "flops": None, "seconds": 1}
_NOT_REACHED = {"marker": ">", "markerfacecolor": "white"}


def crossing(x: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """The first x at which a falling curve is at or below `target`, by linear interpolation; None: never.

    If its first point already is, that point is returned: what came before was not measured.
    """
    below = np.flatnonzero(values <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    share = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def needed(variant: Variant, base: Variant) -> dict[Cost, float | None]:
    """The cost at which a variant reaches the baseline's last value; None: not reached, or not comparable."""
    if variant is base:  # the whole cost: a curve that is not monotonic reaches the value earlier
        return {cost: base.curve.end(cost) for cost in COSTS}
    return {
        cost: crossing(variant.aligned.costs[cost], variant.aligned.bits, float(variant.baseline.bits[-1]))
        if variant.compares(cost)
        else None
        for cost in COSTS
    }


def efficiency_table(study: Study, variants: Sequence[Variant]) -> Table:
    """A row per variant: the cost of its training, and the cost until it reached the baseline's last loss."""
    base = variants[0]
    return Table.of_columns(
        "efficiency",
        f"Training efficiency beside {base.train.label}, study {study.name}",
        [_columns(variant, base) for variant in variants],
        [
            f"Of validation curves, in bits per byte; the baseline is {base.train.label}, its last value "
            f"{base.curve.bits[-1]:.4f}. Tokens, FLOPs and time to it: where a variant's curve, straight "
            "between its validations, first is there; below, their ratio to all of the baseline's. Where "
            "learning rates decay to the end, so do losses: a variant that trains longer than the baseline "
            "has not yet decayed where the baseline ends.",
            *curve_notes(variants),
        ],
    )


def _columns(variant: Variant, base: Variant) -> Iterator[tuple]:
    train, curve = variant.train, variant.curve
    named = {"variant": train.variant, "label": train.label, "seeds": variant.seeds}
    yield "", seeds_label(train.label, variant.seeds), named
    active = f"\n{count(train.parameters.active)} for a token" if train.parameters.active else ""
    yield "parameters", count(train.parameters.total) + active, {}
    costs = {cost: round(curve.end(cost), _DIGITS[cost]) for cost in COSTS}
    yield "trained for", "\n".join(cost_text(cost, curve.end(cost)) for cost in COSTS), costs
    last = float(curve.bits[-1])
    yield "bits per byte\nat the end", f"{last:.3f}", {"val_bits_per_byte": round(last, 5)}
    for cost, value in needed(variant, base).items():
        text = "not reached" if variant is base or variant.compares(cost) else "–"
        record = dict.fromkeys((f"{cost}_to_baseline", f"{cost}_ratio"))
        if value is not None:
            ratio = value / base.curve.end(cost)
            text = f"{cost_text(cost, value)}\n{ratio:.2f} ×"
            record = dict(zip(record, (round(value, _DIGITS[cost]), round(ratio, 4)), strict=True))
        yield f"{COSTS[cost]} to the\nbaseline's last loss", text, record
    spikes = variant.spikes
    yield "loss spikes", "–" if spikes is None else str(spikes), {"loss_spikes": spikes}


def write_efficiency(folder: Path, study: Study, variants: Sequence[Variant]) -> None:
    """Write the plot efficiency and data/efficiency.csv into `folder`: a row per comparable variant."""
    base, others = variants[0], [variant for variant in variants[1:] if variant.aligned is not None]
    if not others:
        return
    ratios = [
        {cost: value and value / base.curve.end(cost) for cost, value in needed(variant, base).items()}
        for variant in others
    ]
    records = []
    for variant, ratio in zip(others, ratios, strict=True):
        shown = {cost: rounded(ratio[cost], 4) for cost in COSTS}
        record = {"variant": variant.train.variant, "flops_ratio": shown["flops"]}
        records.append(record | {"seconds_ratio": shown["seconds"], "value": shown["tokens"]})
    write_data(folder, "efficiency", records)
    title = f"Cost until the last loss of {base.train.label}, study {study.name}"
    handles = {
        cost: legend_entry(name, **COST_LOOKS[cost])
        for cost, name in COSTS.items()
        if any(variant.compares(cost) for variant in others)
    }
    with figure(folder, "efficiency", title, 8.5, 2.0 + 0.42 * len(others)) as drawing:
        axes = drawing.subplots()
        axes.axvline(1, zorder=1, **CHANCE)
        shown = [1.0]
        for row, (variant, ratio) in enumerate(zip(others, ratios, strict=True)):
            for place, cost in enumerate(COSTS):
                if not variant.compares(cost):
                    continue
                value, look = ratio[cost], COST_LOOKS[cost]
                if value is None:
                    value, look = variant.aligned.end(cost) / base.curve.end(cost), look | _NOT_REACHED
                    handles["not reached"] = legend_entry("not reached by its end", **_NOT_REACHED)
                shown.append(value)
                axes.plot([value], [row + 0.24 * (place - 1)], linestyle="none", markersize=7, **look)
        _ratio_axis(axes, min(0.7, min(shown) / 1.2), max(1.4, max(shown) * 1.2))
        variant_rows(axes, [variant.train.label for variant in others])
        legend(drawing, list(handles.values()), 4)


def _ratio_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 3, 4, 8] if high / low > 2.5 else np.arange(0.4, 2.1, 0.1)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    axes.set_xlabel("ratio to the baseline's training")
