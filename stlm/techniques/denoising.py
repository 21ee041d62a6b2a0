"""Fill in the middle (Bavarian et al. 2022) and UL2's mixture of denoisers (Tay et al. 2022).

Shapes: B rows, L positions, M = L + 1 tokens of a row with its last target, N tokens of a document's part.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from stlm.model.config import ModelConfig
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.documents import Documents
from stlm.model.prefixes import Prefixes, pair_flops
from stlm.model.rows import Rows, document_parts, drawn_shares
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.distributed import Group

# The tokens around the parts of a text whose middle is filled in.
_INFILL_MARKERS = 3


class Denoiser(BaseModel):
    """A part of the rows, and what is done in each of them with the longest part of a document. Keys of other
    tasks are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Literal["infill", "prefix", "spans"] = Field(
        description="`infill`: the middle is written after what is before and behind it. `prefix`: the "
        "beginning is visible in both directions, and the rest is predicted. `spans`: spans are taken out, "
        "and written after the text without them, which is visible in both directions."
    )
    share: float = Field(gt=0, le=1, description="Share of the rows.")
    order: Literal["psm", "spm"] | None = Field(
        None,
        description="Of `infill`: prefix, suffix, middle, or suffix, prefix, middle; null: psm.",
    )
    mean: int | None = Field(None, ge=1, description="Of `spans`: their mean length in tokens; null: 3.")
    rate: float | None = Field(
        None, gt=0, lt=1, description="Of `spans`: the share of the tokens in them; null: 0.15."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> Denoiser:
        for key, task in (("order", "infill"), ("mean", "spans"), ("rate", "spans")):
            if getattr(self, key) is not None and self.task != task:
                raise ValueError(
                    f"{key}: found {getattr(self, key)} with task: {self.task}, expected null: only task: "
                    f"{task} has one"
                )
        return self

    def __str__(self) -> str:
        return f"{self.task} {self.share:g}"

    def spans_of(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens, at least 2, are in spans, and how many spans there are (T5, Raffel et
        al. 2020, section 3.1.4)."""
        inside = min(max(1, round(length * (self.rate or 0.15))), length - 1)
        return inside, min(max(1, round(inside / (self.mean or 3))), inside, length - inside)

    def written(self, length: int) -> int:
        """The tokens that become of `length` of them, with their markers."""
        if self.task == "prefix":
            return length
        return length + (_INFILL_MARKERS if self.task == "infill" else 2 * self.spans_of(length)[1])

    def longest(self, room: int) -> int:
        """The most tokens of a text that `room` places hold once they are written; below 2: none."""
        length = room
        while length > 1 and self.written(length) > room:
            length -= 1
        return length


class Added(NamedTuple):
    """The ids of the added tokens: the first of all, which are the markers of `infill` if there are any; that
    of the first entry's own marker; the first sentinel; and the id after the last."""

    first: int
    entries: int
    sentinels: int
    end: int


class Part(NamedTuple):
    """What is written in place of a document's part: its tokens, of which the first `visible` ones are
    visible in both directions, and the indices of those after which an end of text is to be predicted."""

    tokens: list[int]
    visible: int = 0
    ends: Sequence[int] = ()


class Denoising(Technique):
    """In a share of the rows a part of a document is rearranged: its middle is written last, its beginning is
    visible in both directions, or spans are taken out and written behind it (fill in the middle, Bavarian et
    al. 2022; UL2, Tay et al. 2022). The other rows are the plain model's. It is scored and writes as any
    causal model; trained with `infill`, it also writes what stands between two texts."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "batches", "cache", "export", "packing", "sharing"}
    )

    mixture: tuple[Denoiser, ...] = Field(
        (Denoiser(task="infill", share=0.5),),
        description="Shares of the rows, and what is done with them: see `techniques.denoising.mixture`. The "
        "rest of the rows is plain. Empty: the plain model.",
    )
    markers: bool = Field(
        False, description="Whether each part begins with a token that tells its entry (UL2's mode tokens)."
    )

    # The end-of-text token, and the ids of the added tokens.
    _eot: int = PrivateAttr(default=-1)
    _added: Added | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _shares_fit(self) -> Denoising:
        total = sum(entry.share for entry in self.mixture)
        if total > 1 + 1e-9:
            raise ValueError(f"mixture: found shares whose sum is {total:g}, expected at most 1")
        return self

    def neutral(self) -> bool:
        """Whether all rows are plain: then nothing is added."""
        return not self.mixture

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        for number, entry in enumerate(self.mixture):
            if self._longest(entry, run.model.context, 0) < 2:
                least = next(length for length in itertools.count() if self._longest(entry, length, 0) > 1)
                raise ValueError(
                    f"mixture.{number}: found task: {entry.task} with model.context: {run.model.context}, "
                    f"which has no room for two tokens with their markers; expected at least {least}"
                )

    def added(self, config: ModelConfig) -> Added:
        """The ids of the added tokens of a model."""
        tasks = [entry.task for entry in self.mixture]
        entries = config.vocab_size + (_INFILL_MARKERS if "infill" in tasks else 0)
        sentinels = entries + (len(self.mixture) if self.markers else 0)
        spans = [
            entry.spans_of(self._longest(entry, config.context, 0))[1]
            for entry in self.mixture
            if entry.task == "spans"
        ]
        return Added(config.vocab_size, entries, sentinels, sentinels + max(spans, default=0))

    def build(self, model: Transformer) -> None:
        """See `Technique.build`: markers and sentinels are added tokens."""
        added = self.added(model.config)
        if added.end > added.first:
            model.add_tokens(added.end - added.first)

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`."""
        from stlm.tokens.shards import read_meta

        self.know(run.model, read_meta(run.tokens_folder).eot)

    def know(self, config: ModelConfig, eot: int) -> None:
        """Read text with the end-of-text token `eot` from now on, for a model of `config`."""
        self._eot, self._added = eot, self.added(config)

    # Rows

    def rows(self, rows: Rows, step: int, steps: int) -> Rows:
        """See `Technique.rows`. Rows are composed on the CPU, for which a GPU waits."""
        if self.neutral():
            return rows
        (B, L), device = rows.tokens_BL.shape, rows.tokens_BL.device
        entry_B = drawn_shares(B, [entry.share for entry in self.mixture]).tolist()
        if min(entry_B) == len(self.mixture):
            return rows
        numbers = np.random.default_rng(int(torch.randint(2**62, ())))
        row_BM = rows.whole_BM.cpu().numpy()
        composed = [
            self.compose(row_M, number, numbers) if number < len(self.mixture) else plain(row_M)
            for row_M, number in zip(row_BM, entry_B, strict=True)
        ]
        tokens_BL, targets_BL, counted_BL, begin_B, end_B = (
            torch.from_numpy(np.stack(column)).to(device) for column in zip(*composed, strict=True)
        )
        layout = None if rows.layout is None else Documents.of(tokens_BL, self._eot)
        if any(row.end for row in composed):
            layout = Prefixes(end_B, L, begin_B, layout)
        return Rows(tokens_BL, targets_BL, layout, counted_BL)

    def compose(self, row_M: np.ndarray, number: int, numbers: np.random.Generator) -> Row:
        """A row, in which the longest part of a document is written as the entry `number` says.

        What stands before the part keeps its place. The part loses what does not fit behind it, and then what
        follows it does. Too short a part is left as it is.
        """
        entry, M = self.mixture[number], len(row_M)
        longest = longest_part(row_M, self._eot)
        begin, after = longest.start, row_M[longest.stop :]
        length = min(longest.stop - begin, self._longest(entry, M - 1, begin))
        if length < 2:
            return plain(row_M)
        part = self.write(row_M[begin : begin + length].tolist(), number, numbers)
        if entry.task != "prefix":  # what is written ends with an end of text
            after = np.concatenate([[self._eot], after[1:]])
        whole = np.concatenate([row_M[:begin], part.tokens, after])[:M]
        counted_L = np.arange(1, M) < len(whole)
        # Ends of text fill the few places that may be left.
        whole = np.concatenate([whole, np.full(M - len(whole), self._eot)]).astype(np.int64)
        targets_L = whole[1:].copy()
        counted_L &= targets_L < self._added.first
        end = begin + part.visible if part.visible else 0
        counted_L[max(0, begin - 1) : max(0, end - 1)] = False
        for place in part.ends:
            targets_L[begin + place], counted_L[begin + place] = self._eot, True
        targets_L[targets_L >= self._added.first] = self._eot  # not counted
        return Row(whole[:-1], targets_L, counted_L, begin if end else 0, end)

    def _longest(self, entry: Denoiser, length: int, begin: int) -> int:
        """The most tokens of a part that begins there that are written in a row of `length` positions."""
        # The part's last token has its target in the row.
        return entry.longest(length - begin - self.markers + (entry.task == "prefix"))

    def write(self, text: list[int], number: int, numbers: np.random.Generator) -> Part:
        """A document's part as the entry `number` writes it."""
        entry, marker = self.mixture[number], self._marker(number, self._added)
        if entry.task == "infill":
            first, second = sorted(numbers.integers(0, len(text) + 1, 2).tolist())
            around = infill(entry, self._added, text[:first], text[second:])
            return Part([*marker, *around, *text[first:second]])
        if entry.task == "prefix":
            return Part([*marker, *text], len(marker) + int(numbers.integers(1, len(text))))
        inside, spans = entry.spans_of(len(text))
        outer = cut(len(text) - inside, spans, numbers)
        inner = cut(inside, spans, numbers)
        read, written, ends, place = list(marker), [], [], 0
        for sentinel, (kept, taken) in enumerate(zip(outer, inner, strict=True), self._added.sentinels):
            read += [*text[place : place + kept], sentinel]
            written += [sentinel, *text[place + kept : place + kept + taken]]
            ends.append(len(written) - 1)
            place += kept + taken
        return Part(read + written, len(read), [len(read) + end for end in ends])

    def _marker(self, number: int, added: Added) -> list[int]:
        return [added.entries + number] if self.markers else []

    # Cost and generation

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: attention over the pairs of positions that causal attention
        leaves out, as if each row were one document. The head is counted at all positions."""
        if self.neutral():
            return 0.0
        L, model = run.model.context, build_on_meta(run.model, (self,))
        pairs = 0.0
        for entry in self.mixture:
            length = self._longest(entry, L, 0)
            if entry.task == "prefix":
                pairs += entry.share * length**2 / 6  # the mean of n^2 / 2 over prefixes of n tokens
            elif entry.task == "spans":
                inside, spans = entry.spans_of(length)
                pairs += entry.share * (length - inside + spans + self.markers) ** 2 / 2
        return TRAINING_PASSES * pair_flops(model) * pairs / L

    def infilled(
        self, config: ModelConfig, eot: int, prefix: Sequence[int], suffix: Sequence[int]
    ) -> list[int] | None:
        """See `Technique.infilled`: as the first entry of that task writes it."""
        found = [number for number, entry in enumerate(self.mixture) if entry.task == "infill"]
        if not found:
            return None
        added, entry = self.added(config), self.mixture[found[0]]
        return [eot, *self._marker(found[0], added), *infill(entry, added, prefix, suffix)]


class Row(NamedTuple):
    """A row's inputs, targets, which of them count [L each], and the part that is visible in both directions,
    from `begin` to before `end` (0: none)."""

    tokens: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    begin: int
    end: int


def infill(entry: Denoiser, added: Added, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
    """The tokens after which an entry of the task `infill` writes the middle."""
    pre, suf, mid = range(added.first, added.first + _INFILL_MARKERS)
    if entry.order == "spm":
        return [pre, suf, *suffix, mid, *prefix]
    return [pre, *prefix, suf, *suffix, mid]


def plain(row_M: np.ndarray) -> Row:
    """A row as it is."""
    return Row(row_M[:-1], row_M[1:], np.ones(len(row_M) - 1, dtype=bool), 0, 0)


def longest_part(row_M: np.ndarray, eot: int) -> slice:
    """Where the longest part of a document in a row lies, without ends of text."""
    return max(document_parts(row_M, eot), key=lambda part: part.stop - part.start)


def cut(total: int, parts: int, numbers: np.random.Generator) -> list[int]:
    """`total` divided into `parts` whole numbers of at least 1, each division as likely."""
    places = np.sort(numbers.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *places, total]).tolist()
