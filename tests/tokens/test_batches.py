"""Batches: every chunk once an epoch, mixes in proportion, resumable; validation: every byte exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from raw_samples import stories, write_raw

from stlm.errors import UserError
from stlm.files import write_json
from stlm.tokens import batches as batches_module
from stlm.tokens.batches import Batches, ValidationSet, _schedule
from stlm.tokens.config import DataConfig
from stlm.tokens.shards import read_split
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tales")
    folder = root / "tokens" / "tales" / "bytes"
    raw = write_raw(root / "raw" / "tales", stories(500))
    tokenize_corpus(raw, folder, "bytes", root, shard_bytes=8000, progress=False)
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Callable[[dict[str, float]], Path]:
    """Tokenizes a mix; each document is its component's letter and a number, 9 tokens with its end."""

    def tokenize(weights: dict[str, float]) -> Path:
        raw = tmp_path / "raw" / "mix"
        for name in weights:
            write_raw(raw / name, [f"{name}{i:07d}" for i in range(1000)])
        write_json(raw / "source.json", {"name": "mix", "kind": "mix", "mix": weights})
        folder = tmp_path / "tokens" / "mix" / "bytes"
        tokenize_corpus(raw, folder, "bytes", tmp_path, progress=False)
        return folder

    return tokenize


