"""Variants compared with the baseline at equal parameters, tokens, FLOPs and time: table and plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import numpy as np
from matplotlib.lines import Line2D

from stlm.evaluation.statistics import SeedNoise, seed_noise
from stlm.report.curves import COSTS, Cost, Variant
from stlm.report.names import bounds_record, cost_text, count, difference_text, rounded
from stlm.report.notes import curve_notes, noise_in_words, noise_note
from stlm.report.style import COST_LOOKS, Dot, draw_differences, figure, legend, legend_entry, write_data
from stlm.report.table import Cell, Table
from stlm.study.runs import Study
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
_NAMES: dict[str, str] = {
    "parameters": "parameters",
    "both": "parameters and FLOPs",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "training time",
}
_HOLLOW: dict[str, object] = {"markerfacecolor": "white"}
# Kind of a comparison -> its marker in the plot, and what the legend says of it.
_KINDS: dict[str, tuple[dict[str, object], str]] = {
    "finished": ({}, "both trainings finished"),
    "between sizes": ({"fillstyle": "left", "markerfacecoloralt": "white"}, "interpolated between two sizes"),
    "other budget": (_HOLLOW | {"marker": "s"}, "equal parameters, but another training budget"),
    "on the way": (_HOLLOW, "the variant on the way of a longer training"),
    "ended sooner": (_HOLLOW | {"marker": "<"}, "the variant ended sooner: the baseline on the way"),
}
_INTERVAL = {"linewidth": 3.2, "alpha": 0.45}
_SEED = {"marker": "|", "markersize": 9, "markeredgewidth": 1.3, "linestyle": "none", "zorder": 3}


@dataclass(frozen=True)
class Pair:
    """Bits per byte by seed of a variant, and of the baseline (or a size of it) at an equal cost.

    Kinds of equal costs: both trainings are `finished` there; the variant is `on the way` through a longer
    training, or `ended sooner` than the baseline. Of equal parameters: `matched`, or `between sizes`.
    """

    values: Mapping[int, float]
    references: Mapping[int, float]
    kind: Kind
    share: float = 1.0  # the cost divided by the baseline's whole cost
    flops: float = 1.0  # the variant's training FLOPs divided by those of the size it is compared with
    same_budget: bool = True  # whether these or the tokens are equal
    models: frozenset[str] = frozenset()  # the variants that are compared

    @property
    def value(self) -> float:
        """The variant's mean over its seeds."""
        return mean(self.values.values())

    @property
    def differences(self) -> list[float]:
        """The variant's values minus the baseline's, seed by seed."""
        references = self.references
        return [value - references[seed] for seed, value in self.values.items() if seed in references]

    @property
    def difference(self) -> float:
        """The mean of the differences."""
        return mean(self.differences)


@dataclass(frozen=True)
class Row:
    """A variant and its comparisons with the baseline, None where it does not compare.

    `pairs`: at equal `parameters`, with the baseline's architecture at the variant's size, trained on as many
    tokens; at `both`, the same at equal training FLOPs, if the variant used as many; and at each equal cost.
    `sizes`: those of the first two in which the variant is itself one of the baseline's sizes.
    """

    variant: Variant
    pairs: Mapping[str, Pair | None]
    sizes: frozenset[str]


@dataclass(frozen=True)
class EqualCosts:
    """A row a variant, the baseline first; `noise` is None where there is one seed."""

    rows: Sequence[Row]
    noise: SeedNoise | None

    @property
    def base(self) -> Variant:
        """The baseline."""
        return self.rows[0].variant

    @property
    def has_both(self) -> bool:
        """Whether the study has sizes for comparisons at equal parameters and FLOPs."""
        return any(row.pairs["both"] for row in self.rows)

    def half_width(self, pair: Pair) -> float | None:
        """Half of the 95% interval of the pair's difference."""
        return None if self.noise is None else self.noise.half_width(pair.differences, pair.models)


def equal_costs(variants: Sequence[Variant]) -> EqualCosts:
    """Compare `variants`, of which the first is the baseline."""
    base, rows = variants[0], []
    sizes = {
        name: [variant for variant in variants if variant is base or is_size(variant, base, cost)]
        for name, cost in (("parameters", "tokens"), ("both", "flops"))
    }
    for variant in variants:
        pairs: dict[str, Pair | None] = {"parameters": None, "both": None}
        for cost in COSTS:
            comparable = variant is not base and variant.compares(cost)
            pairs[cost] = _pair(variant, base, cost) if comparable else None
        member = {name for name, family in sizes.items() if any(variant is size for size in family)}
        if "parameters" not in member and variant.aligned is not None:
            pairs["parameters"] = _of_size(variant, sizes["parameters"])
        finished = pairs["flops"] is not None and pairs["flops"].kind == "finished"
        if "both" not in member and finished and len(sizes["both"]) > 1:
            both = _of_size(variant, sizes["both"])
            # Each is within a tolerance of the baseline's FLOPs, so they are at most two apart.
            pairs["both"] = both and replace(both, flops=1.0, same_budget=True)
        rows.append(Row(variant, pairs, frozenset(member)))
    noise = seed_noise({v.train.variant: v.aligned.last for v in variants if v.aligned is not None})
    return EqualCosts(rows, noise)


