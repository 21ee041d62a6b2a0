"""What parameters buy: the Pareto plot of parameters and bits per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stlm.files import write_text
from stlm.report.curves import spent, token_length
from stlm.report.documents import amount, comparable
from stlm.report.equal_cost import SAME_COST, SAME_SIZE
from stlm.report.labels import label_points
from stlm.report.names import count
from stlm.report.results import RunResult
from stlm.report.style import figure, heading, styles
from stlm.report.table import csv_text
from stlm.study.runs import Study

_FRONT = {"color": "#999999", "linewidth": 1.3, "zorder": 1}
_HOLLOW = {"markerfacecolor": "white"}


class _Point(NamedTuple):
    """A variant: its run's look, sizes, costs with those of a start, and bits per byte of each seed.

    `same_tokens`: trained on as many tokens as the baseline, and comparable by its size.
    """

    variant: str
    label: str
    look: Mapping[str, object]
    total: int
    non_embedding: int
    tokens: float
    flops: float
    same_tokens: bool
    bits: list[float]

    @property
    def mean(self) -> float:
        return mean(self.bits)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of `points` (size, bits) no other is as small and as good as: their places, by size."""
    best, found = float("inf"), []
    for place in sorted(range(len(points)), key=lambda own: points[own]):
        if points[place][1] < best:
            best = points[place][1]
            found.append(place)
    return found


def write_pareto(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Write `folder`/pareto.{svg,png} and data/pareto.csv; nothing where all variants are of one size."""
    points = _points(study, results)
    sizes = [point.total for point in points]
    if len(points) < 2 or max(sizes) <= (1 + SAME_SIZE) * min(sizes):
        return
    equal = [own for own in points if own.same_tokens]
    on_front = {equal[place].variant for place in front([(own.total, own.mean) for own in equal])}
    records = [
        {"variant": own.variant, "parameters": own.total, "non_embedding": own.non_embedding}
        | {"tokens": round(own.tokens), "flops": round(own.flops), "same_tokens": own.same_tokens}
        | {"seeds": len(own.bits), "front": own.variant in on_front, "value": round(own.mean, 5)}
        for own in points
    ]
    write_text(folder / "data" / "pareto.csv", csv_text(records))
    text = amount(results[study.baseline].last.perplexity)
    title = f"Parameters and bits per byte (test: {text}), study {study.name}"
    with figure(folder, "pareto", title, 11, 4.4 + 0.16 * len(points)) as drawing:
        panels = drawing.subplots(1, 2, sharey=True)
        for axes, name, size in zip(
            panels, ("all parameters", "without embedding and head"), ("total", "non_embedding"), strict=True
        ):
            axes.set_title(name, loc="left")
            _draw(axes, [(getattr(own, size), own) for own in points])
        panels[0].set_ylabel("bits per byte: lower is better")
        heading(drawing, title)
        drawing.legend(handles=_legend(points), loc="outside lower center", ncols=3)
        for axes, size in zip(panels, ("total", "non_embedding"), strict=True):
            places = [(getattr(own, size), own.mean) for own in points]
            spans = [(min(own.bits), max(own.bits)) for own in points]
            label_points(drawing, axes, places, [own.label for own in points], spans)


def _points(study: Study, results: Mapping[str, RunResult]) -> list[_Point]:
    """A point a variant measured on the baseline's text: bits per byte compare on one text alone."""
    looks, base = styles(results), results[study.baseline]
    points: dict[str, _Point] = {}
    for name, result in results.items():
        train = result.train
        alike = comparable(result.last.perplexity, base.last.perplexity)
        if train.corpus != base.train.corpus or not alike:
            continue
        if train.variant not in points:
            cost, token = spent(result, results), token_length(result, base)
            share = None if token is None else token * cost["tokens"] / spent(base, results)["tokens"]
            points[train.variant] = _Point(
                variant=train.variant,
                label=train.label,
                look=looks[name],
                total=train.parameters.total,
                non_embedding=train.parameters.non_embedding,
                tokens=cost["tokens"],
                flops=cost["flops"],
                same_tokens=share is not None and abs(share - 1) <= SAME_COST,
                bits=[],
            )
        points[train.variant].bits.append(result.last.perplexity.bits_per_byte)
    return list(points.values())


def _draw(axes: Axes, points: Sequence[tuple[int, _Point]]) -> None:
    equal = [(size, own.mean) for size, own in points if own.same_tokens]
    edge = [equal[place] for place in front(equal)]
    axes.step([size for size, _ in edge], [bits for _, bits in edge], where="post", **_FRONT)
    for size, own in points:
        colour = own.look["color"]
        if len(own.bits) > 1:
            axes.plot([size] * len(own.bits), own.bits, "_", color=colour, markersize=9, zorder=2)
            axes.plot([size] * 2, [min(own.bits), max(own.bits)], color=colour, linewidth=1, zorder=2)
        fill = {} if own.same_tokens else _HOLLOW
        axes.plot([size], [own.mean], own.look["marker"], color=colour, markersize=7, zorder=3, **fill)
    sizes, bits = [size for size, _ in points], [value for _, own in points for value in own.bits]
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
    others = not all(own.same_tokens for own in points)
    text = "front: none on as many training tokens" if others else "front: none"
    handles = [Line2D([], [], color=_FRONT["color"], linewidth=1.3, label=f"{text} is smaller and as good")]
    grey = {"color": "#444444", "linestyle": "none"}
    if others:
        text = "trained on more or fewer tokens than the baseline: not on the front"
        handles.append(Line2D([], [], marker="o", markersize=7, label=text, **grey, **_HOLLOW))
    if any(len(own.bits) > 1 for own in points):
        handles.append(Line2D([], [], marker="o", markersize=7, label="mean of the seeds", **grey))
        handles.append(Line2D([], [], marker="_", markersize=9, label="a seed", **grey))
    return handles
