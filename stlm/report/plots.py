"""The study's plots, each with its numbers as tidy CSV: perplexity, differences, accuracy, phenomena."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stlm.files import write_text
from stlm.report.accuracies import main_mode, score
from stlm.report.comparison import Comparisons
from stlm.report.differences import write_differences
from stlm.report.names import benchmark_label, count
from stlm.report.phenomena import HUMANS, Phenomena, by_difficulty, human_agreement, phenomena
from stlm.report.results import Proportion, RunResult, run_label
from stlm.report.style import CHANCE, HUMAN, figure, heading, plain_log_ticks, styles
from stlm.report.table import csv_text
from stlm.study.runs import Study

# More intervals than this on one plot hide each other: then only the baseline's are drawn.
_MOST_INTERVALS = 6
Points = dict[str, list[tuple[int, Proportion]]]


def write_plots(
    folder: Path, study: Study, results: Mapping[str, RunResult], comparisons: Comparisons
) -> None:
    """Write every plot as SVG and PNG into `folder` and its numbers into `folder`/data."""
    (folder / "data").mkdir()
    _figure1(folder, study, results)
    mode = main_mode(results)
    write_differences(folder, study, results, comparisons, mode)
    for benchmark in dict.fromkeys(
        b for r in results.values() for c in r.checkpoints.values() for b in c.benchmarks
    ):
        points: Points = {name: _points(result, benchmark, mode) for name, result in results.items()}
        points = {name: own for name, own in points.items() if own}
        if points:
            _accuracy(folder, study, results, benchmark, mode, points, comparisons.chance.get(benchmark))
        if groups := phenomena(results, benchmark, mode):
            _phenomena(folder, study, results, benchmark, mode, groups, comparisons.chance.get(benchmark))


def _points(result: RunResult, benchmark: str, mode: str) -> list[tuple[int, Proportion]]:
    found = [(c.tokens, score(c.benchmarks.get(benchmark), mode, "acc")) for c in result.checkpoints.values()]
    return [(tokens, accuracy) for tokens, accuracy in found if accuracy is not None]


def _write_data(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    write_text(folder / "data" / f"{name}.csv", csv_text(records))


def _legend(
    drawing: Figure, axes: Axes, results: Mapping[str, RunResult], shown: Mapping[str, str], title: str = ""
) -> None:
    """One entry a run, or a variant where it has several; `shown` maps runs to what follows the label.

    The marks of people's agreement, where they are drawn, come last.
    """
    handles, labels, seen, detailed = [], [], set(), False
    drawn = dict(zip(axes.get_legend_handles_labels()[1], axes.get_legend_handles_labels()[0], strict=True))
    for name, detail in shown.items():
        variant = results[name].train.variant
        if variant in seen or name not in drawn:
            continue
        seen.add(variant)
        seeds = sum(results[other].train.variant == variant for other in shown)
        text = results[name].train.label
        detailed |= seeds == 1
        labels.append(f"{text} ({seeds} seeds)" if seeds > 1 else f"{text}{detail}")
        handles.append(drawn[name])
    if HUMANS in drawn:
        labels.append(HUMANS)
        handles.append(drawn[HUMANS])
    if not handles:
        return
    drawing.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(_legend_columns(results), len(labels)),
        title=title if title and detailed else None,
    )


def _legend_columns(results: Mapping[str, RunResult]) -> int:
    longest = max(len(result.train.label) for result in results.values())
    return max(1, min(3, 90 // (longest + 14)))


def _legend_height(results: Mapping[str, RunResult], others: int = 0) -> float:
    """Inches of a legend with an entry a variant and `others` besides."""
    entries = len({result.train.variant for result in results.values()}) + others
    return 0.25 * -(-entries // _legend_columns(results))


def _figure1(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Validation perplexity per character against tokens; beside it the last half, where runs part."""
    curves = {}
    for name, result in results.items():
        rows = result.curve[["tokens", "val_char_perplexity"]].dropna()
        rows = rows[np.isfinite(rows["val_char_perplexity"]) & (rows["tokens"] > 0)]
        if len(rows):
            curves[name] = (rows["tokens"].to_numpy(), rows["val_char_perplexity"].to_numpy())
    _write_data(
        folder,
        "figure1",
        [
            {"run": name, "tokens": int(t), "value": round(float(v), 5)}
            for name, (tokens, values) in curves.items()
            for t, v in zip(tokens, values, strict=True)
        ],
    )
    half = max((tokens[-1] for tokens, _ in curves.values()), default=0) / 2
    zoom = bool(curves) and all(
        (tokens >= half).sum() >= 3 and (tokens < half).any() for tokens, _ in curves.values()
    )
    looks = styles(results)
    title = f"Validation perplexity during training, study {study.name}"
    with figure(folder, "figure1", title, 9, 4.4 + _legend_height(results)) as drawing:
        panels = drawing.subplots(1, 2) if zoom else [drawing.subplots()]
        for axes in panels:
            for name, (tokens, values) in reversed(curves.items()):  # the baseline last, on top
                marker = looks[name]["marker"] if len(tokens) == 1 or axes is not panels[0] else ""
                axes.plot(tokens, values, label=name, **(looks[name] | {"marker": marker}))
            axes.set_xlabel("training tokens")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        panels[0].set_yscale("log")
        plain_log_ticks(panels[0])
        panels[0].set_ylabel("character perplexity (validation)")
        if zoom:
            panels[0].set_title("whole training, logarithmic scale", loc="left")
            panels[1].set_title("second half, linear scale", loc="left")
            panels[1].set_xlim(left=half * 0.98)
            late = np.concatenate([values[tokens >= half] for tokens, values in curves.values()])
            margin = 0.06 * (np.ptp(late) or late[0] or 1)
            panels[1].set_ylim(late.min() - margin, late.max() + margin)
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        heading(drawing, title)
        final = {name: f"  {values[-1]:.3f}" for name, (_, values) in curves.items()}
        _legend(drawing, panels[0], results, final, title="run and its last value")


