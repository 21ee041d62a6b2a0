"""Table 1: what ran, and what differs."""

import json

from stlm.model.reduction import LoraConfig, SharingConfig
from stlm.report.hyperparameters import table1, variants_table
from stlm.report.results import read_results
from stlm.report.schema import DependencyRecord
from stlm.report.table import Section
from stlm.tokens.config import DataConfig


def cells(study) -> dict[str, list]:
    table = table1(read_results(study))
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
    table = table1(read_results(make_study()))
    dropout = next(record for record in table.records if record["hyper_parameter"] == "dropout")
    assert (dropout["baseline"], dropout["simple-ffn"], dropout["dropout-free"]) == ("0.1", "0.1", "0")


def test_any_key_that_differs_has_a_row(make_study):
    study = make_study({"baseline": ("Baseline", {}), "new": ("New", {})}, benchmarks={})
    results = read_results(study)
    results["baseline"].train.training.update(some_new_option=None)
    results["new"].train.training.update(compile=True, some_new_option={"kind": "ramp", "ends": [0.5, 0]})
    results["new"].train.model.update(another=3)
    rows = {row[0].text: row[1:] for row in table1(results).rows if not isinstance(row, Section)}
    assert [cell.text for cell in rows["some new option"]] == ["–", "kind ramp, ends 0.5, 0"]
    assert [cell.text for cell in rows["compile"]] == ["auto", "yes"]
    assert [cell.text for cell in rows["another"]] == ["–", "3"]
    assert variants_table(results).rows[1][1].text.split("\n") == [
        "another: 3",
        "compile: yes (baseline: auto)",
        "some new option: kind ramp, ends 0.5, 0 (baseline: –)",
    ]


def test_techniques_that_no_variant_uses_have_no_row(make_study):
    rows = cells(make_study({"baseline": ("Baseline", {}), "qk": ("QK-norm", {"qk_norm": True})}))
    assert [cell.text for cell in rows["QK-norm"]] == ["no", "yes"]
    assert not {"logit soft cap", "QKV shift", "compile", "dropout schedule", "momentum"} & set(rows)
    assert rows["learning rate"][0].text == "0.0006"


def test_how_a_run_was_recorded_is_no_hyper_parameter(make_study):
    assert not {"log every", "watch every", "validation tokens", "checkpoints"} & set(cells(make_study()))


def test_variants_are_listed_by_what_differs(make_study):
    study = make_study(benchmarks={})
    table = variants_table(read_results(study))
    rows = {row[0].text: row[1].text for row in table.rows}
    assert rows["Baseline"] == "the baseline"
    assert rows["SinCos PE"].split("\n") == [
        "feed-forward width: 60 (baseline: 64)",
        "positions: sinusoidal (baseline: RoPE)",
    ]
    assert rows["DropoutFree"] == "dropout: 0 (baseline: 0.1)"
    record = {"variant": "dropout-free", "hyper_parameter": "dropout", "baseline": "0.1", "value": "0"}
    assert record in table.records


def test_sections_of_the_model_show_what_is_set(make_study):
    sharing, lora = SharingConfig(what="all", order="groups", group=2), LoraConfig(rank=4)
    variants = {"baseline": ("Baseline", {}), "shared": ("Shared", {"sharing": sharing, "lora": lora})}
    study = make_study(variants, benchmarks={})
    shared = variants_table(read_results(study)).rows[1][1].text.split("\n")
    assert shared == ["sharing: what all, order groups, group 2", "LoRA: rank 4, what all"]


def test_one_variant_differs_from_nothing(make_study):
    study = make_study({"baseline": ("Baseline", {})}, benchmarks={})
    assert variants_table(read_results(study)) is None


def test_data_keys_are_shown_where_a_variant_sets_them(make_study):
    study = make_study({"baseline": ("Baseline", {}), "own": ("Own", {})})
    assert "order" not in cells(study)
    path = study.runs["own"].folder / "train.json"
    data = {"order": "length", "weights": {"books": 0.5, "speech": 2.0}, "unique_tokens": 64000}
    config = DataConfig(**data)
    record = json.loads(path.read_text()) | {"data": config.model_dump(mode="json")}
    path.write_text(json.dumps(record))
    study.runs["own"] = study.runs["own"].model_copy(update={"data": config})
    rows = cells(study)
    assert [cell.text for cell in rows["order"]] == ["shuffled", "length"]
    assert [cell.text for cell in rows["weights"]] == ["–", "books 0.5, speech 2"]
    assert [cell.text for cell in rows["unique tokens"]] == ["–", "64,000"]
    assert "pacing" not in rows


def test_settings_of_techniques_have_rows(make_study):
    study = make_study({"baseline": ("Baseline", {}), "new": ("New", {})}, benchmarks={})
    results = read_results(study)
    results["new"].train.techniques["some_new_one"] = {"share": 0.5, "blocks": [1, 3]}
    rows = {row[0].text: row[1:] for row in table1(results).rows if not isinstance(row, Section)}
    assert [cell.text for cell in rows["some new one"]] == ["–", "share 0.5, blocks 1, 3"]
    assert variants_table(results).rows[1][1].text == "some new one: share 0.5, blocks 1, 3"


def test_what_else_a_record_holds_has_rows(make_study):
    study = make_study()
    path = study.runs["sincos"].folder / "train.json"
    added = {"distillation": {"teacher": "baseline", "flops": 1.5e9}, "kept_tokens": 0.25, "losses": [1, 2]}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    found = {r["hyper_parameter"]: r["sincos"] for r in table1(read_results(study)).records}
    assert found["distillation, teacher"] == "baseline" and found["distillation, flops"] == "1.5e+09"
    assert found["kept tokens"] == "0.25" and "losses" not in found


def test_what_was_inherited_has_rows(make_study):
    study = make_study({"baseline": ("Baseline", {}), "cut": ("Cut", {})}, benchmarks={})
    results = read_results(study)
    inherited = {
        "layers": {"kept": [0, 3], "influence": [1.0, 0.1, 0.1, 0.5]},
        "ffn": {"measure": "wanda", "share_of_scores_by_layer": [0.5, 0.7]},
        "width": {"components": 16, "share_of_squares": 0.875, "measure": "taylor", "heads": [[0], [1]]},
    }
    start = {"source": "made", "licence": "MIT", "tokens": 0, "flops": 0.0, "inherited": inherited}
    results["cut"].train.depends["start"] = DependencyRecord.model_validate(start)
    rows = {row[0].text: row[1].text for row in table1(results).rows if not isinstance(row, Section)}
    cut = {row[0].text: row[2].text for row in table1(results).rows if not isinstance(row, Section)}
    assert cut["starts from"] == "made" and rows["starts from"] == "–"
    assert cut["layers kept, from 0"] == "0, 3"
    assert (cut["hidden units by"], cut["of their scores, mean of layers"]) == ("wanda", "60.0%")
    assert (cut["heads by"], cut["stream by"], cut["of its squares"]) == ("taylor", "components", "87.5%")
    assert results["cut"].train.total_flops == results["cut"].train.flops
