"""hf:NAME:N: what is kept, that every text is written with it, and with how many tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from awkward_texts import EDGES, random_texts
from published_sample import EOT, SPECIAL, reference, write_model
from raw_samples import stories, write_raw
from vocabulary import most_frequent

from stlm.errors import UserError
from stlm.study.load import load_study
from stlm.tokens.names import hf_name, is_per_corpus, vocabulary_size
from stlm.tokens.published import PublishedTokenizer, Vocabulary, fetched_tokenizer
from stlm.tokens.reduced import count_tokens, needed, reduced_tokenizer, with_tokens
from stlm.tokens.shards import read_split
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer

# Others than the model was trained on, of a part of the words.
CORPUS = stories(150, seed=9, words=25)
SIZE = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("raw") / "tiny")


@pytest.fixture(scope="module")
def whole(folder: Path) -> PublishedTokenizer:
    return fetched_tokenizer("hf:tiny", folder)


@pytest.fixture(scope="module")
def reduced(whole: PublishedTokenizer) -> PublishedTokenizer:
    return reduced_tokenizer(f"hf:tiny:{SIZE}", whole, CORPUS)


def test_every_text_is_written(reduced: PublishedTokenizer, tmp_path: Path) -> None:
    """And other libraries write it with the same tokens."""
    assert (reduced.vocab_size, reduced.eot, reduced.eot_spelling) == (SIZE, SIZE - 1, EOT)
    assert reduced.is_fast and reduced.dtype == np.uint16
    reduced.save(tmp_path)
    loaded, of = load_tokenizer(tmp_path), reference(tmp_path / "tokenizer.json")
    assert isinstance(loaded, PublishedTokenizer) and loaded.files == reduced.files
    for text in [*EDGES, "\x04\x1d\U00040000", "a 12½  3", *random_texts(300), *CORPUS]:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert ids == reduced.encode(text) == of(text), ascii(text)
    for own, kept in (
        (loaded.parent_ids, reduced.parent_ids),
        (loaded.first_pieces, reduced.first_pieces),
    ):
        assert np.array_equal(own, kept)


def test_kept_tokens_are_made_as_before(whole: PublishedTokenizer, reduced: PublishedTokenizer) -> None:
    """Bytes all stay, merges in their order; a text of kept tokens alone is written with the same."""
    parents, words = reduced.parent_ids, whole.vocabulary
    assert (np.diff(parents[:-1]) > 0).all() and parents[-1] == whole.eot
    assert [words.tokens[parent] for parent in parents] == list(reduced.vocabulary.tokens)
    assert {id_ for id_, token in enumerate(words.tokens) if len(token) == 1} <= set(parents.tolist())
    kept = [merge for merge, product in zip(words.merges, words.products, strict=True) if product in parents]
    assert [tuple(parents[[*merge]]) for merge in reduced.vocabulary.merges] == kept
    made = reduced.vocabulary.encode_pieces([words.tokens[parent] for parent in parents[:-1]])
    assert made == [[own] for own in range(SIZE - 1)]
    same = 0
    for word in " ".join(CORPUS).split(" "):
        ids = whole.encode(" " + word)
        if set(ids) <= set(parents.tolist()):
            same += 1
            assert parents[reduced.encode(" " + word)].tolist() == ids
    assert same > 100


def test_first_pieces(whole: PublishedTokenizer, reduced: PublishedTokenizer) -> None:
    own = {parent: id_ for id_, parent in enumerate(reduced.parent_ids.tolist())}
    removed = 0
    for parent, first in enumerate(reduced.first_pieces.tolist()):
        content, piece = whole.vocabulary.contents[parent], reduced.vocabulary.contents[first]
        if parent in whole.vocabulary.special:
            assert first == reduced.eot
        elif parent in own:
            assert first == own[parent]
        else:
            removed += 1
            assert content.startswith(piece) and len(piece) < len(content)
    assert removed == 500 - 3 - (SIZE - 1)  # of six special tokens three stand for bytes
    assert len(reduced.first_pieces) == whole.vocab_size


def literal(vocabulary: Vocabulary, counts: list[int], size: int) -> list[int]:
    """The tokens to keep, the slow way: look at every token each time."""
    kept = {id_ for id_ in range(len(counts)) if id_ not in vocabulary.special}
    merges = dict(zip(vocabulary.products, vocabulary.merges, strict=True))
    counts = list(counts)
    while len(kept) > size:
        parts = {part for product, merge in merges.items() if product in kept for part in merge}
        loose = [id_ for id_ in kept if id_ in merges and id_ not in parts]
        rarest = min(loose, key=lambda id_: (counts[id_], -id_))
        kept.remove(rarest)
        for part in merges[rarest]:
            counts[part] += counts[rarest]
    return sorted(kept)


@pytest.mark.parametrize("size", [260, 300, 400, 450])
def test_the_rarest_are_removed(whole: PublishedTokenizer, size: int) -> None:
    counts = count_tokens(whole, CORPUS)
    expected = Counter(id_ for text in CORPUS for id_ in whole.encode(text))
    assert {id_: n for id_, n in enumerate(counts.tolist()) if n} == expected
    assert needed(whole.vocabulary, counts, size).ids == literal(whole.vocabulary, counts.tolist(), size)


def test_a_token_that_is_both_parts_of_another() -> None:
    """`aa` of `a` and `a`: its count goes to `a` twice."""
    vocabulary = Vocabulary(("a", "b", "aa", "bb", "aab"), ((0, 0), (1, 1), (2, 1)), frozenset(), {})
    assert needed(vocabulary, np.array([0, 0, 5, 9, 7]), 4) == ([0, 1, 2, 3], 7 + 12 + 9)
    assert needed(vocabulary, np.array([0, 0, 5, 9, 7]), 3) == ([0, 1, 2], 7 + 12 + 18)
    assert needed(vocabulary, np.array([0, 0, 5, 9, 7]), 2) == ([0, 1], 7 + 24 + 18)


@pytest.mark.parametrize("size", [270, 320, 400, 450])
def test_as_many_tokens_as_predicted_and_no_more_than_by_frequency(
    whole: PublishedTokenizer, size: int
) -> None:
    """A removed token's parts may merge with their neighbours: fewer tokens than predicted."""
    counts = count_tokens(whole, CORPUS)
    kept = needed(whole.vocabulary, counts, size)
    found = int(count_tokens(with_tokens("hf:tiny:9", whole, kept.ids), CORPUS).sum())
    assert 0.97 * kept.text_tokens < found <= kept.text_tokens
    other = with_tokens("hf:tiny:9", whole, most_frequent(whole.vocabulary, counts, size))
    assert found <= int(count_tokens(other, CORPUS).sum())


