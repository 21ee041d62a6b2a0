"""Tokens and seconds that a variant needs for the loss that the baseline ends with: table and plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from stlm.files import write_text
from stlm.report.names import count
from stlm.report.results import RunResult, TrainRecord
from stlm.report.style import CHANCE, figure, heading
from stlm.report.table import Cell, Table, csv_text
from stlm.study import Study

_TOKENS = {"color": "#0072B2", "marker": "o"}
_SECONDS = {"color": "#D55E00", "marker": "s"}


@dataclass(frozen=True)
class Curve:
    """Bits per byte on validation text against training tokens and seconds: arrays [points], in order."""

    tokens: np.ndarray
    seconds: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True)
class Efficiency:
    """A variant beside the baseline. None: not reached, or not comparable.

    `tokens_to` and `seconds_to`: until its curve is at the baseline's last value. `at_tokens`, `at_seconds`:
    bits per byte at the fewest tokens of all variants, and at the baseline's seconds or, where training
    `ended_sooner`, at its end. `same_text`, `same_machine`: whether losses and seconds compare.
    """

    train: TrainRecord
    curve: Curve
    seeds: int
    tokens_to: float | None
    seconds_to: float | None
    at_tokens: float | None
    at_seconds: float | None
    ended_sooner: bool
    same_text: bool
    same_machine: bool
    spikes: int | None


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


def mean_curve(results: Sequence[RunResult]) -> Curve | None:
    """The curve of a variant, the mean over its seeds at the first one's points; None: never validated."""
    curves = []
    for result in results:
        rows = result.curve[["tokens", "seconds", "val_bits_per_byte"]].dropna()
        rows = rows[np.isfinite(rows["val_bits_per_byte"])]
        if not len(rows):
            return None
        curves.append(rows.to_numpy(float).T)
    tokens = curves[0][0]
    others = [[np.interp(tokens, own[0], own[row]) for own in curves] for row in (1, 2)]
    return Curve(tokens, np.mean(others[0], axis=0), np.mean(others[1], axis=0))


def efficiencies(study: Study, results: Mapping[str, RunResult]) -> list[Efficiency]:
    """Every variant that was validated, the baseline first; empty where there is nothing to compare."""
    variants: dict[str, list[RunResult]] = {}
    for result in results.values():
        variants.setdefault(result.train.variant, []).append(result)
    curves = {name: mean_curve(own) for name, own in variants.items()}
    base = results[study.baseline].train
    reference = curves[base.variant]
    validated = {name: curve for name, curve in curves.items() if curve is not None}
    if reference is None or len(validated) < 2:
        return []
    same_text = {name: _same_text(variants[name][0].train, base) for name in validated}
    fewest = min(curve.tokens[-1] for name, curve in validated.items() if same_text[name])
    target, limit = float(reference.bits[-1]), float(reference.seconds[-1])
    found = []
    for name, curve in validated.items():
        trains = [own.train for own in variants[name]]
        text, machine = same_text[name], all(_machine(train) == _machine(base) for train in trains)
        timed, ended_sooner = text and machine, bool(curve.seconds[-1] < limit)
        spikes = [train.loss_spikes for train in trains]
        is_base = name == base.variant
        found.append(
            Efficiency(
                train=trains[0],
                curve=curve,
                seeds=len(trains),
                # The baseline's own is its whole training: a curve that rises at times is there sooner.
                tokens_to=_to(curve.tokens, curve.bits, target, is_base) if text else None,
                seconds_to=_to(curve.seconds, curve.bits, target, is_base) if timed else None,
                at_tokens=_at(curve.tokens, curve.bits, fewest) if text else None,
                at_seconds=_at(curve.seconds, curve.bits, limit) if timed else None,
                ended_sooner=ended_sooner,
                same_text=text,
                same_machine=machine,
                spikes=None if None in spikes else sum(len(own) for own in spikes),
            )
        )
    return found


def _to(x: np.ndarray, bits: np.ndarray, target: float, is_base: bool) -> float | None:
    return float(x[-1]) if is_base else crossing(x, bits, target)


def _at(x: np.ndarray, bits: np.ndarray, place: float) -> float | None:
    """The value at `place` by linear interpolation, at most at the end; None before the first point."""
    return None if place < x[0] else float(np.interp(place, x, bits))


def _same_text(train: TrainRecord, base: TrainRecord) -> bool:
    """Whether both were validated on the same documents."""
    tokens = "validation_tokens"
    same = (train.corpus, train.tokenizer) == (base.corpus, base.tokenizer)
    return same and train.training.get(tokens) == base.training.get(tokens)


def _machine(train: TrainRecord) -> tuple[str, int | None, int]:
    return train.device, train.threads, train.processes


