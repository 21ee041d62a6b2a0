"""What evaluation and reading its results rest on is what was fetched and written, to the bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import save_llama

from stlm.corpora.config import BenchmarkEntry, SyntheticSource
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.evaluation import evaluate
from stlm.evaluation.benchmarks import benchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.export.export import export
from stlm.files import read_json, sha256, write_json
from stlm.generation.find import load_generator
from stlm.report.card import read_card
from stlm.report.pairwise import compare_text, find_predictions
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint

CONFIG = EvaluationConfig(benchmarks=["synthetic_pairs"], modes=["harness"], limit=10)


def flips(path, number):
    """The file with single bits flipped, drawn by a seed, one after the other; whole again at the end."""
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(whole)), number):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield place
    path.write_bytes(whole)


@pytest.fixture
def fetched(tmp_path) -> Path:
    """data/raw/synthetic_pairs/, as `stlm fetch` leaves it."""
    entry = BenchmarkEntry(
        name="synthetic_pairs",
        description="pairs",
        licence="none",
        sources=[SyntheticSource(kind="synthetic", part="pairs", size=30)],
        columns=("sentence_good", "sentence_bad", "UID", "linguistics_term"),
    )
    folder = tmp_path / "data" / "raw" / "synthetic_pairs"
    fetch(entry, folder)
    return folder


def test_every_flipped_bit_of_a_benchmark_is_noticed(fetched):
    """Of sixty, 21 were scored as other text."""
    chosen = benchmark("synthetic_pairs")
    (path,) = fetched.glob("*.parquet")
    for _ in flips(path, 60):
        with pytest.raises(UserError, match=r"parquet: damaged.*; run: stlm fetch synthetic_pairs$"):
            chosen.load(fetched)
    assert chosen.load(fetched)[1]
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 100), path)
    with pytest.raises(UserError, match=r"parquet: truncated: .*; run: stlm fetch synthetic_pairs$"):
        chosen.load(fetched)


def test_the_list_of_what_was_fetched_is_checked_too(fetched):
    chosen = benchmark("synthetic_pairs")
    (path,) = fetched.glob("*.parquet")
    source = fetched / "source.json"
    whole, expected = read_json(source), chosen.load(fetched)
    harmless = 0
    for _ in flips(source, 200):
        try:
            assert chosen.load(fetched) == expected and read_json(source) == whole
            harmless += 1
        except UserError as error:
            assert str(error).endswith("run: stlm fetch synthetic_pairs")
    assert harmless < 60
    # Other rows, and the list made to fit them.
    pq.write_table(pq.read_table(path).slice(0, 100), path)
    text = source.read_text().replace(whole["files"][0]["sha256"], sha256(path))
    source.write_text(
        text.replace(f'"bytes": {whole["files"][0]["bytes"]}', f'"bytes": {path.stat().st_size}')
    )
    with pytest.raises(UserError, match=r"source\.json: damaged, or changed by hand"):
        chosen.load(fetched)


def test_a_file_that_was_not_fetched_is_refused(fetched):
    (path,) = fetched.glob("*.parquet")
    shutil.copy(path, fetched / "more-train.parquet")
    with pytest.raises(UserError, match=r"more-train\.parquet: not of the files that source\.json lists"):
        benchmark("synthetic_pairs").load(fetched)
    (fetched / "source.json").unlink()
    assert benchmark("synthetic_pairs").load(fetched), "a folder of one's own has no list"


def test_kept_results_that_were_damaged_are_computed_again(run, monkeypatch, capsys):
    evaluate_run(run, CONFIG)
    whole = {name: (run.folder / name).read_bytes() for name in ("evaluation.json", "items.parquet")}
    with monkeypatch.context() as patch:  # killed before the results were written
        patch.setattr(evaluate, "write_results", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate_run(run, CONFIG)
    kept = sorted((run.state_folder / "evaluation").iterdir())
    assert len(kept) == 6
    for folder, name in ((kept[0], "rows.parquet"), (kept[3], "result.json")):
        next(flips(folder / name, 1))
    capsys.readouterr()
    evaluate_run(run, CONFIG)
    told = capsys.readouterr().err
    assert told.count("scoring step-0000010-perplexity-") == told.count("scoring step-0000010-") == 1
    assert told.count("scoring step-0000020-synthetic_pairs-") == told.count("scoring step-0000020-") == 1
    assert "scoring step-0000030-" not in told
    assert {name: (run.folder / name).read_bytes() for name in whole} == whole


def test_every_flipped_bit_of_the_items_is_noticed(run):
    evaluate_run(run, CONFIG)
    items = run.folder / "items.parquet"
    for _ in flips(items, 60):
        with pytest.raises(UserError, match=r"items\.parquet: damaged.*run: stlm evaluate tiny tiny-run"):
            find_predictions(str(run.folder))
    assert find_predictions(str(run.folder)).step == 30
    for _ in flips(run.folder / "documents.parquet", 10):
        with pytest.raises(UserError, match=r"documents\.parquet: damaged.*run: stlm evaluate tiny tiny-run"):
            compare_text((items, 30), (items, 30))
    # Those of an earlier version have no checksum.
    write_json(run.folder / "evaluation.json", read_json(run.folder / "evaluation.json"))
    assert find_predictions(str(run.folder)).step == 30


def test_every_file_of_a_checkpoint_is_noticed_by_whoever_loads_it(run):
    tokenizer = load_tokenizer(run.tokens_folder / "tokenizer")
    checkpoint = save_llama(Path("results/tiny/runs/llama"), tokenizer, 32)
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    device = torch.device("cpu")
    before = load_checkpoint(checkpoint)[1]
    for _ in flips(weights, 20):
        with pytest.raises(UserError, match=r"model\.safetensors: the weights are damaged"):
            load_generator(checkpoint, device)
    harmless = 0
    for _ in flips(config, 200):
        try:
            assert load_checkpoint(checkpoint)[1] == before
            harmless += 1
        except UserError as error:
            assert "run: stlm train tiny llama" in str(error)
    assert harmless < 60
    description = checkpoint.parent / "tokenizer" / "tokenizer-name.json"
    content = description.read_bytes()
    description.write_bytes(content.replace(b'"bytes"', b'"bytez"'))
    for read in (lambda: load_generator(checkpoint, device), lambda: export(str(checkpoint), Path("out"))):
        with pytest.raises(UserError, match=r"tokenizer-name\.json: damaged.*run: stlm train tiny llama"):
            read()
    description.write_bytes(content)
    assert load_generator(checkpoint, device) and read_card(checkpoint) is None
