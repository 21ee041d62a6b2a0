"""Tokenizers: every text comes back, ids are those of the reference libraries, damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from awkward_texts import EDGES, random_texts
from raw_samples import stories

from stlm.errors import UserError
from stlm.files import read_json
from stlm.tokens.bpe import train_bpe
from stlm.tokens.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer


@pytest.fixture
def gpt2_folder(mirror: Path) -> Path:
    return mirror / "tokenizers" / "gpt2"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe("bpe-400", stories(200))


@pytest.fixture(params=["bytes", "bpe-400", "gpt2"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    if request.param == "gpt2":
        return gpt2_tokenizer(request.getfixturevalue("gpt2_folder"))
    return bpe if request.param == "bpe-400" else ByteTokenizer()


def test_every_text_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.eot) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    texts = EDGES + random_texts(300)
    for text, ids in zip(texts, loaded.encode_batch(texts), strict=True):
        assert loaded.decode(ids) == text
        assert ids == tokenizer.encode(text)
        assert loaded.eot not in ids
        assert all(0 <= token < loaded.vocab_size for token in ids)


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    """Also in pieces of characters that are no text on their own."""
    ids = tokenizer.encode("".join(map(chr, range(0x800))) + "\U0010ffff\U000e0041水")
    assert tokenizer.vocab_size >= 257 and tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.decode([*ids[:5], tokenizer.eot, *ids[5:]]) == tokenizer.decode(ids)


def test_gpt2_is_the_published_one(gpt2_folder: Path) -> None:
    tokenizer = gpt2_tokenizer(gpt2_folder)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.dtype) == (50_257, 50_256, np.uint16)
    # As in the documentation of OpenAI's and Hugging Face's implementations.
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("hello <|endoftext|>")[:2] == [31373, 1279]
    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(gpt2_folder / "encoder.json"), str(gpt2_folder / "vocab.bpe"))
    )
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in EDGES + random_texts(300) + stories(20):
        assert tokenizer.encode(text) == reference.encode(text).ids


def test_a_trained_vocabulary_encodes_as_the_library_that_trained_it(bpe: Tokenizer, tmp_path: Path) -> None:
    assert bpe.vocab_size == 400
    bpe.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert reference.get_vocab_size() == 400 and reference.token_to_id("<|endoftext|>") == bpe.eot
    texts = stories(100, seed=3) + random_texts(300) + [text for text in EDGES if "<|" not in text]
    for text in texts:
        assert bpe.encode(text) == reference.encode(text).ids
    assert len(bpe.encode(texts[0])) < len(texts[0].encode()) / 2


def test_training_is_deterministic(bpe: Tokenizer) -> None:
    again = train_bpe("bpe-400", iter(stories(200)))
    assert again.files == bpe.files


def test_a_very_long_run_of_white_space(bpe: Tokenizer) -> None:
    """The regular expression runs out of stack on it; the pieces are the same as for a shorter run."""
    for space in (" ", "\n", "\u3000"):
        for text in (space * 1_200_000, "a" + space * 1_200_000 + "b"):
            assert bpe.decode(bpe.encode(text)) == text


def test_more_ids_than_two_bytes_hold() -> None:
    """65,536 pairs of bytes beside the bytes: stored in four bytes each."""
    ranks = {bytes([a]): a for a in range(256)}
    ranks |= {bytes([a, b]): 256 + 256 * a + b for a in range(256) for b in range(256)}
    tokenizer = BpeTokenizer("pairs", ranks, {})
    assert (tokenizer.vocab_size, tokenizer.dtype) == (65_793, np.uint32)
    ids = tokenizer.encode_array("\U0010ffff")  # F4, 8F BF (the lowest id first), BF
    assert ids.dtype == np.uint32 and ids.tolist() == [0xF4, 256 + 256 * 0x8F + 0xBF, 0xBF]
    assert ByteTokenizer().dtype == np.uint16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtp2", "did you mean 'gpt2'"),
        ("bpe-", "bpe-N"),
        ("bpe-100", "need 258"),
        ("bpe-0300", "bpe-N"),
        ("bpe-1000001", "at most"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_bpe(name, ["a"])


def test_a_corpus_too_small_for_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"bpe-5000.*choose bpe-\d+ or smaller"):
        train_bpe("bpe-5000", stories(3))


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lone surrogate \('\\ud800' at character 1\)"):
        tokenizer.encode("a\ud800")


def test_damaged_vocabulary_files(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(UserError, match=r"encoder\.json: no such vocabulary file; run `stlm fetch gpt2`"):
        gpt2_tokenizer(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match=r"encoder\.json: corrupt vocabulary file"):
        gpt2_tokenizer(tmp_path / "gpt2")

    bpe.save(tmp_path / "bpe")
    path = tmp_path / "bpe" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"tokenizer\.json: corrupt vocabulary file"):
        load_tokenizer(tmp_path / "bpe")
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such vocabulary file"):
        load_tokenizer(tmp_path / "bpe")
    for content, key in (
        ({"size": 3}, "name"),
        ({"name": "bytes", "sha256": []}, "sha256"),
        ([], "the whole"),
    ):
        (tmp_path / "bpe" / "tokenizer-name.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"tokenizer-name\.json: not what its stage writes \({key}"):
            load_tokenizer(tmp_path / "bpe")


def _vocabulary(folder: Path, change) -> None:
    """Another tokenizer.json in a tokenizer's folder, whose description has its digest."""
    path, description = folder / "tokenizer.json", folder / "tokenizer-name.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    said = read_json(description)  # without its checksum
    said["sha256"] = {"tokenizer.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    description.write_text(json.dumps(said))


def _with(vocabulary: dict) -> dict:
    return {"model": {"vocab": vocabulary}}


@pytest.mark.parametrize(
    "change",
    [
        # Ranks without the single bytes make tiktoken panic, which no `except Exception` catches.
        lambda content: _with({f"word{number}": number for number in range(299)}),
        lambda content: _with({f"\u2581{token}": id_ for token, id_ in content["model"]["vocab"].items()}),
        lambda content: _with(content["model"]["vocab"] | {"!": 3}),
        lambda content: _with(content["model"]["vocab"] | {"!": "0"}),
        lambda content: _with({}),
        lambda content: {"version": "1.0"},
        lambda content: [],
    ],
    ids=["words", "letters", "ids", "texts", "empty", "no model", "list"],
)
def test_vocabularies_of_another_kind(tmp_path: Path, bpe: Tokenizer, change) -> None:
    bpe.save(tmp_path)
    _vocabulary(tmp_path, change)
    with pytest.raises(UserError, match=rf"tokenizer\.json: no vocabulary as {bpe.name} has"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sha256": {}}, r"sha256 names no tokenizer\.json, which the tokenizer bpe-\d+ is made of"),
        ({"name": "gpt2"}, r"names no encoder\.json and no vocab\.bpe"),
        ({"name": "words"}, r"names no chunks\.bin and no chunk-lengths\.bin"),
        ({"name": "own"}, "unknown tokenizer 'own'"),
        ({"vocab_size": 9999}, "vocab_size and eot are 9999 and "),
        ({"name": "bytes", "sha256": {}}, "but the vocabulary of bytes has 257 tokens"),
    ],
)
def test_descriptions_that_do_not_fit_their_files(tmp_path: Path, bpe: Tokenizer, said, message) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer-name.json"
    path.write_text(json.dumps(read_json(path) | said))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_damaged_copy_of_gpt2(tmp_path: Path, gpt2_folder: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copyfile(gpt2_folder / name, tmp_path / name)
    with (tmp_path / "vocab.bpe").open("r+b") as file:
        file.seek(1000)
        file.write(b"zz")
    with pytest.raises(UserError, match=r"vocab\.bpe: corrupt vocabulary file"):
        gpt2_tokenizer(tmp_path)
