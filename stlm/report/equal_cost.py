"""Variants compared with the baseline at equal parameters, training tokens, FLOPs and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

import numpy as np

from stlm.evaluation.statistics import SeedNoise, seed_noise
from stlm.report.curves import COSTS, Cost, Variant
from stlm.training.config import RECORD_KEYS

# Tolerances within which two costs (tokens or FLOPs), or two sizes, count as equal.
SAME_COST, SAME_SIZE = 0.01, 0.03
# Seconds of the same work differ from run to run by more than 1%.
SAME_TIME = 0.05
Kind = Literal["finished", "on the way", "ended sooner", "matched", "between sizes"]
# Keys that change only the size of a model, within the baseline's family.
_SIZE_KEYS = {"layers", "width", "heads", "kv_heads", "ffn_width"}
# Keys that may be tuned for each size, at equal tokens.
_TUNED_KEYS = {
    *("learning_rate", "matrix_learning_rate", "min_learning_rate"),
    *("batch_size", "accumulation", "steps", "warmup_steps"),
}
# Units of a training budget: two budgets are equal where either is.
_BUDGETS: tuple[Cost, ...] = ("tokens", "flops")


@dataclass(frozen=True)
class Pair:
    """Bits per byte by seed of a variant, and of the baseline (or its family) at an equal cost.

    `share`: that cost divided by the baseline's whole cost. `kind` for costs: both trainings are `finished`
    there; the variant is `on the way` through a longer training; or it `ended sooner` than the baseline. For
    parameters: `matched` by a model of that size, or `between sizes`. `flops`: the variant's training FLOPs
    divided by those of the size it is compared with. `same_budget`: these or the tokens are equal. `models`:
    the variants that are compared.
    """

    values: Mapping[int, float]
    references: Mapping[int, float]
    kind: Kind
    share: float = 1.0
    flops: float = 1.0
    same_budget: bool = True
    models: frozenset[str] = frozenset()

    @property
    def like_for_like(self) -> bool:
        """Whether both trainings are finished, at a cost that is the same."""
        return self.kind in ("finished", "matched") and self.same_budget

    @property
    def value(self) -> float:
        """The variant's mean over its seeds."""
        return mean(self.values.values())

    @property
    def differences(self) -> list[float]:
        """The variant's values minus the baseline's, seed by seed."""
        return [
            value - self.references[seed] for seed, value in self.values.items() if seed in self.references
        ]

    @property
    def difference(self) -> float:
        """The mean of the differences."""
        return mean(self.differences)


@dataclass(frozen=True)
class Row:
    """A variant and its comparison with the baseline at each equal cost (None: not comparable).

    `parameters`: with the baseline's architecture at the variant's size, trained on as many tokens. `both`:
    the same at equal training FLOPs, if the variant used as many. `family`, `equal_flops`: the variant is
    itself one of these sizes.
    """

    variant: Variant
    at: Mapping[Cost, Pair | None]
    parameters: Pair | None
    both: Pair | None
    family: bool
    equal_flops: bool

    @property
    def pairs(self) -> dict[str, Pair | None]:
        """Its comparisons by name: at equal parameters, at both equal, and at each equal cost."""
        return {"parameters": self.parameters, "both": self.both, **self.at}


@dataclass(frozen=True)
class EqualCosts:
    """A row a variant, the baseline first; `noise` is None where there is one seed."""

    rows: Sequence[Row]
    noise: SeedNoise | None

    @property
    def base(self) -> Variant:
        """The baseline."""
        return self.rows[0].variant

    def half_width(self, pair: Pair) -> float | None:
        """Half of the 95% interval of the pair's difference."""
        return None if self.noise is None else self.noise.half_width(pair.differences, pair.models)


def equal_costs(variants: Sequence[Variant]) -> EqualCosts:
    """Compare `variants`, of which the first is the baseline."""
    base = variants[0]
    family = [variant for variant in variants if variant is base or is_size(variant, base, "tokens")]
    sizes = [variant for variant in variants if variant is base or is_size(variant, base, "flops")]
    rows = []
    for variant in variants:
        at = {
            cost: _pair(variant, base, cost) if variant is not base and variant.compares(cost) else None
            for cost in COSTS
        }
        in_family, in_sizes = (any(variant is member for member in members) for members in (family, sizes))
        sized = None if in_family or variant.beside is None else _of_size(variant, family)
        both = None
        if len(sizes) > 1 and not in_sizes and at["flops"] is not None and at["flops"].kind == "finished":
            both = _of_size(variant, sizes)
        if both is not None:  # each within a tolerance of the baseline's FLOPs, so at most two apart
            both = replace(both, flops=1.0, same_budget=True)
        rows.append(Row(variant, at, sized, both, in_family, in_sizes))
    compared = {
        variant.train.variant: variant.beside.last for variant in variants if variant.beside is not None
    }
    return EqualCosts(rows, seed_noise(compared))


