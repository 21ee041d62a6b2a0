"""Every checkpoint of a run evaluated: the files, their agreement with slow scoring, kills and bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import slow_reference as reference
from tiny_run import save_weights

from stlm.errors import UserError
from stlm.evaluation import evaluate
from stlm.evaluation.benchmarks import benchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.predictions import read_facts
from stlm.evaluation.statistics import ratio_bootstrap
from stlm.files import read_json, sha256
from stlm.report.run_files import score_items
from stlm.report.schema import EvaluationRecord
from stlm.tokens.shards import read_split
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint

CONFIG = EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"])


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """The checkpoints really scored, in order."""
    names = []

    def load(folder):
        names.append(folder.name)
        return load_checkpoint(folder)

    monkeypatch.setattr(evaluate, "load_checkpoint", load)
    return names


def outputs(run):
    record = json.loads((run.folder / "evaluation.json").read_text())
    EvaluationRecord.model_validate(record)  # the report reads it
    return record, pd.read_parquet(run.folder / "items.parquet")


def test_the_files_agree_with_slow_scoring_and_with_each_other(run):
    evaluate_run(run, CONFIG)
    record, items = outputs(run)
    assert list(record["checkpoints"]) == ["step-0000010", "step-0000020", "step-0000030"]
    assert (record["study"], record["run"], record["precision"]) == ("tiny", "tiny-run", "float32")
    assert len(items) == 3 * 2 * (40 * 2 + 30 * 4)
    assert not run.state_folder.joinpath("evaluation").exists()

    folder = run.folder / "checkpoints" / "step-0000030"
    model, description = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder.parent / "tokenizer")
    last = record["checkpoints"]["step-0000030"]
    assert (last["step"], last["tokens"]) == (30, 30 * 256)
    assert last["weights_sha256"] == description["weights_sha256"]
    own = items[items["checkpoint"] == "step-0000030"]
    for name in CONFIG.benchmarks:
        _, loaded = benchmark(name).load(evaluate.RAW / name)
        expected = {item.id: item for item in loaded}
        for row in own[own["benchmark"] == name].itertuples():
            option = expected[row.item].options[row.option]
            assert (row.n_chars, row.n_bytes) == (len(option.words), len(option.words.encode()))
            assert row.gold == (row.option == expected[row.item].gold)
            if row.truncated and row.mode == "paper":  # what the reference cannot do
                continue
            request = option.request(row.mode)
            score = reference.whole if row.mode == "paper" else reference.harness
            assert row.logprob == pytest.approx(score(model, tokenizer, request)[0], abs=1e-3)
            assert row.n_tokens == score(model, tokenizer, request)[1]
    outcomes = score_items(own.astype({c: str for c in ("benchmark", "mode", "item")}))
    for name, result in last["benchmarks"].items():
        for mode, of_mode in result["modes"].items():
            of_items = outcomes.loc[name, mode]
            assert of_mode["acc"]["value"] == pytest.approx(of_items["acc"].mean())
            assert of_mode["acc"]["n"] == len(of_items) == result["items"] == result["items_total"]
            if "acc_norm" in of_mode:
                assert of_mode["acc_norm"]["value"] == pytest.approx(of_items["acc_norm"].mean())
    pairs, choice = last["benchmarks"]["synthetic_pairs"], last["benchmarks"]["synthetic_choice"]
    assert pairs["modes"]["harness"]["ties"] == 1
    assert "acc_norm" in choice["modes"]["harness"] and "acc_norm" not in choice["modes"]["paper"]
    groups = pairs["modes"]["harness"]["groups"]
    assert {kind: {name: g["n"] for name, g in of_kind.items()} for kind, of_kind in groups.items()} == {
        "phenomenon": {"phenomenon_0": 27, "phenomenon_1": 13},
        "paradigm": {"paradigm_0": 14, "paradigm_1": 13, "paradigm_2": 13},
    }


def test_some_items_do_not_fit_and_are_counted(run):
    evaluate_run(run, CONFIG)
    record, items = outputs(run)
    for mode, result in record["checkpoints"]["step-0000030"]["benchmarks"]["synthetic_choice"][
        "modes"
    ].items():
        own = items[(items["checkpoint"] == "step-0000030") & (items["benchmark"] == "synthetic_choice")]
        cut = own[own["mode"] == mode].groupby("item")["truncated"].any()
        assert result["truncated"] == cut.sum() > 0


def test_bits_per_byte_counts_every_byte_of_the_test_split_once(run):
    evaluate_run(run, EvaluationConfig(checkpoints="last"))
    record, items = outputs(run)
    assert len(items) == 0
    (measured,) = [checkpoint["perplexity"] for checkpoint in record["checkpoints"].values()]
    model, _ = load_checkpoint(run.folder / "checkpoints" / "step-0000030")
    tokenizer = load_tokenizer(run.tokens_folder / "tokenizer")
    texts = [tokenizer.decode(d.tokens) for part in read_split(run.tokens_folder, "test") for d in part]
    nats, context, stride = 0.0, run.model.context, run.model.context // 2
    for text in texts:
        tokens = [tokenizer.eot, *tokenizer.encode(text)]
        for position in range(1, len(tokens)):
            begin = max(0, math.ceil((position - context) / stride) * stride)
            nats -= reference.logprob_of_rest(model, tokens[begin : position + 1], position - begin)
    n_bytes, n_chars = sum(len(text.encode()) for text in texts), sum(map(len, texts))
    assert n_bytes > n_chars
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert measured["char_perplexity"] == pytest.approx(math.exp(nats / n_chars), rel=1e-4)
    assert measured["token_perplexity"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-4)
    assert (measured["bytes"], measured["chars"], measured["documents"]) == (n_bytes, n_chars, len(texts))
    assert measured["stride"] == stride


def test_each_documents_bits_are_kept_and_say_how_sure_the_sum_is(run):
    evaluate_run(run, EvaluationConfig(perplexity={"max_bytes": 500}))
    record, _ = outputs(run)
    documents = pd.read_parquet(run.folder / "documents.parquet")
    assert read_facts(run.folder / "documents.parquet") == read_facts(run.folder / "items.parquet")
    texts = [document for part in read_split(run.tokens_folder, "test") for document in part]
    for name, checkpoint in record["checkpoints"].items():
        measured, own = checkpoint["perplexity"], documents[documents["checkpoint"] == name]
        assert 1 < len(own) == measured["documents"] < measured["documents_total"] == len(texts)
        assert measured["bytes_total"] == sum(document.n_bytes for document in texts)
        assert 500 <= own["n_bytes"].sum() == measured["bytes"]
        assert own["n_tokens"].sum() == measured["tokens"] and own["n_chars"].sum() == measured["chars"]
        bits = own["nats"] / math.log(2)
        assert bits.sum() / measured["bytes"] == pytest.approx(measured["bits_per_byte"])
        low, high = ratio_bootstrap(bits, own["n_bytes"])
        assert measured["interval"] == {"low": low, "high": high, "few_documents": len(own) < 10}
        assert low < measured["bits_per_byte"] < high
    assert documents.groupby("checkpoint", observed=True)["text"].agg(tuple).nunique() == 1
    evaluate_run(run, EvaluationConfig(perplexity={"max_bytes": 1}))
    record, _ = outputs(run)
    assert {c["perplexity"]["documents"] for c in record["checkpoints"].values()} == {1}
    assert {c["perplexity"]["interval"] for c in record["checkpoints"].values()} == {None}


def test_limits_are_recorded_and_the_same_at_every_checkpoint(run):
    config = EvaluationConfig(
        benchmarks={"synthetic_pairs": {"limit": 20}, "synthetic_choice": {}},
        limit=15,
        intermediate_limit=10,
        modes=("harness",),
        perplexity={"max_documents": 2},
    )
    evaluate_run(run, config)
    record, items = outputs(run)
    ids = {
        (row.Index[0], row.Index[1]): set(row.item)
        for row in items.groupby(["checkpoint", "benchmark"], observed=True).agg({"item": list}).itertuples()
    }
    assert [len(ids[f"step-00000{s}0", "synthetic_pairs"]) for s in (1, 2, 3)] == [10, 10, 20]
    assert [len(ids[f"step-00000{s}0", "synthetic_choice"]) for s in (1, 2, 3)] == [10, 10, 15]
    for name in CONFIG.benchmarks:
        assert ids["step-0000010", name] == ids["step-0000020", name] < ids["step-0000030", name]
    last = record["checkpoints"]["step-0000030"]
    found = last["benchmarks"]["synthetic_pairs"]
    assert (found["items"], found["items_total"], found["limit"]) == (20, 40, 20)
    assert list(found["modes"]) == ["harness"]
    assert last["perplexity"]["documents"] == 2 < last["perplexity"]["documents_total"]


def test_after_an_error_finished_checkpoints_are_kept(run, scored):
    evaluate_run(run, CONFIG)
    names = ("evaluation.json", "items.parquet", "documents.parquet")
    whole = {name: (run.folder / name).read_bytes() for name in names}
    for name in whole:
        (run.folder / name).unlink()
    scored.clear()
    weights = run.folder / "checkpoints" / "step-0000020" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"step-0000020.*damaged"):
        evaluate_run(run, CONFIG)
    assert not any((run.folder / name).exists() for name in whole)
    weights.write_bytes(content)
    evaluate_run(run, CONFIG)
    assert scored == ["step-0000010", "step-0000020", "step-0000020", "step-0000030"]
    assert {name: (run.folder / name).read_bytes() for name in whole} == whole


def test_other_weights_or_settings_are_scored_anew(run, scored):
    evaluate_run(run, CONFIG)
    before, _ = outputs(run)
    save_weights(run, 30, scale=5.0)
    shutil.rmtree(run.folder / "checkpoints" / "step-0000020")
    with pytest.raises(UserError):  # the second of the two fails: the first stays in the state
        (run.folder / "checkpoints" / "step-0000040").mkdir()
        evaluate_run(run, CONFIG)
    shutil.rmtree(run.folder / "checkpoints" / "step-0000040")
    scored.clear()
    evaluate_run(run, CONFIG.model_copy(update={"limit_seed": 1, "limit": 30}))
    after, _ = outputs(run)
    assert scored == ["step-0000010", "step-0000030"]
    assert list(after["checkpoints"]) == ["step-0000010", "step-0000030"]
    old, new = (record["checkpoints"]["step-0000030"] for record in (before, after))
    assert old["weights_sha256"] != new["weights_sha256"]
    assert old["perplexity"]["bits_per_byte"] != new["perplexity"]["bits_per_byte"]


def test_killed_it_goes_on_with_the_checkpoint_it_was_at(run, scored):
    for step in range(40, 240, 10):
        save_weights(run, step)
    script = (
        "import sys\n"
        "from stlm.evaluation.config import EvaluationConfig\n"
        "from stlm.evaluation.evaluate import evaluate_run\n"
        "from stlm.study.runs import Run\n"
        "run = Run.model_validate_json(sys.argv[1])\n"
        "evaluate_run(run, EvaluationConfig.model_validate_json(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, run.model_dump_json(), CONFIG.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    state = run.state_folder / "evaluation"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while len(list(state.glob("step-*"))) < 7:  # three parts a checkpoint
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (run.folder / "evaluation.json").exists()
    parts = Counter(path.name[:12] for path in state.glob("step-*"))
    kept = {name for name, count in parts.items() if count == 3}
    assert 2 <= len(kept) < 23
    evaluate_run(run, CONFIG)
    assert not kept & set(scored)
    assert len(kept) + len(scored) == len(outputs(run)[0]["checkpoints"]) == 23


def test_last_words_come_from_the_test_split_and_have_one_mode(run):
    corpus = run.tokens_folder.parents[2] / "raw" / run.corpus
    texts = [
        f"{i}. " + "The owl that lived in the barn was not afraid of any noise that the wind made. " * 3
        + f"It called{' so' * (i % 40)} until the morning came to the barn."
        for i in range(400)
    ]  # fmt: skip
    pq.write_table(pa.table({"text": texts}), corpus / "train.parquet")
    source = read_json(corpus / "source.json")
    source["files"][0] |= {
        "sha256": sha256(corpus / "train.parquet"),
        "bytes": (corpus / "train.parquet").stat().st_size,
    }
    (corpus / "source.json").write_text(json.dumps(source))
    tokenize_corpus(corpus, run.tokens_folder, "bytes", corpus, progress=False)
    config = EvaluationConfig(benchmarks={"last_word": {"limit": 7}, "synthetic_pairs": {}}, limit=9)
    evaluate_run(run, config.model_copy(update={"intermediate_limit": 5}))
    record, items = outputs(run)
    (first, *_, last) = [
        checkpoint["benchmarks"]["last_word"] for checkpoint in record["checkpoints"].values()
    ]
    assert (first["items"], last["items"], last["items_total"], last["split"]) == (5, 7, 7, "test")
    assert list(last["modes"]) == ["harness"]
    assert last["modes"]["harness"]["word_perplexity"] > 1
    own = items[(items["benchmark"] == "last_word") & (items["checkpoint"] == "step-0000030")]
    assert len(own) == 7 and own["greedy"].notna().all() and (own["n_chars"] == len("barn")).all()
    assert own["greedy"].mean() == last["modes"]["harness"]["acc"]["value"]
    assert items[items["benchmark"] == "synthetic_pairs"]["greedy"].isna().all()


def test_a_test_split_without_passages_is_told(run):
    with pytest.raises(UserError, match=r"tokens/tiny/bytes: last_word found no item in the \d+ documents"):
        evaluate_run(run, EvaluationConfig(benchmarks=["last_word"]))


def test_bad_input_is_named(run):
    with pytest.raises(UserError, match=r"data/raw/mmlu: no parquet file .* stlm fetch mmlu"):
        evaluate_run(run, EvaluationConfig(benchmarks=["mmlu"]))
    save_weights(run, 10, scale=math.nan)
    with pytest.raises(UserError, match=r"the tensor embedding\.weight has NaN or infinite values"):
        evaluate_run(run, CONFIG)
    (run.folder / "checkpoints" / "step-0000010" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"step-0000010/config\.json: not a checkpoint's description"):
        evaluate_run(run, CONFIG)
    description = run.tokens_folder / "tokenizer" / "tokenizer-name.json"
    content = read_json(description)
    description.write_text(json.dumps(content | {"name": "bpe-257"}))
    with pytest.raises(UserError, match=r"another tokenizer than .* stlm train tiny tiny-run"):
        evaluate_run(run, CONFIG)
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints: no checkpoint; run: stlm train tiny tiny-run"):
        evaluate_run(run, CONFIG)
    assert not (run.folder / "evaluation.json").exists()


def test_folders_that_are_no_checkpoints_are_passed_over(run):
    for name in ("step-abc", "step-", "step-0000030-old", "step-²"):
        (run.folder / "checkpoints" / name).mkdir()
    found = evaluate.checkpoint_folders(run, CONFIG)
    assert [folder.name for folder in found] == ["step-0000010", "step-0000020", "step-0000030"]
    for folder in found:
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.checkpoint_folders(run, CONFIG)


def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it_itself(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert evaluate.arithmetic(EvaluationConfig(precision="auto"), "cuda") == "float32"
