"""The Pareto plot: the number of parameters and bits per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import textalloc
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stlm.report.curves import spent, token_length
from stlm.report.documents import amount, comparable
from stlm.report.equal_cost import SAME_COST, SAME_SIZE
from stlm.report.names import count
from stlm.report.results import Results
from stlm.report.style import figure, legend, legend_entry, styles, write_data

_FRONT = {"color": "#999999", "linewidth": 1.3, "zorder": 1}
_HOLLOW = {"markerfacecolor": "white"}
# Key of a point's record -> title of the panel whose horizontal axis it is.
_PANELS = {"parameters": "all parameters", "non_embedding": "without embedding and head"}


class _Point(NamedTuple):
    """A variant. `record`: its row in pareto.csv; `bits`: bits per byte by seed."""

    label: str
    look: Mapping[str, object]
    record: dict[str, object]
    bits: list[float]

    @property
    def mean(self) -> float:
        return mean(self.bits)

    @property
    def fill(self) -> dict[str, object]:
        """Hollow where it was trained on other numbers of tokens than the baseline: sizes do not compare."""
        return {} if self.record["same_tokens"] else _HOLLOW


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices, by size, of the `points` (size, bits) that no other equals or beats in both."""
    best, indices = float("inf"), []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            indices.append(index)
    return indices


def write_pareto(folder: Path, results: Results) -> None:
    """Write `folder`/pareto.svg and data/pareto.csv; nothing where all variants have the same size."""
    points = _points(results)
    sizes = [point.record["parameters"] for point in points]
    if len(points) < 2 or max(sizes) <= (1 + SAME_SIZE) * min(sizes):
        return
    equal = [point for point in points if point.record["same_tokens"]]
    best = [equal[index] for index in front([(point.record["parameters"], point.mean) for point in equal])]
    records = [
        point.record | {"seeds": len(point.bits), "front": point in best, "value": round(point.mean, 5)}
        for point in points
    ]
    write_data(folder, "pareto", records)
    text = amount(results.base.perplexity)
    title = f"Parameters and bits per byte (test: {text}), study {results.study.name}"
    with figure(folder, "pareto", title, 11, 4.4 + 0.16 * len(points)) as drawing:
        panels = drawing.subplots(1, 2, sharey=True)
        for axes, (size, name) in zip(panels, _PANELS.items(), strict=True):
            axes.set_title(name, loc="left")
            _draw(axes, [(point.record[size], point) for point in points])
        panels[0].set_ylabel("bits per byte: lower is better")
        legend(drawing, _legend(points), 3)
        for axes, size in zip(panels, _PANELS, strict=True):
            seeds = [(point.record[size], value) for point in points for value in point.bits]
            places = [(point.record[size], point.mean) for point in points]
            names, colours = [point.label for point in points], [point.look["color"] for point in points]
            label_points(axes, places, names, colours, seeds)


def _points(results: Results) -> list[_Point]:
    """A point for each variant measured on the baseline's text: bits per byte compare on one text only."""
    looks, base = styles(results), results.base
    points = []
    for runs in results.variants.values():
        runs = [run for run in runs if comparable(run.perplexity, base.perplexity)]
        if not runs or runs[0].train.corpus != base.train.corpus:
            continue
        train, cost, token = runs[0].train, spent(runs[0], results), token_length(runs[0], base)
        tokens = spent(base, results)["tokens"]
        same = token is not None and abs(token * cost["tokens"] - tokens) <= SAME_COST * tokens
        record = {"variant": train.variant, "parameters": train.parameters.total}
        record |= {"non_embedding": train.parameters.non_embedding}
        record |= {"tokens": round(cost["tokens"]), "flops": round(cost["flops"])}
        record |= {"same_tokens": same}
        bits = [run.perplexity.bits_per_byte for run in runs]
        points.append(_Point(train.label, looks[runs[0].name], record, bits))
    return points


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colours: Sequence[str],
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write a name near each of `points`, off the points, `others` and other names, with a line to its point.

    Call it last: the axes must have their final limits and size.
    """
    x, y = zip(*points, strict=True)
    x_scatter, y_scatter = zip(*points, *others, strict=True)
    _, _, texts, lines = textalloc.allocate(
        axes,
        x,
        y,
        names,
        x_scatter=x_scatter,
        y_scatter=y_scatter,
        textsize=9,
        textcolor=colours,
        linecolor=colours,
        linewidth=0.6,
        margin=0.004,
        min_distance=0.01,
        max_distance=0.25,
        nbr_candidates=2000,
        avoid_label_lines_overlap=True,
        avoid_crossing_label_lines=True,
    )
    for artist in filter(None, [*texts, *lines]):
        artist.set_in_layout(False)


def _draw(axes: Axes, points: Sequence[tuple[int, _Point]]) -> None:
    equal = [(size, point.mean) for size, point in points if point.record["same_tokens"]]
    edge = [equal[place] for place in front(equal)]
    axes.step([size for size, _ in edge], [bits for _, bits in edge], where="post", **_FRONT)
    for size, point in points:
        colour = point.look["color"]
        if len(point.bits) > 1:
            axes.plot([size] * len(point.bits), point.bits, "_", color=colour, markersize=9, zorder=2)
            axes.plot([size] * 2, [min(point.bits), max(point.bits)], color=colour, linewidth=1, zorder=2)
        look = {"color": colour, "markersize": 7, "zorder": 3, **point.fill}
        axes.plot([size], [point.mean], point.look["marker"], **look)
    sizes, bits = [size for size, _ in points], [value for _, point in points for value in point.bits]
    axes.set_xscale("log")
    stretch = (max(sizes) / min(sizes)) ** 0.28
    axes.set_xlim(min(sizes) / stretch / 1.06, max(sizes) * stretch * 1.06)
    margin = 0.08 * (np.ptp(bits) or 0.1)
    axes.set_ylim(min(bits) - margin, max(bits) + margin)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 5 else range(1, 10), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters")


def _legend(points: Sequence[_Point]) -> list[Line2D]:
    others = any(point.fill for point in points)
    text = "front: none on as many training tokens" if others else "front: none"
    handles = [legend_entry(f"{text} is smaller and as good", **_FRONT, linestyle="-")]
    if others:
        text = "trained on more or fewer tokens than the baseline: not on the front"
        handles.append(legend_entry(text, marker="o", **_HOLLOW))
    if any(len(point.bits) > 1 for point in points):
        handles.append(legend_entry("mean of the seeds", marker="o"))
        handles.append(legend_entry("a seed", marker="_", markersize=9))
    return handles
