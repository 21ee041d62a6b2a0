"""The study's plots of perplexity, accuracy, phenomena and differences, each with its numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stlm.report.comparison import SIGN, SIGN_ITEMS, Comparisons, Paired
from stlm.report.names import benchmark_label, bounds_record, p_record
from stlm.report.phenomena import HUMANS, by_difficulty, human_agreement, phenomena
from stlm.report.results import Results
from stlm.report.schema import Proportion, Score
from stlm.report.style import (
    CHANCE,
    HUMAN,
    Dot,
    count_axis,
    draw_differences,
    figure,
    legend,
    legend_columns,
    legend_entry,
    legend_height,
    plain_log_ticks,
    styles,
    variant_rows,
    write_data,
)
from stlm.report.unlike import rows_of, unlike_variants

# More intervals than these on one plot hide each other: then only the baseline's are drawn.
_MOST_INTERVALS = 6
# The same in a row of a dot plot, where more would make the row higher than a glance takes in.
_MOST_ROW_INTERVALS = 12
# Follows the label of a row that was not made as the baseline was; table2 says how.
_UNLIKE = "§"


def write_plots(folder: Path, results: Results, comparisons: Comparisons) -> None:
    """Write every plot as SVG into `folder` and its numbers into `folder`/data."""
    _figure1(folder, results)
    _differences(folder, results, comparisons)
    checkpoints = [checkpoint for run in results.values() for checkpoint in run.checkpoints.values()]
    for benchmark in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.benchmarks):
        chance = comparisons.chance.get(benchmark)
        _accuracy(folder, results, benchmark, chance)
        _phenomena(folder, results, benchmark, chance)


def _figure1(folder: Path, results: Results) -> None:
    """Validation perplexity per character against tokens; to the right its second half, enlarged."""
    curves = {}
    for name, run in results.items():
        rows = run.curve[["tokens", "val_char_perplexity"]].dropna()
        rows = rows[np.isfinite(rows["val_char_perplexity"]) & (rows["tokens"] > 0)]
        if len(rows):
            curves[name] = (rows["tokens"].to_numpy(), rows["val_char_perplexity"].to_numpy())
    records = [
        {"run": name, "tokens": int(tokens), "value": round(float(value), 5)}
        for name, curve in curves.items()
        for tokens, value in zip(*curve, strict=True)
    ]
    write_data(folder, "figure1", records)
    half = max((tokens[-1] for tokens, _ in curves.values()), default=0) / 2
    late = {name: values[tokens >= half] for name, (tokens, values) in curves.items()}
    zoom = bool(late) and all(3 <= len(late[name]) < len(values) for name, (_, values) in curves.items())
    looks = styles(results)
    title = f"Validation perplexity during training, study {results.study.name}"
    last = {name: f"  {values[-1]:.3f}" for name, (_, values) in curves.items()}
    # Where no panel draws a curve's points, its colour and its line tell it.
    plain = {} if zoom or any(len(tokens) == 1 for tokens, _ in curves.values()) else {"marker": ""}
    handles = _handles(results, last, **plain)
    with figure(folder, "figure1", title, 9, 4.4 + legend_height(handles, 9)) as drawing:
        panels = drawing.subplots(1, 1 + zoom, squeeze=False)[0]
        for axes in panels:
            for name, (tokens, values) in reversed(curves.items()):  # the baseline last, on top
                markers = len(tokens) == 1 or axes is not panels[0]
                axes.plot(tokens, values, **(looks[name] | ({} if markers else {"marker": ""})))
            axes.set_xlabel("training tokens")
            count_axis(axes.xaxis)
        panels[0].set_yscale("log")
        plain_log_ticks(panels[0])
        panels[0].set_ylabel("character perplexity (validation)")
        if zoom:
            panels[0].set_title("whole training, logarithmic scale", loc="left")
            panels[1].set_title("second half, linear scale", loc="left")
            panels[1].set_xlim(left=half * 0.98)
            shown = np.concatenate(list(late.values()))
            margin = 0.06 * (np.ptp(shown) or shown[0] or 1)
            panels[1].set_ylim(shown.min() - margin, shown.max() + margin)
        _curve_legend(drawing, results, last, handles)


def _title(results: Results, benchmark: str, what: str) -> str:
    name, study = benchmark_label(benchmark), results.study.name
    return f"{name} {what} ({results.mode} mode, acc, 95% intervals), study {study}"


def _accuracy(folder: Path, results: Results, benchmark: str, chance: float | None) -> None:
    """Accuracy against training tokens with 95% intervals; a dot plot where each run has one checkpoint."""
    points: dict[str, list[tuple[int, Proportion]]] = {}
    for name, run in results.items():
        for checkpoint in run.checkpoints.values():
            if accuracy := checkpoint.accuracy(benchmark, results.mode):
                points.setdefault(name, []).append((checkpoint.tokens, accuracy))
    if not points:
        return
    name, title = f"accuracy-{benchmark}", _title(results, benchmark, "accuracy")
    level = None if chance is None else round(chance, 5)
    records = [
        {"run": run, "tokens": tokens, "n": accuracy.n, "chance": level, **_rounded(accuracy)}
        for run, reached in points.items()
        for tokens, accuracy in reached
    ]
    write_data(folder, name, records)
    if max(map(len, points.values())) == 1:
        rows = {results[run].label: {run: reached[0][1]} for run, reached in points.items()}
        _dots(folder, name, title, results, rows, chance, people={})
        return
    looks = styles(results)
    last = {run: f"  {100 * reached[-1][1].value:.1f}" for run, reached in points.items()}
    handles = _handles(results, last)
    with figure(folder, name, title, 8, 4.6 + legend_height(handles, 8)) as drawing:
        axes = drawing.subplots()
        # Runs are drawn slightly apart, so that none hides another's interval.
        apart = 0.006 * max(tokens for reached in points.values() for tokens, _ in reached)
        for place, (run, reached) in reversed(list(enumerate(points.items()))):
            tokens = [t + apart * (place - (len(points) - 1) / 2) for t, _ in reached]
            axes.plot(tokens, [100 * accuracy.value for _, accuracy in reached], **looks[run])
            if len(points) <= _MOST_INTERVALS or run == results.base.name:
                low, high = ([100 * getattr(one, side) for _, one in reached] for side in ("low", "high"))
                axes.vlines(tokens, low, high, color=looks[run]["color"], linewidth=1.2, alpha=0.7)
        if chance is not None:
            axes.axhline(100 * chance, zorder=1, **CHANCE)
            _name_chance(axes, (1.01, 100 * chance), axes.get_yaxis_transform(), ha="left", va="center")
        axes.set_xlabel("training tokens")
        axes.set_ylabel("accuracy (%)")
        count_axis(axes.xaxis, 6)
        _curve_legend(drawing, results, last, handles)


def _phenomena(folder: Path, results: Results, benchmark: str, chance: float | None) -> None:
    """A row a phenomenon, the baseline's worst at the bottom, with a dot a run and a bar for people."""
    groups = phenomena(results, benchmark)
    if not groups:
        return
    order, agreement = by_difficulty(groups, results.base.name), human_agreement(benchmark)
    people = {group: agreement[group] for group in order if group in agreement}
    records = [
        {"run": run, "phenomenon": group, "n": scored[group].n, **_rounded(scored[group])}
        for run, scored in groups.items()
        for group in order
        if group in scored
    ]
    records += [{"run": HUMANS, "phenomenon": group, "value": value} for group, value in people.items()]
    write_data(folder, f"{benchmark}-phenomena", records)
    rows = {name: {run: one[name] for run, one in groups.items() if name in one} for name in order}
    title = _title(results, benchmark, "by phenomenon")
    _dots(folder, f"{benchmark}-phenomena", title, results, rows, chance, people)


