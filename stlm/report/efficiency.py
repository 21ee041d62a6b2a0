"""Tokens, FLOPs and seconds that a variant needs for the loss that the baseline ends with: table and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from stlm.report.style import CHANCE, COST_LOOKS, figure, heading, variant_rows
from stlm.report.table import Cell, Table, csv_text
from stlm.study.runs import Study


@dataclass(frozen=True)
class Efficiency:
    """What of a variant's training led to the baseline's last value; None: not reached, or not comparable."""

    variant: Variant
    needed: Mapping[Cost, float | None]


def crossing(x: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """Where a falling curve of points is first at `target` or below, by linear interpolation; None: nowhere.

    A first point that is already there is the answer itself: what lies before it was not measured.
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
    """Of each of `variants`, of which the first is the baseline."""
    return [
        Efficiency(own, {cost: _needed(own, cost, is_base=own is variants[0]) for cost in COSTS})
        for own in variants
    ]


def _needed(own: Variant, cost: Cost, is_base: bool) -> float | None:
    if is_base:  # all of it: a curve that rises at times is there sooner
        return own.curve.end(cost)
    if not own.compares(cost):
        return None
    return crossing(own.beside.cost(cost), own.beside.bits, float(own.reference.bits[-1]))


def efficiency_table(study: Study, found: Sequence[Efficiency]) -> Table:
    """A row a variant: its training, and what of it led to the baseline's last loss."""
    base = found[0]
    rows, records = [], []
    for own in found:
        train, curve = own.variant.train, own.variant.curve
        rows.append(
            [
                Cell(seeds_label(train.label, own.variant.seeds)),
                Cell(count(train.parameters.total)),
                Cell("\n".join(cost_text(cost, curve.end(cost)) for cost in COSTS)),
                Cell(f"{curve.bits[-1]:.3f}"),
                *(_reached(own, base, cost) for cost in COSTS),
                Cell("–" if own.variant.spikes is None else str(own.variant.spikes)),
            ]
        )
        records.append(_record(own, base))
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


def _reached(own: Efficiency, base: Efficiency, cost: Cost) -> Cell:
    value, whole = own.needed[cost], base.needed[cost]
    if own is not base and not own.variant.compares(cost):
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
        *comparison_notes([own.variant for own in found]),
    ]


def comparison_notes(variants: Sequence[Variant]) -> list[str]:
    """What limits any comparison of these curves, of which the first is the baseline's."""
    base = variants[0]
    texts = [(own.train.label, own.train.validation) for own in variants if own.train.validation is not None]
    notes = [amount_note(texts, "Validation bits per byte")] if base.train.validation is not None else []
    if any(own.seeds > 1 for own in variants):
        notes.append("Where a variant has several seeds: the mean of their curves.")
    other_tokens = [own.train.label for own in variants if own.beside is not None and not own.same_tokens]
    if other_tokens:
        notes.append(
            "Of another tokenizer, or in chunks of bytes, and compared at the tokens of the baseline's "
            f"tokenizer that hold as much text: {', '.join(other_tokens)}."
        )
    shifted = [own.train.label for own in variants if own.shifted and own.beside is not None]
    if shifted:
        notes.append(
            "Validated on other text than the baseline, and compared by test text: both curves are shifted "
            f"to end at their values on it: {', '.join(shifted)}."
        )
    started = [own.train.label for own in variants if own.train.start is not None]
    if started:
        notes.append(f"Costs include those of the run whose weights it started from: {', '.join(started)}.")
    others = [own.train.label for own in variants if own.train.depends.keys() - {"start"}]
    if others:
        notes.append(f"Costs include the training of other runs that it depends on: {', '.join(others)}.")
    other = [own.train.label for own in variants if own.beside is None]
    if other:
        notes.append(
            "On other text than the baseline (another corpus, or another part of it), and not compared: "
            f"{', '.join(other)}."
        )
    compared = [own for own in variants if own.beside is not None]
    within = [own.train.label for own in compared if own.train.data.attention == "within"]
    if within:
        notes.append(
            "Trained with attention within documents, but validated, as all are, on rows that run across "
            f"them, which they never saw; compare these by test text: {', '.join(within)}."
        )
    notes.append(
        "FLOPs are counted from the shapes, and for chunks of bytes with their mean length; times are of "
        "training alone, without validation, and compare where nothing else kept the machine busy."
    )
    elsewhere = [f"{own.train.label} ({_place(own.train)})" for own in variants if not own.same_machine]
    if elsewhere:
        notes.append(
            f"Times do not compare with those of the baseline ({_place(base.train)}), the device, the "
            "processor, the number of threads or processes or the kernels being others: "
            f"{'; '.join(elsewhere)}."
        )
    return notes


