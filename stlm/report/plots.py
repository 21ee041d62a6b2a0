"""The study's plots of perplexity, accuracy and phenomena, each with its numbers as tidy CSV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stlm.files import write_text
from stlm.report.accuracies import main_mode, score
from stlm.report.comparison import Comparisons
from stlm.report.differences import write_differences
from stlm.report.names import benchmark_label
from stlm.report.phenomena import HUMANS, by_difficulty, human_agreement, phenomena
from stlm.report.results import Proportion, RunResult, run_label
from stlm.report.style import (
    CHANCE,
    HUMAN,
    Dot,
    count_axis,
    figure,
    heading,
    plain_log_ticks,
    styles,
    variant_rows,
)
from stlm.report.table import csv_text
from stlm.study.runs import Study

# More intervals than these on one plot hide each other: then only the baseline's are drawn.
_MOST_INTERVALS = 6
_LAST_VALUE = "run and its last value"


@dataclass(frozen=True)
class _Scores:
    """A benchmark's accuracies as a plot shows them. `chance`: what guessing scores, as a fraction."""

    folder: Path
    study: Study
    results: Mapping[str, RunResult]
    benchmark: str
    mode: str
    chance: float | None

    def title(self, what: str) -> str:
        name = benchmark_label(self.benchmark)
        return f"{name} {what} ({self.mode} mode, acc, 95% intervals), study {self.study.name}"


def write_plots(
    folder: Path, study: Study, results: Mapping[str, RunResult], comparisons: Comparisons
) -> None:
    """Write every plot as SVG into `folder` and its numbers into `folder`/data."""
    (folder / "data").mkdir()
    _figure1(folder, study, results)
    mode = main_mode(results)
    write_differences(folder, study, results, comparisons, mode)
    checkpoints = [checkpoint for result in results.values() for checkpoint in result.checkpoints.values()]
    for benchmark in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.benchmarks):
        scores = _Scores(folder, study, results, benchmark, mode, comparisons.chance.get(benchmark))
        _accuracy(scores)
        _phenomena(scores)