def _dots(
    folder: Path,
    name: str,
    title: str,
    results: Results,
    rows: Mapping[str, Mapping[str, Proportion]],
    chance: float | None,
    people: Mapping[str, float],
) -> None:
    """A horizontal dot plot with intervals: `rows` maps a row's label to its runs' accuracies.

    `people`: their agreement with the labels, as a fraction, by row. Rows of many runs have the baseline's
    interval alone, and grow no higher.
    """
    looks, most = styles(results), max(map(len, rows.values()))
    runs = [run for run in results if any(run in scored for scored in rows.values())]
    row_height = 0.13 * min(most, _MOST_ROW_INTERVALS) + 0.18
    handles = _handles(results, dict.fromkeys(runs, "") if most > 1 else {}, linestyle="none")
    handles += [Line2D([], [], label=HUMANS, **HUMAN)] if people else []
    height = 1.3 + row_height * len(rows) + legend_height(handles, 8.5)
    with figure(folder, name, title, 8.5, height) as drawing:
        axes = drawing.subplots()
        for row, (label, scored) in enumerate(rows.items()):
            for place, run in enumerate(scored if most == 1 else runs):
                if run in scored:
                    offset = 0.0 if most == 1 else 0.78 * ((place + 0.5) / len(runs) - 0.5)
                    low, value, high = (100 * getattr(scored[run], key) for key in ("low", "value", "high"))
                    shown = most <= _MOST_ROW_INTERVALS or run == results.base.name
                    intervals = [((low, high), {"linewidth": 1.3})] if shown else []
                    Dot(row + offset, value, looks[run] | {"markersize": 5}, intervals).draw(axes)
            if label in people:
                axes.plot([100 * people[label]] * 2, [row - 0.4, row + 0.4], zorder=1, **HUMAN)
        if chance is not None:
            axes.axvline(100 * chance, zorder=1, **CHANCE)
            _name_chance(axes, (100 * chance, 1), axes.get_xaxis_transform(), ha="center", va="bottom")
        variant_rows(axes, [label.replace("_", " ") for label in rows], bands=most > 1)
        axes.set_xlabel("accuracy (%)")
        if handles:
            legend(drawing, handles, legend_columns(handles, 8.5))


