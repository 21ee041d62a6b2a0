"""A variant's validation curve: the mean over its seeds against what training cost."""

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

    `costs` and `bits` are means over the seeds at the points of the first seed. `by_seed`: the tokens and the
    bits per byte of each seed.
    """

    costs: Mapping[Cost, np.ndarray]
    bits: np.ndarray
    by_seed: Mapping[int, tuple[np.ndarray, np.ndarray]]

    def cost(self, cost: Cost) -> np.ndarray:
        """What training had cost at each point, [points]."""
        return self.costs[cost]

    def end(self, cost: Cost) -> float:
        """What training cost up to the last validation."""
        return float(self.costs[cost][-1])

    @property
    def last(self) -> dict[int, float]:
        """Each seed's bits per byte at the end of its training."""
        return {seed: float(bits[-1]) for seed, (_, bits) in self.by_seed.items()}

    def at(self, cost: Cost, place: float) -> dict[int, float] | None:
        """Each seed's bits per byte where training has cost `place`, by linear interpolation.

        Seeds are compared at equal tokens, since their times differ by chance. None outside of the range
        that was measured.
        """
        axis = self.costs[cost]
        if not axis[0] <= place <= axis[-1]:
            return None
        tokens = np.interp(place, axis, self.costs["tokens"])
        return {seed: float(np.interp(tokens, *curve)) for seed, curve in self.by_seed.items()}


@dataclass(frozen=True)
class Variant:
    """A variant that was validated, and how it compares with the baseline.

    `train`: the record of its first seed. `curve`: on its own validation text. `beside` and `reference`: the
    curves of the variant and of the baseline on one text, None where they share none; their tokens are
    converted to those of the baseline's tokenizer, by the text they hold. `shifted`: they share test text
    only, and both curves are shifted to end at their values on it. `test`: these values by seed.
    `same_machine`: trained on the baseline's device, threads, processes and kernels, so that seconds compare.
    `spikes`: the number of loss spikes of all seeds; None where they were not looked for.
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
        """Whether its costs compare with the baseline's."""
        return self.beside is not None and (cost != "seconds" or self.same_machine)


def mean_curve(
    runs: Sequence[RunResult],
    results: Mapping[str, RunResult],
    shifted: bool = False,
    token: float = 1.0,
) -> Curve | None:
    """The curve of one variant's `runs`, among `results`; None where a run was never validated.

    The cost of the runs that one depended on is included. `shifted`: each curve is moved up or down to
    end at its value on test text. `token`: how many tokens each token counts as.
    """
    points: dict[int, np.ndarray] = {}
    for result in runs:
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
    *costs, bits = (
        np.mean([np.interp(tokens, seed[0], seed[row]) for seed in points.values()], axis=0)
        for row in range(4)
    )
    by_seed = {seed: (rows[0], rows[3]) for seed, rows in points.items()}
    return Curve(dict(zip(COSTS, costs, strict=True)), bits, by_seed)


def spent(result: RunResult, results: Mapping[str, RunResult]) -> dict[Cost, float]:
    """What a run's weights have cost: its training and that of the runs it depended on."""
    train, before = result.train, _before(result, results)
    trained: dict[Cost, float] = {"tokens": train.tokens, "flops": train.flops, "seconds": train.seconds}
    return {cost: before[cost] + trained[cost] for cost in COSTS}


def _before(result: RunResult, results: Mapping[str, RunResult]) -> dict[Cost, float]:
    """What the runs that a run depended on had cost, each counted once.

    Tokens are those that its weights have read, hence only those of the run they started from.
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
    """Training FLOPs per token, or per chunk of bytes."""
    return result.train.flops / result.train.tokens


def read_variants(study: Study, results: Mapping[str, RunResult]) -> list[Variant]:
    """Every variant that was validated, the baseline first; empty where there is nothing to compare."""
    runs: dict[str, list[RunResult]] = {}
    for result in results.values():
        runs.setdefault(result.train.variant, []).append(result)
    base = runs[results[study.baseline].train.variant]
    curves = {name: mean_curve(own, results) for name, own in runs.items()}
    if curves[base[0].train.variant] is None:
        return []
    found = [_variant(curve, runs[name], base, results) for name, curve in curves.items() if curve]
    return found if len(found) > 1 else []


def _variant(
    curve: Curve, runs: Sequence[RunResult], base: Sequence[RunResult], results: Mapping[str, RunResult]
) -> Variant:
    train = runs[0].train
    token = token_length(runs[0], base[0])
    validation = _same_validation(train, base[0].train)
    shifted = not validation and _same_test(runs[0], base[0])
    beside = reference = None
    if token is not None and (validation or shifted):
        beside = mean_curve(runs, results, shifted, token)
        reference = mean_curve(base, results, shifted)
    spikes = [result.train.loss_spikes for result in runs]
    return Variant(
        train=train,
        curve=curve,
        test={result.train.seed: result.last.perplexity.bits_per_byte for result in runs},
        flops_per_token=flops_per_token(runs[0]),
        same_tokens=train.tokenizer == base[0].train.tokenizer,
        beside=beside if reference is not None else None,
        reference=reference,
        shifted=shifted,
        same_machine=all(machine(result.train) == machine(base[0].train) for result in runs),
        spikes=None if None in spikes else sum(map(len, spikes)),
    )


def _same_validation(train: TrainRecord, base: TrainRecord) -> bool:
    """Whether both were validated on the same documents."""
    if train.corpus != base.corpus or (train.validation is None) != (base.validation is None):
        return False
    if train.validation is not None and base.validation is not None:
        return train.validation.text_sha256 == base.validation.text_sha256
    # Earlier versions drew a number of documents, or of tokens, and the tokens depend on the tokenizer.
    documents, tokens = (
        (train.training.get(key), base.training.get(key))
        for key in ("validation_documents", "validation_tokens")
    )
    if documents[0] != documents[1]:
        return False
    return documents[0] is not None or (train.tokenizer == base.tokenizer and tokens[0] == tokens[1])


def _same_test(run: RunResult, base: RunResult) -> bool:
    """Whether both were measured on the same test text, whatever their tokenizers."""
    return run.train.corpus == base.train.corpus and run.last.perplexity.same_text(base.last.perplexity)


def token_length(run: RunResult, base: RunResult) -> float | None:
    """How many of `base`'s tokens hold as much text as one of `run`'s; None where it was not recorded."""
    if run.train.tokenizer == base.train.tokenizer:
        return 1.0
    lengths = _bytes_per_token(run), _bytes_per_token(base)
    return lengths[0] / lengths[1] if all(lengths) else None


def _bytes_per_token(result: RunResult) -> float | None:
    """Mean bytes of a token, or of a chunk, in the test text; None in records of earlier versions."""
    measured = result.last.perplexity
    return measured.bytes / measured.tokens if measured.bytes and measured.tokens else None


def machine(train: TrainRecord) -> tuple[str, str | None, int | None, int, bool]:
    """What must be equal for seconds to compare: device, processor, threads, processes, kernels."""
    return train.device, train.processor, train.threads, train.processes, train.kernels