def efficiency_table(study: Study, found: Sequence[Efficiency]) -> Table:
    """A row a variant: its training, what of it led to the baseline's last loss, and equal budgets."""
    base = found[0]
    fewest = min(own.curve.tokens[-1] for own in found if own.same_text)
    limit = base.curve.seconds[-1]
    rows, records = [], []
    for own in found:
        train, curve = own.train, own.curve
        rows.append(
            [
                Cell(f"{train.label}, mean of {own.seeds} seeds" if own.seeds > 1 else train.label),
                Cell(count(train.parameters.total)),
                Cell(f"{count(curve.tokens[-1])}\n{_duration(curve.seconds[-1])}"),
                Cell(f"{curve.bits[-1]:.3f}"),
                _reached(own.tokens_to, base.tokens_to, count, own.same_text),
                _reached(own.seconds_to, base.seconds_to, _duration, own.same_text and own.same_machine),
                _equal(own.at_tokens, base.at_tokens, own is base),
                _equal(own.at_seconds, base.at_seconds, own is base, "‡" if own.ended_sooner else ""),
                Cell("–" if own.spikes is None else str(own.spikes)),
            ]
        )
        records.append(_record(own, base))
    return Table(
        name="efficiency",
        title=f"Training efficiency beside {base.train.label}, study {study.name}",
        header=[
            "",
            "parameters",
            "trained for",
            "bits per byte\nat the end",
            "tokens to the\nbaseline's last loss",
            "time to the\nbaseline's last loss",
            f"bits per byte\nat {count(fewest)} tokens",
            f"bits per byte\nafter {_duration(limit)}",
            "loss spikes",
        ],
        rows=rows,
        notes=_notes(found),
        records=records,
    )


def _reached(
    value: float | None, base: float | None, shown: Callable[[float], str], comparable: bool
) -> Cell:
    if not comparable or base is None:
        return Cell("–")
    return Cell("not reached") if value is None else Cell(f"{shown(value)}\n{value / base:.2f} ×")


def _equal(value: float | None, base: float | None, is_base: bool, sign: str = "") -> Cell:
    if value is None:
        return Cell("–")
    if is_base or base is None:
        return Cell(f"{value:.3f}")
    difference = f"{value - base:+.3f}".replace("-", "−")
    return Cell(f"{value:.3f}{sign}\n{difference}")


