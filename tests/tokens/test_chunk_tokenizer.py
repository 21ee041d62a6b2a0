"""Chunks as tokens: shards of the ids of a corpus' chunks, which come back as its text."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from raw_samples import stories, write_raw

from stlm.errors import UserError
from stlm.evaluation.config import PerplexityConfig
from stlm.evaluation.perplexity import load_documents
from stlm.files import read_json
from stlm.tokens.batches import ValidationSet
from stlm.tokens.chunks import END, END_OF_TEXT, make_chunker
from stlm.tokens.shards import SPLITS, read_split
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import chunker_of, load_tokenizer, tokens_table

KINDS = ["words", "spaces", "stride-4"]
TEXTS = [*stories(300), "né—\n\n'tis\x00 a   test, of antidisestablishmentarianism!"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chunks")
    raw = write_raw(root / "raw" / "tales", TEXTS)
    for kind in (*KINDS, "bytes", "bpe-300"):
        tokenize_corpus(raw, root / kind, kind, root, progress=False)
    return {kind: root / kind for kind in (*KINDS, "bytes", "bpe-300")}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_the_chunks_of_the_text(folders, kind):
    tokenizer = load_tokenizer(folders[kind] / "tokenizer")
    chunker, plain = make_chunker(kind), load_tokenizer(folders["bytes"] / "tokenizer")
    meta = read_json(folders[kind] / "meta.json")
    assert meta["vocab_size"] == tokenizer.vocab_size == tokenizer.eot + 1 == len(set(tokenizer.chunks)) + 1
    for split in SPLITS:
        (own,), (other,) = read_split(folders[kind], split), read_split(folders["bytes"], split)
        for document, same in zip(own, other, strict=True):
            text = plain.decode(same.tokens)
            chunks = [tokenizer.decode_bytes([token]) for token in document.tokens[:-1].tolist()]
            assert chunks == chunker.split(text.encode())
            assert tokenizer.encode(tokenizer.decode(document.tokens)) == document.tokens[:-1].tolist()
            assert (document.tokens[-1], document.n_bytes) == (tokenizer.eot, same.n_bytes)


def test_ids_of_many_chunks_are_wider(tmp_path):
    words = [
        " ".join("".join(letters) for letters in product(f"{a}{b}cdefghi", repeat=5)) for a, b in ("xy", "zw")
    ]
    raw = write_raw(tmp_path / "raw" / "names", [*words, *stories(200)])
    meta = tokenize_corpus(raw, tmp_path / "names", "words", tmp_path, progress=False)
    assert meta["vocab_size"] > 65_535 and meta["dtype"] == "uint32"
    tokenizer = load_tokenizer(tmp_path / "names" / "tokenizer")
    texts = {
        tokenizer.decode(d.tokens)
        for split in SPLITS
        for own in read_split(tmp_path / "names", split)
        for d in own
    }
    assert set(words) <= texts


def test_a_text_of_other_chunks_has_no_ids(folders):
    tokenizer = load_tokenizer(folders["words"] / "tokenizer")
    with pytest.raises(UserError, match="has no b' zyzzyva'"):
        tokenizer.encode(tokenizer.chunks[7].decode() + " zyzzyva")


@pytest.mark.parametrize("kind", [*KINDS, "bpe-300"])
def test_the_table_of_a_tokenizer_has_each_ids_bytes(folders, kind):
    tokenizer = load_tokenizer(folders[kind] / "tokenizer")
    table, chunker = tokens_table(tokenizer), chunker_of(tokenizer)
    assert len(table.n_inputs_V) == tokenizer.vocab_size
    for token in (0, 7, tokenizer.eot - 1):
        symbols = table.symbols_T[slice(*table.begins_V[token : token + 2])].tolist()
        assert bytes(s for s in symbols if s < 256) == tokenizer.decode_bytes([token])
        assert set(symbols[table.n_inputs_V[token] :]) <= {END, END_OF_TEXT}
    assert table.symbols_T[table.begins_V[tokenizer.eot]] == END_OF_TEXT
    text = "Once upon a time, né Rex's dog ran home."
    assert b"".join(chunker.split(text.encode())) == text.encode()
    if kind == "bpe-300":
        expected = [tokenizer.decode_bytes([token]) for token in tokenizer.encode(text)]
        assert chunker.split(text.encode()) == expected and chunker.longest == max(
            len(tokenizer.decode_bytes([token])) for token in range(tokenizer.eot)
        )


def test_a_budget_of_bytes_is_the_same_text_for_all_tokenizers(folders):
    """Of validation and of test, which are kept by different code; the records say so."""
    found, measured, said = {}, {}, {}
    for kind, folder in folders.items():
        validation = ValidationSet(folder, 32, 1500)
        tokenizer = load_tokenizer(folder / "tokenizer")
        targets = np.concatenate([y[mask] for _, y, mask in validation.batches(4)])
        found[kind] = tokenizer.decode(targets.tolist())
        assert validation.n_bytes == len(found[kind].encode()) >= 1500
        text = load_documents(folder, PerplexityConfig(max_bytes=1500), 0)
        measured[kind] = [tokenizer.decode(document.tokens.tolist()) for document in text.documents]
        own = {key: value for key, value in validation.record.items() if key != "tokens"}
        said[kind] = [own, text.components, text.ids.tolist(), text.documents_total, text.bytes_total]
    for of_kind in (found, measured, said):
        assert all(value == of_kind["words"] for value in of_kind.values())
    assert said["words"][0]["documents"] < said["words"][0]["documents_total"]
    assert ValidationSet(folders["words"], 32, 10**9).n_bytes > len(found["words"].encode())
