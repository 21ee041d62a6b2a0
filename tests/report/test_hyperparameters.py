"""Table 1: what ran, and what differs."""

from stlm.report.hyperparameters import table1
from stlm.report.results import read_results
from stlm.report.table import Section


def cells(study) -> dict[str, list]:
    table = table1(study, read_results(study))
    return {row[0].text: row[1:] for row in table.rows if not isinstance(row, Section)}


def test_only_what_differs_is_written_and_bold(make_study):
    rows = cells(make_study())
    assert [cell.text for cell in rows["dropout"]] == ["0.1", "", "", "", "0"]
    assert [cell.bold for cell in rows["dropout"]] == [False, False, False, False, True]
    assert [cell.text for cell in rows["positions"]] == ["RoPE", "sinusoidal", "learned", "", ""]
    assert [cell.text for cell in rows["feed-forward width"]] == ["64", "60", "", "96", ""]
    assert [cell.text for cell in rows["layers"]] == ["2", "", "", "", ""]


def test_sizes_are_the_recorded_ones(make_study):
    study = make_study()
    rows = cells(study)
    baseline = study.runs["baseline"]
    assert rows["parameters"][0].text == f"{baseline.parameters.total:,}"
    assert rows["tokens a step"][0].text == "1,024"
    assert rows["training FLOPs"][0].text == f"{baseline.flops:.2e}"


def test_seeds_share_a_column(make_study):
    study = make_study({"baseline": ("Baseline", {})}, seeds=(3, 5))
    rows = cells(study)
    assert [cell.text for cell in rows["seeds"]] == ["3, 5"]


def test_records_are_complete_in_every_column(make_study):
    table = table1(study := make_study(), read_results(study))
    dropout = next(record for record in table.records if record["hyper_parameter"] == "dropout")
    assert (dropout["baseline"], dropout["simple-ffn"], dropout["dropout-free"]) == ("0.1", "0.1", "0")
