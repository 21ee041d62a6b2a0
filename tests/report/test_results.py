"""Reading what runs left behind: scores from options, and every broken file named with its command."""

import json

import pandas as pd
import pytest

from stlm.errors import UserError
from stlm.report.results import read_results
from stlm.report.run_files import score_items
from stlm.tokens.config import DataConfig

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}


def options(*items: list[tuple[float, int, bool]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"benchmark": "arc_easy", "mode": "harness", "item": str(number), "option": place}
            | {"logprob": logprob, "n_chars": chars, "gold": gold}
            for number, item in enumerate(items)
            for place, (logprob, chars, gold) in enumerate(item)
        ]
    )


def test_outcomes_of_right_wrong_and_tied_items():
    scored = score_items(
        options(
            [(-1.0, 1, True), (-2.0, 1, False)],
            [(-2.0, 1, True), (-1.0, 1, False)],
            [(-1.0, 1, True), (-1.0, 1, False), (-1.0, 1, False), (-9.0, 1, False)],
            [(-9.0, 1, True), (-1.0, 1, False), (-1.0, 1, False)],
        )
    )
    assert scored["acc"].tolist() == pytest.approx([1, 0, 1 / 3, 0])
    assert scored["chance"].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 4, 1 / 3])


def test_normalization_divides_by_characters():
    scored = score_items(options([(-6.0, 12, True), (-4.0, 2, False)]))
    assert scored["acc"].tolist() == [0]
    assert scored["acc_norm"].tolist() == [1]


def test_outcomes_average_to_the_recorded_accuracy(make_study):
    study = make_study(TWO)
    for result in read_results(study).values():
        means = result.outcomes().groupby(["benchmark", "mode"])["acc"].mean()
        for name, benchmark in result.last.benchmarks.items():
            for mode, scored in benchmark.modes.items():
                assert means[name, mode] == pytest.approx(scored.acc.value)


def test_baseline_comes_first(make_study):
    study = make_study(TWO)
    reordered = study.model_copy(update={"baseline": "sincos"})
    assert list(read_results(reordered)) == ["sincos", "baseline"]


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("train.json", "train"),
        ("curve.csv", "train"),
        ("evaluation.json", "evaluate"),
        ("items.parquet", "evaluate"),
    ],
)
def test_missing_or_truncated_file_is_named_with_its_command(make_study, file, stage):
    study = make_study(TWO)
    path = study.runs["sincos"].folder / file
    whole = path.read_bytes()
    for content in (None, b"", whole[: len(whole) // 2] if file != "curve.csv" else b'step,tokens\n"1'):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_results(study)["sincos"].outcomes()
        assert str(path) in str(caught.value)
        assert f"stlm {stage} toy sincos" in str(caught.value)


def test_all_broken_runs_are_named_at_once(make_study):
    study = make_study(TWO)
    for run in study.runs.values():
        (run.folder / "train.json").unlink()
    with pytest.raises(UserError, match=r"(?s)toy baseline.*toy sincos"):
        read_results(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"total": "many"}}, "parameters.total"),
        ({"tokens": None}, "tokens"),
        ({"checkpoints": []}, "other weights"),
    ],
)
def test_wrong_content_is_named_by_its_key(make_study, change, message):
    study = make_study(TWO)
    path = study.runs["baseline"].folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_results(study)


def test_scores_of_other_weights_are_refused(make_study):
    """A run trained again and not yet evaluated again must not be published with its old scores."""
    study = make_study(TWO)
    path = study.runs["baseline"].folder / "train.json"
    train = json.loads(path.read_text())
    train["checkpoints"][-1]["weights_sha256"] = "trained again"
    path.write_text(json.dumps(train))
    with pytest.raises(UserError, match="stlm evaluate toy baseline"):
        read_results(study)


def test_curve_without_numbers_is_refused(make_study):
    study = make_study(TWO)
    path = study.runs["baseline"].folder / "curve.csv"
    path.write_text(path.read_text().replace("20480", "many", 1))
    with pytest.raises(UserError, match=r"not numbers in column tokens"):
        read_results(study)


def test_items_of_another_evaluation_are_refused(make_study):
    study = make_study(TWO)
    result = read_results(study)["baseline"]
    items = pd.read_parquet(result.items_path)
    items[items.checkpoint != "step-000200"].to_parquet(result.items_path, index=False)
    with pytest.raises(UserError, match="no rows of step-000200"):
        result.outcomes()


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"seed": 3}, "seed: 0, the study asks for 3"),
        ({"tokenizer": "bytes"}, "tokenizer: bpe-512, the study asks for bytes"),
        ({"model": {"dropout": 0.2}}, r"model.dropout: 0.1, the study asks for 0.2"),
        (
            {"training": {"betas": (0.9, 0.99)}},
            r"training.betas: \[0.9, 0.95\], the study asks for \[0.9, 0.99\]",
        ),
        ({"data": {"attention": "within"}}, "data.attention: across, the study asks for within"),
        ({"data": {"weights": {"a": 1.0}}}, r"data.weights.a: not set, the study asks for 1.0"),
    ],
)
def test_results_of_another_recipe_are_refused(make_study, changed, key):
    study = make_study(TWO)
    run = study.runs["sincos"]
    update = {
        name: getattr(run, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    asked = study.model_copy(update={"runs": {**study.runs, "sincos": run.model_copy(update=update)}})
    message = rf"runs/sincos/train\.json was trained with {key}: run `stlm train toy sincos`, or .* --set"
    with pytest.raises(UserError, match=message):
        read_results(asked)


def test_results_of_other_data_than_the_default_are_refused_too(make_study):
    study = make_study(TWO)
    path = study.runs["sincos"].folder / "train.json"
    record = json.loads(path.read_text())
    sequence = DataConfig(sequence=("b", "a"))
    path.write_text(json.dumps(record | {"data": sequence.model_dump(mode="json")}))
    with pytest.raises(UserError, match=r"data.sequence: \['b', 'a'\], the study asks for \[\]"):
        read_results(study)
    for data in (sequence, sequence.model_copy(update={"max_epochs": 4.0})):
        asked = {**study.runs, "sincos": study.runs["sincos"].model_copy(update={"data": data})}
        assert set(read_results(study.model_copy(update={"runs": asked}))) == set(study.runs)


def test_columns_and_keys_of_a_newer_version_are_kept(make_study):
    """A technique adds to the records what it measures; no list here has to learn of it."""
    study = make_study(TWO)
    folder = study.runs["sincos"].folder
    curve = pd.read_csv(folder / "curve.csv").assign(train_exit_loss=2.5, phase="router")
    curve.to_csv(folder / "curve.csv", index=False)
    path = folder / "train.json"
    added = {"distillation": {"teacher": "baseline", "flops": 1.5e9}, "kept_tokens": 0.25}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    result = read_results(study)["sincos"]
    assert result.curve["train_exit_loss"].eq(2.5).all() and result.curve["phase"].eq("router").all()
    assert result.train.further == added
    assert read_results(study)["baseline"].train.further == {}
