"""A published model beside a study's runs: `stlm evaluate STUDY NAME`, by the code that scores the runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny_hf import CONTEXT, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.predictions import read_facts
from stlm.evaluation.published import evaluate_published
from stlm.files import read_json
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.study.runs import PublishedModel, Run
from stlm.study.strict import read_yaml
from stlm.tokens.shards import read_split
from stlm.tokens.tokenizer import load_tokenizer

STUDY = """
description: A study with a published model.
corpus: synthetic
tokenizer: bytes
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 48, context: 64}
training: {steps: 30, warmup_steps: 2, batch_size: 4}
evaluation: {benchmarks: [synthetic_pairs, synthetic_choice]}
variants: {baseline: {}}
published:
  tiny-llama: {folder: models/tiny, label: TinyLlama}
"""


@pytest.fixture
def published(project: Path, prepared: Path) -> Path:
    """A project whose study names a model; its results' folder."""
    shutil.copytree(prepared / "raw", "data/raw")
    shutil.copytree(prepared / "tokens/tiny", "data/tokens/synthetic")
    Path("params/own.yaml").write_text(STUDY)
    save(Path("models/tiny"), "llama", adds_bos=True)
    return Path("results/own/published/tiny-llama")


@torch.inference_mode()
def nats(model, ids: list[int], first: int) -> float:
    """-log P(ids[first:] | the ids before), from full logits."""
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids)))


def test_evaluate(published: Path) -> None:
    assert main(["evaluate", "own", "tiny-llama"]) == 0
    record = read_json(published / "evaluation.json")
    model = AutoModelForCausalLM.from_pretrained("models/tiny")
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record["label"], record["run"], record["context"]) == (
        "TinyLlama",
        "tiny-llama",
        CONTEXT,
    )

    result = record["checkpoints"]["published"]
    table = pq.read_table(published / "items.parquet")
    assert set(table["checkpoint"].to_pylist()) == {"published"} and set(table["step"].to_pylist()) == {0}
    rows = [
        row for row in table.to_pylist() if row["benchmark"] == "synthetic_pairs" and row["mode"] == "harness"
    ]
    pairs = pq.read_table("data/raw/synthetic_pairs").to_pylist()
    for number, key in enumerate(("sentence_good", "sentence_bad")):
        row = [row for row in rows if row["option"] == number][3]
        ids = [tokenizer.bos_token_id, *tokenizer.encode(" " + pairs[3][key], add_special_tokens=False)]
        assert row["logprob"] == pytest.approx(-nats(model, ids, 1), abs=1e-3)
    assert result["benchmarks"]["synthetic_pairs"]["items"] == 40


