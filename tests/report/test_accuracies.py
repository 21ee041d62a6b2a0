"""Table 2: our rows from the files, the published rows beside them, and what the notes must say."""

import json
import re
import statistics

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from stlm.evaluation.statistics import wilson
from stlm.report.accuracies import accuracy_tables, read_references
from stlm.report.comparison import compare_all
from stlm.report.names import p_value, percent
from stlm.report.results import read_results
from stlm.report.table import Section, Table

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}


def tables(study) -> dict[str, Table]:
    results = read_results(study)
    return {t.name: t for t in accuracy_tables(results, compare_all(results))}


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
    accuracy, difference, p = shown["BLiMP"].split("\n")
    assert accuracy == f"{100 * acc.value:.1f} [{100 * acc.low:.1f}, {100 * acc.high:.1f}]"
    assert re.fullmatch(r"[+−]?\d+\.\d[*†]? \[[+−]?\d+\.\d, [+−]?\d+\.\d\]", difference)
    assert re.fullmatch(r"p [=<] \d\.\d+", p)
    assert float(shown["bits per byte"]) == pytest.approx(last.perplexity.bits_per_byte, abs=0.0005)


def test_baseline_is_not_compared_with_itself(make_study):
    assert row(tables(make_study(TWO))["table2"], "Baseline")["BLiMP"].count("\n") == 0


def test_differences_are_quoted_with_the_adjusted_p_and_marked_where_significant(make_study):
    skills = {"baseline": 0.6, "sincos": 0.95, "learned": 0.61}
    study = make_study(
        TWO | {"learned": ("Learned PE", {"positions": "learned"})}, skills=skills, benchmarks={"blimp": 200}
    )
    results = read_results(study)
    comparisons = compare_all(results)
    table = {t.name: t for t in accuracy_tables(results, comparisons)}["table2"]
    for label, run, significant in (("SinCos PE", "sincos", True), ("Learned PE", "learned", False)):
        own = comparisons.last(run, ("blimp", "harness", "acc")).paired
        cell = next(r for r in table.rows if not isinstance(r, Section) and r[0].text == label)[4]
        _, difference, p = cell.text.split("\n")
        sign = "*" if significant else ""
        assert difference.startswith(f"{percent(own.difference, signed=True)}{sign} [")
        assert cell.bold_line == (1 if significant else None)
        assert p == p_value(own.adjusted)
        record = next(r for r in table.records if r.get("run") == run)
        assert record["blimp_difference"] == pytest.approx(100 * own.difference, abs=0.001)
        assert record["blimp_difference_low"] == pytest.approx(100 * own.interval.low, abs=0.001)
        assert (record["blimp_p"], record["blimp_p_holm"]) == pytest.approx((own.p, own.adjusted), rel=1e-3)
    assert "for the 2 tests of this table" in table.notes[0]


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
    (note,) = [note for note in limited.notes if note.startswith("Limited")]
    assert "BLiMP 50 of 200" in note
    assert "HellaSwag" not in note
    assert "BLiMP\nv1.0, n = 50" in limited.header


def test_much_wider_clustered_intervals_are_told(make_study):
    study = make_study(TWO, benchmarks={"blimp": 100})
    results = read_results(study)
    comparisons = compare_all(results)
    own = comparisons.last("baseline", ("blimp", "harness", "acc")).accuracy
    notes = [n for n in tables(study)["table2"].notes if "cluster-robust" in n]
    assert bool(notes) == (own.clustered.half_width > 1.25 * own.interval.half_width)
    path = study.runs["baseline"].folder / "items.parquet"
    items = pq.read_table(path)
    # All items of a group answered alike: the groups are the units.
    right = pc.equal(items["group"], "agreement")
    scores = pc.if_else(pc.equal(items["gold"], right), pa.scalar(-1.0), pa.scalar(-2.0))
    pq.write_table(items.set_column(items.schema.get_field_index("logprob"), "logprob", scores), path)
    evaluation = path.with_name("evaluation.json")
    content = json.loads(evaluation.read_text())
    for checkpoint in content["checkpoints"].values():
        for mode in checkpoint["benchmarks"]["blimp"]["modes"].values():
            mode["acc"]["value"] = 0.2
    evaluation.write_text(json.dumps(content))
    notes = [n for n in tables(study)["table2"].notes if "cluster-robust" in n]
    wilsons = re.escape(percent(wilson(20, 100).half_width))
    assert re.search(rf"for Baseline: BLiMP ±\d+\.\d over 5 groups instead of ±{wilsons}", notes[0])


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
    assert not any("McNemar" in note for note in table.notes)


def test_three_seeds_are_tested_in_the_mean_row(make_study):
    study = make_study(TWO, seeds=(0, 1, 2), benchmarks={"blimp": 100})
    results = read_results(study)
    comparisons = compare_all(results)
    table = {t.name: t for t in accuracy_tables(results, comparisons)}["table2"]
    test = comparisons.seeds["sincos"]["blimp", "harness", "acc"]
    mean, difference, p = row(table, "SinCos PE, mean of 3 seeds")["BLiMP"].split("\n")
    assert mean == f"{percent(test.mean)} ± {percent(test.sd)}"
    assert difference.startswith(percent(test.test.difference, signed=True))
    assert p == p_value(test.test.adjusted)
    assert "p " not in row(table, "SinCos PE (seed 1)")["BLiMP"]
    assert "\n" not in row(table, "Baseline, mean of 3 seeds")["BLiMP"]
    assert any("with seeds as units" in note for note in table.notes)
    assert "difference in points from Baseline of the same seed on the same items" in table.notes[0]


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
