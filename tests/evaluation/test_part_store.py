"""An evaluation of which a part fails keeps the others, and goes on with what is missing."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from stlm.errors import UserError
from stlm.evaluation import evaluate, perplexity, scoring
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.files import read_json

CONFIG = EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"])
OUTPUTS = ("evaluation.json", "items.parquet")


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """What is really computed, in order: perplexities, and benchmarks by their number of items."""
    done = []
    measure, score = perplexity.measure, scoring.score

    def measured(*arguments):
        done.append("perplexity")
        return measure(*arguments)

    def scored(model, items, *rest):
        done.append(f"{len(items)} items")
        return score(model, items, *rest)

    monkeypatch.setattr(perplexity, "measure", measured)
    monkeypatch.setattr(scoring, "score", scored)
    return done


def results(run):
    record = read_json(run.folder / "evaluation.json")
    return record, pq.read_table(run.folder / "items.parquet")


def spoil(file):
    table = pq.read_table(file)
    pq.write_table(table.drop_columns("label"), file)
    return table


def test_a_benchmark_without_a_column_loses_no_other(run, work, capsys):
    evaluate_run(run, CONFIG)
    whole = results(run)
    for name in OUTPUTS:
        (run.folder / name).unlink()
    work.clear()
    file = evaluate.RAW / "synthetic_choice" / "validation.parquet"
    table = spoil(file)
    with pytest.raises(UserError) as told:
        evaluate_run(run, CONFIG)
    message = str(told.value)
    assert message.startswith("not scored: synthetic_choice;")
    assert "lacks the column(s) label" in message and "run: stlm fetch synthetic_choice" in message
    assert "stlm evaluate tiny tiny-run, which scores only what is missing" in message
    assert "synthetic_choice cannot be scored, going on" in capsys.readouterr().err
    assert work == ["perplexity", "40 items"] * 3
    # Nothing that an engine or the report could take for whole.
    assert not any((run.folder / name).exists() for name in OUTPUTS)
    work.clear()
    with pytest.raises(UserError, match="not scored: synthetic_choice"):
        evaluate_run(run, CONFIG)
    assert work == []
    pq.write_table(table, file)
    evaluate_run(run, CONFIG)
    assert work == ["30 items"] * 3
    record, items = results(run)
    # The file was written anew, by another version of its writer perhaps: its hash may be another.
    record["benchmarks"]["synthetic_choice"] = whole[0]["benchmarks"]["synthetic_choice"]
    assert record == whole[0] and items.equals(whole[1])
    assert not (run.state_folder / "evaluation").exists()


def test_a_benchmark_that_fails_while_it_is_scored_loses_no_other(run, work, monkeypatch):
    score = scoring.score

    def failing(model, items, *rest):
        if len(items) == 40:
            raise UserError("the log-probability of 'x' is nan")
        return score(model, items, *rest)

    monkeypatch.setattr(scoring, "score", failing)
    with pytest.raises(UserError) as told:
        evaluate_run(run, CONFIG)
    lines = str(told.value).splitlines()
    # One line for the benchmark, whatever the number of checkpoints.
    assert len(lines) == 3 and lines[0].startswith("not scored: synthetic_pairs;")
    assert lines[1].startswith("synthetic_pairs: tiny-run step-0000010 (1/3), float32: the log-prob")
    assert work == ["perplexity", "30 items"] * 3
    monkeypatch.setattr(scoring, "score", score)
    work.clear()
    evaluate_run(run, CONFIG)
    assert work == ["40 items"] * 3


def test_a_part_is_scored_anew_only_where_it_depends_on_what_changed(run, work):
    broken = EvaluationConfig(benchmarks=[*CONFIG.benchmarks, "mmlu"])
    with pytest.raises(UserError, match="stlm fetch mmlu"):
        evaluate_run(run, broken)
    for update, expected in (
        ({"intermediate_limit": 10}, ["10 items", "10 items"] * 2),
        ({"perplexity": {"max_documents": 2}}, ["perplexity"] * 3),
        ({"batch_tokens": 100}, []),
    ):
        work.clear()
        with pytest.raises(UserError, match="stlm fetch mmlu"):
            evaluate_run(run, EvaluationConfig.model_validate(broken.model_dump() | update))
        assert work == expected


def test_a_state_that_cannot_be_written_stops_the_evaluation_at_once(run, work):
    (run.state_folder).mkdir(parents=True)
    (run.state_folder / "evaluation").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        evaluate_run(run, CONFIG)
    assert work == ["perplexity"]
