"""Language models within a run's model (exits of a network, say) against the model itself: table and plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stlm.evaluation.statistics import Interval
from stlm.files import write_text
from stlm.model.counts import build_on_meta
from stlm.model.flops import forward_flops
from stlm.report.accuracies import main_mode, score
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.names import benchmark_label, bounds, count, percent
from stlm.report.results import CheckpointResult, Perplexity, Proportion, RunResult, run_label
from stlm.report.style import figure, heading, styles
from stlm.report.table import Cell, Section, Table, csv_text
from stlm.study.runs import Run, Study

MODEL = "model"  # the row of the model itself
# More of them than this and their names overlap below a panel.
_MOST_NAMES = 10


class _Point(NamedTuple):
    """A readout of a run's last checkpoint, or its model: the scores, and FLOPs of a forward pass a token."""

    name: str
    parameters: int
    flops: float
    scored: CheckpointResult


def _points(study: Study, results: Mapping[str, RunResult]) -> dict[str, list[_Point]]:
    """Run -> its readouts and, at the end, its model; of the runs that have any."""
    return {
        name: [
            *(
                _Point(readout, own.parameters, own.flops_per_token, own)
                for readout, own in result.evaluation.readouts.items()
            ),
            _Point(MODEL, result.train.parameters.total, _flops_per_token(study.runs[name]), result.last),
        ]
        for name, result in results.items()
        if result.evaluation.readouts
    }


def _flops_per_token(run: Run) -> float:
    model = build_on_meta(run.model, tuple(run.techniques.values()))
    return forward_flops(model, run.model.context) / run.model.context


def _benchmarks(points: Mapping[str, Sequence[_Point]]) -> list[str]:
    every = (point for own in points.values() for point in own)
    return list(dict.fromkeys(name for point in every for name in point.scored.benchmarks))


def readouts_table(study: Study, results: Mapping[str, RunResult]) -> Table | None:
    """A row a readout and, below, the model, of each run that has readouts; None: no run has any."""
    points = _points(study, results)
    if not points:
        return None
    mode, benchmarks = main_mode(results), _benchmarks(points)
    rows: list[list[Cell] | Section] = []
    records = []
    for run, own in points.items():
        rows.append(Section(run_label(results[run], results)))
        for point in own:
            measured = point.scored.perplexity
            record: dict[str, object] = {"run": run, "readout": point.name, "parameters": point.parameters}
            record |= {"flops_per_token": round(point.flops, 1)}
            record |= {"bits_per_byte": round(measured.bits_per_byte, 5)}
            cells = [point.name, count(point.parameters), count(point.flops), _bits(measured)]
            for benchmark in benchmarks:
                accuracy = score(point.scored.benchmarks.get(benchmark), mode, "acc")
                cells.append(_shown(accuracy))
                if accuracy is not None:
                    values = (("", accuracy.value), ("_low", accuracy.low), ("_high", accuracy.high))
                    record |= {f"{benchmark}{end}": round(value, 5) for end, value in values}
            rows.append([Cell(text, bold=point.name == MODEL) for text in cells])
            records.append(record)
    return Table(
        name="readouts",
        title=f"Language models within the models, study {study.name}",
        header=["", "parameters", "FLOPs\nper token", "bits per byte", *map(benchmark_label, benchmarks)],
        rows=rows,
        notes=[
            f"Of each run's last checkpoint; {MODEL}: the model itself. FLOPs: of a forward pass, in a text "
            "as long as the context. Parameters: those that the row's model uses.",
            amount_note((run_label(results[run], results), results[run].last.perplexity) for run in points),
            f"Accuracies in percent ({mode} mode, acc). In brackets: 95% intervals, of bits per byte over "
            "documents, of accuracies over items. Rows are scored on the same text and items.",
            *([FEW_NOTE] if any(_few(point) for own in points.values() for point in own) else []),
        ],
        records=records,
    )


def _few(point: _Point) -> bool:
    interval = point.scored.perplexity.interval
    return interval is not None and interval.few_documents


def _bits(measured: Perplexity) -> str:
    text, own = f"{measured.bits_per_byte:.3f}", measured.interval
    return text if own is None else f"{text} {interval_text(Interval(own.low, own.high), own.few_documents)}"


def _shown(accuracy: Proportion | None) -> str:
    return "–" if accuracy is None else f"{percent(accuracy.value)} {bounds(accuracy.low, accuracy.high)}"