def _name_chance(axes: Axes, place: tuple[float, float], transform: Any, **align: str) -> None:
    axes.text(*place, "chance", transform=transform, color=CHANCE["color"], fontsize=10, **align)


def _rounded(accuracy: Proportion) -> dict[str, float]:
    return {key: round(getattr(accuracy, key), 5) for key in ("low", "high", "value")}


def _handles(results: Results, details: Mapping[str, str], **look: str) -> list[Line2D]:
    """A legend's entry for each run, or variant with several; `details`: run -> what follows its label."""
    looks, handles = styles(results), []
    for variant in results.variants.values():
        runs = [run.name for run in variant if run.name in details]
        if runs:
            detail = f" ({len(runs)} seeds)" if len(runs) > 1 else details[runs[0]]
            label = variant[0].train.label + detail
            handles.append(Line2D([], [], label=label, **(looks[runs[0]] | look)))
    return handles


def _curve_legend(
    drawing: Figure, results: Results, last: Mapping[str, str], handles: Sequence[Line2D]
) -> None:
    """The legend of curves; `last`: run -> its last value, shown where a variant has a single run."""
    single = any(sum(run.name in last for run in runs) == 1 for runs in results.variants.values())
    if handles:
        columns = legend_columns(handles, drawing.get_figwidth())
        legend(drawing, handles, columns, title="run and its last value" if single else None)


