"""Language models within a run's model (exits of a network, say) against the model itself: table and plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stlm.model.counts import build_on_meta
from stlm.model.flops import forward_flops
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.names import benchmark_label, bounds, bounds_record, count, percent
from stlm.report.results import Results
from stlm.report.schema import CheckpointResult
from stlm.report.style import figure, legend, panels_of, styles, write_data
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Run

MODEL = "model"  # the row of the model itself
# More of them than this and their names overlap below a panel.
_MOST_NAMES = 10
_BITS = "bits_per_byte"


class _Model(NamedTuple):
    """A readout of a run's last checkpoint, or its model: the scores, and FLOPs of a forward pass a token."""

    name: str
    parameters: int
    flops: float
    scored: CheckpointResult

    def value(self, measure: str, mode: str) -> tuple[float, float, float] | None:
        """Bits per byte, or the accuracy of a benchmark in percent, with its bounds; None: not scored."""
        if measure == _BITS:
            if self.scored.perplexity is None:
                return None
            bits = self.scored.perplexity.bits_per_byte
            return (bits, *(self.scored.perplexity.over_documents or (bits, bits)))
        accuracy = self.scored.accuracy(measure, mode)
        return accuracy and (100 * accuracy.value, 100 * accuracy.low, 100 * accuracy.high)


def _models(results: Results) -> dict[str, list[_Model]]:
    """Run -> its readouts and, at the end, its model; of the runs that have any."""
    by_run = {}
    for name, run in results.items():
        if readouts := run.evaluation.readouts:
            models = [_Model(key, one.parameters, one.flops_per_token, one) for key, one in readouts.items()]
            size, flops = run.train.parameters.total, _flops_per_token(results.study.runs[name])
            by_run[name] = [*models, _Model(MODEL, size, flops, run.last)]
    return by_run


def _flops_per_token(run: Run) -> float:
    model = build_on_meta(run.model, tuple(run.techniques.values()))
    return forward_flops(model, run.model.context) / run.model.context


def _benchmarks(models: Mapping[str, Sequence[_Model]]) -> list[str]:
    every = [model.scored for of_run in models.values() for model in of_run]
    return list(dict.fromkeys(name for scored in every for name in scored.benchmarks))


def readouts_table(results: Results) -> Table | None:
    """A row a readout and, below, the model, of each run that has readouts; None: no run has any."""
    models, mode = _models(results), results.mode
    if not models:
        return None
    benchmarks = _benchmarks(models)

    def columns(run: str, model: _Model) -> Iterator[tuple]:
        def cell(text: str) -> Cell:
            return Cell(text, bold=model.name == MODEL)

        measured = model.scored.perplexity
        bits = "–" if measured is None else f"{measured.bits_per_byte:.3f}"
        if measured is not None and measured.over_documents is not None:
            bits += f" {interval_text(measured.over_documents, measured.few_documents)}"
        yield "", cell(model.name), {"run": run, "readout": model.name}
        yield "parameters", cell(count(model.parameters)), {"parameters": model.parameters}
        yield "FLOPs\nper token", cell(count(model.flops)), {"flops_per_token": round(model.flops, 1)}
        yield (
            "bits per byte",
            cell(bits),
            {} if measured is None else {_BITS: round(measured.bits_per_byte, 5)},
        )
        for benchmark in benchmarks:
            text, record = "–", {}
            if accuracy := model.scored.accuracy(benchmark, mode):
                text = f"{percent(accuracy.value)} {bounds(*accuracy.interval)}"
                record = {benchmark: round(accuracy.value, 5)}
                record |= bounds_record(accuracy.interval, f"{benchmark}_", 5)
            yield benchmark_label(benchmark), cell(text), record

    rows: list[Section | Iterator[tuple]] = []
    for run, of_run in models.items():
        rows += [Section(results[run].label), *(columns(run, model) for model in of_run)]
    texts = [model.scored.perplexity for of_run in models.values() for model in of_run]
    few = any(text.few_documents for text in texts if text is not None)
    return Table.of_columns(
        "readouts",
        f"Language models within the models, study {results.study.name}",
        rows,
        [
            f"Of each run's last checkpoint; {MODEL}: the model itself. FLOPs: of a forward pass, in a text "
            "as long as the context. Parameters: those that the row's model uses.",
            amount_note((results[run].label, results[run].perplexity) for run in models),
            f"Accuracies in percent ({mode} mode, acc). In brackets: 95% intervals, of bits per byte over "
            "documents, of accuracies over items. Rows are scored on the same text and items.",
            FEW_NOTE if few else None,
        ],
    )