def test_an_epoch_visits_every_chunk_once_and_the_next_in_another_order(tokens: Path) -> None:
    (component,) = read_split(tokens, "train")
    flat = np.concatenate([shard.values for shard in component.shards]).astype(np.int64)
    chunks = (len(flat) - 1) // CONTEXT
    expected = [flat[i * CONTEXT : (i + 1) * CONTEXT + 1].tobytes() for i in range(chunks)]
    batches = Batches(tokens, CONTEXT, 1, seed=3)
    epochs = [[batches.batch(e * chunks + i)[0].tobytes() for i in range(chunks)] for e in range(2)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(expected)
        assert epoch != expected
    assert epochs[0] != epochs[1]


def test_order_depends_on_seed_and_index_alone(tokens: Path) -> None:
    batches = Batches(tokens, CONTEXT, 4, seed=1)
    first = [batches.batch(step) for step in range(40)]
    assert first[0].shape == (4, CONTEXT + 1) and first[0].dtype == np.int64
    again = Batches(tokens, CONTEXT, 4, seed=1)
    for step in (39, 7, 8, 0):
        np.testing.assert_array_equal(again.batch(step), first[step])
    other = Batches(tokens, CONTEXT, 4, seed=2)
    assert any(not np.array_equal(other.batch(step), first[step]) for step in range(3))


def test_accumulation_splits_a_batch(tokens: Path) -> None:
    """The same documents a step, whatever the micro-batches."""
    whole = Batches(tokens, CONTEXT, 12, seed=0)
    parts = Batches(tokens, CONTEXT, 3, seed=0)
    for step in range(5):
        micro = np.concatenate([parts.batch(step, part, 4) for part in range(4)])
        np.testing.assert_array_equal(micro, whole.batch(step))


@pytest.mark.parametrize(
    "weights", [{"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 1.0, "b": 2.0}, {"a": 0.001, "b": 0.999}]
)
def test_a_mix_keeps_its_proportions(mixed: Callable[[dict[str, float]], Path], weights: dict) -> None:
    batches = Batches(mixed(weights), 9, 50, seed=0)
    letters = {name: ord(name) for name in weights}
    seen, rows = Counter(), 0
    for step in range(240):  # beyond the schedule's period, and over several epochs
        for row in batches.batch(step):
            (name,) = (name for name, letter in letters.items() if letter in row)
            seen[name] += 1
            rows += 1
            for each, weight in weights.items():
                assert abs(seen[each] - rows * weight / sum(weights.values())) <= 1.5


def furthest(counts: list[int]) -> tuple[float, float]:
    """How many turns a component is ahead of its share at most, and behind, over a period."""
    turns, _, got = _schedule(counts)
    assert got.tolist() == counts
    seen = np.cumsum(turns[:, None] == np.arange(len(counts)), axis=0)
    due = np.arange(1, len(turns) + 1)[:, None] * np.array(counts) / len(turns)
    return (seen - due).max(), (due - seen).max()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_turns_of_a_mix_keep_to_their_shares(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_PERIOD", 60)
    bound = sum(1 / k for k in range(2, n + 1))
    rng = np.random.default_rng(n)
    for spread in (0.3, 1.0, 3.0) * 20:
        counts = rng.multinomial(60 - n, rng.dirichlet(np.full(n, spread))) + 1
        ahead, behind = furthest(counts.tolist())
        assert ahead < 1
        assert behind <= bound + 1e-9


def test_a_component_can_be_more_than_a_row_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_PERIOD", 62)
    assert furthest([6, 1, 1, 1, 26, 1, 26])[1] == pytest.approx(74 / 62)


def test_a_component_that_would_never_be_read_is_told(mixed: Callable[[dict[str, float]], Path]) -> None:
    folder = mixed({"a": 0.99998, "b": 0.00002})
    with pytest.raises(
        UserError, match=r"share of 'b' in the mix, 2e-05, is none of 10,000 rows.*possible share: 0.0001;"
    ):
        Batches(folder, 9, 4, seed=0)
    least = Batches(folder, 9, 4, seed=0, config=DataConfig(weights={"a": 0.9999, "b": 0.0001}))
    assert "b" in {part.name for step in range(2500) for part, _ in least.sources(step)}
    staged = DataConfig(sequence=("b", "a"))
    with pytest.raises(UserError, match=r"share of 'b'.*none of 1,000 rows.*possible share: 0.001;"):
        Batches(folder, 9, 4, seed=0, config=staged, rows=1000)


def test_each_component_of_a_mix_is_read_evenly(mixed: Callable[[dict[str, float]], Path]) -> None:
    folder = mixed({"a": 0.7, "b": 0.3})
    batches = Batches(folder, 9, 100, seed=0)
    seen = Counter(row.tobytes() for step in range(300) for row in batches.batch(step))
    for component, rows in zip(read_split(folder, "train"), (21_000, 9000), strict=True):
        chunks = (component.n_tokens - 1) // 9
        counts = [n for row, n in seen.items() if np.frombuffer(row, np.int64)[0] == ord(component.name)]
        assert len(counts) == chunks and sum(counts) == rows
        assert max(counts) - min(counts) <= 1


def test_a_corpus_shorter_than_a_context(tokens: Path) -> None:
    (component,) = read_split(tokens, "train")
    Batches(tokens, component.n_tokens - 1, 1, 0).batch(5)
    with pytest.raises(
        UserError, match=rf"'tales' has {component.n_tokens:,} tokens, fewer than one context"
    ):
        Batches(tokens, component.n_tokens, 1, 0)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_validation_scores_every_byte_once(tokens: Path, batch_size: int) -> None:
    tokenizer = load_tokenizer(tokens / "tokenizer")
    (component,) = read_split(tokens, "val")
    validation = ValidationSet(tokens, CONTEXT, max_bytes=10**9)
    before, targets = [], []
    for x_BL, y_BL, mask_BL in validation.batches(batch_size):
        assert x_BL.shape == y_BL.shape == mask_BL.shape and x_BL.shape[1] == CONTEXT
        assert x_BL.dtype == y_BL.dtype == np.int64 and mask_BL.dtype == bool
        np.testing.assert_array_equal(x_BL[:, 1:], y_BL[:, :-1])
        before.append(x_BL[mask_BL])
        targets.append(y_BL[mask_BL])
    before, targets = np.concatenate(before), np.concatenate(targets)
    assert tokenizer.eot not in targets
    assert validation.n_tokens == validation.n_bytes == len(targets)
    # Where the input is the end of text, a document starts.
    starts = np.flatnonzero(before == tokenizer.eot)
    texts = [tokenizer.decode(part) for part in np.split(targets, starts[1:])]
    assert sorted(texts) == sorted(tokenizer.decode(document.tokens) for document in component)
    assert validation.n_bytes == sum(len(text.encode()) for text in texts)
    assert validation.n_chars == sum(len(text) for text in texts) < validation.n_bytes


def test_validation_takes_whole_documents_up_to_a_limit(tokens: Path) -> None:
    (component,) = read_split(tokens, "val")
    sizes = {len(document.tokens) - 1 for document in component}
    assert ValidationSet(tokens, CONTEXT, 1).n_tokens in sizes
    some = ValidationSet(tokens, CONTEXT, 600)
    assert 600 - len(component) <= some.n_tokens < 600 + max(sizes)
    assert some.n_tokens < ValidationSet(tokens, CONTEXT, 10**9).n_tokens


def test_validation_of_a_mix(mixed: Callable[[dict[str, float]], Path]) -> None:
    validation = ValidationSet(mixed({"a": 0.5, "b": 0.5}), CONTEXT, 1)
    targets = np.concatenate([y_BL[mask_BL] for _, y_BL, mask_BL in validation.batches(8)])
    assert {ord("a"), ord("b")} <= set(targets.tolist())


def test_the_sources_of_a_batch_are_where_its_rows_stand(mixed: Callable[[dict[str, float]], Path]) -> None:
    folder = mixed({"a": 0.75, "b": 0.25})
    batches = Batches(folder, CONTEXT, 8, seed=1)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for step, micro in ((0, 0), (5, 1), (40, 2)):
        rows, sources = batches.batch(step, micro, 3), batches.sources(step, micro, 3)
        assert len(sources) == len(rows) == 8
        for row, (component, start) in zip(rows, sources, strict=True):
            pieces = list(component.documents(start, start + len(row)))
            assert np.concatenate([tokens for _, _, tokens in pieces]).tolist() == row.tolist()
            for shard, document, tokens in pieces:
                offsets = component.shards[shard].offsets[document : document + 2]
                whole = tokenizer.decode(component.shards[shard].values[offsets[0] : offsets[1]].tolist())
                assert tokenizer.decode(tokens.tolist()) in whole
                assert whole.startswith(component.name)