def _duration(seconds: float) -> str:
    """418 s, 14 min, 3.2 h."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _notes(found: Sequence[Efficiency]) -> list[str]:
    base = found[0]
    notes = [
        f"Of validation curves, in bits per byte; the baseline is {base.train.label}, its last value "
        f"{base.curve.bits[-1]:.4f}. Tokens and time to it: where a variant's curve, straight between its "
        "validations, first is there; below, their ratio to all of the baseline's. Where learning rates "
        "decay to the end, so do losses: a variant that trains longer than the baseline has not yet decayed "
        "where the baseline ends."
    ]
    if any(own.seeds > 1 for own in found):
        notes.append("Where a variant has several seeds: the mean of their curves.")
    other = [own.train.label for own in found if not own.same_text]
    if other:
        notes.append(
            "Validated on other text than the baseline (another corpus, tokenizer or number of validation "
            f"tokens), and not compared: {', '.join(other)}."
        )
    within = [own.train.label for own in found if own.same_text and own.train.data.attention == "within"]
    if within:
        notes.append(
            "Trained with attention within documents, but validated, as all are, on rows that run across "
            f"them, which they never saw; compare these by test text: {', '.join(within)}."
        )
    notes.append(
        "Times are of training alone, without validation; they compare where nothing else kept the machine "
        "busy."
    )
    elsewhere = [f"{own.train.label} ({_place(own.train)})" for own in found if not own.same_machine]
    if elsewhere:
        notes.append(
            f"Times do not compare with those of the baseline ({_place(base.train)}), the device or the "
            f"number of threads or processes being another: {'; '.join(elsewhere)}."
        )
    if any(own.ended_sooner and own.at_seconds is not None for own in found):
        notes.append("‡ Its training ended sooner: the value at its end.")
    return notes


def _place(train: TrainRecord) -> str:
    threads = "" if train.threads is None else f", {train.threads} thread{'s'[: train.threads > 1]}"
    return f"{train.device}{threads}" + (f", {train.processes} processes" if train.processes > 1 else "")


def _record(own: Efficiency, base: Efficiency) -> dict[str, object]:
    def ratio(value: float | None, whole: float | None) -> float | None:
        return None if value is None or whole is None else round(value / whole, 4)

    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    return {
        "variant": own.train.variant,
        "label": own.train.label,
        "seeds": own.seeds,
        "tokens": int(own.curve.tokens[-1]),
        "seconds": round(float(own.curve.seconds[-1]), 1),
        "val_bits_per_byte": round(float(own.curve.bits[-1]), 5),
        "tokens_to_baseline": rounded(own.tokens_to, 0),
        "tokens_ratio": ratio(own.tokens_to, base.tokens_to),
        "seconds_to_baseline": rounded(own.seconds_to, 1),
        "seconds_ratio": ratio(own.seconds_to, base.seconds_to),
        "bits_per_byte_at_equal_tokens": rounded(own.at_tokens, 5),
        "bits_per_byte_at_equal_seconds": rounded(own.at_seconds, 5),
        "ended_sooner": own.ended_sooner,
        "loss_spikes": own.spikes,
    }


def write_efficiency(folder: Path, study: Study, found: Sequence[Efficiency]) -> None:
    """Write `folder`/efficiency.{svg,png} and data/efficiency.csv: a row a variant that compares."""
    base, others = found[0], [own for own in found[1:] if own.same_text]
    if not others:
        return
    write_text(folder / "data" / "efficiency.csv", csv_text(_data(base, others)))
    title = f"Tokens and time to the loss of {base.train.label}, study {study.name}"
    labels = [own.train.label for own in others]
    with figure(folder, "efficiency", title, 9.5, 2.0 + 0.34 * len(others)) as drawing:
        ratios, bits = drawing.subplots(1, 2, sharey=True)
        _draw_ratios(ratios, base, others)
        _draw_bits(bits, base, others)
        for axes in (ratios, bits):
            axes.set_ylim(len(others) - 0.5, -0.5)
            axes.set_yticks(range(len(others)), labels)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            for row in range(1, len(others), 2):
                axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=0)
        heading(drawing, title)
        drawing.legend(handles=_legend(others), loc="outside lower center", ncols=4)


def _draw_ratios(axes: Axes, base: Efficiency, others: Sequence[Efficiency]) -> None:
    axes.set_title("until the baseline's last loss", loc="left")
    axes.axvline(1, zorder=1, **CHANCE)
    shown = [1.0]
    for row, own in enumerate(others):
        for offset, look, value, whole, last in (
            (-0.16, _TOKENS, own.tokens_to, base.tokens_to, own.curve.tokens[-1]),
            (0.16, _SECONDS, own.seconds_to, base.seconds_to, own.curve.seconds[-1]),
        ):
            if whole is None or (look is _SECONDS and not own.same_machine):
                continue
            reached = value is not None
            ratio = (value if reached else last) / whole
            shown.append(ratio)
            look = look if reached else look | {"marker": ">", "markerfacecolor": "white"}
            axes.plot([ratio], [row + offset], linestyle="none", markersize=7, **look)
    axes.set_xscale("log", base=2)
    low, high = min(0.7, min(shown) / 1.2), max(1.4, max(shown) * 1.2)
    axes.set_xlim(low, high)
    ticks = [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 3, 4, 8] if high / low > 2.5 else np.arange(0.4, 2.1, 0.1)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    axes.set_xlabel("ratio to the baseline's training")


def _draw_bits(axes: Axes, base: Efficiency, others: Sequence[Efficiency]) -> None:
    axes.set_title("at an equal budget", loc="left")
    axes.axvline(0, zorder=1, **CHANCE)
    for row, own in enumerate(others):
        for offset, look, value, reference in (
            (-0.16, _TOKENS, own.at_tokens, base.at_tokens),
            (0.16, _SECONDS, own.at_seconds, base.at_seconds),
        ):
            if value is not None and reference is not None:
                ended = look is _SECONDS and own.ended_sooner
                fill = {"markerfacecolor": "white"} if ended else {}
                place = [value - reference], [row + offset]
                axes.plot(*place, linestyle="none", markersize=7, **look, **fill)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if x else "0"))
    axes.set_xlabel("bits per byte, difference from the baseline")


def _legend(others: Sequence[Efficiency]) -> list[Line2D]:
    def mark(label: str, **look: object) -> Line2D:
        return Line2D([], [], linestyle="none", markersize=7, label=label, **look)

    timed = [own for own in others if own.same_machine]
    handles = [mark("tokens", **_TOKENS)]
    if timed:
        handles.append(mark("time", **_SECONDS))
    if any(own.tokens_to is None or (own.same_machine and own.seconds_to is None) for own in others):
        handles.append(mark("not reached by its end", color="#444444", marker=">", markerfacecolor="white"))
    if any(own.ended_sooner and own.at_seconds is not None for own in others):
        handles.append(
            mark("time, ended sooner", color=_SECONDS["color"], marker="s", markerfacecolor="white")
        )
    return handles


def _data(base: Efficiency, others: Sequence[Efficiency]) -> list[dict[str, object]]:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    keys = ("seconds_ratio", "bits_per_byte_at_equal_tokens", "bits_per_byte_at_equal_seconds")
    records = []
    for own in others:
        whole = _record(own, base)
        kept = {key: whole[key] for key in ("variant", *keys)}
        records.append(kept | {"value": whole["tokens_ratio"]})
    return records
