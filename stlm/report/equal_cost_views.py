"""Comparisons at equal cost, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.lines import Line2D

from stlm.files import write_text
from stlm.report.curves import COSTS
from stlm.report.efficiency import comparison_notes
from stlm.report.equal_cost import SAME_COST, SAME_SIZE, SAME_TIME, EqualCosts, Pair, Row
from stlm.report.names import cost_text, count, difference_text
from stlm.report.notes import noise_note
from stlm.report.style import COST_LOOKS, Dot, draw_differences, figure, heading, sign
from stlm.report.table import Cell, Table, csv_text
from stlm.study.runs import Study

_NAMES: dict[str, str] = {
    "parameters": "parameters",
    "both": "parameters and FLOPs",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "training time",
}
# Kind of a comparison -> its marker in the plot, and what the legend says of it.
_KINDS: dict[str, tuple[dict[str, object], str]] = {
    "finished": ({}, "both trainings finished"),
    "between sizes": ({"fillstyle": "left", "markerfacecoloralt": "white"}, "interpolated between two sizes"),
    "other budget": (
        {"markerfacecolor": "white", "marker": "s"},
        "equal parameters, but another training budget",
    ),
    "on the way": ({"markerfacecolor": "white"}, "the variant on the way of a longer training"),
    "ended sooner": (
        {"markerfacecolor": "white", "marker": "<"},
        "the variant ended sooner: the baseline on the way",
    ),
}
_INTERVAL = {"linewidth": 3.2, "alpha": 0.45}
_SEED = {"marker": "|", "markersize": 9, "markeredgewidth": 1.3, "linestyle": "none", "zorder": 3}


def equal_cost_table(study: Study, found: EqualCosts) -> Table:
    """A row for each variant: its size, its last value, and its value and difference at each equal cost."""
    base, names, rows = found.base, _columns(found), []
    for row in found.rows:
        variant = row.variant
        bits = list(variant.curve.last.values())
        spread = f"\nsd {stdev(bits):.3f}, {len(bits)} seeds" if len(bits) > 1 else ""
        size = f"{count(variant.train.parameters.total)}\n{variant.flops_per_token:.2e}"
        cells = [_cell(row, name, found) for name in names]
        rows.append([Cell(variant.train.label), Cell(size), Cell(f"{mean(bits):.3f}{spread}"), *cells])
    amounts = {cost: cost_text(cost, base.curve.end(cost)).removesuffix(" FLOPs") for cost in COSTS}
    amounts["parameters"] = count(base.train.parameters.total)
    amounts["both"] = f"{amounts['parameters']}, {amounts['flops']}"
    header = [f"at equal\n{_NAMES[name]}\n({amounts[name]})" for name in names]
    return Table(
        name="equal-cost",
        title=f"Validation bits per byte and {base.train.label}'s at equal cost, study {study.name}",
        header=["", "parameters\nFLOPs a token", "bits per byte\nat the end", *header],
        rows=rows,
        notes=_notes(found),
        records=[_record(row, found) for row in found.rows],
    )


def _columns(found: EqualCosts) -> list[str]:
    """What the study can compare at: parameters and FLOPs together only where it has sizes for that."""
    return [name for name in _NAMES if name != "both" or any(row.both for row in found.rows)]


def _cell(row: Row, name: str, found: EqualCosts) -> Cell:
    variant, pair = row.variant, row.pairs[name]
    if variant is found.base:
        return Cell(f"{mean(variant.curve.last.values()):.3f}")
    if pair is None:
        if name in ("parameters", "both"):
            member = row.family if name == "parameters" else row.equal_flops
            return Cell("a size of\nthe baseline" if member else "–")
        return Cell("before its first\nvalidation" if variant.compares(name) else "–")
    half = found.half_width(pair)
    text = difference_text(pair.difference) + ("" if half is None else f" ±{half:.3f}")
    certain = half is not None and abs(pair.difference) > half and pair.like_for_like
    if pair.kind == "ended sooner":
        return Cell(f"not reached\n{text}\nat its end, {pair.share:.2f} ×")
    remark = {"on the way": "\non the way", "between sizes": "\nbetween sizes"}.get(pair.kind, "")
    if not pair.same_budget:
        remark += "\nother budget:"
    if not pair.same_budget or abs(pair.flops - 1) > SAME_COST:
        remark += f"\n{pair.flops:.2f} × the FLOPs"
    return Cell(f"{pair.value:.3f}\n{text}{remark}", bold_line=1 if certain else None)


def _notes(found: EqualCosts) -> list[str]:
    base = found.base
    pairs = [pair for row in found.rows for pair in row.pairs.values() if pair is not None]
    kinds = {pair.kind for pair in pairs}
    notes = [
        "The columns of tokens, FLOPs and time give a variant's value where it has cost what all of "
        f"{base.train.label}'s training cost (in brackets), and the difference from the baseline there. "
        "Values between validations are interpolated linearly; nothing is extrapolated. Costs count as "
        f"equal where tokens or FLOPs differ by at most {SAME_COST:.0%}; times for the same FLOPs, which "
        f"vary though the work does not, by at most {SAME_TIME:.0%}."
    ]
    if "on the way" in kinds:
        notes.append(
            "On the way: a point of a longer training, whose learning rate has not decayed there. A training "
            "planned for that cost would have ended lower."
        )
    if "ended sooner" in kinds:
        notes.append(
            "Not reached: its training ended at that fraction of the baseline's cost. The difference is from "
            "the baseline at that point of its way: one planned for that cost would have ended lower."
        )
    notes += _size_notes(found, pairs)
    if found.noise is None:
        notes.append("One seed: how far another seed would move these figures is not known.")
    else:
        notes.append(
            "±: 95% interval of the mean difference over seeds, from the noise of the seeds of all variants "
            f"together at the end of training (randomized blocks: standard deviation {found.noise.sd:.4f}, "
            f"{found.noise.dof} degrees of freedom), not adjusted for the number of differences. Bold: the "
            "interval excludes zero, both trainings are finished, and the cost is equal for both."
        )
        trains = [row.variant.train for row in found.rows]
        notes.append(noise_note(found.noise, {train.variant: train.label for train in trains}))
    return notes + comparison_notes([row.variant for row in found.rows])


def _size_notes(found: EqualCosts, pairs: Sequence[Pair]) -> list[str]:
    """What the columns of parameters compare with."""
    family, equal = (
        "; ".join(row.variant.train.label for row in found.rows if getattr(row, kind))
        for kind in ("family", "equal_flops")
    )
    if sum(row.family for row in found.rows) > 1:
        notes = [
            f"Equal parameters: compared with the baseline in its sizes ({family}), trained on as many "
            "tokens, all at the end of their training: with the size that is equal within "
            f"{SAME_SIZE:.0%}, or with a straight line between the next smaller and larger sizes, in the "
            "logarithms of parameters and of bits per byte."
        ]
    else:
        notes = [
            f"Equal parameters: where they are the baseline's within {SAME_SIZE:.0%}, at the end of both "
            "trainings. The study has no other size of the baseline for variants of other sizes."
        ]
    if "both" in _columns(found):
        notes.append(
            f"Equal parameters and FLOPs: the same for the baseline's sizes ({equal}) that were each trained "
            "for as many FLOPs as the baseline, and for variants trained so."
        )
    if any(pair.kind == "between sizes" for pair in pairs):
        notes.append(
            "Between sizes: loss against size is convex in these logarithms, so that, apart from noise, a "
            "straight line lies above it, which favours the variant."
        )
    if any(abs(pair.flops - 1) > SAME_COST for pair in pairs):
        notes.append(
            "× the FLOPs: the variant's training FLOPs divided by those of the size it is compared with. "
            "Other budget: the tokens differ, too, so that the difference is partly one of training."
        )
    return notes


def _record(row: Row, found: EqualCosts) -> dict[str, object]:
    curve, train = row.variant.curve, row.variant.train
    bits = list(curve.last.values())
    record: dict[str, object] = {
        "variant": train.variant,
        "label": train.label,
        "seeds": row.variant.seeds,
        "parameters": train.parameters.total,
        "tokens": round(curve.end("tokens")),
        "flops": round(curve.end("flops")),
        "seconds": round(curve.end("seconds"), 1),
        "val_bits_per_byte": round(mean(bits), 5),
        "sd": round(stdev(bits), 5) if len(bits) > 1 else None,
    }
    for name, pair in row.pairs.items():
        keys = [f"{name}_{key}" for key in ("kind", "share", "bits_per_byte", "difference", "half_width")]
        if pair is None:
            record |= dict.fromkeys(keys)
        else:
            half = found.half_width(pair)
            values = (pair.kind, round(pair.share, 4), round(pair.value, 5), round(pair.difference, 5))
            record |= zip(keys, (*values, None if half is None else round(half, 5)), strict=True)
        if name == "parameters":
            record["parameters_flops"] = None if pair is None else round(pair.flops, 4)
    return record


def write_equal_cost(folder: Path, study: Study, found: EqualCosts) -> None:
    """Write `folder`/equal-cost.svg and data/equal-cost.csv: a row per variant, a panel per cost."""
    rows = [row for row in found.rows[1:] if any(row.pairs.values())]
    if not rows:
        return
    write_text(folder / "data" / "equal-cost.csv", csv_text(_data(rows, found)))
    panels = {
        f"equal {title}".replace(" and ", "\nand "): [
            _dot(place, pair, found.half_width(pair), COST_LOOKS[name]["color"])
            for place, row in enumerate(rows)
            if (pair := row.pairs[name]) is not None
        ]
        for name, title in _NAMES.items()
    }
    panels = {title: dots for title, dots in panels.items() if dots}
    title = f"Difference from {found.base.train.label} at equal cost (left is better), study {study.name}"
    with figure(folder, "equal-cost", title, 3.4 + 2.1 * len(panels), 1.9 + 0.3 * len(rows)) as drawing:
        labels = [row.variant.train.label for row in rows]
        draw_differences(drawing, panels, labels, "bits per byte", len(panels))
        heading(drawing, title)
        drawing.legend(handles=_legend(rows, found), loc="outside lower center", ncols=2)


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


def _legend(rows: Sequence[Row], found: EqualCosts) -> list[Line2D]:
    kinds = {_kind(pair) for row in rows for pair in row.pairs.values() if pair is not None}
    handles = [
        sign(text, **({"marker": "o"} | look)) for kind, (look, text) in _KINDS.items() if kind in kinds
    ]
    if found.noise is not None:
        handles.append(sign("95% interval over seeds", linestyle="-", **_INTERVAL))
        handles.append(sign("a seed", **_SEED))
    return handles


def _data(rows: Sequence[Row], found: EqualCosts) -> list[Mapping[str, object]]:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    records = []
    for row in rows:
        for name, pair in row.pairs.items():
            if pair is None:
                continue
            half, value = found.half_width(pair), pair.difference
            low, high = (None, None) if half is None else (round(value - half, 5), round(value + half, 5))
            record = {"variant": row.variant.train.variant, "cost": name, "kind": pair.kind}
            record |= {"share": round(pair.share, 4), "flops": round(pair.flops, 4)}
            records.append(record | {"low": low, "high": high, "value": round(value, 5)})
    return records
