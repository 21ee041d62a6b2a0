"""The plot of differences from the baseline: a panel a benchmark, a row a run or, over seeds, a variant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stlm.evaluation.statistics import Interval
from stlm.files import write_text
from stlm.report.comparison import SIGN, SIGN_ITEMS, Comparisons, Score, mark, significant
from stlm.report.names import benchmark_label
from stlm.report.results import RunResult, run_label
from stlm.report.style import CHANCE, figure, heading, styles
from stlm.report.table import csv_text
from stlm.report.unlike import rows_of, unlike_variants
from stlm.study.runs import Study

_COLUMNS = 3
_GREY = "#444444"
# After a row that was not made as the baseline was; table2 says how.
_OTHERWISE = "§"


class _Difference(NamedTuple):
    """Fractions; `sign` as in the tables: significant, on these items only, or neither (empty)."""

    value: float
    interval: Interval
    clustered: Interval | None
    sign: str
    adjusted: float | None


def write_differences(
    folder: Path, study: Study, results: Mapping[str, RunResult], comparisons: Comparisons, mode: str
) -> None:
    """Write `folder`/differences.{svg,png} and data/differences.csv, of `acc` in `mode`.

    Nothing is written where no run is compared with another.
    """
    benchmarks = list(dict.fromkeys(b for result in results.values() for b in result.last.benchmarks))
    panels = {b: _rows(results, comparisons, (b, mode, "acc")) for b in benchmarks}
    panels = {benchmark: rows for benchmark, rows in panels.items() if rows}
    if not panels:
        return
    write_text(
        folder / "data" / "differences.csv",
        csv_text([_record(b, run, own) for b, rows in panels.items() for run, own in rows.items()]),
    )
    names = list(dict.fromkeys(run for rows in panels.values() for run in rows))
    looks, labels = styles(results), {run: _label(run, results, comparisons, mode) for run in names}
    otherwise = unlike_variants(rows_of(results)) & {results[run].train.variant for run in names}
    labels |= {run: f"{labels[run]} {_OTHERWISE}" for run in names if results[run].train.variant in otherwise}
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    baseline = results[study.baseline].train.label
    title = f"Differences from {baseline} ({mode} mode, acc, 95% intervals), study {study.name}"
    height = 1.5 + lines * (0.75 + 0.3 * len(names))
    width = max(8.5, 3.6 + 2.5 * columns)  # room for the title beside a single panel
    with figure(folder, "differences", title, width, height) as drawing:
        grid = drawing.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (benchmark, rows) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(benchmark_label(benchmark), loc="left")
            axes.axvline(0, zorder=1, **CHANCE)
            for run, own in rows.items():
                _draw(axes, names.index(run), own, looks[run])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), [labels[run] for run in names])
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_axis_off()
            elif place + columns >= len(panels):  # the lowest of its column
                axes.tick_params(axis="x", labelbottom=True)
                axes.set_xlabel("difference (points)")
        heading(drawing, title)
        handles = _legend(panels, bool(otherwise))
        drawing.legend(handles=handles, loc="outside lower center", ncols=2 if columns > 1 else 1)


def _rows(results: Mapping[str, RunResult], comparisons: Comparisons, score: Score) -> dict[str, _Difference]:
    """By run, or by a variant's first run where the variant is tested over its seeds."""
    rows: dict[str, _Difference] = {}
    tested = set()
    for name, result in results.items():
        variant = result.train.variant
        over_seeds = comparisons.seeds.get(variant, {}).get(score)
        if over_seeds is not None and over_seeds.test is not None:
            if variant not in tested:
                sign = SIGN if significant(over_seeds.adjusted) else ""
                test = over_seeds.test
                rows[name] = _Difference(test.difference, test.interval, None, sign, over_seeds.adjusted)
            tested.add(variant)
            continue
        point = comparisons.last(name, score)
        if point is not None and point.paired is not None:
            own = point.paired
            rows[name] = _Difference(own.difference, own.interval, own.clustered, mark(own), own.adjusted)
    return rows


def _label(run: str, results: Mapping[str, RunResult], comparisons: Comparisons, mode: str) -> str:
    train = results[run].train
    tested = [
        own.shared
        for (_, in_mode, _), own in comparisons.seeds.get(train.variant, {}).items()
        if in_mode == mode and own.test is not None
    ]
    return f"{train.label} ({len(tested[0])} seeds)" if tested else run_label(results[run], results)


def _record(benchmark: str, run: str, own: _Difference) -> dict[str, Any]:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    record = {"run": run, "benchmark": benchmark, "low": round(own.interval.low, 5)}
    record |= {"high": round(own.interval.high, 5)}
    clustered = own.clustered
    record |= {
        "clustered_low": None if clustered is None else round(clustered.low, 5),
        "clustered_high": None if clustered is None else round(clustered.high, 5),
        "p_holm": None if own.adjusted is None else float(f"{own.adjusted:.4g}"),
    }
    return record | {"value": round(own.value, 5)}


def _draw(axes: Axes, row: int, own: _Difference, look: Mapping[str, Any]) -> None:
    colour = look["color"]
    for interval, width in ((own.clustered, 1.0), (own.interval, 3.2)):
        if interval is not None:
            bounds = [100 * bound for bound in interval]
            # Butt: the line must end where the interval does.
            axes.plot(bounds, [row, row], color=colour, linewidth=width, solid_capstyle="butt", zorder=2)
    marker = {"marker": look["marker"], "markersize": 7, "color": colour, **_fill(own.sign)}
    axes.plot([100 * own.value], [row], linestyle="none", zorder=3, **marker)


def _fill(sign: str) -> dict[str, Any]:
    if not sign:
        return {"markerfacecolor": "white"}
    return {"fillstyle": "full" if sign == SIGN else "left", "markerfacecoloralt": "white"}


def _legend(panels: Mapping[str, Mapping[str, _Difference]], otherwise: bool) -> list[Line2D]:
    shown = [own for rows in panels.values() for own in rows.values()]
    texts = {SIGN: "p < 0.05 after Holm's correction"}
    if any(own.sign == SIGN_ITEMS for own in shown):
        texts[SIGN_ITEMS] = "the same, but not over groups of items"
    texts[""] = "not significant"
    grey = {"color": _GREY, "marker": "o", "markersize": 7, "linestyle": "none"}
    handles = [Line2D([], [], label=text, **grey, **_fill(sign)) for sign, text in texts.items()]
    handles.append(Line2D([], [], color=_GREY, linewidth=3.2, label="interval over items (or over seeds)"))
    if any(own.clustered is not None for own in shown):
        handles.append(Line2D([], [], color=_GREY, linewidth=1.0, label="interval over groups of items"))
    if otherwise:
        text = "other arithmetic, code or processor than the baseline's"
        handles.append(Line2D([], [], linestyle="none", marker=f"${_OTHERWISE}$", color=_GREY, label=text))
    return handles
