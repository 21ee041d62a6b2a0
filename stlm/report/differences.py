"""The plot of differences from the baseline: a panel a benchmark, a row a run or, over seeds, a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.lines import Line2D

from stlm.evaluation.statistics import Interval
from stlm.files import write_text
from stlm.report.comparison import SIGN, SIGN_ITEMS, Comparisons, Score, mark, significant
from stlm.report.names import benchmark_label
from stlm.report.results import RunResult, run_label
from stlm.report.style import Dot, draw_differences, figure, heading, sign, styles
from stlm.report.table import csv_text
from stlm.report.unlike import rows_of, unlike_variants
from stlm.study.runs import Study

_COLUMNS = 3
# Follows the label of a row that was not made as the baseline was; table2 says how.
_UNLIKE = "§"


class _Difference(NamedTuple):
    """Fractions. `sign` is the tables': significant, significant over these items only, or empty."""

    value: float
    interval: Interval
    clustered: Interval | None
    sign: str
    adjusted: float | None


def write_differences(
    folder: Path, study: Study, results: Mapping[str, RunResult], comparisons: Comparisons, mode: str
) -> None:
    """Write `folder`/differences.svg and data/differences.csv, of `acc` in `mode`.

    Nothing is written where no run is compared with another.
    """
    benchmarks = list(dict.fromkeys(b for result in results.values() for b in result.last.benchmarks))
    panels = {b: _rows(results, comparisons, (b, mode, "acc")) for b in benchmarks}
    panels = {benchmark: rows for benchmark, rows in panels.items() if rows}
    if not panels:
        return
    records = [_record(b, run, found) for b, rows in panels.items() for run, found in rows.items()]
    write_text(folder / "data" / "differences.csv", csv_text(records))
    names = list(dict.fromkeys(run for rows in panels.values() for run in rows))
    unlike = unlike_variants(rows_of(results)) & {results[run].train.variant for run in names}
    labels = [
        _label(run, results, comparisons, mode) + f" {_UNLIKE}" * (results[run].train.variant in unlike)
        for run in names
    ]
    columns, looks = min(_COLUMNS, len(panels)), styles(results)
    baseline = results[study.baseline].train.label
    title = f"Differences from {baseline} ({mode} mode, acc, 95% intervals), study {study.name}"
    height = 1.5 - (-len(panels) // columns) * (0.75 + 0.3 * len(names))
    width = max(8.5, 3.6 + 2.5 * columns)  # room for the title above a single panel
    with figure(folder, "differences", title, width, height) as drawing:
        dots = {
            benchmark_label(benchmark): [
                _dot(names.index(run), found, looks[run]) for run, found in rows.items()
            ]
            for benchmark, rows in panels.items()
        }
        draw_differences(drawing, dots, labels, "difference (points)", columns)
        heading(drawing, title)
        handles = _legend([found for rows in panels.values() for found in rows.values()], bool(unlike))
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
                test, star = over_seeds.test, SIGN if significant(over_seeds.adjusted) else ""
                rows[name] = _Difference(test.difference, test.interval, None, star, over_seeds.adjusted)
            tested.add(variant)
            continue
        point = comparisons.last(name, score)
        if point is not None and (paired := point.paired) is not None:
            rows[name] = _Difference(
                paired.difference, paired.interval, paired.clustered, mark(paired), paired.adjusted
            )
    return rows


def _label(run: str, results: Mapping[str, RunResult], comparisons: Comparisons, mode: str) -> str:
    train = results[run].train
    for (_, in_mode, _), found in comparisons.seeds.get(train.variant, {}).items():
        if in_mode == mode and found.test is not None:
            return f"{train.label} ({len(found.shared)} seeds)"
    return run_label(results[run], results)


def _record(benchmark: str, run: str, found: _Difference) -> dict[str, Any]:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    record: dict[str, Any] = {"run": run, "benchmark": benchmark}
    for prefix, interval in (("", found.interval), ("clustered_", found.clustered)):
        low, high = (None, None) if interval is None else (round(bound, 5) for bound in interval)
        record |= {f"{prefix}low": low, f"{prefix}high": high}
    p = None if found.adjusted is None else float(f"{found.adjusted:.4g}")
    return record | {"p_holm": p, "value": round(found.value, 5)}


def _dot(row: int, found: _Difference, look: Mapping[str, Any]) -> Dot:
    intervals = [
        ((100 * interval.low, 100 * interval.high), {"linewidth": width})
        for interval, width in ((found.clustered, 1.0), (found.interval, 3.2))
        if interval is not None
    ]
    return Dot(row, 100 * found.value, {**look, **_fill(found.sign)}, intervals)


def _fill(kind: str) -> dict[str, Any]:
    if not kind:
        return {"markerfacecolor": "white"}
    return {"fillstyle": "full" if kind == SIGN else "left", "markerfacecoloralt": "white"}


def _legend(shown: Sequence[_Difference], unlike: bool) -> list[Line2D]:
    texts = {SIGN: "p < 0.05 after Holm's correction"}
    if any(found.sign == SIGN_ITEMS for found in shown):
        texts[SIGN_ITEMS] = "the same, but not over groups of items"
    texts[""] = "not significant"
    handles = [sign(text, marker="o", **_fill(kind)) for kind, text in texts.items()]
    handles.append(sign("interval over items (or over seeds)", linestyle="-", linewidth=3.2))
    if any(found.clustered is not None for found in shown):
        handles.append(sign("interval over groups of items", linestyle="-", linewidth=1.0))
    if unlike:
        text = "made with another precision, code or processor than the baseline"
        handles.append(sign(text, marker=f"${_UNLIKE}$"))
    return handles