def _pair(variant: Variant, baseline: Variant, cost: Cost) -> Pair | None:
    """Both at the baseline's whole cost, or at the variant's if that is smaller."""
    curve, base, models = variant.aligned, variant.baseline, _names(variant, baseline)
    share = curve.end(cost) / base.end(cost)
    same_work = abs(curve.end("flops") / base.end("flops") - 1) <= SAME_COST
    if abs(share - 1) <= (SAME_TIME if cost == "seconds" and same_work else SAME_COST):
        return Pair(curve.last, base.last, "finished", models=models)
    amount = min(curve.end(cost), base.end(cost))
    values, references = curve.at(cost, amount), base.at(cost, amount)
    if values is None or references is None:
        return None
    kind: Kind = "on the way" if share > 1 else "ended sooner"
    return Pair(values, references, kind, min(share, 1.0), models=models)


def _names(*variants: Variant) -> frozenset[str]:
    return frozenset(variant.train.variant for variant in variants)


def is_size(variant: Variant, baseline: Variant, cost: Literal["tokens", "flops"]) -> bool:
    """Whether a variant is the baseline in another size, trained alike at the same cost."""
    train, base = variant.train, baseline.train

    def rest(settings: Mapping[str, object], without: set[str]) -> dict[str, object]:
        return {key: value for key, value in settings.items() if key not in without}

    recipe = _TUNED_KEYS | RECORD_KEYS
    return (
        variant.aligned is not None
        and not variant.shifted
        and train.model != base.model
        and rest(train.model, _SIZE_KEYS) == rest(base.model, _SIZE_KEYS)
        and rest(train.training, recipe) == rest(base.training, recipe)
        and train.techniques == base.techniques
        and variant.same_tokens
        and abs(getattr(train, cost) - getattr(base, cost)) <= SAME_COST * getattr(base, cost)
        and (train.corpus, train.data) == (base.corpus, base.data)
    )


def _of_size(variant: Variant, family: Sequence[Variant]) -> Pair | None:
    """The variant compared with the family at its number of parameters, all fully trained.

    With a member of nearly that size if there is one; otherwise with the two nearest sizes, interpolated
    linearly in the logarithms of parameters and bits per byte; None outside the family's range.
    """
    size, last = variant.train.parameters.total, variant.aligned.last
    members = sorted(family, key=lambda member: member.train.parameters.total)
    sizes = [member.train.parameters.total for member in members]
    bits = [member.test if variant.shifted else member.aligned.last for member in members]
    nearest = min(range(len(sizes)), key=lambda place: abs(sizes[place] - size))
    if abs(size / sizes[nearest] - 1) <= SAME_SIZE:
        kind, members, references = "matched", [members[nearest]], bits[nearest]
    elif sizes[0] < size < sizes[-1]:
        kind, common = "between sizes", [seed for seed in bits[0] if all(seed in by_seed for by_seed in bits)]
        references = {seed: _between(size, sizes, [by_seed[seed] for by_seed in bits]) for seed in common}
    else:
        return None
    shares = {}
    for cost in _BUDGETS:
        ends = [member.aligned.end(cost) for member in members]
        end = ends[0] if kind == "matched" else _between(size, sizes, ends)
        shares[cost] = variant.aligned.end(cost) / end
    same_budget = any(abs(share - 1) <= SAME_COST for share in shares.values())
    models = _names(variant, *members)
    return Pair(last, references, kind, flops=shares["flops"], same_budget=same_budget, models=models)


def _between(size: float, sizes: Sequence[float], values: Sequence[float]) -> float:
    """The value at `size`, interpolated linearly in the logarithms."""
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(values))))


def equal_cost_table(study: Study, costs: EqualCosts) -> Table:
    """A row for each variant: its size, its last value, and its value and difference at each equal cost."""
    title = f"Validation bits per byte at equal cost, with the difference from {costs.base.train.label}"
    rows = [_columns(row, costs) for row in costs.rows]
    return Table.of_columns("equal-cost", f"{title}; study {study.name}", rows, _notes(costs))


