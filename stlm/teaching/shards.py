"""Shards of a teacher's answers: Arrow IPC streams, one row a chunk of the training text. Needs no torch.

A chunk is `context` tokens of a component's token stream, as in training (`stlm.tokens.order`). A row has its
number, a key of its tokens, and at each of its positions what the teacher says about the next token.

Shapes: R chunks, L positions (the context), K tokens kept at each, E the teacher's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from stlm.errors import UserError
from stlm.files import atomic_path, read_record
from stlm.integrity import Listed, check_files, seal
from stlm.remedy import remedy

META = "meta.json"
_SECONDS, _DIGEST = b"seconds", b"answers"


class Answers(NamedTuple):
    """What a teacher says at each position of some chunks.

    `ids_RLK`: tokens of the student's vocabulary, sampled or the most likely first; `log_q_RLK`: the
    logarithms of their probabilities, float16. `log_rest_RL`: that of the mass of all other tokens; None for
    sampled ones. `states`: the residual stream [R, L, E] after layers of the teacher, from 1, float16.
    """

    ids_RLK: np.ndarray
    log_q_RLK: np.ndarray
    log_rest_RL: np.ndarray | None
    states: Mapping[int, np.ndarray]

    def take(self, rows: np.ndarray | slice) -> Answers:
        """The answers for some of the chunks."""
        rest = None if self.log_rest_RL is None else self.log_rest_RL[rows]
        states = {layer: state[rows] for layer, state in self.states.items()}
        return Answers(self.ids_RLK[rows], self.log_q_RLK[rows], rest, states)


def joined(parts: list[Answers]) -> Answers:
    """Answers for consecutive chunks, as one."""
    ids, log_q, rests, states = zip(*parts, strict=True)
    return Answers(
        np.concatenate(ids),
        np.concatenate(log_q),
        None if rests[0] is None else np.concatenate(rests),
        {layer: np.concatenate([state[layer] for state in states]) for layer in states[0]},
    )


def keys_of(tokens_RL: np.ndarray) -> np.ndarray:
    """64 bits [R] of a hash of each row of tokens, whatever their integer type.

    Training finds a row's answers by its tokens: answers of another text cannot be taken for its own. Equal
    chunks have equal answers.
    """
    rows = np.ascontiguousarray(tokens_RL, "<u4")
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8")


def bytes_per_position(vocabulary: int, kept: int, rest: bool, widths: int) -> int:
    """Bytes of a shard for each position; `widths`: the sum of the widths of the kept states."""
    return kept * (id_type(vocabulary).itemsize + 2) + 2 * rest + 2 * widths


def id_type(vocabulary: int) -> np.dtype:
    """The type of ids, as in token shards."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def write_answers(
    path: Path, chunks_R: np.ndarray, keys_R: np.ndarray, answers: Answers, seconds: float
) -> None:
    """Write a shard atomically and seal it.

    `seconds`: what computing it took. The schema keeps them, and a digest of all else, which is equal if the
    teacher is asked again.
    """
    columns = {"chunk": chunks_R.astype(np.uint32), "key": keys_R.astype(np.uint64)}
    columns |= {"tokens": answers.ids_RLK, "log_probability": answers.log_q_RLK}
    if answers.log_rest_RL is not None:
        columns["log_rest"] = answers.log_rest_RL
    columns |= {f"layer_{layer}": state for layer, state in answers.states.items()}
    found = hashlib.sha256()
    for name, values in columns.items():
        found.update(f"{name} {values.shape} {values.dtype}".encode())
        found.update(np.ascontiguousarray(values))
    arrays = {
        name: pa.array(values) if values.ndim == 1 else _fixed(values) for name, values in columns.items()
    }
    notes = {_SECONDS: f"{seconds:.3f}", _DIGEST: found.hexdigest()}
    batch = pa.record_batch(arrays).replace_schema_metadata(notes)
    with atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        seal(temporary)


def _fixed(values: np.ndarray) -> pa.FixedSizeListArray:
    """Rows of equal size, without a copy of the values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), int(np.prod(values.shape[1:])))


class AnswerShard(NamedTuple):
    """A shard, memory-mapped."""

    chunks_R: np.ndarray
    keys_R: np.ndarray
    answers: Answers
    seconds: float
    digest: str


def open_answers(path: Path, context: int) -> AnswerShard:
    """Open a shard; its arrays are views of the file."""
    try:
        batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        rows = batch.num_rows

        def values(name: str) -> np.ndarray:
            return columns[name].values.to_numpy(zero_copy_only=True).reshape(rows, context, -1)

        rest = values("log_rest")[..., 0] if "log_rest" in columns else None
        layers = (name for name in columns if name.startswith("layer_"))
        states = {int(name.removeprefix("layer_")): values(name) for name in layers}
        answers = Answers(values("tokens"), values("log_probability"), rest, states)
        plain = (columns[name].to_numpy(zero_copy_only=True) for name in ("chunk", "key"))
        notes = batch.schema.metadata
        return AnswerShard(*plain, answers, float(notes[_SECONDS]), notes[_DIGEST].decode())
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: no shard of a teacher's answers ({error}); {remedy(path)}") from None


class AnswersEntry(BaseModel):
    """The entry of meta.json for a shard; `answers`: a digest of what it holds but for the seconds."""

    path: str
    component: str
    sha256: str
    answers: str
    size: int
    chunks: int


class AnswersMeta(BaseModel):
    """meta.json of a folder of answers. `plan`: all that they depend on; see `stlm.teaching.plan`.

    `tokens`: those that the teacher read; `flops` and `seconds`: what that cost.
    """

    plan: dict[str, Any]
    context: int
    positions: int
    tokens: int
    flops: float
    seconds: float
    shards: list[AnswersEntry]


class TaughtText:
    """The answers of a folder, found by the tokens of a row. Memory: 16 bytes a chunk; the rest is mapped.

    Raises ``UserError`` for a missing or damaged shard (large ones are read once after each change).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, read_record(folder / META, AnswersMeta)
        entries = self.meta.shards
        check_files(Listed(folder / entry.path, entry.sha256, entry.size) for entry in entries)
        self._shards = [open_answers(folder / entry.path, self.meta.context) for entry in entries]
        keys_R = np.concatenate([shard.keys_R for shard in self._shards])
        order_R = np.argsort(keys_R, kind="stable")
        self._keys_R = keys_R[order_R]
        shards = np.repeat(np.arange(len(entries)), [entry.chunks for entry in entries])
        rows = np.concatenate([np.arange(entry.chunks) for entry in entries])
        self._places_R2 = np.stack([shards, rows], axis=1).astype(np.int32)[order_R]

    def answers(self, tokens_RL: np.ndarray) -> Answers:
        """The answers for rows of tokens; ``UserError`` for a row that was not taught."""
        keys_R = keys_of(tokens_RL)
        found_R = np.searchsorted(self._keys_R, keys_R)
        known_R = self._keys_R[np.minimum(found_R, len(self._keys_R) - 1)] == keys_R
        if not known_R.all():
            raise UserError(
                f"{self.folder}: the teacher was not asked about {int((~known_R).sum())} of {len(keys_R)} "
                f"rows of the training text: it has changed, or the run has; {remedy(self.folder / META)}"
            )
        parts = [
            self._shards[shard].answers.take(slice(row, row + 1)) for shard, row in self._places_R2[found_R]
        ]
        return joined(parts)