def _pair(variant: Variant, baseline: Variant, cost: Cost) -> Pair | None:
    """Both at the baseline's whole cost, or at the variant's if that is smaller."""
    curve, base = variant.beside, variant.reference
    share = curve.end(cost) / base.end(cost)
    same_work = abs(curve.end("flops") / base.end("flops") - 1) <= SAME_COST
    if abs(share - 1) <= (SAME_TIME if cost == "seconds" and same_work else SAME_COST):
        return Pair(curve.last, base.last, "finished", models=_names(variant, baseline))
    kind: Kind = "on the way" if share > 1 else "ended sooner"
    place = min(curve.end(cost), base.end(cost))
    values, references = curve.at(cost, place), base.at(cost, place)
    if values is None or references is None:
        return None
    return Pair(values, references, kind, min(share, 1.0), models=_names(variant, baseline))


def _names(*variants: Variant) -> frozenset[str]:
    return frozenset(variant.train.variant for variant in variants)


def is_size(variant: Variant, baseline: Variant, cost: Literal["tokens", "flops"]) -> bool:
    """Whether a variant is the baseline in another size, trained alike at the same cost."""
    train, base = variant.train, baseline.train

    def rest(settings: Mapping[str, object], without: set[str]) -> dict[str, object]:
        return {key: value for key, value in settings.items() if key not in without}

    recipe = _TUNED_KEYS | RECORD_KEYS
    return (
        variant.beside is not None
        and not variant.shifted
        and train.model != base.model
        and rest(train.model, _SIZE_KEYS) == rest(base.model, _SIZE_KEYS)
        and rest(train.training, recipe) == rest(base.training, recipe)
        and variant.same_tokens
        and abs(getattr(train, cost) / getattr(base, cost) - 1) <= SAME_COST
        and (train.corpus, train.data) == (base.corpus, base.data)
    )


def _of_size(variant: Variant, family: Sequence[Variant]) -> Pair | None:
    """The variant compared with the family at its number of parameters, all fully trained.

    With a member of nearly that size if there is one; otherwise with the two nearest sizes, interpolated
    linearly in the logarithms of parameters and bits per byte; None outside the family's range.
    """
    size = variant.train.parameters.total
    members = sorted(family, key=lambda member: member.train.parameters.total)
    sizes = [member.train.parameters.total for member in members]
    bits = [member.test if variant.shifted else member.beside.last for member in members]
    nearest = min(range(len(sizes)), key=lambda place: abs(sizes[place] - size))
    if abs(size / sizes[nearest] - 1) <= SAME_SIZE:
        ends = {cost: members[nearest].beside.end(cost) for cost in _BUDGETS}
        of = _names(variant, members[nearest])
        return Pair(variant.beside.last, bits[nearest], "matched", models=of, **_budget(variant, ends))
    if not sizes[0] < size < sizes[-1]:
        return None

    def between(values: Sequence[float]) -> float:
        return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(values))))

    common = [seed for seed in bits[0] if all(seed in one for one in bits)]
    references = {seed: between([one[seed] for one in bits]) for seed in common}
    ends = {cost: between([member.beside.end(cost) for member in members]) for cost in _BUDGETS}
    of = _names(variant, *members)
    return Pair(variant.beside.last, references, "between sizes", models=of, **_budget(variant, ends))


def _budget(variant: Variant, ends: Mapping[Cost, float]) -> dict[str, Any]:
    """A pair's `flops` and `same_budget`, compared with a training whose whole costs are `ends`."""
    shares = {cost: variant.beside.end(cost) / end for cost, end in ends.items()}
    equal = any(abs(share - 1) <= SAME_COST for share in shares.values())
    return {"flops": shares["flops"], "same_budget": equal}
