"""Bits per byte over documents: the amount of text measured, intervals, and paired differences.

Two models are compared document by document, on the same documents: how hard a document is cancels out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stlm.errors import UserError
from stlm.evaluation.statistics import Interval, few_units, ratio_bootstrap
from stlm.integrity import check_beside
from stlm.report.names import difference_text, some
from stlm.report.results import CheckpointResult, Perplexity, PublishedResult, RunResult, TextRecord
from stlm.tokens.held_out import text_digest
from stlm.units import byte_size

_COLUMNS = ["component", "text", "nats", "n_bytes"]


@dataclass(frozen=True)
class Documents:
    """A checkpoint's documents of the test text, in order: arrays [documents].

    `text`: 64 bits of a hash of each document's text. `bits`: -log2 of its probability.
    """

    components: np.ndarray
    text: np.ndarray
    bits: np.ndarray
    n_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    def same_text(self, other: Documents) -> bool:
        """Whether both are of the same documents."""
        return np.array_equal(self.text, other.text) and np.array_equal(self.components, other.components)

    def of(self, component: str) -> Documents:
        """The documents of one component of a mix."""
        chosen = self.components == component
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
    """The bits per byte of one model minus those of another on the same documents.

    `interval`: 95%, paired, over documents; None for a single document. `few`: so few documents that it is
    too narrow.
    """

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
    found = Documents(components, numbers[0], numbers[1] / log(2), numbers[2])
    if measured is not None and (
        abs(found.bits_per_byte / measured.bits_per_byte - 1) > 1e-9
        or text_digest(found.text, components.tolist()) != measured.text_sha256
    ):
        raise UserError(
            f"{path} gives {found.bits_per_byte:.6f} bits per byte of {len(found)} documents at step {step}, "
            f"evaluation.json beside it {measured.bits_per_byte:.6f} of {measured.documents}, or other text"
        )
    return found


def documents_of(result: RunResult | PublishedResult) -> Documents | None:
    """The documents of a run's last checkpoint or a published model; None if an earlier version kept none.

    Raises UserError naming the command that makes them again.
    """
    last = result.last if isinstance(result, RunResult) else result.checkpoint
    return checkpoint_documents(result.items_path.parent, last, result.evaluate_command)


def checkpoint_documents(folder: Path, checkpoint: CheckpointResult, command: str) -> Documents | None:
    """The documents of a checkpoint evaluated in `folder`; None if an earlier version kept none.

    Raises UserError naming `command`, which makes them again.
    """
    if checkpoint.perplexity.text_sha256 is None:
        return None
    check_beside(folder / "evaluation.json", "documents.parquet")
    try:
        return read_documents(folder / "documents.parquet", checkpoint.step, checkpoint.perplexity)
    except UserError as error:
        raise UserError(f"{error}: run `{command}`") from None


def mean_over_seeds(runs: Sequence[Documents]) -> Documents:
    """The mean bits of each document over runs on the same text."""
    first = runs[0]
    bits = np.mean([run.bits for run in runs], axis=0)
    return Documents(first.components, first.text, bits, first.n_bytes)


def compare(model: Documents, base: Documents) -> Difference | None:
    """How `model` differs from `base`; None where their documents differ."""
    if not model.same_text(base):
        return None
    both = Documents(model.components, model.text, model.bits - base.bits, model.n_bytes)
    return Difference(both.bits_per_byte, both.interval, both.few)


def compare_seeds(
    model: Mapping[int, Documents | None], base: Mapping[int, Documents | None]
) -> Difference | None:
    """How a variant differs from the baseline, each given as seed -> documents: over common seeds, if any.

    None where the documents of two runs differ, or an earlier version of STLM kept none.
    """
    seeds = [seed for seed in model if seed in base]
    pairs = [model[s] for s in seeds] or list(model.values()), [base[s] for s in seeds] or list(base.values())
    runs = [run for side in pairs for run in side if run is not None]
    if len(runs) < sum(map(len, pairs)) or not all(run.same_text(runs[0]) for run in runs):
        return None
    return compare(*map(mean_over_seeds, pairs))


def amount(text: TextRecord) -> str:
    """The amount of text behind a figure: 44 of 297 documents, 715.3 kB of 4.801 MB."""
    if text.documents is None or text.bytes is None:
        return "an amount of text that was not recorded"
    total, whole = text.documents_total, text.bytes_total
    documents = f"{text.documents:,}" + ("" if total is None else f" of {total:,}")
    size = byte_size(text.bytes, digits=4) + ("" if whole is None else f" of {byte_size(whole, digits=4)}")
    return f"{documents} document{'s'[: (total or text.documents) > 1]}, {size}"


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


def interval_text(interval: Interval | None, few: bool = False, signed: bool = False) -> str:
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