def _differences(folder: Path, results: Results, comparisons: Comparisons) -> None:
    """Write `folder`/differences.svg and data/differences.csv, of `acc` in the main mode.

    Nothing is written where no run is compared with another.
    """
    mode = results.mode
    panels = {b: _compared(results, comparisons, (b, mode, "acc")) for b in results.benchmarks}
    panels = {benchmark: rows for benchmark, rows in panels.items() if rows}
    if not panels:
        return
    shown = [(benchmark, run, paired) for benchmark, rows in panels.items() for run, paired in rows.items()]
    write_data(folder, "differences", [_difference_record(*one) for one in shown])
    names = list(dict.fromkeys(run for _, run, _ in shown))
    unlike = unlike_variants(rows_of(results)) & {results[run].train.variant for run in names}
    labels = [
        _tested_label(run, results, comparisons) + f" {_UNLIKE}" * (results[run].train.variant in unlike)
        for run in names
    ]
    columns, looks = min(3, len(panels)), styles(results)
    baseline, study = results.base.train.label, results.study.name
    title = f"Differences from {baseline} ({mode} mode, acc, 95% intervals), study {study}"
    height = 1.5 - (-len(panels) // columns) * (0.75 + 0.3 * len(names))
    width = max(8.5, 3.6 + 2.5 * columns)  # room for the title above a single panel
    with figure(folder, "differences", title, width, height) as drawing:
        dots = {
            benchmark_label(benchmark): [
                _difference_dot(names.index(run), paired, looks[run]) for run, paired in rows.items()
            ]
            for benchmark, rows in panels.items()
        }
        draw_differences(drawing, dots, labels, "difference (points)", columns)
        handles = _difference_legend([paired for *_, paired in shown], bool(unlike))
        legend(drawing, handles, 2 if columns > 1 else 1)


def _compared(results: Results, comparisons: Comparisons, score: Score) -> dict[str, Paired]:
    """By run, or by a variant's first run where the variant is tested over its seeds."""
    rows = {}
    for variant, runs in results.variants.items():
        if test := comparisons.over_seeds(variant, score):
            rows[runs[0].name] = test
        else:
            points = {run.name: comparisons.last(run.name, score) for run in runs}
            rows |= {run: point.paired for run, point in points.items() if point and point.paired}
    return rows


def _tested_label(run: str, results: Results, comparisons: Comparisons) -> str:
    train = results[run].train
    for score in comparisons.seeds.get(train.variant, {}):
        if score[1] == results.mode and (test := comparisons.over_seeds(train.variant, score)):
            return f"{train.label} ({test.n} seeds)"
    return results[run].label


def _difference_record(benchmark: str, run: str, paired: Paired) -> dict[str, Any]:
    record: dict[str, Any] = {"run": run, "benchmark": benchmark}
    record |= bounds_record(paired.interval, digits=5) | bounds_record(paired.clustered, "clustered_", 5)
    return record | {"p_holm": p_record(paired.adjusted), "value": round(paired.difference, 5)}


def _difference_dot(row: int, paired: Paired, look: Mapping[str, Any]) -> Dot:
    intervals = [
        ((100 * interval.low, 100 * interval.high), {"linewidth": width})
        for interval, width in ((paired.clustered, 1.0), (paired.interval, 3.2))
        if interval is not None
    ]
    return Dot(row, 100 * paired.difference, {**look, **_fill(paired.sign)}, intervals)


def _fill(sign: str) -> dict[str, Any]:
    if not sign:
        return {"markerfacecolor": "white"}
    return {"fillstyle": "full" if sign == SIGN else "left", "markerfacecoloralt": "white"}


def _difference_legend(shown: Iterable[Paired], unlike: bool) -> list[Line2D]:
    texts = {SIGN: "p < 0.05 after Holm's correction"}
    if any(paired.sign == SIGN_ITEMS for paired in shown):
        texts[SIGN_ITEMS] = "the same, but not over groups of items"
    texts[""] = "not significant"
    handles = [legend_entry(text, marker="o", **_fill(sign)) for sign, text in texts.items()]
    handles.append(legend_entry("interval over items (or over seeds)", linestyle="-", linewidth=3.2))
    if any(paired.clustered is not None for paired in shown):
        handles.append(legend_entry("interval over groups of items", linestyle="-", linewidth=1.0))
    if unlike:
        text = "made with another precision, code or processor than the baseline"
        handles.append(legend_entry(text, marker=f"${_UNLIKE}$"))
    return handles
