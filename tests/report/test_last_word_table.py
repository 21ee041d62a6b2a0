"""The perplexity of last words in the note, in Table 2's CSV and among the metrics."""

from __future__ import annotations

import csv
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.evaluation.scoring import ITEMS_SCHEMA
from stlm.report.build import report
from stlm.report.notes import last_word_note
from stlm.report.results import read_results

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}
PERPLEXITY = {"baseline": 12.5, "sincos": 1234.56}


@pytest.fixture
def study(make_study):
    """A study whose runs were asked for five last words, of which they said two and one."""
    study = make_study(TWO)
    for (name, run), right in zip(study.runs.items(), (2, 1), strict=True):
        path = run.folder / "evaluation.json"
        record = json.loads(path.read_text())
        (step, checkpoint) = list(record["checkpoints"].items())[-1]
        acc = {"value": right / 5, "low": 0.01, "high": 0.9, "n": 5}
        harness = {"acc": acc, "word_perplexity": PERPLEXITY[name], "ties": 0, "truncated": 0}
        checkpoint["benchmarks"]["last_word"] = {
            "version": "1", "items": 5, "items_total": 5, "limit": None, "modes": {"harness": harness}
        }  # fmt: skip
        path.write_text(json.dumps(record))
        rows = pd.DataFrame({"item": list("abcde"), "greedy": [i < right for i in range(5)]}).assign(
            checkpoint=step, step=checkpoint["step"], benchmark="last_word", mode="harness", group="",
            option=0, gold=True, logprob=-2.0, n_tokens=1, n_bytes=4, n_chars=4, truncated=False,
        )  # fmt: skip
        columns = [pa.array(rows[field.name], field.type) for field in ITEMS_SCHEMA]
        table = pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)
        known = pq.read_table(run.folder / "items.parquet", schema=ITEMS_SCHEMA)
        whole = pa.concat_tables([known, table]).unify_dictionaries()
        pq.write_table(whole, run.folder / "items.parquet")
    return study


@pytest.mark.usefixtures("quick_figures")
def test_the_report_has_accuracy_chance_and_perplexity(study):
    report(study)
    with (study.folder / "tables" / "table2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    baseline, sincos = rows[:2]
    assert (baseline["last_word_percent"], sincos["last_word_percent"]) == ("40.0", "20.0")
    assert (baseline["last_word_perplexity"], sincos["last_word_perplexity"]) == ("12.5", "1234.56")
    assert sincos["last_word_difference"] == "-20.0"
    assert next(row for row in rows if row["kind"] == "chance")["last_word_percent"] == "0.0"
    metrics = json.loads((study.folder / "metrics.json").read_text())
    assert metrics["sincos"]["last_word"] == 0.2
    assert metrics["sincos"]["last_word_perplexity"] == 1234.56
    text = (study.folder / "tables" / "table2.md").read_text()
    assert "compare runs of one corpus only. Perplexity of the word: Baseline 12.5; SinCos PE 1,235." in text


def test_there_is_no_note_where_nobody_was_asked(study, make_study):
    results = read_results(study)
    assert last_word_note(results, "paper") is None
    assert last_word_note({}, "harness") is None
    assert last_word_note({"sincos": results["sincos"]}, "harness").endswith(": SinCos PE 1,235.")


def test_items_written_before_the_column_was_there_are_read(make_study):
    study = make_study(TWO)
    result = read_results(study)["baseline"]
    expected = result.outcomes()
    table = pq.read_table(result.items_path)
    pq.write_table(table.drop_columns("greedy"), result.items_path)
    pd.testing.assert_frame_equal(result.outcomes(), expected)