def test_all_of_them_are_the_whole(whole: PublishedTokenizer) -> None:
    most = whole.vocab_size - len(SPECIAL) + 3 + 1
    everything = reduced_tokenizer(f"hf:tiny:{most}", whole, CORPUS[:3])
    for text in [*EDGES, *CORPUS[:50], *random_texts(50)]:
        assert everything.parent_ids[everything.encode(text)].tolist() == whole.encode(text)
    assert everything.vocabulary.merges == tuple(
        tuple(int(everything.first_pieces[part]) for part in merge) for merge in whole.vocabulary.merges
    )
    with pytest.raises(UserError, match=rf"hf:tiny:{most + 1}: N must be from 257 .* to {most} .* hf:tiny "):
        reduced_tokenizer(f"hf:tiny:{most + 1}", whole, [])


def test_without_tiktoken(tmp_path: Path) -> None:
    """Where the whole is encoded by `tokenizers`, so is a part."""

    def unlike(content: dict) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False

    whole = fetched_tokenizer("hf:slow", write_model(tmp_path / "slow", change=unlike))
    reduced = reduced_tokenizer("hf:slow:300", whole, CORPUS)
    reduced.save(tmp_path / "stored")
    loaded, of = load_tokenizer(tmp_path / "stored"), reference(tmp_path / "stored" / "tokenizer.json")
    assert not loaded.is_fast
    for text in [*EDGES, "12 34", *CORPUS[:20]]:
        assert loaded.encode(text) == of(text) and loaded.decode(loaded.encode(text)) == text


