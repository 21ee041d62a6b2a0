"""Which test documents are taken, of a corpus and of a mix, and the figures of each component."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from stlm.evaluation.config import PerplexityConfig
from stlm.evaluation.perplexity import load_documents, measure
from stlm.evaluation.statistics import ratio_bootstrap
from stlm.files import write_json
from stlm.tokens.shards import Document, write_shard
from stlm.tokens.tokenizer import ByteTokenizer

LENGTHS = {"a": [30] * 40, "b": [7, 9, 300] * 5}
WEIGHTS = {"a": 0.5, "b": 1.5}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Tokens of a mix; a document's tokens are its number, the end of text last."""
    components = {}
    for name, lengths in LENGTHS.items():
        documents = [
            Document(np.array([i] * n + [256], np.uint16), n_bytes=n, n_chars=n)
            for i, n in enumerate(lengths)
        ]
        entry = write_shard(tmp_path / f"test-{name}-00000.arrow", documents)
        splits = {split: {"shards": [entry] if split == "test" else []} for split in ("train", "val", "test")}
        components[name] = {"weight": WEIGHTS[name], "splits": splits}
    ByteTokenizer().save(tmp_path / "tokenizer")
    write_json(tmp_path / "meta.json", {"eot": 256, "dtype": "uint16", "components": components})
    return tmp_path


class Model:
    """Says that each token of a document has a probability of 1 / (2 + the document's number)."""

    def document_loglikelihoods(self, documents, stride, progress):
        return [-len(tokens) * math.log(2 + tokens[0]) for tokens in documents]


def test_all_documents_without_their_ends(tokens: Path) -> None:
    text = load_documents(tokens, PerplexityConfig(), 0)
    assert text.documents_total == len(text.documents) == 55
    assert text.components == ["a"] * 40 + ["b"] * 15
    assert [len(d.tokens) for d in text.documents] == LENGTHS["a"] + LENGTHS["b"]
    assert all(256 not in d.tokens for d in text.documents)


@pytest.mark.parametrize("most", [600, 60])
def test_components_share_a_bound_by_their_weights(tokens: Path, most: int) -> None:
    text = load_documents(tokens, PerplexityConfig(max_bytes=most), 3)
    for name, share in (("a", 0.25), ("b", 0.75)):
        own = [d for d, of in zip(text.documents, text.components, strict=True) if of == name]
        taken = sum(d.n_bytes for d in own)
        assert most * share <= taken < most * share + max(LENGTHS[name])
    text = load_documents(tokens, PerplexityConfig(max_documents=8), 3)
    assert (text.components.count("a"), text.components.count("b")) == (2, 6)
    assert text.components == sorted(text.components)


def test_each_components_figures_and_those_of_all(tokens: Path) -> None:
    text = load_documents(tokens, PerplexityConfig(), 0)
    measured, _ = measure(Model(), text, 5)
    nats = {name: sum(n * math.log(2 + i) for i, n in enumerate(own)) for name, own in LENGTHS.items()}
    for name, own in LENGTHS.items():
        part = measured["components"][name]
        assert part["bits_per_byte"] == pytest.approx(nats[name] / math.log(2) / sum(own))
        assert (part["documents"], part["tokens"], part["chars"]) == (len(own), sum(own), sum(own))
    everything = sum(map(sum, LENGTHS.values()))
    assert measured["token_perplexity"] == pytest.approx(math.exp(sum(nats.values()) / everything))
    few = text._replace(documents=text.documents[:3], components=text.components[:3], ids=text.ids[:3])
    assert "components" not in measure(Model(), few, 5)[0]


def test_a_mixs_interval_is_over_documents_within_its_components(tokens: Path) -> None:
    text = load_documents(tokens, PerplexityConfig(), 0)
    measured, nats = measure(Model(), text, 5)
    bits, sizes = nats / math.log(2), [d.n_bytes for d in text.documents]
    low, high = ratio_bootstrap(bits, sizes, text.components)
    assert measured["interval"] == {"low": low, "high": high, "few_documents": False}
    own = np.array(text.components) == "b"
    low, high = ratio_bootstrap(bits[own], np.array(sizes)[own])
    assert measured["components"]["b"]["interval"] == {"low": low, "high": high, "few_documents": False}
    # One document of a component says nothing of how its documents vary.
    text = load_documents(tokens, PerplexityConfig(max_documents=3), 0)
    measured, _ = measure(Model(), text, 5)
    assert text.components.count("a") == 1 and measured["interval"] is None
    assert measured["components"]["b"]["interval"]["few_documents"]