def _place(train: TrainRecord) -> str:
    threads = "" if train.threads is None else f", {train.threads} thread{'s'[: train.threads > 1]}"
    processes = f", {train.processes} processes" if train.processes > 1 else ""
    device = train.device if train.processor is None else f"{train.device}, {train.processor}"
    return f"{device}{threads}{processes}" + (", kernels in C" if train.kernels else "")


def _record(own: Efficiency, base: Efficiency) -> dict[str, object]:
    train, curve = own.variant.train, own.variant.curve
    digits: dict[Cost, int | None] = {"tokens": None, "flops": None, "seconds": 1}
    record: dict[str, object] = {"variant": train.variant, "label": train.label, "seeds": own.variant.seeds}
    record |= {cost: round(curve.end(cost), digits[cost]) for cost in COSTS}
    record["val_bits_per_byte"] = round(float(curve.bits[-1]), 5)
    for cost in COSTS:
        value, whole = own.needed[cost], base.needed[cost]
        record[f"{cost}_to_baseline"] = None if value is None else round(value, digits[cost])
        record[f"{cost}_ratio"] = None if value is None else round(value / whole, 4)
    return record | {"loss_spikes": own.variant.spikes}


def write_efficiency(folder: Path, study: Study, found: Sequence[Efficiency]) -> None:
    """Write `folder`/efficiency.{svg,png} and data/efficiency.csv: a row a variant that compares."""
    base, others = found[0], [own for own in found[1:] if own.variant.beside is not None]
    if not others:
        return
    write_text(folder / "data" / "efficiency.csv", csv_text(_data(base, others)))
    title = f"Cost until the last loss of {base.variant.train.label}, study {study.name}"
    labels = [own.variant.train.label for own in others]
    with figure(folder, "efficiency", title, 8.5, 2.0 + 0.42 * len(others)) as drawing:
        axes = drawing.subplots()
        _draw(axes, base, others)
        variant_rows(axes, labels)
        heading(drawing, title)
        drawing.legend(handles=_legend(others), loc="outside lower center", ncols=4)


def _draw(axes: Axes, base: Efficiency, others: Sequence[Efficiency]) -> None:
    axes.axvline(1, zorder=1, **CHANCE)
    shown = [1.0]
    for row, own in enumerate(others):
        for place, cost in enumerate(COSTS):
            if not own.variant.compares(cost):
                continue
            value = own.needed[cost]
            ratio = (own.variant.beside.end(cost) if value is None else value) / base.needed[cost]
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
    shown = [cost for cost in COSTS if any(own.variant.compares(cost) for own in others)]
    handles = [mark(names[cost], COST_LOOKS[cost]) for cost in shown]
    if any(own.variant.compares(cost) and own.needed[cost] is None for own in others for cost in COSTS):
        handles.append(mark("not reached by its end", _not_reached({"color": "#444444"})))
    return handles


def _data(base: Efficiency, others: Sequence[Efficiency]) -> list[dict[str, object]]:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    records = [_record(own, base) for own in others]
    return [
        {key: own[key] for key in ("variant", "flops_ratio", "seconds_ratio")}
        | {"value": own["tokens_ratio"]}
        for own in records
    ]