def _write_data(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    write_text(folder / "data" / f"{name}.csv", csv_text(records))


def _figure1(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Validation perplexity per character against tokens; to the right its second half, enlarged."""
    curves = {}
    for name, result in results.items():
        rows = result.curve[["tokens", "val_char_perplexity"]].dropna()
        rows = rows[np.isfinite(rows["val_char_perplexity"]) & (rows["tokens"] > 0)]
        if len(rows):
            curves[name] = (rows["tokens"].to_numpy(), rows["val_char_perplexity"].to_numpy())
    records = [
        {"run": name, "tokens": int(tokens), "value": round(float(value), 5)}
        for name, curve in curves.items()
        for tokens, value in zip(*curve, strict=True)
    ]
    _write_data(folder, "figure1", records)
    half = max((tokens[-1] for tokens, _ in curves.values()), default=0) / 2
    late = {name: values[tokens >= half] for name, (tokens, values) in curves.items()}
    zoom = bool(late) and all(3 <= len(late[name]) < len(values) for name, (_, values) in curves.items())
    looks = styles(results)
    title = f"Validation perplexity during training, study {study.name}"
    with figure(folder, "figure1", title, 9, 4.4 + _legend_height(results)) as drawing:
        panels = drawing.subplots(1, 1 + zoom, squeeze=False)[0]
        for axes in panels:
            for name, (tokens, values) in reversed(curves.items()):  # the baseline last, on top
                marked = len(tokens) == 1 or axes is not panels[0]
                axes.plot(tokens, values, **(looks[name] | ({} if marked else {"marker": ""})))
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
        heading(drawing, title)
        final = {name: f"  {values[-1]:.3f}" for name, (_, values) in curves.items()}
        _legend(drawing, results, final, _LAST_VALUE, line=True)


def _accuracy(scores: _Scores) -> None:
    """Accuracy against training tokens with 95% intervals; a dot plot where each run has one checkpoint."""
    points: dict[str, list[tuple[int, Proportion]]] = {}
    for run, result in scores.results.items():
        for checkpoint in result.checkpoints.values():
            accuracy = score(checkpoint.benchmarks.get(scores.benchmark), scores.mode, "acc")
            if accuracy is not None:
                points.setdefault(run, []).append((checkpoint.tokens, accuracy))
    if not points:
        return
    name, title = f"accuracy-{scores.benchmark}", scores.title("accuracy")
    chance = None if scores.chance is None else round(scores.chance, 5)
    records = [
        {"run": run, "tokens": tokens, "n": accuracy.n, "chance": chance, **_rounded(accuracy)}
        for run, reached in points.items()
        for tokens, accuracy in reached
    ]
    _write_data(scores.folder, name, records)
    if max(map(len, points.values())) > 1:
        _accuracy_curves(scores, name, title, points)
    else:
        labels = {run: run_label(scores.results[run], scores.results) for run in points}
        _dots(scores, name, title, {labels[run]: {run: reached[0][1]} for run, reached in points.items()})


def _accuracy_curves(
    scores: _Scores, name: str, title: str, points: Mapping[str, list[tuple[int, Proportion]]]
) -> None:
    looks = styles(scores.results)
    with figure(scores.folder, name, title, 8, 4.6 + _legend_height(scores.results)) as drawing:
        axes = drawing.subplots()
        # Runs are drawn slightly apart, so that none hides another's interval.
        apart = 0.006 * max(tokens for reached in points.values() for tokens, _ in reached)
        for place, (run, reached) in reversed(list(enumerate(points.items()))):
            tokens = [t + apart * (place - (len(points) - 1) / 2) for t, _ in reached]
            axes.plot(tokens, [100 * accuracy.value for _, accuracy in reached], **looks[run])
            if len(points) <= _MOST_INTERVALS or run == scores.study.baseline:
                low, high = ([100 * getattr(one, side) for _, one in reached] for side in ("low", "high"))
                axes.vlines(tokens, low, high, color=looks[run]["color"], linewidth=1.2, alpha=0.7)
        if scores.chance is not None:
            place = 100 * scores.chance
            axes.axhline(place, zorder=1, **CHANCE)
            _name_chance(axes, (1.01, place), axes.get_yaxis_transform(), ha="left", va="center")
        axes.set_xlabel("training tokens")
        axes.set_ylabel("accuracy (%)")
        count_axis(axes.xaxis, 6)
        heading(drawing, title)
        final = {run: f"  {100 * reached[-1][1].value:.1f}" for run, reached in points.items()}
        _legend(drawing, scores.results, final, _LAST_VALUE, line=True)


def _phenomena(scores: _Scores) -> None:
    """A row a phenomenon, the baseline's worst at the bottom, with a dot a run and a bar for people."""
    groups = phenomena(scores.results, scores.benchmark, scores.mode)
    if not groups:
        return
    name, order = f"{scores.benchmark}-phenomena", by_difficulty(groups, scores.study.baseline)
    people = {group: value for group, value in human_agreement(scores.benchmark).items() if group in order}
    records = [
        {"run": run, "phenomenon": group, "n": scored[group].n, **_rounded(scored[group])}
        for run, scored in groups.items()
        for group in order
        if group in scored
    ]
    records += [
        {"run": HUMANS, "phenomenon": group, "value": people[group]} for group in order if group in people
    ]
    _write_data(scores.folder, name, records)
    rows = {group: {run: found[group] for run, found in groups.items() if group in found} for group in order}
    _dots(scores, name, scores.title("by phenomenon"), rows, people)


def _dots(
    scores: _Scores,
    name: str,
    title: str,
    rows: Mapping[str, Mapping[str, Proportion]],
    people: Mapping[str, float] | None = None,
) -> None:
    """A horizontal dot plot with intervals: `rows` maps a row's label to its runs' accuracies.

    `people`: their agreement with the labels, as a fraction, by row.
    """
    people, results, looks = people or {}, scores.results, styles(scores.results)
    runs = [run for run in results if any(run in scored for scored in rows.values())]
    most = max(map(len, rows.values()))
    height = 1.3 + (0.13 * most + 0.18) * len(rows) + _legend_height(results, others=bool(people))
    with figure(scores.folder, name, title, 8.5, height) as drawing:
        axes = drawing.subplots()
        for row, (label, scored) in enumerate(rows.items()):
            for place, run in enumerate(scored if most == 1 else runs):
                if run in scored:
                    offset = 0.0 if most == 1 else 0.78 * ((place + 0.5) / len(runs) - 0.5)
                    low, value, high = (100 * getattr(scored[run], key) for key in ("low", "value", "high"))
                    interval = (low, high), {"linewidth": 1.3}
                    Dot(row + offset, value, looks[run] | {"markersize": 5}, [interval]).draw(axes)
            if label in people:
                axes.plot([100 * people[label]] * 2, [row - 0.4, row + 0.4], zorder=1, **HUMAN)
        if scores.chance is not None:
            place = 100 * scores.chance
            axes.axvline(place, zorder=1, **CHANCE)
            _name_chance(axes, (place, 1), axes.get_xaxis_transform(), ha="center", va="bottom")
        variant_rows(axes, [label.replace("_", " ") for label in rows], bands=most > 1)
        axes.set_xlabel("accuracy (%)")
        heading(drawing, title)
        extra = [Line2D([], [], label=HUMANS, **HUMAN)] if people else []
        _legend(drawing, results, dict.fromkeys(runs, "") if most > 1 else {}, extra=extra)


def _name_chance(axes: Axes, place: tuple[float, float], transform: Any, **align: str) -> None:
    axes.text(*place, "chance", transform=transform, color=CHANCE["color"], fontsize=10, **align)


def _rounded(accuracy: Proportion) -> dict[str, float]:
    return {key: round(getattr(accuracy, key), 5) for key in ("low", "high", "value")}


def _legend(
    drawing: Figure,
    results: Mapping[str, RunResult],
    shown: Mapping[str, str],
    title: str | None = None,
    line: bool = False,
    extra: list[Line2D] | None = None,
) -> None:
    """An entry for each run, or for each variant with several; `shown`: run -> what follows its label."""
    looks, by_variant, handles = styles(results), {}, []
    for run in shown:
        by_variant.setdefault(results[run].train.variant, []).append(run)
    for first, *others in by_variant.values():
        detail = f" ({1 + len(others)} seeds)" if others else shown[first]
        look = looks[first] if line else looks[first] | {"linestyle": "none"}
        handles.append(Line2D([], [], label=results[first].train.label + detail, **look))
    if handles := handles + (extra or []):
        columns = min(_legend_columns(results), len(handles))
        single = any(len(runs) == 1 for runs in by_variant.values())
        drawing.legend(
            handles=handles, loc="outside lower center", ncols=columns, title=title if single else None
        )


def _legend_columns(results: Mapping[str, RunResult]) -> int:
    longest = max(len(result.train.label) for result in results.values())
    return max(1, min(3, 90 // (longest + 14)))


def _legend_height(results: Mapping[str, RunResult], others: int = 0) -> float:
    """Inches of a legend with an entry for each variant and `others` more."""
    entries = len({result.train.variant for result in results.values()}) + others
    return 0.25 * -(-entries // _legend_columns(results))
