"""Tokens, FLOPs and seconds that a variant needs to reach the baseline's final loss: table and plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stlm.files import write_text
from stlm.report.curves import COSTS, Cost, Variant
from stlm.report.documents import amount_note
from stlm.report.names import cost_text, count, seeds_label
from stlm.report.results import TrainRecord
from stlm.report.schema import ParameterCounts
from stlm.report.style import CHANCE, COST_LOOKS, figure, heading, variant_rows
from stlm.report.table import Cell, Table, csv_text
from stlm.study.runs import Study


@dataclass(frozen=True)
class Efficiency:
    """The cost at which a variant reaches the baseline's last value; None: not reached, or not comparable."""

    variant: Variant
    needed: Mapping[Cost, float | None]


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


def efficiencies(variants: Sequence[Variant]) -> list[Efficiency]:
    """The efficiency of each of `variants`, of which the first is the baseline."""
    return [
        Efficiency(variant, {cost: _needed(variant, cost, is_base=variant is variants[0]) for cost in COSTS})
        for variant in variants
    ]


def _needed(variant: Variant, cost: Cost, is_base: bool) -> float | None:
    if is_base:  # the whole cost: a curve that is not monotonic reaches the value earlier
        return variant.curve.end(cost)
    if not variant.compares(cost):
        return None
    return crossing(variant.beside.cost(cost), variant.beside.bits, float(variant.reference.bits[-1]))


def _size(parameters: ParameterCounts) -> str:
    """The number of parameters, and of those that a token uses where these are fewer."""
    active = f"\n{count(parameters.active)} for a token" if parameters.active else ""
    return count(parameters.total) + active


def efficiency_table(study: Study, found: Sequence[Efficiency]) -> Table:
    """A row per variant: the cost of its training, and the cost until it reached the baseline's last loss."""
    base = found[0]
    rows, records = [], []
    for result in found:
        train, curve = result.variant.train, result.variant.curve
        rows.append(
            [
                Cell(seeds_label(train.label, result.variant.seeds)),
                Cell(_size(train.parameters)),
                Cell("\n".join(cost_text(cost, curve.end(cost)) for cost in COSTS)),
                Cell(f"{curve.bits[-1]:.3f}"),
                *(_reached(result, base, cost) for cost in COSTS),
                Cell("–" if result.variant.spikes is None else str(result.variant.spikes)),
            ]
        )
        records.append(_record(result, base))
    return Table(
        name="efficiency",
        title=f"Training efficiency beside {base.variant.train.label}, study {study.name}",
        header=[
            "",
            "parameters",
            "trained for",
            "bits per byte\nat the end",
            "tokens to the\nbaseline's last loss",
            "FLOPs to the\nbaseline's last loss",
            "time to the\nbaseline's last loss",
            "loss spikes",
        ],
        rows=rows,
        notes=_notes(found),
        records=records,
    )


def _reached(result: Efficiency, base: Efficiency, cost: Cost) -> Cell:
    value, whole = result.needed[cost], base.needed[cost]
    if result is not base and not result.variant.compares(cost):
        return Cell("–")
    return Cell("not reached") if value is None else Cell(f"{cost_text(cost, value)}\n{value / whole:.2f} ×")


def _notes(found: Sequence[Efficiency]) -> list[str]:
    base = found[0].variant
    return [
        f"Of validation curves, in bits per byte; the baseline is {base.train.label}, its last value "
        f"{base.curve.bits[-1]:.4f}. Tokens, FLOPs and time to it: where a variant's curve, straight between "
        "its validations, first is there; below, their ratio to all of the baseline's. Where learning rates "
        "decay to the end, so do losses: a variant that trains longer than the baseline has not yet decayed "
        "where the baseline ends.",
        *comparison_notes([result.variant for result in found]),
    ]


def comparison_notes(variants: Sequence[Variant]) -> list[str]:
    """Limits of comparing these curves, of which the first is the baseline's."""
    base = variants[0]
    texts = [
        (variant.train.label, variant.train.validation)
        for variant in variants
        if variant.train.validation is not None
    ]
    notes = [amount_note(texts, "Validation bits per byte")] if base.train.validation is not None else []
    if any(variant.seeds > 1 for variant in variants):
        notes.append("Where a variant has several seeds: the mean of their curves.")

    def add(sentence: str, labels: Iterable[str], between: str = ", ") -> None:
        if listed := between.join(labels):
            notes.append(f"{sentence}: {listed}.")

    compared = [variant for variant in variants if variant.beside is not None]
    add(
        "Of another tokenizer, or in chunks of bytes, and compared at the tokens of the baseline's tokenizer "
        "that hold as much text",
        (variant.train.label for variant in compared if not variant.same_tokens),
    )
    add(
        "Validated on other text than the baseline, and compared by test text: both curves are shifted to "
        "end at their values on it",
        (variant.train.label for variant in compared if variant.shifted),
    )
    add(
        "Costs include those of the run whose weights it started from",
        (variant.train.label for variant in variants if variant.train.start is not None),
    )
    add(
        "Costs include the training of other runs that it depends on",
        (variant.train.label for variant in variants if variant.train.depends.keys() - {"start"}),
    )
    add(
        "On other text than the baseline (another corpus, or another part of it), and not compared",
        (variant.train.label for variant in variants if variant.beside is None),
    )
    add(
        "Trained with attention within documents, but validated, as all are, on rows that run across them, "
        "which they never saw; compare these by test text",
        (variant.train.label for variant in compared if variant.train.data.attention == "within"),
    )
    notes.append(
        "FLOPs are counted from the shapes, and for chunks of bytes with their mean length; times are of "
        "training alone, without validation, and compare where nothing else kept the machine busy."
    )
    add(
        f"Times do not compare with those of the baseline ({_place(base.train)}), the device, the processor, "
        "the number of threads or processes or the kernels being others",
        (
            f"{variant.train.label} ({_place(variant.train)})"
            for variant in variants
            if not variant.same_machine
        ),
        between="; ",
    )
    return notes


