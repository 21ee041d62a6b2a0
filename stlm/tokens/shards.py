"""Token shards: Arrow IPC streams, one row a document, written at once and memory-mapped without a copy.

The tokens of a row end with the end-of-text token, so the values buffer of a shard is the training stream
itself (document, end of text, document, ...) and the offsets are the ends of the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from stlm.errors import UserError, nearest
from stlm.files import atomic_path, read_record, sha256
from stlm.integrity import Listed, check_files
from stlm.remedy import remedy

SPLITS = ("train", "val", "test")


class Document(NamedTuple):
    """Tokens, the end of text last; the UTF-8 bytes and the characters of the text alone."""

    tokens: np.ndarray
    n_bytes: int
    n_chars: int


class Shard(NamedTuple):
    """Views of a shard's buffers: document i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    n_chars: np.ndarray


@dataclass(frozen=True)
class ComponentTokens:
    """The documents of one split of a corpus, or of one component of a mix, in the order of the raw files.

    `weight` is the component's share of a mix, as stated (1 for a corpus). Iteration yields each document.
    """

    name: str
    weight: float
    shards: list[Shard]

    def __len__(self) -> int:
        return sum(len(shard.n_bytes) for shard in self.shards)

    def __iter__(self) -> Iterator[Document]:
        for values, offsets, n_bytes, n_chars in self.shards:
            for i in range(len(n_bytes)):
                tokens = values[offsets[i] : offsets[i + 1]]
                yield Document(tokens, int(n_bytes[i]), int(n_chars[i]))

    @cached_property
    def starts(self) -> np.ndarray:
        """The start of each shard in the component's token stream, followed by the stream's length."""
        return np.cumsum([0, *(len(shard.values) for shard in self.shards)])

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the stream, end-of-text tokens included."""
        return int(self.starts[-1])

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy `len(out)` tokens of the stream from `start` into `out`, possibly across shards."""
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        done = 0
        while done < len(out):
            values = self.shards[shard].values[start + done - self.starts[shard] :][: len(out) - done]
            out[done : done + len(values)] = values
            done += len(values)
            shard += 1

    def documents(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """The documents of the tokens `start` to `stop` (exclusive) of the stream.

        Each is: the number of its shard, its number in the shard (both from 0), and its tokens in the range.
        """
        for number, shard in enumerate(self.shards):
            low, high = (int(place - self.starts[number]) for place in (start, stop))
            if high <= 0 or low >= len(shard.values):
                continue
            first = int(np.searchsorted(shard.offsets, max(low, 0), side="right")) - 1
            for document in range(first, len(shard.n_bytes)):
                begin, end = int(shard.offsets[document]), int(shard.offsets[document + 1])
                if begin >= high:
                    break
                yield number, document, shard.values[max(begin, low) : min(end, high)]


class ShardEntry(BaseModel):
    """The entry of meta.json for a shard."""

    path: str
    sha256: str
    size: int
    documents: int
    tokens: int


class _Split(BaseModel):
    shards: list[ShardEntry]


class _Splits(BaseModel):
    train: _Split
    val: _Split
    test: _Split


class _Component(BaseModel):
    weight: float
    splits: _Splits


class Meta(BaseModel):
    """The part of meta.json that readers need."""

    eot: int
    dtype: str
    components: dict[str, _Component]
    tokenizer_sha256: str | None = None  # of the folder `tokenizer`; None in files of earlier versions


def write_shard(path: Path, documents: Sequence[Document]) -> dict[str, Any]:
    """Write `documents` (at least one) as one record batch, atomically; the shard's entry for meta.json."""
    values = np.concatenate([document.tokens for document in documents])
    offsets = np.zeros(len(documents) + 1, np.int32)
    np.cumsum([len(document.tokens) for document in documents], out=offsets[1:])
    n_bytes = np.array([document.n_bytes for document in documents], np.int64)
    n_chars = np.array([document.n_chars for document in documents], np.int64)
    batch = pa.record_batch(
        {
            "tokens": pa.ListArray.from_arrays(offsets, pa.array(values)),
            "n_bytes": n_bytes,
            "n_chars": n_chars,
        }
    )
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    return {
        "path": path.name,
        "sha256": sha256(path),
        "size": path.stat().st_size,
        "documents": len(documents),
        "tokens": len(values),
        "bytes": int(n_bytes.sum()),
        "chars": int(n_chars.sum()),
    }


def read_split(folder: Path, split: str) -> list[ComponentTokens]:
    """A split (train, val, test) of `data/tokens/<corpus>/<tokenizer>/`, one entry a component of a mix.

    Memory-mapped: nothing is copied. First each shard's SHA-256 is compared with meta.json, for a large shard
    once after each change (`stlm.integrity`). A missing, truncated or damaged shard is a `UserError`.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
    meta = read_meta(folder)
    check_files(
        Listed(folder / entry.path, entry.sha256, entry.size)
        for component in meta.components.values()
        for entry in getattr(component.splits, split).shards
    )
    return [
        ComponentTokens(
            name,
            component.weight,
            [_open(folder, entry, meta.dtype) for entry in getattr(component.splits, split).shards],
        )
        for name, component in meta.components.items()
    ]


def read_meta(folder: Path) -> Meta:
    """The meta.json of a folder of tokens; `UserError` if it describes no shards."""
    return read_record(folder / "meta.json", Meta)


def _open(folder: Path, entry: ShardEntry, dtype: str) -> Shard:
    path = folder / entry.path
    batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
    tokens = batch.column("tokens")
    values = tokens.values.to_numpy(zero_copy_only=True)
    if values.dtype != dtype or len(values) != entry.tokens or batch.num_rows != entry.documents:
        raise UserError(f"{path}: shard and meta.json do not belong together; {remedy(path)}")
    return Shard(
        values,
        tokens.offsets.to_numpy(zero_copy_only=True),
        batch.column("n_bytes").to_numpy(zero_copy_only=True),
        batch.column("n_chars").to_numpy(zero_copy_only=True),
    )
