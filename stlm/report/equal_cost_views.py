"""Comparisons at equal cost as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stlm.files import write_text
from stlm.report.curves import COSTS
from stlm.report.efficiency import comparison_notes
from stlm.report.equal_cost import SAME_COST, SAME_SIZE, SAME_TIME, EqualCosts, Pair, Row
from stlm.report.names import cost_text, count, difference_text
from stlm.report.noise import noise_note
from stlm.report.style import CHANCE, COST_LOOKS, figure, heading, variant_rows
from stlm.report.table import Cell, Table, csv_text
from stlm.study.runs import Study

_NAMES: dict[str, str] = {
    "parameters": "parameters",
    "both": "parameters and FLOPs",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "training time",
}


def equal_cost_table(study: Study, found: EqualCosts) -> Table:
    """A row a variant: its size and last value, and its value beside the baseline's at each equal cost."""
    base = found.base
    names = _columns(found)
    rows, records = [], []
    for row in found.rows:
        own = row.variant
        bits = list(own.curve.last.values())
        spread = f"\nsd {stdev(bits):.3f}, {len(bits)} seeds" if len(bits) > 1 else ""
        rows.append(
            [
                Cell(own.train.label),
                Cell(f"{count(own.train.parameters.total)}\n{own.flops_per_token:.2e}"),
                Cell(f"{mean(bits):.3f}{spread}"),
                *(_cell(row, name, row.pairs[name], found) for name in names),
            ]
        )
        records.append(_record(row, found))
    amounts = {cost: cost_text(cost, base.curve.end(cost)).removesuffix(" FLOPs") for cost in COSTS}
    amounts["parameters"] = count(base.train.parameters.total)
    amounts["both"] = f"{amounts['parameters']}, {amounts['flops']}"
    header = [f"at equal\n{_NAMES[name]}\n({amounts[name]})" for name in names]
    return Table(
        name="equal-cost",
        title=f"Validation bits per byte beside {base.train.label} at equal cost, study {study.name}",
        header=["", "parameters\nFLOPs a token", "bits per byte\nat the end", *header],
        rows=rows,
        notes=_notes(found),
        records=records,
    )


def _columns(found: EqualCosts) -> list[str]:
    """What there is to compare at: both parameters and FLOPs where the study has sizes for it."""
    return [name for name in _NAMES if name != "both" or any(row.both for row in found.rows)]


def _cell(row: Row, name: str, pair: Pair | None, found: EqualCosts) -> Cell:
    own = row.variant
    if own is found.base:
        return Cell(f"{mean(own.curve.last.values()):.3f}")
    if pair is None:
        if name in ("parameters", "both"):
            member = row.family if name == "parameters" else row.equal_flops
            return Cell("a size of\nthe baseline" if member else "–")
        return Cell("before its first\nvalidation" if own.compares(name) else "–")
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
        "In the columns of tokens, FLOPs and time, the value of a variant where it has cost what all of "
        f"{base.train.label}'s training cost (in brackets), and the difference from the baseline there. "
        "Values between validations are on a straight line; nothing is extrapolated. Costs are equal where "
        f"tokens or FLOPs are within {SAME_COST:.0%}; times of as many FLOPs, which vary though the work "
        f"does not, within {SAME_TIME:.0%}."
    ]
    if "on the way" in kinds:
        notes.append(
            "On the way: a point of a longer training, whose learning rate has not decayed there. A training "
            "planned for that cost would have ended lower."
        )
    if "ended sooner" in kinds:
        notes.append(
            "Not reached: its training ended at that part of the baseline's cost. The difference is from the "
            "baseline there, a point on the way: a baseline planned for that cost would have ended lower."
        )
    notes += _size_notes(found, pairs)
    if found.noise is None:
        notes.append("One seed: how far another would move these figures is not known.")
    else:
        notes.append(
            "±: 95% interval of the mean difference over seeds, from the noise of the seeds of all variants "
            f"together at the end of training (randomized blocks: standard deviation {found.noise.sd:.4f}, "
            f"{found.noise.dof} degrees of freedom), not adjusted for the number of differences. Bold: zero "
            "is outside, both trainings are finished, and what they are compared at is equal for both."
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
            f"Equal parameters: beside the baseline in its sizes ({family}), trained on as many tokens, all "
            f"at the end of their training: the size that is equal within {SAME_SIZE:.0%}, or a straight "
            "line between the two next, in the logarithms of parameters and of bits per byte."
        ]
    else:
        notes = [
            f"Equal parameters: where they are the baseline's within {SAME_SIZE:.0%}, at the end of both "
            "trainings. The study has no other size of the baseline for variants of other sizes."
        ]
    if "both" in _columns(found):
        notes.append(
            f"Equal parameters and FLOPs: so too, beside the baseline in its sizes ({equal}), each trained "
            "for as many FLOPs as the baseline; for variants that were so, too."
        )
    if any(pair.kind == "between sizes" for pair in pairs):
        notes.append(
            "Between sizes: such curves are convex, so that a straight line lies above them, noise aside, "
            "which favours the variant beside it."
        )
    if any(abs(pair.flops - 1) > SAME_COST for pair in pairs):
        notes.append(
            "× the FLOPs: the variant's training FLOPs divided by those of the size it is compared with. "
            "Other budget: the tokens differ, too, so that the difference is partly one of training."
        )
    return notes


