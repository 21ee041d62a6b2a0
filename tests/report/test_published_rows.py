"""Published models in the report: their rows in Table 2, and what is missing named with its command."""

import csv
import json
import shutil

import pytest

from stlm.errors import UserError
from stlm.report.build import report
from stlm.report.results import read_results
from stlm.study.runs import PublishedModel

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}


@pytest.fixture
def study(make_study):
    """A study with two published models, whose scores are those of the last checkpoint of its runs."""
    study = make_study(TWO)
    published = {}
    for name, run, parameters in (("tiny-a", "sincos", "1.1B"), ("tiny-b", "baseline", None)):
        model = PublishedModel(
            study=study.name,
            name=name,
            label=f"Model {name}",
            folder=f"models/{name}",
            parameters=parameters,
            tokens_folder=study.runs["baseline"].tokens_folder,
        )
        published[name] = model
        record = json.loads((study.runs[run].folder / "evaluation.json").read_text())
        record["parameters"] = 4_066_000
        record["published"] = model.settings
        record["checkpoints"] = {"published": list(record["checkpoints"].values())[-1]}
        model.results_folder.mkdir(parents=True)
        (model.results_folder / "evaluation.json").write_text(json.dumps(record))
        shutil.copyfile(study.runs[run].folder / "items.parquet", model.results_folder / "items.parquet")
    return study.model_copy(update={"published": published})


def test_rows_of_table_2(study):
    report(study)
    lines = (study.folder / "tables" / "table2.md").read_text().splitlines()
    headings = [place for place, line in enumerate(lines) if line.startswith("| **")]
    own = next(i for i in headings if "This study" in lines[i])
    other = next(i for i in headings if "Published models, scored here" in lines[i])
    paper = next(i for i in headings if "The paper" in lines[i])
    assert own < other < paper and paper - other == 3
    first, second = lines[other + 1], lines[other + 2]
    assert first.startswith("| Model tiny-a | 1.1B |") and second.startswith("| Model tiny-b | 4.066M |")
    scores = read_results(study).published["tiny-a"].last.benchmarks["blimp"].modes["harness"].acc
    assert f"| {100 * scores.value:.1f} \\[" in first and "p " not in first
    text = (study.folder / "tables" / "table2.csv").read_text()
    assert text.count("\npublished,") == 2


def _record(study, name: str, **keys) -> None:
    path = study.published[name].results_folder / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_the_token_that_starts_a_text_is_shown(study):
    report(study)
    text = (study.folder / "tables" / "table2.md").read_text()
    assert "a text starts with" not in text, "records of earlier versions do not name it"
    asked = study.published["tiny-b"].model_copy(update={"context": 32, "prefix": "<s>"})
    _record(study, "tiny-a", prefix="<|endoftext|>")
    _record(study, "tiny-b", prefix="<s>", published=asked.settings)
    other = study.model_copy(update={"published": {**study.published, "tiny-b": asked}})
    report(other)
    for name in ("table2", "table2-paper-mode"):
        text = (study.folder / "tables" / f"{name}.md").read_text()
        assert r"Model tiny-a \<\|endoftext\|>; Model tiny-b \<s>" in text
    rows = csv.DictReader((study.folder / "tables" / "table2.csv").open())
    assert [row["prefix"] for row in rows if row["kind"] == "published"] == ["<|endoftext|>", "<s>"]


@pytest.mark.parametrize(
    ("asked", "recorded", "message"),
    [
        ({"prefix": "<s>"}, {}, "prefix: not set, the study asks for <s>"),
        ({}, {"prefix": "<s>"}, "prefix: <s>, the study asks for not set"),
        ({"prefix": "</s>"}, {"prefix": "<s>"}, "prefix: <s>, the study asks for </s>"),
    ],
)
def test_scores_made_after_another_token_are_refused(study, asked, recorded, message):
    model = study.published["tiny-a"]
    _record(study, "tiny-a", prefix="<s>", published=model.model_copy(update=recorded).settings)
    other = study.model_copy(
        update={"published": {**study.published, "tiny-a": model.model_copy(update=asked)}}
    )
    with pytest.raises(UserError, match=rf"{message}: run `stlm evaluate toy tiny-a`"):
        read_results(other)


def test_a_study_without_published_models_has_no_such_rows(study):
    report(study.model_copy(update={"published": {}}))
    assert "Published models" not in (study.folder / "tables" / "table2.md").read_text()


def test_all_that_is_missing_is_named(study):
    (study.published["tiny-a"].results_folder / "items.parquet").unlink()
    path = study.published["tiny-b"].results_folder / "evaluation.json"
    path.write_text((study.runs["baseline"].folder / "evaluation.json").read_text())
    with pytest.raises(UserError) as error:
        read_results(study)
    assert "tiny-a/items.parquet is missing: run `stlm evaluate toy tiny-a`" in str(error.value)
    assert "tiny-b/evaluation.json: not what its stage writes (parameters" in str(error.value)
    path.unlink()
    with pytest.raises(
        UserError, match=r"tiny-b/evaluation\.json is missing: run `stlm evaluate toy tiny-b`"
    ):
        read_results(study)
