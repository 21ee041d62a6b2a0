"""A variant's validation curve over its seeds, and where along it a cost is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stlm.report.results import RunResult, TrainRecord
from stlm.study.runs import Study

Cost = Literal["tokens", "flops", "seconds"]
COSTS: tuple[Cost, ...] = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Curve:
    """Bits per byte on held-out text against the costs of training: arrays [points], in order.

    Means over the seeds at the points of the first. `by_seed`: the tokens and bits per byte of each.
    """

    tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    bits: np.ndarray
    by_seed: Mapping[int, tuple[np.ndarray, np.ndarray]]

    def cost(self, cost: Cost) -> np.ndarray:
        """The points' place on the axis of `cost`, [points]."""
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}[cost]

    def end(self, cost: Cost) -> float:
        """What the whole training cost, to its last validation."""
        return float(self.cost(cost)[-1])

    @property
    def last(self) -> dict[int, float]:
        """Each seed's bits per byte at the end of its training."""
        return {seed: float(bits[-1]) for seed, (_, bits) in self.by_seed.items()}

    def at(self, cost: Cost, place: float) -> dict[int, float] | None:
        """Each seed's bits per byte where the variant has cost `place`, by linear interpolation.

        Seeds are read at one number of tokens, since their times differ by chance alone. None outside of
        what was measured.
        """
        axis = self.cost(cost)
        if not axis[0] <= place <= axis[-1]:
            return None
        tokens = np.interp(place, axis, self.tokens)
        return {seed: float(np.interp(tokens, *own)) for seed, own in self.by_seed.items()}


@dataclass(frozen=True)
class Variant:
    """A variant that was validated, and how it compares with the baseline.

    `train`: its first seed's record. `curve`: on its validation text. `beside` and `reference`: its curve and
    the baseline's on the same text, None where there is none; tokens are those of the baseline's tokenizer
    that hold as much text. `shifted`: only test text is the same, and both are shifted to end at their values
    on it, which `test` has by seed. `same_machine`: on the baseline's device, with its number of threads and
    processes and with kernels if it had them, so that seconds compare. `spikes`: loss spikes of all seeds;
    None where no one looked.
    """

    train: TrainRecord
    curve: Curve
    test: Mapping[int, float]
    flops_per_token: float
    same_tokens: bool
    beside: Curve | None
    reference: Curve | None
    shifted: bool
    same_machine: bool
    spikes: int | None

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len(self.curve.by_seed)

    def compares(self, cost: Cost) -> bool:
        """Whether its place on the axis of `cost` means what the baseline's does."""
        return self.beside is not None and (cost != "seconds" or self.same_machine)


def read_curve(
    own: Sequence[RunResult],
    results: Mapping[str, RunResult],
    shifted: bool = False,
    token: float = 1.0,
) -> Curve | None:
    """The curve of the runs of one variant, of those of `results`; None where one was never validated.

    What was spent on the runs that one depended on is counted. `shifted`: each curve is moved up or
    down to end at its value on test text. `token`: what a token counts for.
    """
    points: dict[int, np.ndarray] = {}
    for result in own:
        rows = result.curve[["tokens", "seconds", "val_bits_per_byte"]].dropna()
        rows = rows[np.isfinite(rows["val_bits_per_byte"])]
        if not len(rows):
            return None
        tokens, seconds, bits = rows.to_numpy(float).T
        before = _before(result, results)
        if shifted:
            bits += result.last.perplexity.bits_per_byte - bits[-1]
        flops = before["flops"] + tokens * flops_per_token(result)
        tokens = token * (before["tokens"] + tokens)
        points[result.train.seed] = np.stack([tokens, flops, before["seconds"] + seconds, bits])
    tokens = next(iter(points.values()))[0]
    flops, seconds, bits = (
        np.mean([np.interp(tokens, one[0], one[row]) for one in points.values()], axis=0) for row in (1, 2, 3)
    )
    return Curve(tokens, flops, seconds, bits, {seed: (one[0], one[3]) for seed, one in points.items()})


def spent(result: RunResult, results: Mapping[str, RunResult]) -> dict[Cost, float]:
    """What a run's weights have cost: its training, and that of the runs that it depended on."""
    train, before = result.train, _before(result, results)
    own: dict[Cost, float] = {"tokens": train.tokens, "flops": train.flops, "seconds": train.seconds}
    return {cost: before[cost] + own[cost] for cost in COSTS}


