"""Bits per byte over documents: the amount of text measured, intervals, and paired differences.

Two models are compared document by document, on the same documents: how hard a document is cancels out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stlm.errors import UserError
from stlm.evaluation.statistics import Interval, few_units, ratio_bootstrap
from stlm.integrity import check_listed
from stlm.report.names import difference_text, plural, some
from stlm.report.schema import CheckpointResult, Perplexity, TextRecord
from stlm.tokens.held_out import text_digest
from stlm.units import byte_size

_COLUMNS = ["component", "text", "nats", "n_bytes"]


@dataclass(frozen=True)
class Documents:
    """A checkpoint's documents of the test text, in order: arrays [documents]."""

    components: np.ndarray
    text: np.ndarray  # 64 bits of a hash of each document's text
    bits: np.ndarray  # -log2 of its probability
    n_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    def same_text(self, other: Documents) -> bool:
        """Whether both are of the same documents."""
        return np.array_equal(self.text, other.text) and np.array_equal(self.components, other.components)

    def of(self, component: str) -> Documents:
        """The documents of one component of a mix, or `all` of them."""
        chosen = (self.components == component) | (component == "all")
        return Documents(self.components[chosen], self.text[chosen], self.bits[chosen], self.n_bytes[chosen])

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of all documents together."""
        return float(self.bits.sum() / self.n_bytes.sum())

    @property
    def interval(self) -> Interval | None:
        """The 95% interval of bits per byte over documents; None where a component has a single document."""
        return ratio_bootstrap(self.bits, self.n_bytes, self.components)

    @property
    def few(self) -> bool:
        """Whether a component has so few documents that the interval is too narrow."""
        return few_units(self.components)


class Difference(NamedTuple):
    """The bits per byte of one model minus those of another, paired; interval and `few` as of `Documents`."""

    value: float
    interval: Interval | None
    few: bool


def read_documents(
    path: Path, step: int, measured: Perplexity | None = None, run: str | None = None
) -> Documents:
    """The documents of a documents.parquet at the checkpoint of `step`, of `run` where it has several.

    `measured` are their figures in evaluation.json. Raises UserError where the file is missing, unreadable,
    or disagrees with them.
    """
    try:
        rows = [("step", "==", step), *([("run", "==", run)] if run is not None else [])]
        table = pq.read_table(path, columns=_COLUMNS, filters=rows)
        components = np.array(table["component"].cast(pa.string()).to_pylist(), dtype=str)
        numbers = [table[name].to_numpy() for name in _COLUMNS[1:]]
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    kinds = [array.dtype.kind for array in numbers]
    if kinds != ["u", "f", "i"] or not np.isfinite(numbers[1]).all() or (numbers[2] < 0).any():
        raise UserError(f"{path} is not what `stlm evaluate` writes: text, nats or n_bytes are no numbers")
    if not len(components) or not numbers[2].sum():
        raise UserError(f"{path} has no text of step {step}")
    documents = Documents(components, numbers[0], numbers[1] / log(2), numbers[2])
    if measured is not None and (
        abs(documents.bits_per_byte / measured.bits_per_byte - 1) > 1e-9
        or text_digest(documents.text, components.tolist()) != measured.text_sha256
    ):
        raise UserError(
            f"{path} gives {documents.bits_per_byte:.6f} bits per byte of {len(documents)} documents at step "
            f"{step}, evaluation.json beside it {measured.bits_per_byte:.6f} of {measured.documents}, or "
            "other text"
        )
    return documents


def documents_of(
    record: Path, path: Path, last: CheckpointResult, command: str, run: str | None = None
) -> Documents | None:
    """The documents of the checkpoint `last` in `path`, which `record` lists.

    None if an earlier version kept none. Raises UserError naming `command`, which makes them again, where
    they are missing or disagree with `last`.
    """
    if last.perplexity.text_sha256 is None:
        return None
    check_listed(record, path.name)
    try:
        return read_documents(path, last.step, last.perplexity, run)
    except UserError as error:
        raise UserError(f"{error}: run `{command}`") from None


def mean_documents(runs: Sequence[Documents | None]) -> Documents | None:
    """The mean bits of each document over `runs`; None where one has no documents, or others."""
    first = runs[0]
    if first is None or any(run is None or not run.same_text(first) for run in runs):
        return None
    bits = np.mean([run.bits for run in runs], axis=0)
    return Documents(first.components, first.text, bits, first.n_bytes)


def compare(model: Documents | None, base: Documents | None) -> Difference | None:
    """How `model` differs from `base`; None where their documents differ, or are not there."""
    if model is None or base is None or not model.same_text(base):
        return None
    both = Documents(model.components, model.text, model.bits - base.bits, model.n_bytes)
    return Difference(both.bits_per_byte, both.interval, both.few)


@dataclass
class TextScores:
    """A variant's last checkpoints and their documents, by seed; a published model has the seed None."""

    label: str
    last: dict[int | None, CheckpointResult] = field(default_factory=dict)
    documents: dict[int | None, Documents | None] = field(default_factory=dict)

    @property
    def text(self) -> Perplexity:
        """The first seed's figures, with the amount of text."""
        return next(iter(self.last.values())).perplexity

    @property
    def bits(self) -> dict[int | None, float]:
        """Bits per byte of test text by seed."""
        return {seed: last.perplexity.bits_per_byte for seed, last in self.last.items()}

    @property
    def few(self) -> bool:
        """Whether intervals over its documents are too narrow, as there are too few."""
        return any(documents is not None and documents.few for documents in self.documents.values())

    def compare(self, base: TextScores) -> Difference | None:
        """The paired difference from `base` over documents, of the seeds that both have, or of all.

        None where the documents of two runs differ, or an earlier version of STLM kept none of one: an
        interval of the other seeds alone would be of another difference than that of all, which tables show.
        """
        seeds = [seed for seed in self.documents if seed in base.documents]
        pair = ([one.documents[s] for s in seeds or one.documents] for one in (self, base))
        return compare(*map(mean_documents, pair))


