"""Accuracy by linguistic phenomenon, beside people's agreement where BLiMP's paper has measured it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from stlm.report.accuracies import main_mode, score
from stlm.report.names import percent
from stlm.report.results import Proportion, RunResult, run_label
from stlm.report.table import Cell, Table
from stlm.study.runs import Study

HUMANS = "human, Warstadt et al. 2020"
_BENCHMARK = "blimp"
# Run -> phenomenon -> accuracy.
Phenomena = Mapping[str, Mapping[str, Proportion]]


def human_agreement(benchmark: str) -> dict[str, float]:
    """How often a person picks the acceptable sentence, a fraction by phenomenon; `all`: over all paradigms.

    The row "Human" of Table 3 of Warstadt et al. 2020 (BLiMP, TACL 8): forced choices of single people, not
    the majority of several (96.4%). Empty for any other benchmark.
    """
    if benchmark != _BENCHMARK:
        return {}
    with Path(__file__).with_name("blimp_humans.csv").open(encoding="utf-8", newline="") as file:
        return {row["phenomenon"]: round(float(row["percent"]) / 100, 3) for row in csv.DictReader(file)}


def phenomena(results: Mapping[str, RunResult], benchmark: str, mode: str) -> Phenomena:
    """The accuracies of the runs that have any, by phenomenon, at their last checkpoint."""
    found = {}
    for name, result in results.items():
        scored = result.last.benchmarks.get(benchmark)
        groups = scored.modes[mode].groups.get("phenomenon") if scored and mode in scored.modes else None
        if groups:
            found[name] = groups
    return found


def by_difficulty(groups: Phenomena, baseline: str) -> list[str]:
    """Every phenomenon of any run, those that the baseline (else the first run) finds hardest last."""
    reference = groups.get(baseline) or next(iter(groups.values()))
    names = dict.fromkeys(name for own in groups.values() for name in own)
    return sorted(names, key=lambda name: -reference[name].value if name in reference else 0.0)


def phenomena_tables(study: Study, results: Mapping[str, RunResult]) -> list[Table]:
    """blimp-phenomena: a row a phenomenon, a column a run, people beside them; none without BLiMP."""
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
        shown = percent(accuracy.value)
        cells.append(Cell(f"{shown}\n[{percent(accuracy.low)}, {percent(accuracy.high)}]"))
        record |= {
            f"{run}_{key}": round(100 * getattr(accuracy, field), 3)
            for key, field in (("percent", "value"), ("low", "low"), ("high", "high"))
        }
    cells.append(Cell("–" if human is None else percent(human)))
    return cells, record | ({} if human is None else {"human_percent": round(100 * human, 1)})
