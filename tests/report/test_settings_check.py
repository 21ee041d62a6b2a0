"""A report takes a record only where all of its settings are those of params/, keys on one side included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stlm import recording
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.model.config import ModelConfig
from stlm.report.card import read_card
from stlm.report.comparison import compare_all
from stlm.report.contamination import read_contamination
from stlm.report.results import read_results
from stlm.report.schema import DependencyRecord
from stlm.report.settings_check import check_dependencies, check_published
from stlm.study.runs import PublishedModel, Study
from stlm.tokens.config import DataConfig
from stlm.training.config import RECORD_KEYS, TrainingConfig

ONE = {"baseline": ("Baseline", {})}
# Of every section that may be left out, and of some keys that may not: a value that changes something.
DIFFERENCES = [
    ("model", {"sharing": {"what": "ffn"}}, "sharing.what"),
    ("model", {"lora": {"rank": 2}}, "lora.rank"),
    ("model", {"low_rank": {"ffn": 8}}, "low_rank.ffn"),
    ("model", {"embedding_rank": 8}, "embedding_rank"),
    ("model", {"bytes": {}}, "bytes.width"),
    ("model", {"value_embeddings": 1}, "value_embeddings"),
    ("model", {"zero_init": True}, "zero_init"),
    ("training", {"start_from": "baseline"}, "start_from"),
    ("training", {"inherit": {"layers": "loss"}}, "inherit.layers"),
    ("training", {"matrix_learning_rate": 1e-3}, "matrix_learning_rate"),
    ("training", {"compile": True}, "compile"),
    ("data", {"weights": {"a": 1.0}}, "weights.a"),
    ("data", {"sequence": ["a"]}, "sequence"),
    ("data", {"attention": "within"}, "attention"),
    ("data", {"order": "length", "direction": "hard_first"}, "direction"),
    ("data", {"order": "length", "pacing": "competence"}, "pacing"),
    ("data", {"order": "difficulty", "reference": "baseline"}, "reference"),
    (
        "data",
        {"reference": "baseline", "select": {"by": "perplexity", "share": 0.5}},
        "select.share",
    ),
    ("data", {"competence_start": 0.5}, "competence_start"),
    ("data", {"unique_tokens": 5}, "unique_tokens"),
]
KINDS = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}


def changed(section: Any, difference: dict[str, Any]) -> Any:
    return type(section).model_validate(section.model_dump() | difference)


def asking(study: Study, section: str, difference: dict[str, Any]) -> Study:
    """The same study, its only run with other settings."""
    run = study.runs["baseline"]
    other = run.model_copy(update={section: changed(getattr(run, section), difference)})
    return study.model_copy(update={"runs": {"baseline": other}})


def rewrite(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refused(study: Study) -> str:
    with pytest.raises(UserError) as caught:
        read_results(study)
    return str(caught.value)


@pytest.mark.parametrize(("section", "difference", "key"), DIFFERENCES, ids=[key for *_, key in DIFFERENCES])
def test_a_setting_of_one_side_alone_is_refused_in_both_directions(make_study, section, difference, key):
    study = make_study(ONE, benchmarks={"blimp": 10})
    asked = asking(study, section, difference)
    # The study has it, the record has not.
    message = refused(asked)
    assert f"baseline/train.json was trained with {section}." in message
    assert f"{section}.{key}: " in message
    assert "run `stlm train toy baseline`" in message
    # And the other way round.
    run = asked.runs["baseline"]
    rewrite(run.folder / "train.json", **{section: getattr(run, section).model_dump(mode="json")})
    if "start_from" in difference:
        rewrite(run.folder / "train.json", start={"run": "baseline", "tokens": 1, "flops": 1.0})
    assert f"{section}.{key}: " in refused(study)
    assert set(read_results(asked)) == {"baseline"}


def test_every_section_that_may_be_left_out_is_tried():
    optional = {
        (name, key) for name, kind in KINDS.items() for key, f in kind.model_fields.items() if f.exclude_if
    }
    tried = {(section, key) for section, difference, _ in DIFFERENCES for key in difference}
    assert optional - {("training", "validation_documents")} <= tried
    assert set(DataConfig.model_fields) - {"max_epochs", "competence_share"} <= {
        key for section, key in tried if section == "data"
    }


def test_a_record_of_before_a_section_was_there_is_equal_to_its_default(make_study):
    study = make_study(ONE, benchmarks={"blimp": 10})
    record = json.loads((study.runs["baseline"].folder / "train.json").read_text())
    assert "data" not in record
    assert "sharing" not in record["model"]
    assert set(read_results(study)) == {"baseline"}


@pytest.mark.parametrize(
    ("section", "key"), [("model", "rope_theta"), ("training", "compile"), ("data", "order")]
)
def test_a_record_that_does_not_say_a_setting_is_refused(make_study, section, key):
    """It was made by a version that had no such setting: nobody knows what it would have been."""
    study = make_study(ONE, benchmarks={"blimp": 10})
    run = study.runs["baseline"]
    rewrite(run.folder / "train.json", data=DataConfig().model_dump(mode="json"))
    content = json.loads((run.folder / "train.json").read_text())[section]
    del content[key]
    rewrite(run.folder / "train.json", **{section: content})
    assert f"does not say what it had as {section}.{key}" in refused(study)


def test_a_setting_that_no_longer_exists_is_refused_by_name(make_study):
    study = make_study(ONE, benchmarks={"blimp": 10})
    run = study.runs["baseline"]
    rewrite(run.folder / "train.json", training=run.training.model_dump(mode="json") | {"long_gone": 1})
    assert "training.long_gone: no such key" in refused(study)


def test_what_is_recorded_and_when_is_not_compared(make_study, monkeypatch):
    monkeypatch.setattr("stlm.report.settings_check.RECORD_KEYS", RECORD_KEYS | {"former"})
    study = make_study(ONE, benchmarks={"blimp": 10})
    run = study.runs["baseline"]
    training = run.training.model_dump(mode="json") | {"wandb": True, "log_every": 7, "former": 1}
    del training["watch_every"]
    rewrite(run.folder / "train.json", training=training)
    assert set(read_results(study)) == {"baseline"}


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"run": "other"}, "run: other"),
        ({"variant": "other"}, "variant: other"),
        ({"start": {"run": "other", "tokens": 1, "flops": 1.0}}, "depends.start.run: other"),
    ],
)
def test_a_record_of_another_run_is_refused(make_study, keys, found):
    study = make_study(ONE, benchmarks={"blimp": 10})
    rewrite(study.runs["baseline"].folder / "train.json", **keys)
    assert f"was trained with {found}, the study asks for" in refused(study)


def test_a_run_that_read_other_weights_of_another_run_than_it_has_now_is_refused(make_study):
    variants = {"baseline": ("Baseline", {}), "student": ("Student", {})}
    study = make_study(variants, benchmarks={"blimp": 10})
    results = read_results(study)
    weights = results["baseline"].train.checkpoints[-1].weights_sha256
    trained = {}
    for found in (weights, "0" * 64, None):
        other = {"run": "baseline", "tokens": 1, "flops": 1.0, "weights_sha256": found}
        train = results["student"].train.model_copy(
            update={"depends": {"teacher": DependencyRecord.model_validate(other)}}
        )
        trained[found] = {"baseline": results["baseline"].train, "student": train}
    check_dependencies(study, trained[weights])
    check_dependencies(study, trained[None])  # earlier versions did not record it
    with pytest.raises(UserError, match=r"depends.teacher: baseline has been trained again.*stlm train"):
        check_dependencies(study, trained["0" * 64])


@pytest.mark.parametrize(
    ("difference", "found"),
    [
        ({"limit": 5}, "evaluation.limit: null, the study asks for 5"),
        (
            {"benchmarks": {"blimp": {"limit": 5}}},
            "evaluation.benchmarks.blimp.limit: null, the study asks for",
        ),
        (
            {"benchmarks": {"blimp": {}, "mmlu": {}}},
            "evaluation.benchmarks.mmlu.limit: not set, the study asks",
        ),
        ({"benchmarks": {}}, "evaluation.benchmarks.blimp.limit: null, the study asks for not set"),
        ({"limit_seed": 1}, "evaluation.limit_seed: 0, the study asks for 1"),
        ({"modes": ["harness"]}, "evaluation.modes: ['harness', 'paper'], the study asks for ['harness']"),
        ({"precision": "auto"}, "evaluation.precision: float32, the study asks for auto"),
        ({"intermediate_limit": 5}, "evaluation.intermediate_limit: null, the study asks for 5"),
        ({"perplexity": {"stride": 7}}, "evaluation.perplexity.stride: null, the study asks for 7"),
        ({"checkpoints": "last"}, "evaluation.checkpoints: all, the study asks for last"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_of_other_settings_are_refused(make_study, difference, found):
    study = make_study(ONE, benchmarks={"blimp": 10})
    evaluation = EvaluationConfig.model_validate(study.evaluation.model_dump() | difference)
    message = refused(study.model_copy(update={"evaluation": evaluation}))
    assert f"baseline/evaluation.json was scored with {found}" in message
    assert "run `stlm evaluate toy baseline`" in message


def test_scores_of_other_settings_are_not_recorded_in_dvc(make_study):
    study = make_study(ONE)
    recording._check_made(study, Path())
    asked = study.model_copy(update={"evaluation": changed(study.evaluation, {"limit_seed": 7})})
    with pytest.raises(UserError, match=r"evaluation\.json was scored with evaluation\.limit_seed: 0"):
        recording._check_made(asked, Path())


def test_how_much_is_scored_at_a_time_is_not_compared(make_study):
    study = make_study(ONE, benchmarks={"blimp": 10})
    evaluation = study.evaluation.model_copy(update={"batch_tokens": 99})
    assert set(read_results(study.model_copy(update={"evaluation": evaluation}))) == {"baseline"}


def test_scores_that_do_not_say_their_settings_are_refused(make_study):
    study = make_study(ONE, benchmarks={"blimp": 10})
    path = study.runs["baseline"].folder / "evaluation.json"
    settings = json.loads(path.read_text())["settings"]
    rewrite(path, settings={key: value for key, value in settings.items() if key != "limit_seed"})
    assert "does not say what it had as evaluation.limit_seed" in refused(study)
    rewrite(path, settings=settings | {"perplexity": settings["perplexity"] | {"long_gone": 3}})
    assert "evaluation.perplexity.long_gone: no such key" in refused(study)
    rewrite(path, settings=None)
    assert "does not say with which settings it was scored" in refused(study)


def test_items_of_another_evaluation_than_the_record_beside_them_are_refused(make_study, change_facts):
    study = make_study(ONE, benchmarks={"blimp": 10})
    change_facts(study.runs["baseline"].folder / "items.parquet", precision="bfloat16")
    with pytest.raises(
        UserError, match=r"items\.parquet says precision: bfloat16, evaluation\.json beside it"
    ):
        compare_all(read_results(study))


def test_a_published_model_loaded_otherwise_is_refused():
    asked = PublishedModel(
        study="toy", name="theirs", label="Theirs", folder="models/a", tokens_folder=Path("t")
    )
    path = Path("evaluation.json")
    check_published(asked, asked.settings, path, "stlm evaluate toy theirs")
    check_published(asked.model_copy(update={"label": "Other"}), asked.settings, path, "x")
    for change in ({"context": 64}, {"folder": "models/b"}):
        other = asked.model_copy(update=change)
        with pytest.raises(UserError, match=rf"was scored with published\.theirs\.{next(iter(change))}: "):
            check_published(other, asked.settings, path, "x")
    with pytest.raises(UserError, match="does not say how the model was loaded"):
        check_published(asked, None, path, "x")


def test_contamination_counted_with_other_settings_is_refused(make_study):
    study = make_study(ONE, benchmarks={"blimp": 10})
    read_contamination(study)
    path = study.folder / "contamination.json"
    record = json.loads(path.read_text())
    rewrite(path, sizes=[5, 13])
    with pytest.raises(UserError, match=r"sequences of 5 and 13 words.*run: stlm contamination toy"):
        read_contamination(study)
    path.write_text(json.dumps(record))
    other = study.evaluation.model_copy(update={"limit_seed": 1})
    with pytest.raises(UserError, match="'limit_seed': 0"):
        read_contamination(study.model_copy(update={"evaluation": other}))


def test_a_card_takes_no_record_of_other_weights(make_study):
    study = make_study(ONE, benchmarks={"blimp": 10})
    checkpoint = study.runs["baseline"].folder / "checkpoints" / "step-000200"
    checkpoint.mkdir(parents=True)
    description = {"study": "toy", "step": 200, "tokens": 5, "weights_sha256": "trained again"}
    (checkpoint / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"train\.json does not list the weights in .*step-000200"):
        read_card(checkpoint)
