"""Shingles, near-duplicates and clusters, against searches by sets of tuples."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from stlm.tokens import near_duplicates
from stlm.tokens.near_duplicates import Clusters, linked
from stlm.tokens.shingles import DocumentHashes, sample, shingles, word_hashes
from stlm.tokens.words import words

VOCABULARY = ["".join(random.Random(i).choices("abcdefghijklmnop", k=6)) for i in range(5000)]


def text(draw: random.Random, n: int) -> str:
    return " ".join(draw.choices(VOCABULARY, k=n))


def write(path: Path, documents: list[np.ndarray], rate: int = 1) -> DocumentHashes:
    np.concatenate([*documents, np.empty(0, np.uint64)]).tofile(path)
    return DocumentHashes.of_lengths(path, np.array(list(map(len, documents))), rate)


def sketches(path: Path, texts: list[str], rate: int = 1) -> DocumentHashes:
    return write(path, [np.unique(sample(shingles(word_hashes(t.encode()), 5), rate)) for t in texts], rate)


def test_equal_sequences_have_equal_hashes_and_others_do_not() -> None:
    draw = random.Random(0)
    one = "Ünder the—sea 水, " + text(draw, 3000)
    other = text(draw, 7) + "\n\n" + one.upper() + "!"  # another place, another block
    for n in (1, 5, 13):
        own = words(one)
        expected = [tuple(own[i : i + n]) for i in range(len(own) - n + 1)]
        hashes = shingles(word_hashes(one.encode()), n)
        assert len(hashes) == len(expected)
        assert len(set(hashes.tolist())) == len(set(expected))
        skipped = len(words(other)) - len(own)
        np.testing.assert_array_equal(shingles(word_hashes(other.encode()), n)[skipped:], hashes)
    assert len(shingles(word_hashes(b"only four words here"), 5)) == 0
    assert len(word_hashes(b"")) == len(word_hashes(b" \n ")) == 0


def test_texts_longer_than_a_block() -> None:
    long = " ".join(f"w{i}" for i in range(200_000))  # 1.3 MB: five blocks
    hashes = word_hashes(long.encode())
    assert len(hashes) == len(set(hashes.tolist())) == 200_000
    np.testing.assert_array_equal(
        hashes[150_000:150_010], word_hashes(long[-400_000:].encode())[-50_000:-49_990]
    )
    one = word_hashes(b"x" * 600_000)
    assert 1 <= len(one) <= 3 and one[0] == word_hashes(b"x" * 600_000 + b" y")[0]


@pytest.mark.parametrize("memory", [1 << 28, 2000])
def test_near_duplicates_are_found_in_any_memory(tmp_path: Path, memory: int) -> None:
    draw = random.Random(1)
    texts = [text(draw, 400) for _ in range(30)]
    own = texts[3].split()
    texts.append(" ".join(word if i % 40 else "changed" for i, word in enumerate(own)))  # another edition
    texts.append(text(draw, 600) + " " + " ".join(texts[5].split()[50:250]))  # contains half of it
    texts.append(text(draw, 400) + " " + " ".join(texts[7].split()[:12]))  # a quotation
    found = linked(sketches(tmp_path / "s", texts), np.arange(len(texts)), memory)
    assert [(a, b) for _, a, b in found] == [(3, 30), (5, 31)]
    grams = [{tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in texts]
    for share, a, b in found:
        assert share == len(grams[a] & grams[b]) / min(len(grams[a]), len(grams[b]))


def test_common_phrases_link_nothing_and_many_copies_are_linked(tmp_path: Path) -> None:
    draw = random.Random(2)
    phrase = text(draw, 30)
    apart = [text(draw, 400) + " " + phrase for _ in range(50)]
    copies = [apart[0].replace(VOCABULARY[i], "x") for i in range(20)]
    found = linked(sketches(tmp_path / "s", [*apart, *copies]), np.arange(70), 1 << 28)
    clusters = Clusters(np.ones(70), 100)
    for _, a, b in found:
        clusters.join(a, b)
    same = {unit for unit in range(70) if clusters.find(unit) == clusters.find(0)}
    assert same == {0, *range(50, 70)}


def test_units_and_documents_left_out(tmp_path: Path) -> None:
    draw = random.Random(3)
    one = text(draw, 300)
    own = sketches(tmp_path / "s", [one, one, one + " more", text(draw, 300)])
    assert linked(own, np.array([0, 0, 1, 2]), 1 << 28)[0][1:] == (0, 1)
    assert linked(own, np.array([0, 0, 0, 2]), 1 << 28) == []
    assert linked(own, np.array([0, -1, -1, 2]), 1 << 28) == []
    assert linked(sketches(tmp_path / "e", ["", "a b"]), np.arange(2), 1 << 28) == []


def test_short_texts_need_half(tmp_path: Path) -> None:
    draw = random.Random(4)
    one = text(draw, 40).split()
    texts = [
        " ".join(one),
        " ".join(one[:15]) + " " + text(draw, 25),
        " ".join(one[:35]) + " " + text(draw, 5),
    ]
    assert [link[1:] for link in linked(sketches(tmp_path / "s", texts), np.arange(3), 1 << 28)] == [(0, 2)]


def test_sampled_sketches_find_the_same(tmp_path: Path) -> None:
    draw = random.Random(5)
    texts = [text(draw, 3000) for _ in range(10)]
    texts += [text(draw, 2000) + " " + " ".join(texts[i].split()[:1000]) for i in range(3)]
    exact = linked(sketches(tmp_path / "1", texts), np.arange(13), 1 << 28)
    sampled = linked(sketches(tmp_path / "8", texts, 8), np.arange(13), 1 << 28)
    assert (
        sorted(link[1:] for link in exact)
        == sorted(link[1:] for link in sampled)
        == [(0, 10), (1, 11), (2, 12)]
    )
    for share, _, _ in sampled:
        assert share == pytest.approx(1 / 3, abs=0.08)


def test_candidates_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few pairs, those that share most are kept."""
    draw = random.Random(6)
    texts = [text(draw, 200) for _ in range(60)]
    for i in range(59):  # each shares a sentence with the next one, two are copies
        texts[i + 1] += " " + " ".join(texts[i].split()[:12])
    texts.append(texts[0])
    own = sketches(tmp_path / "s", texts)
    first, _, counts = near_duplicates._candidates(own, np.arange(61), 50_000)
    assert len(first) > 50 and counts.max() > 150
    monkeypatch.setattr(near_duplicates, "_FEWEST_PAIRS", 5)
    first, second, counts = near_duplicates._candidates(own, np.arange(61), 500)
    assert len(first) <= 500 // 48
    assert (0, 60) in zip(first.tolist(), second.tolist(), strict=True) and counts.max() > 150