def write_readouts(folder: Path, results: Results) -> None:
    """Write the plot `folder`/readouts and `folder`/data/readouts.csv; nothing where no run has readouts."""
    models, mode = _models(results), results.mode
    if not models:
        return
    panels = {_BITS: "bits per byte: lower is better"}
    for benchmark in _benchmarks(models):
        if any(_scored(of_run, benchmark, mode) for of_run in models.values()):
            panels[benchmark] = f"{benchmark_label(benchmark)} accuracy (%)"
    records = [
        {"run": run, "readout": model.name, "flops_per_token": round(model.flops, 1), "measure": measure}
        | {"low": round(low, 5), "high": round(high, 5), "value": round(value, 5)}
        for measure in panels
        for run, of_run in models.items()
        for model, (value, low, high) in _scored(of_run, measure, mode)
    ]
    write_data(folder, "readouts", records)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    study = results.study.name
    title = f"Language models within the models against their cost (95% intervals), study {study}"
    every = [model for of_run in models.values() for model in of_run]
    flops = [model.flops for model in every]
    with figure(folder, "readouts", title, 1 + 4 * columns, 0.9 + 3.4 * lines) as drawing:
        grid = panels_of(drawing, len(panels), columns)
        for axes, (measure, label) in zip(grid, panels.items(), strict=True):
            axes.set_title(label, loc="left")
            scored = {run: _scored(of_run, measure, mode) for run, of_run in models.items()}
            _draw(axes, scored, 0.01 * (max(flops) - min(flops)), results)
            _name_ticks(axes, every)
        handles, _ = grid[0].get_legend_handles_labels()
        legend(drawing, handles, min(3, len(handles)))


def _scored(
    models: Sequence[_Model], measure: str, mode: str
) -> list[tuple[_Model, tuple[float, float, float]]]:
    """The models of one run that have a value, cheapest first, with the value and its bounds."""
    values = [(model, model.value(measure, mode)) for model in models]
    return sorted((pair for pair in values if pair[1] is not None), key=lambda pair: pair[0].flops)


def _draw(axes: Axes, scored: Mapping[str, list], apart: float, results: Results) -> None:
    """Runs stand `apart` side by side (FLOPs), so that none hides another's interval."""
    looks, labelled = styles(results), set()
    for place, (run, of_run) in enumerate(scored.items()):
        if not of_run:
            continue
        label, look, shift = results[run].train.label, looks[run], apart * (place - (len(scored) - 1) / 2)
        x = [model.flops + shift for model, _ in of_run]
        values, low, high = zip(*(bounded for _, bounded in of_run), strict=True)
        axes.plot(x, values, label=None if label in labelled else label, **look, markerfacecolor="white")
        labelled.add(label)
        axes.vlines(x, low, high, color=look["color"], linewidth=1.2, alpha=0.6, zorder=1)
        for model, (value, _, _) in of_run:
            if model.name == MODEL:
                axes.plot([model.flops + shift], [value], look["marker"], color=look["color"], markersize=8)
    axes.set_xlabel("FLOPs per token (filled: the model itself)")


def _name_ticks(axes: Axes, models: Sequence[_Model]) -> None:
    """The readouts' names at their FLOPs where there is room, else numbers alone."""
    names: dict[float, list[str]] = {}
    for model in models:
        names.setdefault(model.flops, []).append(model.name)
    if len(names) > _MOST_NAMES:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        return
    places = sorted(names)
    texts = [f"{', '.join(dict.fromkeys(names[place]))}\n{count(place)}" for place in places]
    axes.set_xticks(places, texts, fontsize=8)
    axes.grid(False, axis="x")