def _columns(row: Row, costs: EqualCosts) -> Iterator[tuple]:
    variant, train, curve, base = row.variant, row.variant.train, row.variant.curve, costs.base
    bits, size = list(curve.last.values()), train.parameters.total
    sd = stdev(bits) if len(bits) > 1 else None
    yield "", train.label, {"variant": train.variant, "label": train.label, "seeds": variant.seeds}
    record = {"parameters": size, "tokens": round(curve.end("tokens")), "flops": round(curve.end("flops"))}
    record |= {"seconds": round(curve.end("seconds"), 1)}
    sizes = f"{count(size)}\n{train.flops / train.tokens:.2e}" if train.tokens else f"{count(size)}\n–"
    yield "parameters\nFLOPs a token", sizes, record
    spread = "" if sd is None else f"\nsd {sd:.3f}, {len(bits)} seeds"
    record = {"val_bits_per_byte": round(mean(bits), 5), "sd": rounded(sd, 5)}
    yield "bits per byte\nat the end", f"{mean(bits):.3f}{spread}", record
    amounts = {cost: cost_text(cost, base.curve.end(cost)).removesuffix(" FLOPs") for cost in COSTS}
    amounts["parameters"] = count(base.train.parameters.total)
    amounts["both"] = f"{amounts['parameters']}, {amounts['flops']}"
    for name, pair in row.pairs.items():
        header = f"at equal\n{_NAMES[name]}\n({amounts[name]})"
        shown = name != "both" or costs.has_both
        yield header if shown else None, _cell(row, name, costs), _record(name, pair, costs)


def _record(name: str, pair: Pair | None, costs: EqualCosts) -> dict[str, object]:
    """A pair for programs; all None where there is none."""
    keys = ["kind", "share", "bits_per_byte", "difference", "half_width"]
    keys += ["flops"] if name == "parameters" else []
    if pair is None:
        return dict.fromkeys(f"{name}_{key}" for key in keys)
    numbers = (pair.value, pair.difference, costs.half_width(pair))
    values = [pair.kind, round(pair.share, 4), *(rounded(number, 5) for number in numbers)]
    return {f"{name}_{key}": value for key, value in zip(keys, [*values, round(pair.flops, 4)], strict=False)}


def _cell(row: Row, name: str, costs: EqualCosts) -> Cell:
    variant, pair = row.variant, row.pairs[name]
    if variant is costs.base:
        return Cell(f"{mean(variant.curve.last.values()):.3f}")
    if pair is None:
        if name in ("parameters", "both"):
            return Cell("a size of\nthe baseline" if name in row.sizes else "–")
        return Cell("before its first\nvalidation" if variant.compares(name) else "–")
    half = costs.half_width(pair)
    text = difference_text(pair.difference) + ("" if half is None else f" ±{half:.3f}")
    like_for_like = pair.kind in ("finished", "matched") and pair.same_budget
    certain = half is not None and abs(pair.difference) > half and like_for_like
    if pair.kind == "ended sooner":
        return Cell(f"not reached\n{text}\nat its end, {pair.share:.2f} ×")
    remark = {"on the way": "\non the way", "between sizes": "\nbetween sizes"}.get(pair.kind, "")
    if not pair.same_budget:
        remark += "\nother budget:"
    if not pair.same_budget or abs(pair.flops - 1) > SAME_COST:
        remark += f"\n{pair.flops:.2f} × the FLOPs"
    return Cell(f"{pair.value:.3f}\n{text}{remark}", bold_line=1 if certain else None)


