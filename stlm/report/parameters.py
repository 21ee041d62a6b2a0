"""Where the parameters are: stacked bars by group."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stlm.files import write_text
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.names import count, some
from stlm.report.results import RunResult
from stlm.report.style import figure, group_colour, heading
from stlm.report.table import csv_text
from stlm.study.runs import Study


def write_parameters(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Write `folder`/parameters.{svg,png} and data/parameters.csv: a bar for the variants of one division."""
    bars: dict[tuple[tuple[str, int], ...], list[str]] = {}
    records = []
    for variant, name in {result.train.variant: name for name, result in results.items()}.items():
        run = study.runs[name]
        division = parameter_groups(build_on_meta(run.model, tuple(run.techniques.values())))
        bars.setdefault(tuple(division.items()), []).append(results[name].train.label)
        records += [{"variant": variant, "group": group, "value": own} for group, own in division.items()]
    write_text(folder / "data" / "parameters.csv", csv_text(records))
    title = f"Where the parameters are, study {study.name}"
    groups = list(dict.fromkeys(group for bar in bars for group, _ in bar))
    with figure(folder, "parameters", title, 9, 1.7 + 0.42 * len(bars)) as drawing:
        axes = drawing.subplots()
        longest = max(sum(own for _, own in bar) for bar in bars)
        for place, bar in enumerate(bars):
            _draw_bar(axes, place, bar, longest)
        names = [textwrap.fill(some(labels, most=2), 36) for labels in bars.values()]
        axes.set_yticks(range(len(bars)), names)
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.set_xlim(0, 1.12 * longest)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.set_xlabel("parameters, shared ones once")
        heading(drawing, title)
        handles = [Patch(facecolor=group_colour(group, 0.6), label=group) for group in groups]
        drawing.legend(handles=handles, loc="outside lower center", ncols=min(4, len(groups)))


def _draw_bar(axes: Axes, place: int, bar: Sequence[tuple[str, int]], longest: int) -> None:
    total, start = sum(own for _, own in bar), 0
    for group, own in bar:
        axes.barh(place, own, left=start, height=0.68, color=group_colour(group, 0.6), edgecolor="white")
        if own > 0.075 * longest:  # room for its share
            axes.text(start + own / 2, place, f"{own / total:.0%}", ha="center", va="center", fontsize=9)
        start += own
    axes.text(total + 0.01 * longest, place, count(total), ha="left", va="center", fontsize=9.5)
