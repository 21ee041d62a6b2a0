"""Shards: what was written is read, without a copy, and damage is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from raw_samples import stories, write_raw

from stlm.errors import UserError
from stlm.files import read_json, write_json
from stlm.tokens.shards import Document, read_split, write_shard
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 600 documents in bytes, in shards of at most 8 kB."""
    root = tmp_path_factory.mktemp("tales")
    folder = root / "tokens" / "tales" / "bytes"
    raw = write_raw(root / "raw" / "tales", stories(600))
    tokenize_corpus(raw, folder, "bytes", root, shard_bytes=8000, progress=False)
    return folder


def test_ids_of_four_bytes(tmp_path: Path) -> None:
    tokens = [np.array([70_000, 3, 65_792], np.uint32), np.array([65_792], np.uint32)]
    entry = write_shard(tmp_path / "a.arrow", [Document(tokens[0], 5, 4), Document(tokens[1], 0, 0)])
    assert (entry["documents"], entry["tokens"], entry["bytes"], entry["chars"]) == (2, 4, 5, 4)
    splits = {"train": {"shards": [entry]}, "val": {"shards": []}, "test": {"shards": []}}
    components = {"a": {"weight": 1.0, "splits": splits}}
    write_json(tmp_path / "meta.json", {"dtype": "uint32", "eot": 65_792, "components": components})
    for row, expected in zip(read_split(tmp_path, "train")[0], tokens, strict=True):
        assert row.tokens.dtype == np.uint32 and row.tokens.tolist() == expected.tolist()
    loaded = datasets.Dataset.from_file(str(tmp_path / "a.arrow"))
    assert loaded["tokens"][:] == [array.tolist() for array in tokens]


@pytest.fixture
def copied(tokens: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(tokens, tmp_path / "copied"))


def test_documents_in_order(tokens: Path) -> None:
    tokenizer = load_tokenizer(tokens / "tokenizer")
    texts = {}
    for split in ("train", "val", "test"):
        (component,) = read_split(tokens, split)
        assert (component.name, component.weight) == ("tales", 1.0)
        here = []
        for document in component:
            assert document.tokens.dtype == np.uint16
            assert document.tokens[-1] == tokenizer.eot and tokenizer.eot not in document.tokens[:-1]
            text = tokenizer.decode(document.tokens)
            assert (len(text.encode()), len(text)) == (document.n_bytes, document.n_chars)
            here.append(text)
        assert len(component) == len(here) > 0
        assert component.n_tokens == sum(len(text.encode()) + 1 for text in here)
        texts[split] = here
    everything = stories(600)
    places = {text: place for place, text in enumerate(everything)}
    for here in texts.values():
        assert [places[text] for text in here] == sorted(places[text] for text in here)
    assert sorted(text for here in texts.values() for text in here) == sorted(everything)


def test_the_stream_across_shards(tokens: Path) -> None:
    (component,) = read_split(tokens, "train")
    assert len(component.shards) > 20
    flat = np.concatenate([shard.values for shard in component.shards])
    draw = np.random.default_rng(0)
    for length in (1, 100, 20_000):
        for start in draw.integers(0, len(flat) - length, 30):
            out = np.empty(length, np.int64)
            component.read(int(start), out)
            np.testing.assert_array_equal(out, flat[start : start + length])


def test_nothing_is_copied(tokens: Path) -> None:
    """Every view lies in a mapping of its shard's file."""
    (component,) = read_split(tokens, "train")
    mapped: dict[Path, list[range]] = {}  # other tests may have mapped files of the same name
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name.endswith(".arrow"):
            start, end = (int(address, 16) for address in span.split("-"))
            mapped.setdefault(Path(name), []).append(range(start, end))
    for number, shard in enumerate(component.shards):
        ranges = mapped[(tokens / f"train-tales-{number:05d}.arrow").resolve()]
        for view in shard:
            first, last = view.ctypes.data, view.ctypes.data + view.nbytes - 1
            assert any(first in span and last in span for span in ranges)
            assert not view.flags.writeable


def test_the_library_datasets_opens_a_shard(tokens: Path) -> None:
    loaded = datasets.Dataset.from_file(str(tokens / "train-tales-00000.arrow"))
    (component,) = read_split(tokens, "train")
    for row, document in zip(loaded, component, strict=False):
        assert row["tokens"] == document.tokens.tolist()
        assert (row["n_bytes"], row["n_chars"]) == (document.n_bytes, document.n_chars)
    assert loaded.features["tokens"].feature.dtype == "uint16"
    entry = read_json(tokens / "meta.json")["components"]["tales"]["splits"]["train"]["shards"][0]
    assert len(loaded) == entry["documents"]


def test_damaged_shards(copied: Path) -> None:
    path = copied / "val-tales-00000.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"val-tales-00000\.arrow: truncated: "):
        read_split(copied, "val")
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=r"val-tales-00000\.arrow: changed: "):
        read_split(copied, "val")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=r"val-tales-00000\.arrow: damaged"):
        read_split(copied, "val")
    path.unlink()
    with pytest.raises(UserError, match=r"val-tales-00000\.arrow: no such file"):
        read_split(copied, "val")
    assert read_split(copied, "train")


def test_damaged_description(copied: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'train'"):
        read_split(copied, "trian")
    meta = copied / "meta.json"
    plain = read_json(meta)
    meta.write_text(meta.read_text()[:50])
    with pytest.raises(UserError, match=r"meta\.json: not valid JSON"):
        read_split(copied, "train")
    write_json(meta, plain)  # as earlier versions did, without its checksum
    whole = meta.read_text()
    for content, key in (
        ('{"eot": 256, "dtype": "uint16"}', "components: Field required"),
        ('{"eot": 256, "dtype": "uint16", "components": []}', "components: Input should be a"),
        (whole.replace('"weight"', '"width"'), r"components\.tales\.weight: Field required"),
        (whole.replace('"size"', '"length"'), r"splits\.train\.shards\.0\.size: Field required"),
        ("[]", "the whole file: Input should be"),
    ):
        meta.write_text(content)
        with pytest.raises(UserError, match=rf"meta\.json: not what its stage writes \(.*{key}"):
            read_split(copied, "train")
    meta.write_text(whole.replace('"uint16"', '"uint32"'))
    with pytest.raises(UserError, match="do not belong together"):
        read_split(copied, "train")
    meta.unlink()
    with pytest.raises(UserError, match=r"meta\.json: no such file"):
        read_split(copied, "train")


def test_the_documents_of_any_part_of_the_stream(tokens: Path) -> None:
    """Against counting documents one by one; parts end at, before and after ends of documents and shards."""
    (component,) = read_split(tokens, "train")
    assert len(component.shards) > 2
    owners = [
        (number, document)
        for number, shard in enumerate(component.shards)
        for document in range(len(shard.n_bytes))
        for _ in range(shard.offsets[document], shard.offsets[document + 1])
    ]
    ends = [int(place) for place in (*component.starts, *component.shards[0].offsets[:4])]
    rng = np.random.default_rng(0)
    places = {p for end in ends for p in (end - 1, end, end + 1)} | set(rng.integers(len(owners), size=20))
    places = sorted(int(p) for p in places if 0 <= p <= len(owners))
    for start, stop in np.sort(rng.choice(places, (150, 2)), axis=1).tolist():
        if start == stop:
            continue
        pieces = list(component.documents(start, stop))
        assert [piece[:2] for piece in pieces] == list(dict.fromkeys(owners[start:stop]))
        out = np.empty(stop - start, np.int64)
        component.read(start, out)
        assert np.concatenate([tokens for _, _, tokens in pieces]).tolist() == out.tolist()
