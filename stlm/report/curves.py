"""A variant's validation curve: the mean over its seeds against what training cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stlm.report.results import Results, RunResult
from stlm.report.schema import TrainRecord

Cost = Literal["tokens", "flops", "seconds"]
# The costs of a training, and their names in tables and plots.
COSTS: dict[Cost, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}


@dataclass(frozen=True)
class Curve:
    """Bits per byte on held-out text against the costs of training: arrays [points], in order."""

    costs: Mapping[Cost, np.ndarray]  # these and `bits`: means over the seeds at the points of the first
    bits: np.ndarray
    by_seed: Mapping[int, tuple[np.ndarray, np.ndarray]]  # tokens and bits per byte

    def end(self, cost: Cost) -> float:
        """What training cost up to the last validation."""
        return float(self.costs[cost][-1])

    @property
    def last(self) -> dict[int, float]:
        """Each seed's bits per byte at the end of its training."""
        return {seed: float(bits[-1]) for seed, (_, bits) in self.by_seed.items()}

    def at(self, cost: Cost, amount: float) -> dict[int, float] | None:
        """Each seed's bits per byte where training has cost `amount`, by linear interpolation.

        Seeds are compared at equal tokens, since their times differ by chance. None outside of the range
        that was measured.
        """
        axis = self.costs[cost]
        if not axis[0] <= amount <= axis[-1]:
            return None
        tokens = np.interp(amount, axis, self.costs["tokens"])
        return {seed: float(np.interp(tokens, *curve)) for seed, curve in self.by_seed.items()}


@dataclass(frozen=True)
class Variant:
    """A variant that was validated, and how it compares with the baseline.

    `aligned` and `baseline`: the curves of the variant and of the baseline on one text, None where they share
    none; their tokens are converted to those of the baseline's tokenizer, by the text they hold.
    """

    train: TrainRecord  # of its first seed
    curve: Curve  # on the validation text of the variant
    test: Mapping[int, float]  # bits per byte of test text by seed
    same_tokens: bool
    aligned: Curve | None
    baseline: Curve | None
    shifted: bool  # they share test text only: both curves are shifted to end at their values on it
    same_machine: bool  # as the baseline (see `machine`), so that seconds compare
    spikes: int | None  # the number of loss spikes of all seeds; None where they were not looked for

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len(self.curve.by_seed)

    def compares(self, cost: Cost) -> bool:
        """Whether its costs compare with the baseline's."""
        return self.aligned is not None and (cost != "seconds" or self.same_machine)


def mean_curve(
    runs: Sequence[RunResult], results: Results, shifted: bool = False, token: float = 1.0
) -> Curve | None:
    """The curve of one variant's `runs`, among `results`; None where a run was never validated, or has read
    no token (a published model as it is).

    The cost of the runs that one depended on is included. `shifted`: each curve is moved up or down to
    end at its value on test text. `token`: how many tokens each token counts as.
    """
    points: dict[int, np.ndarray] = {}
    for run in runs:
        rows = run.curve[["tokens", "seconds", "val_bits_per_byte"]].dropna()
        rows = rows[np.isfinite(rows["val_bits_per_byte"])]
        if not len(rows):
            return None
        tokens, seconds, bits = rows.to_numpy(float).T
        before = _cost_before(run, results)
        if not before["tokens"] + run.train.tokens:
            return None
        if shifted:
            bits += run.perplexity.bits_per_byte - bits[-1]
        done = tokens / run.train.tokens if run.train.tokens else np.ones_like(tokens)
        flops = before["flops"] + done * run.train.flops
        tokens = token * (before["tokens"] + tokens)
        points[run.train.seed] = np.stack([tokens, flops, before["seconds"] + seconds, bits])
    tokens = next(iter(points.values()))[0]
    *costs, bits = (
        np.mean([np.interp(tokens, seed[0], seed[row]) for seed in points.values()], axis=0)
        for row in range(4)
    )
    by_seed = {seed: (rows[0], rows[3]) for seed, rows in points.items()}
    return Curve(dict(zip(COSTS, costs, strict=True)), bits, by_seed)


