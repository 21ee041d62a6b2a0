"""BLiMP by phenomenon, beside people."""

from __future__ import annotations

import csv
import io

import pytest

from stlm.report.build import report
from stlm.report.phenomena import HUMANS, by_difficulty, human_agreement, phenomena, phenomena_table
from stlm.report.results import read_results
from stlm.report.schema import Proportion

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}
PHENOMENA = [
    "anaphor_agreement", "argument_structure", "binding", "control_raising", "determiner_noun_agreement",
    "ellipsis", "filler_gap_dependency", "irregular_forms", "island_effects", "npi_licensing", "quantifiers",
    "subject_verb_agreement",
]  # fmt: skip
# Paradigms of each, in that order, as the benchmark's files have them (two of s-selection are of the second).
PARADIGMS = [2, 9, 7, 5, 8, 2, 7, 2, 8, 7, 4, 6]


def test_the_published_numbers_belong_together():
    humans = human_agreement("blimp")
    assert list(humans) == [*PHENOMENA, "all"]
    mean = sum(humans[name] * n for name, n in zip(PHENOMENA, PARADIGMS, strict=True)) / sum(PARADIGMS)
    assert sum(PARADIGMS) == 67
    assert mean == pytest.approx(humans["all"], abs=0.0005 + 0.0005)
    assert human_agreement("synthetic_pairs") == {}


def test_the_hardest_for_the_baseline_is_last():
    def of(**values):
        return {name: Proportion(value=value, low=0, high=1, n=9) for name, value in values.items()}

    groups = {"sincos": of(a=0.1, b=0.9, c=0.5), "baseline": of(b=0.2, a=0.6)}
    assert by_difficulty(groups, "baseline") == ["a", "b", "c"]
    assert by_difficulty(groups, "absent") == ["b", "c", "a"]


def test_the_table_has_a_row_a_phenomenon_and_a_column_a_run(make_study):
    study = make_study(TWO)
    results = read_results(study)
    table = phenomena_table(results)
    groups = phenomena(results, "blimp")
    order = by_difficulty(groups, "baseline")
    assert table.header == ["", "n", "Baseline", "SinCos PE", "human"]
    assert [row[0].text for row in table.rows] == [name.replace("_", " ") for name in [*order, "all"]]
    for name, row, record in zip(order, table.rows, table.records, strict=False):
        assert row[1].text == f"{groups['baseline'][name].n}"
        for cell, run in zip(row[2:4], ("baseline", "sincos"), strict=True):
            own = groups[run][name]
            assert cell.text.split("\n")[0] == f"{100 * own.value:.1f}"
            assert record[f"{run}_percent"] == pytest.approx(100 * own.value, abs=0.001)
            assert (record[f"{run}_low"], record[f"{run}_high"]) == pytest.approx(
                (100 * own.low, 100 * own.high), abs=0.001
            )
    shown = {row[0].text: row[-1].text for row in table.rows}
    assert (shown["island effects"], shown["all"], shown["agreement"]) == ("84.9", "88.6", "–")
    assert "BLiMP version 1.0" in table.notes[0]


def test_without_blimp_there_is_no_table(make_study):
    study = make_study(TWO, benchmarks={"synthetic_pairs": 50})
    assert phenomena_table(read_results(study)) is None


@pytest.mark.usefixtures("quick_figures")
def test_table_and_plot_are_written_and_people_are_in_the_plot_of_blimp_alone(make_study):
    study = make_study(TWO, benchmarks={"blimp": 200, "synthetic_pairs": 50})
    report(study)
    written = {path.name for name in ("tables", "typeset") for path in (study.folder / name).iterdir()}
    assert {f"blimp-phenomena.{ending}" for ending in ("csv", "md", "tex", "html")} <= written
    plots = study.folder / "plots"
    people = {
        name: [row for row in csv.DictReader(io.StringIO(text)) if row["run"] == HUMANS]
        for name, text in (
            (name, (plots / "data" / f"{name}-phenomena.csv").read_text())
            for name in ("blimp", "synthetic_pairs")
        )
    }
    assert {(row["phenomenon"], row["value"]) for row in people["blimp"]} == {
        ("island_effects", "0.849"),
        ("npi_licensing", "0.881"),
    }
    assert people["synthetic_pairs"] == []
    assert HUMANS in (plots / "blimp-phenomena.svg").read_text()
    assert HUMANS not in (plots / "synthetic_pairs-phenomena.svg").read_text()