def _record(row: Row, found: EqualCosts) -> dict[str, object]:
    own = row.variant
    bits = list(own.curve.last.values())
    record: dict[str, object] = {
        "variant": own.train.variant,
        "label": own.train.label,
        "seeds": own.seeds,
        "parameters": own.train.parameters.total,
        "tokens": round(own.curve.end("tokens")),
        "flops": round(own.curve.end("flops")),
        "seconds": round(own.curve.end("seconds"), 1),
        "val_bits_per_byte": round(mean(bits), 5),
        "sd": round(stdev(bits), 5) if len(bits) > 1 else None,
    }
    for name, pair in row.pairs.items():
        half = None if pair is None else found.half_width(pair)
        record |= {
            f"{name}_kind": None if pair is None else pair.kind,
            f"{name}_share": None if pair is None else round(pair.share, 4),
            f"{name}_bits_per_byte": None if pair is None else round(pair.value, 5),
            f"{name}_difference": None if pair is None else round(pair.difference, 5),
            f"{name}_half_width": _rounded(half, 5),
        }
        if name == "parameters":
            record["parameters_flops"] = None if pair is None else round(pair.flops, 4)
    return record


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def write_equal_cost(folder: Path, study: Study, found: EqualCosts) -> None:
    """Write `folder`/equal-cost.{svg,png} and data/equal-cost.csv: a row a variant, a panel a cost."""
    rows = [row for row in found.rows[1:] if any(row.pairs.values())]
    if not rows:
        return
    write_text(folder / "data" / "equal-cost.csv", csv_text(_data(rows, found)))
    panels = [name for name in _NAMES if any(row.pairs[name] for row in rows)]
    title = f"Difference from {found.base.train.label} at equal cost (left is better), study {study.name}"
    with figure(folder, "equal-cost", title, 3.4 + 2.1 * len(panels), 1.9 + 0.3 * len(rows)) as drawing:
        grid = drawing.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, panels, strict=True):
            axes.set_title(f"equal {_NAMES[name]}".replace(" and ", "\nand "), loc="left")
            axes.axvline(0, zorder=1, **CHANCE)
            for place, row in enumerate(rows):
                if (pair := row.pairs[name]) is not None:
                    _draw(axes, place, pair, found.half_width(pair), COST_LOOKS[name])
            variant_rows(axes, [row.variant.train.label for row in rows])
            axes.set_xlabel("bits per byte")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if x else "0")
            )
        heading(drawing, title)
        drawing.legend(handles=_legend(rows, found), loc="outside lower center", ncols=2)


def _draw(axes: Axes, place: int, pair: Pair, half: float | None, look: Mapping[str, object]) -> None:
    colour = look["color"]
    if half is not None:
        bounds = [pair.difference - half, pair.difference + half]
        axes.plot(
            bounds, [place, place], color=colour, linewidth=3.2, alpha=0.45, solid_capstyle="butt", zorder=2
        )
        seeds = pair.differences
        axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=9, markeredgewidth=1.3, zorder=3)
    marker = {"marker": "o", "markersize": 7, "color": colour, **_FILLS[_look(pair)]}
    axes.plot([pair.difference], [place], linestyle="none", zorder=4, **marker)


def _look(pair: Pair) -> str:
    """Which mark of `_FILLS` a pair has."""
    if not pair.same_budget:
        return "other budget"
    return "finished" if pair.kind == "matched" else pair.kind


_FILLS: dict[str, dict[str, object]] = {
    "finished": {},
    "between sizes": {"fillstyle": "left", "markerfacecoloralt": "white"},
    "other budget": {"markerfacecolor": "white", "marker": "s"},
    "on the way": {"markerfacecolor": "white"},
    "ended sooner": {"markerfacecolor": "white", "marker": "<"},
}
_MEANINGS: dict[str, str] = {
    "finished": "both trainings finished there",
    "between sizes": "beside a line between two sizes",
    "other budget": "equal parameters, but another training budget",
    "on the way": "the variant on the way of a longer training",
    "ended sooner": "ended sooner: the baseline on the way",
}


def _legend(rows: Sequence[Row], found: EqualCosts) -> list[Line2D]:
    looks = {_look(pair) for row in rows for pair in row.pairs.values() if pair is not None}
    grey = {"color": "#444444", "linestyle": "none", "markersize": 7}
    handles = [
        Line2D([], [], label=text, **({"marker": "o"} | grey | _FILLS[look]))
        for look, text in _MEANINGS.items()
        if look in looks
    ]
    if found.noise is not None:
        handles.append(
            Line2D([], [], color="#444444", linewidth=3.2, alpha=0.45, label="95% interval over seeds")
        )
        handles.append(Line2D([], [], label="a seed", **(grey | {"marker": "|", "markersize": 9})))
    return handles


def _data(rows: Sequence[Row], found: EqualCosts) -> list[dict[str, object]]:
    """`value` must be the last column: the one that DVC plots unless told otherwise."""
    records = []
    for row in rows:
        for name, pair in row.pairs.items():
            if pair is None:
                continue
            half, value = found.half_width(pair), pair.difference
            records.append(
                {"variant": row.variant.train.variant, "cost": name, "kind": pair.kind}
                | {"share": round(pair.share, 4), "flops": round(pair.flops, 4)}
                | {"low": None if half is None else round(value - half, 5)}
                | {"high": None if half is None else round(value + half, 5), "value": round(value, 5)}
            )
    return records
