"""Accuracy by linguistic phenomenon, next to the human accuracy that the paper of BLiMP reports."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from stlm.report.names import bounds, bounds_record, percent
from stlm.report.results import Results
from stlm.report.schema import Proportion
from stlm.report.table import Cell, Table

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


def phenomena(results: Results, benchmark: str) -> Phenomena:
    """Accuracies by phenomenon at the last checkpoint of every run that has any."""
    scored = {
        name: run.last.benchmarks[benchmark].modes.get(results.mode)
        for name, run in results.items()
        if benchmark in run.last.benchmarks
    }
    groups = {name: mode.groups.get("phenomenon") for name, mode in scored.items() if mode}
    return {name: by_phenomenon for name, by_phenomenon in groups.items() if by_phenomenon}


def by_difficulty(groups: Phenomena, baseline: str) -> list[str]:
    """Every phenomenon of any run, from the baseline's best to its worst (or the first run's)."""
    reference = groups.get(baseline) or next(iter(groups.values()))
    names = dict.fromkeys(name for by_phenomenon in groups.values() for name in by_phenomenon)
    return sorted(names, key=lambda name: -reference[name].value if name in reference else 0.0)


def phenomena_table(results: Results) -> Table | None:
    """blimp-phenomena: a row per phenomenon, a column per run, one for people; None without BLiMP."""
    groups = phenomena(results, _BENCHMARK)
    if not groups:
        return None
    mode, humans = results.mode, human_agreement(_BENCHMARK)
    versions = ", ".join(sorted({str(results[run].last.benchmarks[_BENCHMARK].version) for run in groups}))

    def columns(name: str) -> Iterator[tuple]:
        scores = {run: by_phenomenon.get(name) for run, by_phenomenon in groups.items()}
        if name == "all":
            scores = {run: results[run].last.accuracy(_BENCHMARK, mode) for run in groups}
        sizes = sorted({accuracy.n for accuracy in scores.values() if accuracy})
        yield "", Cell(name.replace("_", " "), bold=name == "all"), {"phenomenon": name, "n": sizes[-1]}
        yield "n", "–".join(f"{n:,}" for n in dict.fromkeys((sizes[0], sizes[-1]))), {}
        for run, accuracy in scores.items():
            text, record = "–", {}
            if accuracy is not None:
                text = f"{percent(accuracy.value)}\n{bounds(*accuracy.interval)}"
                record[f"{run}_percent"] = round(100 * accuracy.value, 3)
                record |= bounds_record(accuracy.interval, f"{run}_", 3, 100)
            yield results[run].label, text, record
        human = humans.get(name)
        record = {} if human is None else {"human_percent": round(100 * human, 1)}
        yield "human", "–" if human is None else percent(human), record | {"mode": mode, "version": versions}

    return Table.of_columns(
        "blimp-phenomena",
        f"BLiMP by phenomenon: accuracy (%), {mode} mode, acc; study {results.study.name}",
        map(columns, [*by_difficulty(groups, results.study.baseline), "all"]),
        [
            f"BLiMP version {versions}; the last checkpoint of each run; phenomena from the "
            "baseline's best to its worst. In brackets: the 95% Wilson interval over sentence pairs. It "
            "holds for these paradigms: a phenomenon has two to nine, the pairs of one share a template.",
            "Human: how often single people, given both sentences, pick the acceptable one (Warstadt et al. "
            "2020, Table 3); the majority of several people does so for 96.4% of the pairs. Chance is 50.",
        ],
    )