def _before(result: RunResult, results: Mapping[str, RunResult]) -> dict[Cost, float]:
    """What was spent on the runs that a run depended on, on each once.

    Tokens are those that its weights have read, of the run that they started from alone.
    """
    needed: dict[str, TrainRecord] = {}
    waiting = [result.train]
    while waiting:
        for one in waiting.pop().depends.values():
            if one.run not in needed:
                needed[one.run] = results[one.run].train
                waiting.append(needed[one.run])
    start = result.train.start
    return {
        "tokens": spent(results[start.run], results)["tokens"] if start else 0.0,
        "flops": sum(train.flops for train in needed.values()),
        "seconds": sum(train.seconds for train in needed.values()),
    }


def flops_per_token(result: RunResult) -> float:
    """Training FLOPs of a token, or of a chunk of bytes."""
    return result.train.flops / result.train.tokens


def read_variants(study: Study, results: Mapping[str, RunResult]) -> list[Variant]:
    """Every variant that was validated, the baseline first; empty where there is nothing to compare."""
    runs: dict[str, list[RunResult]] = {}
    for result in results.values():
        runs.setdefault(result.train.variant, []).append(result)
    base = runs[results[study.baseline].train.variant]
    found = [
        _variant(curve, own, base, results)
        for own in runs.values()
        if (curve := read_curve(own, results)) is not None
    ]
    return found if len(found) > 1 and found[0].train.variant == base[0].train.variant else []


def _variant(
    curve: Curve, own: Sequence[RunResult], base: Sequence[RunResult], results: Mapping[str, RunResult]
) -> Variant:
    train = own[0].train
    token = token_length(own[0], base[0])
    validation = _same_validation(train, base[0].train)
    shifted = not validation and _same_test(own[0], base[0])
    beside = reference = None
    if token is not None and (validation or shifted):
        beside = read_curve(own, results, shifted, token)
        reference = read_curve(base, results, shifted)
    spikes = [result.train.loss_spikes for result in own]
    return Variant(
        train=train,
        curve=curve,
        test={result.train.seed: result.last.perplexity.bits_per_byte for result in own},
        flops_per_token=flops_per_token(own[0]),
        same_tokens=train.tokenizer == base[0].train.tokenizer,
        beside=beside if reference is not None else None,
        reference=reference,
        shifted=shifted,
        same_machine=all(machine(result.train) == machine(base[0].train) for result in own),
        spikes=None if None in spikes else sum(len(seen) for seen in spikes),
    )


def _same_validation(train: TrainRecord, base: TrainRecord) -> bool:
    """Whether both were validated on the same documents."""
    if train.corpus != base.corpus or (train.validation is None) != (base.validation is None):
        return False
    if train.validation is not None and base.validation is not None:
        return train.validation.text_sha256 == base.validation.text_sha256
    # Of earlier versions, which drew so many documents, or so many tokens, by the tokenizer.
    documents, tokens = (
        (train.training.get(key), base.training.get(key))
        for key in ("validation_documents", "validation_tokens")
    )
    if documents[0] != documents[1]:
        return False
    return documents[0] is not None or (train.tokenizer == base.tokenizer and tokens[0] == tokens[1])


def _same_test(own: RunResult, base: RunResult) -> bool:
    """Whether both were measured on the same test text, whatever their tokenizers."""
    return own.train.corpus == base.train.corpus and own.last.perplexity.same_text(base.last.perplexity)


def token_length(own: RunResult, base: RunResult) -> float | None:
    """How many of `base`'s tokens hold as much text as one of `own`'s; None where no one counted."""
    if own.train.tokenizer == base.train.tokenizer:
        return 1.0
    lengths = _bytes_per_token(own), _bytes_per_token(base)
    return lengths[0] / lengths[1] if all(lengths) else None


def _bytes_per_token(result: RunResult) -> float | None:
    """Mean bytes of a token, or of a chunk, in the test text; None: written by an earlier version."""
    measured = result.last.perplexity
    return measured.bytes / measured.tokens if measured.bytes and measured.tokens else None


def machine(train: TrainRecord) -> tuple[str, str | None, int | None, int, bool]:
    """What must be equal for seconds to compare: device, processor, its threads, processes, kernels."""
    return train.device, train.processor, train.threads, train.processes, train.kernels
