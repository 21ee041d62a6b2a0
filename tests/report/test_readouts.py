"""The table and the plot of language models within a run's model."""

from __future__ import annotations

import csv
import json

import pytest

from stlm.model.counts import training_flops_per_token
from stlm.report.build import report
from stlm.report.readouts import MODEL, readouts_table, write_readouts
from stlm.report.results import read_results

VARIANTS = {
    "baseline": ("Baseline", {}),
    "sincos": ("SinCos PE", {"positions": "sinusoidal"}),
    "learned": ("Learned PE", {"positions": "learned"}),
}
NAMES = ["exit-1", "exit-2", "exit-3"]


def add_readouts(study, run: str, names=NAMES) -> None:
    """Readouts that cost less than the model and score worse."""
    path = study.runs[run].folder / "evaluation.json"
    record = json.loads(path.read_text())
    last = list(record["checkpoints"].values())[-1]
    whole = training_flops_per_token(study.runs[run].model) / 3
    record["readouts"] = {}
    for number, name in enumerate(names, 1):
        own = json.loads(json.dumps(last))
        share = number / (len(names) + 1)
        bits = last["perplexity"]["bits_per_byte"] + 0.4 * (1 - share) ** 2
        interval = {"low": bits - 0.03, "high": bits + 0.04, "few_documents": number == 2}
        own["perplexity"] |= {"bits_per_byte": bits, "interval": interval}
        for benchmark in own["benchmarks"].values():
            for mode in benchmark["modes"].values():
                for key in ("value", "low", "high"):
                    mode["acc"][key] *= 0.7 + 0.3 * share
        record["readouts"][name] = {"parameters": 1000 * number, "flops_per_token": share * whole, **own}
    path.write_text(json.dumps(record))


def test_each_readout_has_a_row_and_the_model_is_the_last(make_study):
    study = make_study(VARIANTS)
    add_readouts(study, "sincos")
    results = read_results(study)
    table = readouts_table(results)
    assert [record["readout"] for record in table.records] == [*NAMES, MODEL]
    assert {record["run"] for record in table.records} == {"sincos"}
    last = table.records[-1]
    assert last["parameters"] == results["sincos"].train.parameters.total
    assert last["flops_per_token"] == pytest.approx(training_flops_per_token(study.runs["sincos"].model) / 3)
    scored = results["sincos"].last
    assert last["bits_per_byte"] == pytest.approx(scored.perplexity.bits_per_byte, abs=1e-5)
    assert last["blimp"] == pytest.approx(scored.benchmarks["blimp"].modes["harness"].acc.value, abs=1e-5)
    assert table.rows[0].title == "SinCos PE"
    assert all(len(row) == len(table.header) for row in table.rows[1:])
    exit_2 = table.rows[2]
    assert exit_2[0].text == "exit-2" and "‡" in exit_2[3].text and any("‡" in note for note in table.notes)


@pytest.mark.usefixtures("quick_figures")
def test_a_report_has_them_where_a_run_has(make_study):
    study = make_study(VARIANTS, seeds=(0, 1))
    for run in ("sincos-s0", "sincos-s1", "learned-s0"):
        add_readouts(study, run)
    report(study)
    assert (study.folder / "tables" / "readouts.md").is_file()
    drawn = (study.folder / "plots" / "readouts.svg").read_text()
    assert "exit-2" in drawn and "BLiMP accuracy" in drawn
    with (study.folder / "plots" / "data" / "readouts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 3, "runs, points, measures"
    bits = [float(row["value"]) for row in rows if row["run"] == "learned-s0"][:4]
    assert bits == sorted(bits, reverse=True)
    record = json.loads((study.folder / "records" / "runs.json").read_text())["runs"]["learned-s0"]
    kept = record["evaluation"]["readouts"]["exit-1"]["benchmarks"]["blimp"]["modes"]["harness"]
    assert "acc" in kept and "groups" not in kept


def test_a_readout_without_perplexity_has_accuracies_alone(make_study):
    """One whose scores are no probabilities of texts."""
    study = make_study(VARIANTS)
    add_readouts(study, "sincos", ["masked"])
    path = study.runs["sincos"].folder / "evaluation.json"
    record = json.loads(path.read_text())
    record["readouts"]["masked"]["perplexity"] = None
    path.write_text(json.dumps(record))
    results = read_results(study)
    table = readouts_table(results)
    own, model = table.records
    assert own["readout"] == "masked" and "bits_per_byte" not in own and own["blimp"] > 0
    assert table.rows[1][3].text == "–" and model["bits_per_byte"] > 0
    write_readouts(study.folder / "plots", results)
    with (study.folder / "plots" / "data" / "readouts.csv").open() as file:
        drawn = {(row["readout"], row["measure"]) for row in csv.DictReader(file)}
    assert ("masked", "blimp") in drawn and ("masked", "bits_per_byte") not in drawn


def test_a_study_without_readouts_has_neither(make_study, tmp_path):
    study = make_study(VARIANTS)
    results = read_results(study)
    assert readouts_table(results) is None
    write_readouts(tmp_path, results)
    assert not (tmp_path / "readouts.svg").exists()


def test_many_readouts_have_no_names_below_the_panels(make_study, tmp_path):
    study = make_study(VARIANTS)
    add_readouts(study, "sincos", [f"exit-{number}" for number in range(1, 16)])
    (tmp_path / "plots" / "data").mkdir(parents=True)
    write_readouts(tmp_path / "plots", read_results(study))
    assert "exit-9" not in (tmp_path / "plots" / "readouts.svg").read_text()