class _Panel(NamedTuple):
    """What is drawn in one panel: run -> value, low and high of each point, None where it was not scored."""

    key: str
    label: str
    values: dict[str, list[tuple[float, float, float] | None]]


def _panels(points: Mapping[str, Sequence[_Point]], mode: str) -> Iterator[_Panel]:
    bits: dict[str, list[tuple[float, float, float] | None]] = {}
    for run, own in points.items():
        bits[run] = []
        for point in own:
            value, interval = point.scored.perplexity.bits_per_byte, point.scored.perplexity.interval
            bits[run].append(
                (value, value, value) if interval is None else (value, interval.low, interval.high)
            )
    yield _Panel("bits_per_byte", "bits per byte: lower is better", bits)
    for benchmark in _benchmarks(points):
        values = {}
        for run, own in points.items():
            found = [score(point.scored.benchmarks.get(benchmark), mode, "acc") for point in own]
            values[run] = [
                None if one is None else (100 * one.value, 100 * one.low, 100 * one.high) for one in found
            ]
        if any(one is not None for own in values.values() for one in own):
            yield _Panel(benchmark, f"{benchmark_label(benchmark)} accuracy (%)", values)


def write_readouts(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Write the plot `folder`/readouts and `folder`/data/readouts.csv; nothing where no run has readouts."""
    points = _points(study, results)
    if not points:
        return
    mode = main_mode(results)
    panels = list(_panels(points, mode))
    records = [
        {"run": run, "readout": point.name, "flops_per_token": round(point.flops, 1), "measure": panel.key}
        | {"low": round(low, 5), "high": round(high, 5), "value": round(value, 5)}
        for panel in panels
        for run, own in points.items()
        for point, (value, low, high) in _scored(own, panel.values[run])
    ]
    write_text(folder / "data" / "readouts.csv", csv_text(records))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    title = f"Language models within the models against their cost (95% intervals), study {study.name}"
    with figure(folder, "readouts", title, 1 + 4 * columns, 0.9 + 3.4 * lines) as drawing:
        grid = drawing.subplots(lines, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, points, results)
        for axes in grid[len(panels) :]:
            axes.remove()
        handles, labels = grid[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
        heading(drawing, title)


def _scored(
    points: Sequence[_Point], values: Sequence[tuple[float, float, float] | None]
) -> Iterator[tuple[_Point, tuple[float, float, float]]]:
    """The points of one run that have a value, cheapest first."""
    pairs = zip(points, values, strict=True)
    yield from sorted(
        ((point, one) for point, one in pairs if one is not None), key=lambda pair: pair[0].flops
    )


def _draw(
    axes: Axes, panel: _Panel, points: Mapping[str, Sequence[_Point]], results: Mapping[str, RunResult]
) -> None:
    looks, seen = styles(results), set()
    # Runs stand a little side by side, so that none hides another's interval.
    flops = [point.flops for own in points.values() for point in own]
    aside = 0.01 * (max(flops) - min(flops))
    for place, (run, own) in enumerate(points.items()):
        drawn = list(_scored(own, panel.values[run]))
        if not drawn:
            continue
        label = results[run].train.label
        look, shift = looks[run], aside * (place - (len(points) - 1) / 2)
        x = [point.flops + shift for point, _ in drawn]
        values, low, high = zip(*(one for _, one in drawn), strict=True)
        axes.plot(x, values, label=None if label in seen else label, **look, markerfacecolor="white")
        seen.add(label)
        axes.vlines(x, low, high, color=look["color"], linewidth=1.2, alpha=0.6, zorder=1)
        for point, (value, _, _) in drawn:
            if point.name == MODEL:
                axes.plot([point.flops + shift], [value], look["marker"], color=look["color"], markersize=8)
    axes.set_title(panel.label, loc="left")
    axes.set_xlabel("FLOPs per token (filled: the model itself)")
    _name_ticks(axes, [point for own in points.values() for point in own])


def _name_ticks(axes: Axes, points: Sequence[_Point]) -> None:
    """The readouts' names at their FLOPs where there is room, else numbers alone."""
    names: dict[float, list[str]] = {}
    for point in points:
        names.setdefault(point.flops, []).append(point.name)
    if len(names) > _MOST_NAMES:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        return
    places = sorted(names)
    texts = [f"{', '.join(dict.fromkeys(names[place]))}\n{count(place)}" for place in places]
    axes.set_xticks(places, texts, fontsize=8)
    axes.grid(False, axis="x")