def test_clusters_are_capped() -> None:
    clusters = Clusters(np.array([4.0, 4.0, 4.0, 1.0]), 9)
    assert clusters.join(0, 1) and clusters.join(1, 0)
    assert not clusters.join(1, 2)
    assert clusters.join(3, 0)
    assert not clusters.join(2, 3)
    roots = clusters.roots
    assert roots[0] == roots[1] == roots[3] != roots[2]
    assert set(clusters.refused) == {roots[0], roots[2]}
    assert clusters.counts(0, 4) == {"joined": 3, "clusters": 1, "kept_in_train": 4}


def test_all_pairs_against_sets(tmp_path: Path) -> None:
    """Texts of chapters drawn from a few: whatever shares enough is linked, directly or by a chain."""
    draw = random.Random(7)
    chapters = [text(draw, 150) for _ in range(12)]
    texts = [" ".join(draw.sample(chapters, k=2)) + " " + text(draw, 100) for _ in range(25)]
    found = {link[1:] for link in linked(sketches(tmp_path / "s", texts), np.arange(25), 1 << 28)}
    clusters = Clusters(np.ones(25), 100)
    for a, b in found:
        clusters.join(a, b)
    grams = [{tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in texts]
    for a, b in combinations(range(25), 2):
        shared = len(grams[a] & grams[b])
        near = shared >= 100 and shared / min(len(grams[a]), len(grams[b])) >= 0.1
        assert ((a, b) in found) <= near
        assert near <= (clusters.find(a) == clusters.find(b))


def test_few_sampled_hashes_link_nothing(tmp_path: Path) -> None:
    """Two short texts may have all of their two or three sampled hashes in common and little else."""
    own = write(tmp_path / "s", [np.array([8, 16, 24], np.uint64)] * 2, rate=8)
    assert linked(own, np.arange(2), 1 << 28) == []
    assert (
        len(linked(write(tmp_path / "s", [np.array([8, 16, 24], np.uint64)] * 2), np.arange(2), 1 << 28)) == 1
    )
