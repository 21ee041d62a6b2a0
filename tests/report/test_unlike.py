"""Tables name the rows that were trained or scored in other arithmetic, by other code or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stlm.evaluation.statistics import SeedNoise
from stlm.report.build import report
from stlm.report.notes import noise_note
from stlm.report.results import read_results
from stlm.report.schema import EvaluationRecord, TrainRecord
from stlm.report.unlike import Row, rows_of, unlike_note, unlike_variants

CODE = {"stlm": "0.1.0", "torch": "2.13.0", "git": "aaa"}
MADE = {"device": "cpu (x86_64)", "processor": "Good CPU", "code": CODE}


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a train.json and an evaluation.json of the committed results say, with all that they may."""
    path = Path(__file__).parents[2] / "results" / "desk" / "records" / "runs.json"
    record = json.loads(path.read_text())["runs"]["baseline-s0"]
    train, scored = record["train"], record["evaluation"]
    return train | MADE, scored | MADE | {"checkpoints": {}}


def row(made, label: str, seed: int = 0, train: dict | None = None, scored: dict | None = None) -> Row:
    record = TrainRecord.model_validate(made[0] | {"seed": seed} | (train or {}))
    return Row(label, label, record, EvaluationRecord.model_validate(made[1] | (scored or {})))


def test_rows_made_alike_need_no_note(made):
    rows = [row(made, "A"), row(made, "B")]
    assert unlike_note(rows) is None
    assert unlike_variants(rows) == set()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": "float32"}, "trained in float32, not in bfloat16: B"),
        ({"compiled": True}, "trained with torch.compile, not without torch.compile: B"),
        ({"kernels": False}, "trained without kernels in C, not with kernels in C: B"),
        ({"processor": "Other CPU"}, "trained on Other CPU, not on Good CPU: B"),
        ({"device": "A GPU"}, "trained on A GPU, not on Good CPU: B"),
        ({"code": CODE | {"git": "bbb"}}, "trained by STLM 0.1.0 (bbb), not by STLM 0.1.0 (aaa): B"),
        ({"code": CODE | {"torch": "2.14.0"}}, "trained by torch 2.14.0, not by torch 2.13.0: B"),
        ({"code": CODE | {"git": None}}, "trained by STLM 0.1.0 (no commit), not by STLM 0.1.0 (aaa): B"),
    ],
)
def test_training_otherwise_is_told(made, change, told):
    rows = [row(made, "A"), row(made, "B", train=change), row(made, "C")]
    for scored in (True, False):
        assert unlike_note(rows, scored) == f"Not known to be made alike: {told}."
    assert unlike_variants(rows) == {"B"}


def test_scoring_otherwise_is_told_where_there_are_scores(made):
    rows = [row(made, "A"), row(made, "B", scored={"precision": "float32"})]
    assert unlike_note(rows) == "Not known to be made alike: scored in float32, not in bfloat16: B."
    assert unlike_note(rows, scored=False) is None
    other = {"processor": "Other"}
    published = Row("theirs", "Theirs", None, EvaluationRecord.model_validate(made[1] | other))
    told = "scored on Other, not on Good CPU: Theirs"
    assert unlike_note([row(made, "A"), published]) == f"Not known to be made alike: {told}."


def test_rows_are_named_by_seed_by_variant_or_by_what_is_left_out(made):
    other = {"train": {"kernels": False}}

    def named(*rows: Row) -> str:
        return unlike_note(rows).split(": ")[-1]

    first = [row(made, "A"), row(made, "A", 1)]
    assert named(*first, row(made, "B"), row(made, "B", 1, **other)) == "B (seed 1)."
    assert named(*first, row(made, "B", **other), row(made, "B", 1, **other)) == "B."
    assert named(first[0], *(row(made, label, **other) for label in "BCD")) == "all rows but A."


def test_training_and_scoring_by_the_same_other_code_are_told_once(made):
    other = {"code": CODE | {"git": "bbb"}}
    told = "trained and scored by STLM 0.1.0 (bbb), not by STLM 0.1.0 (aaa): B"
    rows = [row(made, "A"), row(made, "B", train=other, scored=other)]
    assert unlike_note(rows) == f"Not known to be made alike: {told}."


def test_what_cannot_be_known_is_told(made):
    dirty = {"code": CODE | {"git": "aaa-dirty"}}
    rows = [row(made, "A", train=dirty, scored=dirty), row(made, "B", train=dirty, scored=dirty)]
    assert "by code with uncommitted changes, which may differ from row to row: all rows" in unlike_note(rows)
    rows = [row(made, "A"), row(made, "B", scored={"processor": None})]
    assert "on a processor that is not recorded: B" in unlike_note(rows)
    parts = [MADE, MADE | {"processor": "Other"}]
    rows = [row(made, "A"), row(made, "B", train={"parts": parts})]
    assert "trained in parts, by other code or on another machine: B" in unlike_note(rows)


@pytest.mark.usefixtures("quick_figures")
def test_the_report_tells_it_below_every_table_of_rows_and_in_its_summary(make_study, change_facts, capsys):
    study = make_study({"baseline": ("Baseline", {}), "other": ("Other", {"dropout": 0.0})})
    for name, run in study.runs.items():
        precision = "bfloat16" if name == "other" else "float32"
        for file, keys in (("train", {"code": CODE}), ("evaluation", {"code": CODE, "precision": precision})):
            path = run.folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | MADE | keys))
        change_facts(run.folder / "items.parquet", **MADE, precision=precision)
    rows = rows_of(read_results(study))
    assert [own.label for own in rows] == ["Baseline", "Other"]
    report(study)
    told = "scored in bfloat16, not in float32: Other"
    assert told in capsys.readouterr().out
    for name in ("table2", "table2-acc-norm", "table2-paper-mode", "blimp-phenomena"):
        assert told in (study.folder / "tables" / f"{name}.md").read_text(), name
    assert told not in (study.folder / "tables" / "table1.md").read_text()
    made = json.loads((study.folder / "tables" / "made.json").read_text())
    assert set(made["code"]) == {"stlm", "torch", "git"}


def test_the_noise_of_seeds_says_what_it_assumes():
    labels = {"a": "A", "b": "B", "c": "C"}
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    equal = noise_note(SeedNoise(0.1, 2, shares, 0.4, {}), labels, "of bits")
    assert equal == (
        "The noise of bits is assumed to be equal in all variants (test: p = 0.400; largest shares of the "
        "variance, of 3 variants: A 50%; B 30%)."
    )
    unequal = noise_note(SeedNoise(0.1, 2, shares, 0.01, {"a": 0.3}), labels)
    assert "in all variants (p = 0.010" in unequal
    assert "Differences with A have the wider of" in unequal
    assert "both variants" in noise_note(SeedNoise(0.1, 1, {"a": 0.5, "b": 0.5}, 1.0, {}), labels)
