"""Accuracy by linguistic phenomenon, next to the human accuracy that the paper of BLiMP reports."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from stlm.report.accuracies import main_mode, score
from stlm.report.names import bounds, bounds_record, percent
from stlm.report.results import Proportion, RunResult, run_label
from stlm.report.table import Cell, Table
from stlm.study.runs import Study

HUMANS = "human, Warstadt et al. 2020"
_BENCHMARK = "blimp"
# Run -> phenomenon -> accuracy.
Phenomena = Mapping[str, Mapping[str, Proportion]]


def human_agreement(benchmark: str) -> dict[str, float]:
    """How often a person picks the acceptable sentence, as a fraction by phenomenon; `all`: all paradigms.

    The row "Human" of Table 3 of Warstadt et al. 2020 (BLiMP, TACL 8): forced choices of single people, not
    the majority of several (96.4%). Empty for any other benchmark.
    """
    if benchmark != _BENCHMARK:
        return {}
    with Path(__file__).with_name("blimp_humans.csv").open(encoding="utf-8", newline="") as file:
        return {row["phenomenon"]: round(float(row["percent"]) / 100, 3) for row in csv.DictReader(file)}


def phenomena(results: Mapping[str, RunResult], benchmark: str, mode: str) -> Phenomena:
    """Accuracies by phenomenon at the last checkpoint of every run that has any."""
    found = {}
    for name, result in results.items():
        scored = result.last.benchmarks.get(benchmark)
        groups = scored.modes[mode].groups.get("phenomenon") if scored and mode in scored.modes else None
        if groups:
            found[name] = groups
    return found


def by_difficulty(groups: Phenomena, baseline: str) -> list[str]:
    """Every phenomenon of any run, from the baseline's best to its worst (or the first run's)."""
    reference = groups.get(baseline) or next(iter(groups.values()))
    names = dict.fromkeys(name for own in groups.values() for name in own)
    return sorted(names, key=lambda name: -reference[name].value if name in reference else 0.0)


def phenomena_tables(study: Study, results: Mapping[str, RunResult]) -> list[Table]:
    """blimp-phenomena: a row per phenomenon, a column per run, one for people; no table without BLiMP."""
    mode = main_mode(results)
    groups = phenomena(results, _BENCHMARK, mode)
    if not groups:
        return []
    humans = human_agreement(_BENCHMARK)
    totals = {run: score(results[run].last.benchmarks[_BENCHMARK], mode, "acc") for run in groups}
    versions = sorted({str(results[run].last.benchmarks[_BENCHMARK].version) for run in groups})
    rows, records = [], []
    for name in [*by_difficulty(groups, study.baseline), "all"]:
        own = totals if name == "all" else {run: of_run.get(name) for run, of_run in groups.items()}
        cells, record = _row(name, own, humans.get(name))
        rows.append(cells)
        records.append(record | {"mode": mode, "version": ", ".join(versions)})
    table = Table(
        name="blimp-phenomena",
        title=f"BLiMP by phenomenon: accuracy (%), {mode} mode, acc; study {study.name}",
        header=["", "n", *(run_label(results[run], results) for run in groups), "human"],
        rows=rows,
        notes=[
            f"BLiMP version {', '.join(versions)}; the last checkpoint of each run; phenomena from the "
            "baseline's best to its worst. In brackets: the 95% Wilson interval over sentence pairs. It "
            "holds for these paradigms: a phenomenon has two to nine, the pairs of one share a template.",
            "Human: how often single people, given both sentences, pick the acceptable one (Warstadt et al. "
            "2020, Table 3); the majority of several people does so for 96.4% of the pairs. Chance is 50.",
        ],
        records=records,
    )
    return [table]


def _row(
    name: str, own: Mapping[str, Proportion | None], human: float | None
) -> tuple[list[Cell], dict[str, object]]:
    """A phenomenon's cells, and the same numbers as a record."""
    sizes = sorted({accuracy.n for accuracy in own.values() if accuracy})
    size = "–".join(f"{n:,}" for n in dict.fromkeys((sizes[0], sizes[-1])))
    bold = name == "all"
    cells = [Cell(name.replace("_", " "), bold), Cell(size)]
    record: dict[str, object] = {"phenomenon": name, "n": sizes[-1]}
    for run, accuracy in own.items():
        if accuracy is None:
            cells.append(Cell("–"))
            continue
        cells.append(Cell(f"{percent(accuracy.value)}\n{bounds(*accuracy.interval)}"))
        record[f"{run}_percent"] = round(100 * accuracy.value, 3)
        record |= bounds_record(accuracy.interval, f"{run}_", 3, 100)
    cells.append(Cell("–" if human is None else percent(human)))
    return cells, record | ({} if human is None else {"human_percent": round(100 * human, 1)})