def amount(text: TextRecord) -> str:
    """The amount of text behind a figure: 44 of 297 documents, 715.3 kB of 4.801 MB."""
    if text.documents is None or text.bytes is None:
        return "an amount of text that was not recorded"
    documents, size = plural(text.documents, "document"), byte_size(text.bytes, digits=4)
    if text.documents_total is not None:
        documents = f"{text.documents:,} of {plural(text.documents_total, 'document')}"
    if text.bytes_total is not None:
        size += f" of {byte_size(text.bytes_total, digits=4)}"
    return f"{documents}, {size}"


def amount_note(texts: Iterable[tuple[str, TextRecord]], what: str = "Bits per byte") -> str:
    """The amount of text behind a table's figures, from each row's label and record, the baseline's first.

    It names the rows measured on other text than the baseline, whose figures do not compare with it.
    """
    rows = list(texts)
    base = rows[0][1]
    others = [label for label, text in rows if text is not base and not comparable(text, base)]
    note = f"{what}: of {amount(base)}."
    if others:
        note += f" Of other text than {rows[0][0]}, and not comparable with it: {some(others)}."
    return note


def comparable(text: TextRecord, base: TextRecord) -> bool:
    """Whether two figures of one corpus were measured on the same text, as far as that was recorded."""
    return text.same_text(base) or (text.bytes is None and base.bytes is None)


def interval_text(interval: tuple[float, float] | None, few: bool = False, signed: bool = False) -> str:
    """An interval of bits per byte, marked if there are few documents: [1.95, 2.03]‡; a dash for None."""
    if interval is None:
        return "–"
    low, high = (difference_text(bound) if signed else f"{bound:.3f}" for bound in interval)
    return f"[{low}, {high}]{FEW if few else ''}"


# After an interval of so few documents that it is too narrow.
FEW = "‡"
FEW_NOTE = (
    f"{FEW}: of fewer than ten documents of a component; such an interval holds the true value too seldom."
)
