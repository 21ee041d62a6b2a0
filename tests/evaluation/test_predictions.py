"""items.parquet says of itself what was scored; two files are told apart by what matters."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.errors import UserError
from stlm.evaluation import evaluate
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.predictions import KEY, Facts, read_facts, unlike, write_predictions
from stlm.evaluation.scoring import ITEMS_SCHEMA
from stlm.files import sha256
from stlm.provenance import code_version
from stlm.report.pairwise import compare, find_predictions
from stlm.training.checkpoints import load_checkpoint

CONFIG = EvaluationConfig(
    benchmarks={"synthetic_pairs": {"limit": 12}, "synthetic_choice": {}}, intermediate_limit=10, limit_seed=5
)


def test_evaluation_writes_what_its_predictions_depend_on(run):
    evaluate_run(run, CONFIG)
    facts = read_facts(run.folder / "items.parquet")
    assert (facts.study, facts.run, facts.variant, facts.seed) == ("tiny", "tiny-run", "baseline", 0)
    assert (facts.corpus, facts.modes, facts.limit_seed) == ("tiny", ["harness", "paper"], 5)
    assert (facts.device, facts.precision) == ("cpu", "float32")
    assert (facts.scoring_version, facts.harness) == (evaluate.SCORING_VERSION, evaluate.HARNESS)
    assert facts.code == code_version()
    tokenizer = run.folder / "checkpoints" / "tokenizer" / "tokenizer-name.json"
    assert (facts.tokenizer.name, facts.tokenizer.sha256) == ("bytes", sha256(tokenizer))
    assert facts.tokens_sha256 == sha256(run.tokens_folder / "meta.json")
    for name, file, metrics in (
        ("synthetic_pairs", "train.parquet", {"harness": ["acc"], "paper": ["acc"]}),
        ("synthetic_choice", "validation.parquet", {"harness": ["acc", "acc_norm"], "paper": ["acc"]}),
    ):
        own = facts.benchmarks[name]
        assert (own.version, own.split) == ("1", file.removesuffix(".parquet"))
        assert own.sha256 == [sha256(evaluate.RAW / name / file)]
        assert own.metrics == metrics
    assert list(facts.checkpoints) == ["step-0000010", "step-0000020", "step-0000030"]
    for name, own in facts.checkpoints.items():
        assert own.weights_sha256 == load_checkpoint(run.folder / "checkpoints" / name)[1]["weights_sha256"]
        last = name == "step-0000030"
        pairs, choice = own.benchmarks["synthetic_pairs"], own.benchmarks["synthetic_choice"]
        assert (pairs.items, pairs.items_total, pairs.limit) == ((12 if last else 10), 40, 12 if last else 10)
        assert (choice.items, choice.limit) == ((30, None) if last else (10, 10))
    record = json.loads((run.folder / "evaluation.json").read_text())
    own = {key: value for key, value in record.items() if key not in ("checkpoints", "checksum")}
    assert facts.without_checkpoints() == own


def test_two_checkpoints_really_scored_can_be_compared(run):
    evaluate_run(run, CONFIG)
    folder = str(run.folder)
    found = compare(find_predictions(f"{folder}@10"), find_predictions(f"{folder}@30"))
    assert {(row.benchmark, row.mode, row.metric) for row in found.rows} == {
        *(("synthetic_pairs", mode, "acc") for mode in ("harness", "paper")),
        *(("synthetic_choice", mode, "acc") for mode in ("harness", "paper")),
        ("synthetic_choice", "harness", "acc_norm"),
    }
    assert {row.paired.n for row in found.rows} == {10}


def test_without_a_benchmark_the_file_still_says_what_it_is(run):
    evaluate_run(run, EvaluationConfig(checkpoints="last"))
    facts = read_facts(run.folder / "items.parquet")
    assert (facts.benchmarks, list(facts.checkpoints)) == ({}, ["step-0000030"])
    with pytest.raises(UserError, match="holds no item"):
        find_predictions(str(run.folder))


def test_checkpoints_scored_on_another_device_are_scored_anew(run, monkeypatch):
    monkeypatch.setattr(evaluate, "write_results", lambda *arguments: 1 / 0)
    kept = []
    for name in ("cpu", "cpu", "A GPU"):
        monkeypatch.setattr(evaluate.Material, "device_name", property(lambda self, name=name: name))
        with pytest.raises(ZeroDivisionError):
            evaluate_run(run, CONFIG)
        kept.append(len([*(run.state_folder / "evaluation").iterdir()]))
    assert kept[0] == kept[1] == kept[2] / 2


def test_files_without_facts_and_broken_ones(tmp_path):
    path = tmp_path / "items.parquet"
    with pytest.raises(UserError, match=r"items\.parquet: no such file; `stlm evaluate` writes it"):
        read_facts(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"items\.parquet: not a readable Parquet file"):
        read_facts(path)
    pq.write_table(ITEMS_SCHEMA.empty_table(), path)
    assert read_facts(path) is None
    for content in (b"not JSON", b"[]", b'{"study": "s"}'):
        pq.write_table(ITEMS_SCHEMA.empty_table().replace_schema_metadata({KEY: content}), path)
        with pytest.raises(UserError, match=r"its metadata `stlm` is not what .* evaluate again"):
            read_facts(path)


def test_facts_survive_the_file(tmp_path, run):
    evaluate_run(run, CONFIG)
    facts = read_facts(run.folder / "items.parquet")
    table = pa.Table.from_pylist([], schema=ITEMS_SCHEMA)
    write_predictions(tmp_path / "copy.parquet", table, facts)
    assert read_facts(tmp_path / "copy.parquet") == facts
    assert unlike(facts, Facts.model_validate(facts.model_dump())) == ([], [])


def test_passages_of_other_text_are_no_reason_to_refuse(run):
    """The benchmarks made of a corpus have other items where the corpus is another."""
    evaluate_run(run, CONFIG)
    facts = read_facts(run.folder / "items.parquet")
    content = facts.model_dump()
    some = next(iter(content["benchmarks"].values()))
    made = {**some, "split": "test", "sha256": ["a"]}
    own = Facts.model_validate(content | {"benchmarks": {"last_word": made}})
    other = Facts.model_validate(content | {"benchmarks": {"last_word": {**made, "sha256": ["b"]}}})
    refusals, warnings = unlike(own, other)
    assert not refusals and "last_word" in warnings[0]
