"""Orders, mixes and repetition: exact shares, the same chunks in every order, functions of the row alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from raw_samples import WORDS, write_raw

from stlm.errors import UserError
from stlm.files import write_json
from stlm.tokens.batches import Batches
from stlm.tokens.config import DataConfig
from stlm.tokens.order import mean_lengths
from stlm.tokens.shards import read_split
from stlm.tokens.tokenize import tokenize_corpus

CONTEXT = 24
BATCH = 4


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix of two components of documents of many lengths, in several shards."""
    root = tmp_path_factory.mktemp("mix")
    draw = np.random.default_rng(0)
    for name, count in (("a", 150), ("b", 60)):
        texts = [
            f"{name}{i} " + " ".join(draw.choice(WORDS[:40], size=draw.integers(1, 40))) for i in range(count)
        ]
        write_raw(root / "raw" / "mix" / name, texts)
    write_json(
        root / "raw" / "mix" / "source.json", {"name": "mix", "kind": "mix", "mix": {"a": 0.75, "b": 0.25}}
    )
    tokenize_corpus(root / "raw" / "mix", root / "mix", "bytes", root, shard_bytes=4000, progress=False)
    return root / "mix"


def chunks(batches: Batches, rows: int) -> list[tuple[str, int]]:
    """Component and chunk of each row, in the order of training."""
    steps = -(-rows // BATCH)
    found = [source for step in range(steps) for source in batches.sources(step)][:rows]
    return [(component.name, start // CONTEXT) for component, start in found]


def of(rows: list[tuple[str, int]], name: str) -> list[int]:
    return [chunk for component, chunk in rows if component == name]


def make(tokens: Path, rows: int, difficulty=None, seed: int = 0, **config) -> Batches:
    return Batches(tokens, CONTEXT, BATCH, seed, DataConfig(**config), rows, difficulty)


def by_hash(component, number, read):
    """Made-up difficulty: any function of the chunk."""
    return np.sin(read.astype(np.float32) * 7 + number)


def test_the_defaults_change_nothing(tokens: Path) -> None:
    plain, configured = Batches(tokens, CONTEXT, BATCH, 5), make(tokens, 4000, seed=5)
    for step in range(0, 1000, 37):
        np.testing.assert_array_equal(plain.batch(step), configured.batch(step))


@pytest.mark.parametrize(
    "config",
    [
        {"order": "source"},
        {"order": "length"},
        {"order": "length", "direction": "hard_first"},
        {"order": "difficulty", "reference": "any"},
        {"order": "difficulty", "reference": "any", "direction": "hard_first"},
    ],
)
@pytest.mark.parametrize("rows", [60, 800, 1500])
def test_every_order_reads_the_chunks_of_the_shuffled_one(tokens: Path, config: dict, rows: int) -> None:
    """For part of an epoch, and for several: the same chunks in each epoch, sorted by brute force here."""
    shuffled, ordered = make(tokens, rows), make(tokens, rows, by_hash, **config)
    for number, component in enumerate(read_split(tokens, "train")):
        n = (component.n_tokens - 1) // CONTEXT
        before, after = (of(chunks(batches, rows), component.name) for batches in (shuffled, ordered))
        assert len(before) == len(after)
        for start in range(0, len(before), n):
            epoch = after[start : start + n]
            assert Counter(before[start : start + n]) == Counter(epoch)
            if config["order"] == "source":
                keys = epoch
            elif config["order"] == "length":
                keys = [brute_length(component, chunk) for chunk in epoch]
            else:
                keys = by_hash(component, number, np.array(epoch)).tolist()
            sign = -1 if config.get("direction") == "hard_first" else 1
            assert all(sign * (y - x) > -1e-4 for x, y in pairwise(keys))


def brute_length(component, chunk: int) -> float:
    owners = [len(document.tokens) for document in component for _ in document.tokens]
    return float(np.mean(owners[chunk * CONTEXT : (chunk + 1) * CONTEXT]))


def test_mean_lengths_against_counting(tokens: Path) -> None:
    for component in read_split(tokens, "train"):
        found = mean_lengths(component, CONTEXT)
        assert len(found) == (component.n_tokens - 1) // CONTEXT
        expected = [brute_length(component, chunk) for chunk in range(len(found))]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"order": "length"},
        {"order": "difficulty", "reference": "any", "pacing": "competence"},
        {"sequence": ("b", "a")},
        {"unique_tokens": 480},
    ],
)
def test_any_row_without_those_before(tokens: Path, config: dict) -> None:
    rows = 500
    one = make(tokens, rows, by_hash, seed=2, **config)
    first = [one.batch(step) for step in range(rows // BATCH)]
    for step in (124, 3, 77, 0):
        np.testing.assert_array_equal(make(tokens, rows, by_hash, seed=2, **config).batch(step), first[step])
    other = make(tokens, rows, by_hash, seed=3, **config)
    assert any(not np.array_equal(other.batch(step), first[step]) for step in range(5))


def test_competence_opens_the_order_as_in_the_paper(tokens: Path) -> None:
    """Every row lies in the easiest part that Platanios et al.'s square root allows, and uses all of it."""
    rows = 2000
    batches = make(
        tokens, rows, by_hash, order="difficulty", reference="any", pacing="competence",
        competence_start=0.1, competence_share=0.5, weights={"a": 1},
    )  # fmt: skip
    (component,) = batches.components
    n = (component.n_tokens - 1) // CONTEXT
    ranks = np.argsort(np.argsort(by_hash(component, 0, np.arange(n)), kind="stable"))
    places = np.array([ranks[chunk] for chunk in of(chunks(batches, rows), "a")]) / n
    done = np.arange(rows) / rows
    competence = np.minimum(1, np.sqrt(done * (1 - 0.1**2) / 0.5 + 0.1**2))
    assert (places <= competence).all()
    relative = places / competence
    assert abs(relative.mean() - 0.5) < 0.02 and relative.max() > 0.97
    assert relative[done > 0.5].max() > 0.97 and places[done < 0.02].max() < 0.25


def test_weights_replace_the_mixs_own(tokens: Path) -> None:
    rows = 1000
    counts = Counter(name for name, _ in chunks(make(tokens, rows, weights={"b": 3, "a": 2}), rows))
    assert counts == {"a": 400, "b": 600}
    assert {name for name, _ in chunks(make(tokens, 50, weights={"b": 1}), 50)} == {"b"}
    with pytest.raises(
        UserError, match=r"'bb', no component of it \(did you mean 'b'\?\)|'bb'.*nearest.*'b'"
    ):
        make(tokens, 10, weights={"bb": 1.0})


def test_components_in_sequence(tokens: Path) -> None:
    rows = 401
    names = [name for name, _ in chunks(make(tokens, rows, sequence=("b", "a")), rows)]
    assert names == ["b"] * 100 + ["a"] * 301


def test_a_component_gives_the_same_chunks_however_it_is_mixed(tokens: Path) -> None:
    rows = 40
    mixed = chunks(make(tokens, rows), rows)
    in_sequence = chunks(make(tokens, rows, sequence=("b", "a")), rows)
    assert sorted(mixed) == sorted(in_sequence)
    alone = chunks(make(tokens, rows, weights={"b": 1}), rows)
    assert of(alone, "b")[:10] == of(mixed, "b")


def test_a_part_is_repeated(tokens: Path) -> None:
    """`unique_tokens`: whole chunks, components by their shares, a smaller part within a larger one."""
    rows = 400
    parts = {}
    for unique in (10, 40):
        seen = chunks(make(tokens, rows, unique_tokens=unique * CONTEXT), rows)
        counts = Counter(seen)
        parts[unique] = set(counts)
        assert len({c for n, c in counts if n == "a"}) == round(0.75 * unique)
        assert len({c for n, c in counts if n == "b"}) == round(0.25 * unique)
        for name in "ab":
            often = [times for (own, _), times in counts.items() if own == name]
            assert max(often) - min(often) <= 1
    assert parts[10] < parts[40]
    everything = make(tokens, rows, unique_tokens=10**9)
    for step in range(20):
        np.testing.assert_array_equal(everything.batch(step), make(tokens, rows).batch(step))


def test_a_limit_on_epochs(tokens: Path) -> None:
    component = read_split(tokens, "train")[1]
    n = (component.n_tokens - 1) // CONTEXT
    rows = 4 * n  # two epochs of b, half of the rows
    half = {"a": 0.5, "b": 0.5}
    make(tokens, rows, weights=half, max_epochs=2)
    with pytest.raises(UserError, match=rf"'b' has {n * CONTEXT:,} tokens .* 2\.00 epochs, above .*: 1\.5"):
        make(tokens, rows, weights=half, max_epochs=1.5)
    with pytest.raises(
        UserError, match=r"above data.max_epochs: 1; train on at most ([\d,]+) tokens"
    ) as found:
        make(tokens, rows, weights=half, max_epochs=1)
    fit = int(str(found.value).split("at most ")[1].split()[0].replace(",", "")) // CONTEXT
    make(tokens, fit, weights=half, max_epochs=1)
    assert fit >= rows // 2 - 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"order": "difficulty"}, "needs reference"),
        ({"reference": "baseline"}, "order: difficulty and by select alone"),
        ({"direction": "hard_first"}, "needs order: length or difficulty; found shuffled"),
        ({"order": "source", "pacing": "competence"}, "needs order: length or difficulty; found source"),
        ({"weights": {"a": 0}}, "greater than 0"),
    ],
)
def test_keys_that_do_not_fit(config: dict, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        DataConfig(**config)