def spent(run: RunResult, results: Results) -> dict[Cost, float]:
    """What a run's weights have cost: its training and that of the runs it depended on."""
    before = _cost_before(run, results)
    return {cost: before[cost] + getattr(run.train, cost) for cost in COSTS}


def _cost_before(run: RunResult, results: Results) -> dict[Cost, float]:
    """What the runs that a run depended on had cost, each counted once.

    Tokens are those that its weights have read, hence only those of the run they started from.
    """
    needed: dict[str, TrainRecord] = {}
    waiting = [run.train]
    while waiting:
        for dependency in waiting.pop().depends.values():
            if dependency.run is not None and dependency.run not in needed:
                needed[dependency.run] = results[dependency.run].train
                waiting.append(needed[dependency.run])
    start = run.train.start
    return {
        "tokens": spent(results[start.run], results)["tokens"] if start and start.run else 0.0,
        "flops": sum(train.flops for train in needed.values()),
        "seconds": sum(train.seconds for train in needed.values()),
    }


def read_variants(results: Results) -> list[Variant]:
    """Every variant that was validated, the baseline first; empty where there is nothing to compare."""
    curves = {name: mean_curve(runs, results) for name, runs in results.variants.items()}
    if curves[results.base.train.variant] is None:
        return []
    variants = [_variant(curve, results.variants[name], results) for name, curve in curves.items() if curve]
    return variants if len(variants) > 1 else []


def _variant(curve: Curve, runs: Sequence[RunResult], results: Results) -> Variant:
    train, base = runs[0].train, results.variants[results.base.train.variant]
    token = token_length(runs[0], base[0])
    validation = _same_validation(train, base[0].train)
    # Whatever their tokenizers.
    same_test = train.corpus == base[0].train.corpus and runs[0].perplexity.same_text(base[0].perplexity)
    shifted = not validation and same_test
    aligned = baseline = None
    if token is not None and (validation or shifted):
        aligned, baseline = mean_curve(runs, results, shifted, token), mean_curve(base, results, shifted)
    spikes = [run.train.loss_spikes for run in runs]
    return Variant(
        train=train,
        curve=curve,
        test={run.train.seed: run.perplexity.bits_per_byte for run in runs},
        same_tokens=train.tokenizer == base[0].train.tokenizer,
        aligned=aligned,
        baseline=baseline,
        shifted=shifted,
        same_machine=all(machine(run.train) == machine(base[0].train) for run in runs),
        spikes=None if None in spikes else sum(map(len, spikes)),
    )


def _same_validation(train: TrainRecord, base: TrainRecord) -> bool:
    """Whether both were validated on the same documents."""
    if train.corpus != base.corpus or (train.validation is None) != (base.validation is None):
        return False
    if train.validation is not None:
        return train.validation.text_sha256 == base.validation.text_sha256
    # Earlier versions drew a number of documents, or of tokens, and the tokens depend on the tokenizer.
    keys = ("validation_documents", "validation_tokens")
    drawn, base_drawn = ([one.training.get(key) for key in keys] for one in (train, base))
    same_tokens = train.tokenizer == base.tokenizer and drawn == base_drawn
    return same_tokens or (drawn[0] is not None and drawn[0] == base_drawn[0])


def token_length(run: RunResult, base: RunResult) -> float | None:
    """How many of `base`'s tokens hold as much text as one of `run`'s; None where it was not recorded."""
    if run.train.tokenizer == base.train.tokenizer:
        return 1.0
    texts = run.perplexity, base.perplexity
    if not all(text.bytes and text.tokens for text in texts):
        return None
    length, base_length = (text.bytes / text.tokens for text in texts)
    return length / base_length


def machine(train: TrainRecord) -> tuple[str, str | None, int | None, int, bool]:
    """What must be equal for seconds to compare: device, processor, threads, processes, kernels."""
    return train.device, train.processor, train.threads, train.processes, train.kernels
