"""Table 2: our rows from the files, the published rows beside them, and what the notes must say."""

import json
import statistics

import pytest

from stlm.report.accuracies import accuracy_tables, read_references
from stlm.report.comparison import compare_all
from stlm.report.results import read_results
from stlm.report.table import Section, Table

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}


def tables(study) -> dict[str, Table]:
    results = read_results(study)
    return {t.name: t for t in accuracy_tables(study, results, compare_all(results, study.baseline))}


def row(table: Table, label: str) -> dict[str, str]:
    """The first row of that label: column heading (its first line) -> text."""
    cells = next(r for r in table.rows if not isinstance(r, Section) and r[0].text == label)
    return dict(zip((h.split("\n")[0] for h in table.header), (c.text for c in cells), strict=True))


def test_published_rows_are_those_of_the_paper():
    benchmarks, references = read_references()
    assert benchmarks == ["blimp", "hellaswag", "arc_easy", "winogrande", "mmlu"]
    scores = {(r.kind, r.label): list(r.scores.values()) for r in references}
    assert scores["paper", "Learned PE"] == [77, 29, 37, 50, 23]
    assert scores["literature", "Phi-3"] == [83, 56, 80, 73, 32]
    assert scores["chance", "chance"] == [50, 25, 25, 50, 25]
    assert [r.kind for r in references] == ["paper"] * 5 + ["literature"] * 4 + ["chance"]


def test_run_row_quotes_the_last_checkpoint(make_study):
    study = make_study(TWO)
    last = read_results(study)["sincos"].last
    acc = last.benchmarks["blimp"].modes["harness"].acc
    shown = row(tables(study)["table2"], "SinCos PE")
    value, interval, difference = shown["BLiMP"].split("\n")
    assert float(value) == pytest.approx(100 * acc.value, abs=0.051)
    assert interval == f"[{100 * acc.low:.1f}, {100 * acc.high:.1f}]"
    assert ", p" in difference
    assert float(shown["bits per byte"]) == pytest.approx(last.perplexity.bits_per_byte, abs=0.0005)


def test_baseline_is_not_compared_with_itself(make_study):
    assert row(tables(make_study(TWO))["table2"], "Baseline")["BLiMP"].count("\n") == 1


def test_order_ours_then_published_then_chance(make_study):
    table = tables(make_study(TWO))["table2"]
    kinds = list(dict.fromkeys(record["kind"] for record in table.records))
    assert kinds == ["run", "paper", "literature", "chance"]
    assert table.rows[-1][0].text == "chance"
    assert row(table, "Phi-3")["MMLU"] == "32"
    assert row(table, "chance")["BLiMP"] == "50"


def test_own_benchmarks_get_columns_after_the_papers(make_study):
    table = tables(make_study(TWO, benchmarks={"synthetic_choice": 40, "synthetic_pairs": 40}))["table2"]
    columns = [heading.split("\n")[0] for heading in table.header[4:]]
    assert columns[:5] == ["BLiMP", "HellaSwag", "ARC-easy", "WinoGrande", "MMLU"]
    assert columns[5:] == ["Synthetic choice", "Synthetic pairs"]
    assert row(table, "chance")["Synthetic choice"] == "25"
    assert row(table, "Phi-3")["Synthetic pairs"] == "–"


def test_other_modes_and_metrics_have_their_own_tables(make_study):
    found = tables(make_study(TWO))
    assert list(found) == ["table2", "table2-acc-norm", "table2-paper-mode"]
    # Only hellaswag is normalized; the paper's whole-string numbers do not belong there.
    assert [h.split("\n")[0] for h in found["table2-acc-norm"].header[4:]] == ["HellaSwag"]
    assert not any(record["kind"] == "paper" for record in found["table2-acc-norm"].records)
    assert "paper mode" in found["table2-paper-mode"].title


def test_limit_is_stated_or_denied(make_study):
    limited = tables(make_study(TWO, benchmarks={"blimp": 50, "hellaswag": 200}, total=200))["table2"]
    notes = " ".join(limited.notes)
    assert "BLiMP 50 of 200" in notes
    assert "HellaSwag" not in notes
    assert "BLiMP\nn = 50" in limited.header


def test_all_items_is_stated(make_study):
    notes = " ".join(tables(make_study(TWO, benchmarks={"blimp": 60}, total=60))["table2"].notes)
    assert "no limit" in notes


def test_truncated_items_are_counted_in_the_notes(make_study):
    study = make_study(TWO)
    path = study.runs["sincos"].folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["checkpoints"]["step-000200"]["benchmarks"]["hellaswag"]["modes"]["harness"]["truncated"] = (
        1234
    )
    path.write_text(json.dumps(evaluation))
    assert "HellaSwag 1,234" in " ".join(tables(study)["table2"].notes)


def test_seeds_have_a_row_each_and_a_mean(make_study):
    study = make_study({"baseline": ("Baseline", {})}, seeds=(0, 1, 2), benchmarks={"blimp": 100})
    table = tables(study)["table2"]
    runs = [record for record in table.records if record["kind"] == "run"]
    assert [record["label"] for record in runs] == [f"Baseline (seed {seed})" for seed in (0, 1, 2)]
    mean = next(record for record in table.records if record["kind"] == "mean")
    values = [record["blimp_percent"] for record in runs]
    assert mean["blimp_percent"] == pytest.approx(statistics.mean(values), abs=0.001)
    assert mean["blimp_sd"] == pytest.approx(statistics.stdev(values), abs=0.001)
    assert "±" in row(table, "Baseline, mean of 3 seeds")["BLiMP"]


def test_benchmark_that_one_run_lacks_is_a_dash_there(make_study):
    study = make_study(TWO)
    path = study.runs["sincos"].folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for checkpoint in evaluation["checkpoints"].values():
        del checkpoint["benchmarks"]["hellaswag"]
    path.write_text(json.dumps(evaluation))
    table = tables(study)["table2"]
    assert row(table, "SinCos PE")["HellaSwag"] == "–"
    assert row(table, "Baseline")["HellaSwag"] != "–"


def test_paper_mode_alone_is_the_main_table(make_study):
    study = make_study(TWO)
    for run in study.runs.values():
        path = run.folder / "evaluation.json"
        evaluation = json.loads(path.read_text())
        for checkpoint in evaluation["checkpoints"].values():
            for benchmark in checkpoint["benchmarks"].values():
                del benchmark["modes"]["harness"]
        path.write_text(json.dumps(evaluation))
    found = tables(study)
    assert list(found) == ["table2"]
    assert "paper mode" in found["table2"].title