def test_test_text_is_the_runs(published: Path, prepared: Path) -> None:
    """The same bytes and characters as a run of the study is measured on, in the model's own tokens."""
    main(["evaluate", "own", "tiny-llama"])
    measured = read_json(published / "evaluation.json")["checkpoints"]["published"]["perplexity"]
    own = load_tokenizer(Path("data/tokens/synthetic/bytes/tokenizer"))
    texts = [
        own.decode(d.tokens.tolist())
        for part in read_split(Path("data/tokens/synthetic/bytes"), "test")
        for d in part
    ]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained("models/tiny"),
        AutoTokenizer.from_pretrained("models/tiny"),
    )
    encoded = [tokenizer.encode(text) for text in texts]
    assert all(len(ids) <= CONTEXT for ids in encoded), "each in a window of its own"
    assert measured["bytes"] == sum(len(text.encode()) for text in texts)
    assert measured["tokens"] == sum(len(ids) - 1 for ids in encoded)
    bits = sum(nats(model, ids, 1) for ids in encoded) / torch.tensor(2.0).log().item() / measured["bytes"]
    assert measured["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_files_are_those_of_a_run(run: Run) -> None:
    """The same keys and columns, so that the same readers read them."""
    config = EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"], checkpoints="last", limit=9)
    evaluate_run(run, config)
    published = PublishedModel(
        study="tiny", name="other", label="Other", folder="models/tiny", tokens_folder=run.tokens_folder
    )
    save(Path(published.folder), "gpt2")
    evaluate_published(published, config)
    own, other = (read_json(folder / "evaluation.json") for folder in (run.folder, published.results_folder))
    assert own.keys() == other.keys() - {"parameters", "context", "prefix", "published"}
    (own_scores,), (other_scores,) = own.pop("checkpoints").values(), other.pop("checkpoints").values()
    assert own_scores.keys() == other_scores.keys()
    for key in ("bytes", "chars", "documents", "documents_total", "bytes_total", "text_sha256"):
        assert own_scores["perplexity"][key] == other_scores["perplexity"][key]
    for name, benchmark in own_scores["benchmarks"].items():
        assert benchmark.keys() == other_scores["benchmarks"][name].keys()
    texts = [pq.read_table(folder / "documents.parquet") for folder in (run.folder, published.results_folder)]
    assert texts[0].schema.names == texts[1].schema.names
    for column in ("component", "text", "n_bytes", "n_chars"):
        assert texts[0][column].to_pylist() == texts[1][column].to_pylist()
    tables = [pq.read_table(folder / "items.parquet") for folder in (run.folder, published.results_folder)]
    assert tables[0].schema.names == tables[1].schema.names
    for column in ("benchmark", "mode", "item", "group", "option", "gold", "n_bytes", "n_chars"):
        assert tables[0][column].to_pylist() == tables[1][column].to_pylist()


@pytest.mark.parametrize(("prefix", "start"), [("</s>", 1), ("\\n", None)])
def test_the_token_that_starts_a_text_is_a_setting(published: Path, prefix: str, start: int | None) -> None:
    """It stands where the tokenizer puts its bos, and before an option without a context."""
    Path("params/own.yaml").write_text(
        STUDY.replace("label: TinyLlama", f'label: TinyLlama, prefix: "{prefix}"')
    )
    assert main(["evaluate", "own", "tiny-llama"]) == 0
    record = read_json(published / "evaluation.json")
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    if start is None:
        (start,) = tokenizer.encode("\n", add_special_tokens=False)
    assert record["prefix"] == tokenizer.convert_ids_to_tokens(start)
    assert record["published"]["prefix"] == prefix.replace("\\n", "\n")
    assert read_facts(published / "items.parquet").prefix == record["prefix"]

    model = AutoModelForCausalLM.from_pretrained("models/tiny")
    rows = pq.read_table(published / "items.parquet").to_pylist()
    pairs = pq.read_table("data/raw/synthetic_pairs").to_pylist()
    choices = pq.read_table("data/raw/synthetic_choice").to_pylist()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def row(benchmark: str) -> dict:
        return next(
            row for row in rows if (row["benchmark"], row["mode"], row["option"]) == (benchmark, "harness", 0)
        )

    ids = [start, *encode(" " + pairs[0]["sentence_good"])]
    assert row("synthetic_pairs")["logprob"] == pytest.approx(-nats(model, ids, 1), abs=1e-3)
    context, ending = encode(choices[0]["ctx"]), encode(f"{choices[0]['ctx']} {choices[0]['endings'][0]}")
    ids = [start, *ending]
    assert row("synthetic_choice")["logprob"] == pytest.approx(-nats(model, ids, 1 + len(context)), abs=1e-3)


def test_a_prefix_that_is_no_token_is_refused_with_the_nearest(published: Path, capsys) -> None:
    Path("params/own.yaml").write_text(STUDY.replace("label: TinyLlama", "prefix: </t>"))
    assert main(["evaluate", "own", "tiny-llama"]) == 2
    assert "prefix: '</t>' is no token of tiny (did you mean '</s>'?)" in capsys.readouterr().err


def test_the_prefix_is_part_of_what_both_engines_compare(project: Path) -> None:
    """DVC by the key's place in the file, Snakemake by the model's values; none for models without one."""
    Path("params/own.yaml").write_text(STUDY)
    assert "prefix" not in load_study("own").published["tiny-llama"].model_dump()
    assert main(["use", "own"]) == 0
    stage = read_yaml(Path("dvc.yaml"))["stages"]["evaluate-own-tiny-llama"]
    assert stage["params"] == [{"params/own.yaml": ["evaluation", "published.tiny-llama"]}]
    given = load_study("own", ["published.tiny-llama.prefix=</s>"]).published["tiny-llama"]
    assert given.model_dump(mode="json")["prefix"] == "</s>"


def test_a_study_lists_its_published_models(published: Path, capsys) -> None:
    assert main(["study", "own"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, row = (line.split() for line in lines[-2:])
    assert header == ["published", "label", "parameters", "folder"]
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("models/tiny").parameters())
    assert row == ["tiny-llama", "TinyLlama", f"~{numbers / 1000:.3g}k", "models/tiny", "there"]
    (Path("models/tiny") / "model.safetensors").write_bytes(b"")
    main(["study", "own"])
    assert "cannot be read: models/tiny/model.safetensors: 0 bytes" in capsys.readouterr().out
    shutil.rmtree("models")
    Path("params/own.yaml").write_text(STUDY.replace("label:", "parameters: 1.1B, label:"))
    main(["study", "own"])
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        *("tiny-llama", "TinyLlama", "1.1B", "models/tiny", "not", "there")
    ]


def test_names_are_checked(project: Path) -> None:
    Path("params/own.yaml").write_text(STUDY.replace("tiny-llama:", "baseline:"))
    assert main(["study", "own"]) == 2
    Path("params/own.yaml").write_text(STUDY.replace("folder", "fodler"))
    assert main(["study", "own"]) == 2
    Path("params/own.yaml").write_text(STUDY)
    study = load_study("own")
    assert str(study.published["tiny-llama"].tokens_folder) == "data/tokens/synthetic/bytes"
    assert main(["evaluate", "own", "tiny-lama"]) == 2


def test_a_plain_llama_is_scored_by_our_model_with_the_same_results(published: Path, monkeypatch) -> None:
    from stlm.evaluation import published as module

    loaded = []
    ours = module.load_plain_llama

    def spy(*arguments):
        loaded.append(ours(*arguments))
        return loaded[-1]

    monkeypatch.setattr(module, "load_plain_llama", spy)
    assert main(["evaluate", "own", "tiny-llama"]) == 0
    assert type(loaded[0][0]) is Transformer
    first = pq.read_table(published / "items.parquet"), read_json(published / "evaluation.json")
    shutil.rmtree(published)
    monkeypatch.setattr(module, "load_plain_llama", lambda *arguments: None)
    assert main(["evaluate", "own", "tiny-llama"]) == 0
    second = pq.read_table(published / "items.parquet"), read_json(published / "evaluation.json")
    for column in first[0].schema.names:
        one, other = (table[column].to_pylist() for table, _ in (first, second))
        assert one == (pytest.approx(other, abs=2e-3) if column == "logprob" else other), column
    for key in ("parameters", "context", "prefix", "published", "tokenizer"):
        assert first[1][key] == second[1][key]
    bits = [
        record["checkpoints"]["published"]["perplexity"]["bits_per_byte"] for _, record in (first, second)
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)


def test_other_layouts_are_scored_by_transformers(published: Path) -> None:
    from tiny_llama import save as save_llama

    from stlm.evaluation.plain_llama import load_plain_llama

    assert load_plain_llama(save(Path("models/gpt2"), "gpt2")) is None
    assert load_plain_llama(save_llama(Path("models/biased"), attention_bias=True)) is None
    assert load_plain_llama(save_llama(Path("models/plain")))[0].config.context == 128
    assert load_plain_llama(Path("models/plain"), context=20)[0].config.context == 20
    with pytest.raises(UserError, match="context: 129 is longer than the 128 positions"):
        load_plain_llama(Path("models/plain"), context=129)


CATALOGUED = """
llama:
  description: a tiny Llama
  licence: Apache-2.0
  origin: the tests
  training_tokens: 123
  prefix: <|endoftext|>
  model:
    layers: 2
    width: 64
    heads: 4
    kv_heads: 2
    ffn_width: 96
    rope_theta: 5000.0
    norm_eps: 1.0e-5
    context: 128
    tied: true
    vocab_size: 384
  sources:
    - {kind: folder, path: models/gguf, files: {model.gguf: model.gguf}}
"""


def test_a_model_of_the_catalogue_is_fetched_and_named(published: Path, capsys) -> None:
    """`published.NAME.model`: its prefix is the catalogue's, and its files are where fetch wrote them."""
    from tiny_llama import write_gguf

    write_gguf(Path("models/gguf/model.gguf"))
    Path("params/models.yaml").write_text(CATALOGUED)
    study = STUDY.replace("{folder: models/tiny, label: TinyLlama}", "{model: llama, context: 100}")
    Path("params/own.yaml").write_text(study)
    assert main(["evaluate", "own", "tiny-llama"]) == 2
    assert "data/raw/llama/model.safetensors: no such file; run: stlm fetch llama" in capsys.readouterr().err
    assert main(["study", "own"]) == 0
    listed = capsys.readouterr().out
    assert "to be fetched" in listed and "models of params/models.yaml: llama\n" in listed
    assert main(["fetch", "llama"]) == 0
    assert main(["evaluate", "own", "tiny-llama"]) == 0
    record = read_json(published / "evaluation.json")
    assert (record["prefix"], record["context"]) == ("<|endoftext|>", 100)
    assert record["published"] == {"model": "llama", "context": 100, "prefix": "<|endoftext|>"}
    capsys.readouterr()
    assert main(["study", "own"]) == 0
    assert re.search(r"data/raw/llama +there", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "{model: lama}",
            "params/own.yaml: published.tiny-llama.model: no model 'lama' in params/models.yaml",
        ),
        ("{model: llama, context: 200}", "published.tiny-llama.context: 200 is longer than the 128 of llama"),
        ("{model: llama, folder: a}", "give either `folder` or `model`"),
        ("{label: a}", "give either `folder` or `model`"),
    ],
)
def test_mistaken_names_are_refused(published: Path, settings: str, message: str, capsys) -> None:
    Path("params/models.yaml").write_text(CATALOGUED)
    Path("params/own.yaml").write_text(STUDY.replace("{folder: models/tiny, label: TinyLlama}", settings))
    assert main(["study", "own"]) == 2
    assert message in capsys.readouterr().err