def test_a_corpus_gets_the_tokens_that_its_train_split_needs(folder: Path, tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw" / "a", stories(300, seed=2))
    meta = tokenize_corpus(raw, tmp_path / "a" / "hf:tiny:300", "hf:tiny:300", folder, progress=False)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("hf:tiny:300", 300, 299)
    again = tokenize_corpus(raw, tmp_path / "b" / "hf:tiny:300", "hf:tiny:300", folder, progress=False)
    assert again == meta
    tokenizer = load_tokenizer(tmp_path / "a" / "hf:tiny:300" / "tokenizer")
    (train,) = read_split(tmp_path / "a" / "hf:tiny:300", "train")
    texts = [tokenizer.decode(document.tokens.tolist()) for document in train]
    assert set(texts) < set(stories(300, seed=2))
    made = reduced_tokenizer("hf:tiny:300", fetched_tokenizer("hf:tiny", folder), texts)
    assert np.array_equal(made.parent_ids, tokenizer.parent_ids)


def test_a_corpus_in_the_whole_vocabulary(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of text has the first id: documents end with it, and nothing else is it."""
    # The model stands in no params/models.yaml.
    monkeypatch.setattr("stlm.tokens.vocabulary.vocabulary_size", lambda name: 500)
    raw = write_raw(tmp_path / "raw" / "a", [*stories(100), f"{EOT} in a text"])
    meta = tokenize_corpus(raw, tmp_path / "hf:tiny", "hf:tiny", folder, progress=False)
    assert (meta["vocab_size"], meta["eot"]) == (500, 0)
    for split in ("train", "val", "test"):
        for document in read_split(tmp_path / "hf:tiny", split)[0]:
            assert document.tokens[-1] == 0 and (document.tokens[:-1] != 0).all()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw" / "a", stories(10))
    with pytest.raises(UserError, match="no such folder; run: stlm fetch tiny"):
        tokenize_corpus(raw, tmp_path / "out", "hf:tiny:300", tmp_path / "raw" / "tiny", progress=False)


def test_names() -> None:
    assert hf_name("hf:smollm2_135m") == ("smollm2_135m", None)
    assert hf_name("hf:A-b:8192") == ("A-b", 8192)
    assert hf_name("bpe-4096") is None
    for name in ("hf:", "hf:a:", "hf:a:0", "hf:a:b", "hf:a:1:2", "hf:../a", "hf:a:01"):
        with pytest.raises(UserError, match="expected hf:NAME or hf:NAME:N"):
            hf_name(name)
    with pytest.raises(UserError, match="too small"):
        hf_name("hf:a:200")
    with pytest.raises(UserError, match="too large"):
        hf_name("hf:a:99999999")
    assert [is_per_corpus(name) for name in ("bpe-300", "hf:a:300", "hf:a", "gpt2", "words")] == [
        *(True, True),
        *(False, False, False),
    ]


def test_a_study_knows_the_sizes_before_anything_is_fetched(project: Path) -> None:
    run = load_study("smoke", ["tokenizer=hf:smollm2_135m:2000"]).runs["baseline"]
    assert run.model.vocab_size == vocabulary_size("hf:smollm2_135m:2000") == 2000
    assert run.tokens_folder == Path("data/tokens/synthetic/hf:smollm2_135m:2000")
    assert vocabulary_size("hf:smollm2_135m") == 49_152
    for override, message in (
        ("hf:smollm2", "no model in params/models.yaml .*did you mean 'smollm2_135m'"),
        ("hf:smollm2_135m:50000", "has 49,152 tokens; choose hf:smollm2_135m, or a smaller N"),
        ("hf:smollm2_135m:1e4", "expected hf:NAME or hf:NAME:N"),
    ):
        with pytest.raises(UserError, match=message):
            load_study("smoke", [f"tokenizer={override}"])
    with pytest.raises(UserError, match="hf:smollm2_135m' cuts no chunks for byte-level models"):
        load_study("bytes", ["tokenizer=hf:smollm2_135m"])
