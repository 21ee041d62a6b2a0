"""Published models in the report: their rows in Table 2, and what is missing named with its command."""

import csv
import json
import shutil

import numpy as np
import pytest
from hand_made import set_documents

from stlm.errors import UserError
from stlm.evaluation.statistics import ratio_bootstrap
from stlm.report.accuracies import accuracy_tables
from stlm.report.bits_table import bits_table
from stlm.report.build import report
from stlm.report.comparison import compare_all
from stlm.report.results import read_results
from stlm.study.runs import PublishedModel

pytestmark = pytest.mark.usefixtures("quick_figures")

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}


def publish(study, models):
    """The study with published models, whose scores are those of the last checkpoint of its runs.

    `models`: name -> run, and the size as the study writes it.
    """
    published = {}
    for name, (run, parameters) in models.items():
        model = PublishedModel(
            study=study.name,
            name=name,
            label=f"Model {name}",
            folder=f"models/{name}",
            parameters=parameters,
            tokens_folder=study.runs[run].tokens_folder,
        )
        published[name] = model
        folder = study.runs[run].folder
        record = json.loads((folder / "evaluation.json").read_text())
        record["parameters"] = 4_066_000
        record["published"] = model.settings
        record["checkpoints"] = {"published": list(record["checkpoints"].values())[-1]}
        model.results_folder.mkdir(parents=True)
        (model.results_folder / "evaluation.json").write_text(json.dumps(record))
        for file in ("items.parquet", "documents.parquet"):
            if (folder / file).exists():
                shutil.copyfile(folder / file, model.results_folder / file)
    return study.model_copy(update={"published": published})


@pytest.fixture
def study(make_study):
    """A study with two published models."""
    return publish(make_study(TWO), {"tiny-a": ("sincos", "1.1B"), "tiny-b": ("baseline", None)})


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


def test_predictions_that_do_not_say_how_they_were_scored_are_named(study, change_facts):
    assert compare_all(read_results(study)).disturbing == []
    change_facts(study.published["tiny-a"].results_folder / "items.parquet")
    results = read_results(study)
    comparisons = compare_all(results)
    (told,) = comparisons.disturbing
    assert told.startswith("tiny-a: written by an earlier version of STLM")
    for table in accuracy_tables(results, comparisons):
        assert f"Not scored alike: {told}." in table.notes


def _with_documents(make_study):
    """Two seeds of the baseline and a published model, measured on the same documents; then their rates."""
    study = make_study(TWO, seeds=(0, 1), benchmarks={})
    sizes = [900, 1500, 300, 2400, 700, 1100, 1300, 500, 1900, 800, 1000, 1200]
    seed_0, seed_1 = np.linspace(1.4, 2.6, len(sizes)), np.linspace(1.5, 2.8, len(sizes))
    model = seed_0 - 0.02 + 0.004 * np.cos(np.arange(len(sizes)))
    for run, rates in (("baseline-s0", seed_0), ("baseline-s1", seed_1), ("sincos-s0", model)):
        set_documents(study, run, rates * sizes, sizes)
    study = publish(study, {"tiny": ("sincos-s0", None)})
    return study, sizes, model, (seed_0, seed_1)


def test_its_documents_are_compared_with_the_mean_over_the_seeds_of_the_baseline(make_study):
    study, sizes, model, seeds = _with_documents(make_study)
    record = bits_table(read_results(study)).records[-1]
    bits = (model - np.mean(seeds, axis=0)) * sizes
    interval = ratio_bootstrap(bits, sizes)
    assert record["label"] == "Model tiny"
    assert record["difference"] == pytest.approx(bits.sum() / sum(sizes), abs=1e-6)
    found = record["difference_low"], record["difference_high"]
    assert found == pytest.approx(tuple(interval), abs=1e-6)
    assert record["difference_half_width_seeds"] is None


def test_a_seed_of_the_baseline_without_documents_leaves_the_difference_without_an_interval(make_study):
    """The difference is still from the mean of all seeds, and not from those that have documents."""
    study, *_ = _with_documents(make_study)
    whole = bits_table(read_results(study)).records[-1]
    folder = study.runs["baseline-s1"].folder
    record = json.loads((folder / "evaluation.json").read_text())
    list(record["checkpoints"].values())[-1]["perplexity"].pop("text_sha256")
    (folder / "evaluation.json").write_text(json.dumps(record))
    table = bits_table(read_results(study))
    assert table.records[-1]["difference"] == whole["difference"]
    assert table.records[-1]["difference_low"] is None
    difference, over_documents = table.rows[-1][4:6]
    assert over_documents.text == "–" and not difference.bold


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