def _place(train: TrainRecord) -> str:
    threads = "" if train.threads is None else f", {train.threads} thread{'s'[: train.threads > 1]}"
    processes = f", {train.processes} processes" if train.processes > 1 else ""
    device = train.device if train.processor is None else f"{train.device}, {train.processor}"
    return f"{device}{threads}{processes}" + (", kernels in C" if train.kernels else "")


def _record(result: Efficiency, base: Efficiency) -> dict[str, object]:
    train, curve = result.variant.train, result.variant.curve
    digits: dict[Cost, int | None] = {"tokens": None, "flops": None, "seconds": 1}
    record: dict[str, object] = {
        "variant": train.variant,
        "label": train.label,
        "seeds": result.variant.seeds,
    }
    record |= {cost: round(curve.end(cost), digits[cost]) for cost in COSTS}
    record["val_bits_per_byte"] = round(float(curve.bits[-1]), 5)
    for cost in COSTS:
        value, whole = result.needed[cost], base.needed[cost]
        record[f"{cost}_to_baseline"] = None if value is None else round(value, digits[cost])
        record[f"{cost}_ratio"] = None if value is None else round(value / whole, 4)
    return record | {"loss_spikes": result.variant.spikes}


def write_efficiency(folder: Path, study: Study, found: Sequence[Efficiency]) -> None:
    """Write the plot efficiency and data/efficiency.csv into `folder`: a row per comparable variant."""
    base, others = found[0], [result for result in found[1:] if result.variant.beside is not None]
    if not others:
        return
    # `value` must be the last column: the one that DVC plots unless told otherwise.
    records = [
        {key: record[key] for key in ("variant", "flops_ratio", "seconds_ratio")}
        | {"value": record["tokens_ratio"]}
        for record in (_record(result, base) for result in others)
    ]
    write_text(folder / "data" / "efficiency.csv", csv_text(records))
    title = f"Cost until the last loss of {base.variant.train.label}, study {study.name}"
    labels = [result.variant.train.label for result in others]
    with figure(folder, "efficiency", title, 8.5, 2.0 + 0.42 * len(others)) as drawing:
        axes = drawing.subplots()
        _draw(axes, base, others)
        variant_rows(axes, labels)
        heading(drawing, title)
        drawing.legend(handles=_legend(others), loc="outside lower center", ncols=4)


def _draw(axes: Axes, base: Efficiency, others: Sequence[Efficiency]) -> None:
    axes.axvline(1, zorder=1, **CHANCE)
    shown = [1.0]
    for row, result in enumerate(others):
        for place, cost in enumerate(COSTS):
            if not result.variant.compares(cost):
                continue
            value = result.needed[cost]
            ratio = (result.variant.beside.end(cost) if value is None else value) / base.needed[cost]
            shown.append(ratio)
            look = dict(COST_LOOKS[cost]) if value is not None else _not_reached(COST_LOOKS[cost])
            axes.plot([ratio], [row + 0.24 * (place - 1)], linestyle="none", markersize=7, **look)
    axes.set_xscale("log", base=2)
    low, high = min(0.7, min(shown) / 1.2), max(1.4, max(shown) * 1.2)
    axes.set_xlim(low, high)
    ticks = [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 3, 4, 8] if high / low > 2.5 else np.arange(0.4, 2.1, 0.1)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    axes.set_xlabel("ratio to the baseline's training")


def _not_reached(look: Mapping[str, object]) -> dict[str, object]:
    return dict(look) | {"marker": ">", "markerfacecolor": "white"}


def _legend(others: Sequence[Efficiency]) -> list[Line2D]:
    def mark(label: str, look: Mapping[str, object]) -> Line2D:
        return Line2D([], [], linestyle="none", markersize=7, label=label, **look)

    names: dict[Cost, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}
    shown = [cost for cost in COSTS if any(result.variant.compares(cost) for result in others)]
    handles = [mark(names[cost], COST_LOOKS[cost]) for cost in shown]
    if any(
        result.variant.compares(cost) and result.needed[cost] is None for result in others for cost in COSTS
    ):
        handles.append(mark("not reached by its end", _not_reached({"color": "#444444"})))
    return handles