def _notes(costs: EqualCosts) -> list[str | None]:
    pairs = [pair for row in costs.rows for pair in row.pairs.values() if pair is not None]
    kinds = {pair.kind for pair in pairs}
    labels = {row.variant.train.variant: row.variant.train.label for row in costs.rows}
    sizes = (
        [r.variant.train.label for r in costs.rows if name in r.sizes] for name in ("parameters", "both")
    )
    family, equal = sizes
    notes = {
        "The columns of tokens, FLOPs and time give a variant's value where it has cost what all of "
        f"{costs.base.train.label}'s training cost (in brackets), and the difference from the baseline "
        "there. Values between validations are interpolated linearly; nothing is extrapolated. Costs count "
        f"as equal where tokens or FLOPs differ by at most {SAME_COST:.0%}; times for the same FLOPs, which "
        f"vary though the work does not, by at most {SAME_TIME:.0%}.": True,
        "On the way: a point of a longer training, whose learning rate has not decayed there. A training "
        "planned for that cost would have ended lower.": "on the way" in kinds,
        "Not reached: its training ended at that fraction of the baseline's cost. The difference is from "
        "the baseline at that point of its way: one planned for that cost would have ended lower.": (
            "ended sooner" in kinds
        ),
        f"Equal parameters: compared with the baseline in its sizes ({'; '.join(family)}), trained on as "
        "many tokens, all at the end of their training: with the size that is equal within "
        f"{SAME_SIZE:.0%}, or with a straight line between the next smaller and larger sizes, in the "
        "logarithms of parameters and of bits per byte.": len(family) > 1,
        f"Equal parameters: where they are the baseline's within {SAME_SIZE:.0%}, at the end of both "
        "trainings. The study has no other size of the baseline for variants of other sizes.": (
            len(family) == 1
        ),
        f"Equal parameters and FLOPs: the same for the baseline's sizes ({'; '.join(equal)}) that were "
        "each trained for as many FLOPs as the baseline, and for variants trained so.": costs.has_both,
        "Between sizes: loss against size is convex in these logarithms, so that, apart from noise, a "
        "straight line lies above it, which favours the variant.": "between sizes" in kinds,
        "× the FLOPs: the variant's training FLOPs divided by those of the size it is compared with. "
        "Other budget: the tokens differ, too, so that the difference is partly one of training.": any(
            abs(pair.flops - 1) > SAME_COST for pair in pairs
        ),
    }
    seeds = ["One seed: how far another seed would move these figures is not known."]
    if costs.noise is not None:
        seeds = [
            "±: 95% interval of the mean difference over seeds, from the noise of the seeds of all variants "
            f"together at the end of training (randomized blocks: {noise_in_words(costs.noise)}), not "
            "adjusted for the number of differences. Bold: the interval excludes zero, both trainings are "
            "finished, and the cost is equal for both.",
            noise_note(costs.noise, labels),
        ]
    notes = [note for note, applies in notes.items() if applies]
    return [*notes, *seeds, *curve_notes([row.variant for row in costs.rows])]


def write_equal_cost(folder: Path, study: Study, costs: EqualCosts) -> None:
    """Write `folder`/equal-cost.svg and data/equal-cost.csv: a row per variant, a panel per cost."""
    rows = [row for row in costs.rows[1:] if any(row.pairs.values())]
    if not rows:
        return
    pairs = [(row, *item) for row, compared in enumerate(rows) for item in compared.pairs.items() if item[1]]
    labels = [row.variant.train.label for row in rows]
    variants = [row.variant.train.variant for row in rows]
    records = [_point(variants[row], name, pair, costs.half_width(pair)) for row, name, pair in pairs]
    write_data(folder, "equal-cost", records)
    panels = {
        f"equal {title}".replace(" and ", "\nand "): [
            _dot(row, pair, costs.half_width(pair), COST_LOOKS[name]["color"])
            for row, cost, pair in pairs
            if cost == name
        ]
        for name, title in _NAMES.items()
    }
    panels = {title: dots for title, dots in panels.items() if dots}
    title = f"Difference from {costs.base.train.label} at equal cost (left is better), study {study.name}"
    with figure(folder, "equal-cost", title, 3.4 + 2.1 * len(panels), 1.9 + 0.3 * len(rows)) as drawing:
        draw_differences(drawing, panels, labels, "bits per byte", len(panels))
        legend(drawing, _legend({_kind(pair) for _, _, pair in pairs}, costs.noise is not None), 2)


def _point(variant: str, name: str, pair: Pair, half: float | None) -> dict[str, object]:
    value = pair.difference
    record = {"variant": variant, "cost": name, "kind": pair.kind}
    record |= {"share": round(pair.share, 4), "flops": round(pair.flops, 4)}
    interval = None if half is None else (value - half, value + half)
    return record | {**bounds_record(interval, digits=5), "value": round(value, 5)}


def _dot(row: int, pair: Pair, half: float | None, colour: object) -> Dot:
    """A pair's difference, with its interval and its seeds where there is one."""
    look = {"marker": "o", "color": colour, **_KINDS[_kind(pair)][0]}
    if half is None:
        return Dot(row, pair.difference, look)
    seeds = [((value, value), _SEED | {"color": colour}) for value in pair.differences]
    bounds = pair.difference - half, pair.difference + half
    return Dot(row, pair.difference, look, [(bounds, _INTERVAL), *seeds])


def _kind(pair: Pair) -> str:
    """The key of `_KINDS`."""
    if not pair.same_budget:
        return "other budget"
    return "finished" if pair.kind == "matched" else pair.kind


def _legend(kinds: set[str], seeds: bool) -> list[Line2D]:
    shown = [look for kind, look in _KINDS.items() if kind in kinds]
    handles = [legend_entry(text, **({"marker": "o"} | look)) for look, text in shown]
    if seeds:
        handles.append(legend_entry("95% interval over seeds", linestyle="-", **_INTERVAL))
        handles.append(legend_entry("a seed", **_SEED))
    return handles