def _accuracy(
    folder: Path,
    study: Study,
    results: Mapping[str, RunResult],
    benchmark: str,
    mode: str,
    points: Points,
    chance: float | None,
) -> None:
    """Accuracy against training tokens with 95% intervals; a dot plot where each run has one checkpoint."""
    name = f"accuracy-{benchmark}"
    _write_data(
        folder,
        name,
        [
            {"run": run, "tokens": tokens, "n": a.n, "chance": None if chance is None else round(chance, 5)}
            | {"low": round(a.low, 5), "high": round(a.high, 5), "value": round(a.value, 5)}
            for run, own in points.items()
            for tokens, a in own
        ],
    )
    title = f"{benchmark_label(benchmark)} accuracy ({mode} mode, acc, 95% intervals), study {study.name}"
    if max(len(own) for own in points.values()) == 1:
        rows = {run_label(results[run], results): {run: own[0][1]} for run, own in points.items()}
        _dots(folder, name, title, results, rows, chance)
        return
    looks = styles(results)
    with figure(folder, name, title, 8, 4.6 + _legend_height(results)) as drawing:
        axes = drawing.subplots()
        # Runs stand a little side by side, so that none hides another's interval.
        aside = 0.006 * max(tokens for own in points.values() for tokens, _ in own)
        for place, (run, own) in reversed(list(enumerate(points.items()))):
            tokens = [t + aside * (place - (len(points) - 1) / 2) for t, _ in own]
            axes.plot(tokens, [100 * a.value for _, a in own], label=run, **looks[run])
            if len(points) <= _MOST_INTERVALS or run == study.baseline:
                low, high = ([100 * getattr(a, side) for _, a in own] for side in ("low", "high"))
                axes.vlines(tokens, low, high, color=looks[run]["color"], linewidth=1.2, alpha=0.7)
        if chance is not None:
            _chance_line(axes.axhline, chance)
            axes.annotate(
                "chance",
                (1, 100 * chance),
                xycoords=("axes fraction", "data"),
                ha="left",
                va="center",
                xytext=(4, 0),
                textcoords="offset points",
                color=CHANCE["color"],
                fontsize=10,
            )
        axes.set_xlabel("training tokens")
        axes.set_ylabel("accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        heading(drawing, title)
        final = {run: f"  {100 * own[-1][1].value:.1f}" for run, own in points.items()}
        _legend(drawing, axes, results, final, title="run and its last value")


def _chance_line(draw: Any, chance: float) -> None:
    draw(100 * chance, zorder=1, **CHANCE)


def _phenomena(
    folder: Path,
    study: Study,
    results: Mapping[str, RunResult],
    benchmark: str,
    mode: str,
    groups: Phenomena,
    chance: float | None,
) -> None:
    """One row a phenomenon, hardest for the baseline at the bottom, one dot a run, a mark for people."""
    name = f"{benchmark}-phenomena"
    order = by_difficulty(groups, study.baseline)
    humans = human_agreement(benchmark)
    _write_data(
        folder,
        name,
        [
            {"run": run, "phenomenon": group, "n": own[group].n, "low": round(own[group].low, 5)}
            | {"high": round(own[group].high, 5), "value": round(own[group].value, 5)}
            for run, own in groups.items()
            for group in order
            if group in own
        ]
        + [
            {"run": HUMANS, "phenomenon": group, "value": humans[group]} for group in order if group in humans
        ],
    )
    rows = {
        group.replace("_", " "): {run: own[group] for run, own in groups.items() if group in own}
        for group in order
    }
    title = (
        f"{benchmark_label(benchmark)} by phenomenon ({mode} mode, acc, 95% intervals), study {study.name}"
    )
    marks = {group.replace("_", " "): humans[group] for group in order if group in humans}
    _dots(folder, name, title, results, rows, chance, marks)


def _dots(
    folder: Path,
    name: str,
    title: str,
    results: Mapping[str, RunResult],
    rows: Mapping[str, Mapping[str, Proportion]],
    chance: float | None,
    marks: Mapping[str, float] | None = None,
) -> None:
    """A horizontal dot plot with intervals: `rows` maps a row's label to its runs' accuracies.

    `marks`: people's agreement (a fraction) by row, a bar across the row.
    """
    looks = styles(results)
    runs = [run for run in results if any(run in own for own in rows.values())]
    most = max(len(own) for own in rows.values())
    height = 1.3 + (0.13 * most + 0.18) * len(rows) + _legend_height(results, others=bool(marks))
    with figure(folder, name, title, 8.5, height) as drawing:
        axes = drawing.subplots()
        for index, own in enumerate(rows.values()):
            if index % 2 and most > 1:
                axes.axhspan(index - 0.5, index + 0.5, color="#f4f4f4", linewidth=0, zorder=0)
            for place, run in enumerate(own if most == 1 else runs):
                if run not in own:
                    continue
                offset = 0.0 if most == 1 else 0.78 * ((place + 0.5) / len(runs) - 0.5)
                _dot(axes, index + offset, own[run], run, looks[run])
        for index, label in enumerate(rows):
            if marks and label in marks:
                at = 100 * marks[label]
                axes.plot([at, at], [index - 0.4, index + 0.4], zorder=1, label=HUMANS, **HUMAN)
        if chance is not None:
            _chance_line(axes.axvline, chance)
            axes.annotate(
                "chance",
                (100 * chance, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=CHANCE["color"],
                fontsize=10,
            )
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy (%)")
        heading(drawing, title)
        if most > 1 or marks:
            _legend(drawing, axes, results, dict.fromkeys(runs, "") if most > 1 else {})


def _dot(axes: Axes, y: float, accuracy: Proportion, run: str, look: Mapping[str, Any]) -> None:
    value, low, high = 100 * accuracy.value, 100 * accuracy.low, 100 * accuracy.high
    axes.plot([low, high], [y, y], color=look["color"], linewidth=1.3, zorder=2)
    axes.plot([value], [y], color=look["color"], marker=look["marker"], linestyle="none", label=run, zorder=3)
