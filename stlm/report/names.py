"""How things are called in tables and plots, and how numbers are written there."""

from __future__ import annotations

from collections.abc import Sequence

_BENCHMARKS = {
    "blimp": "BLiMP",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "winogrande": "WinoGrande",
    "mmlu": "MMLU",
    "mmlu_cloze": "MMLU (cloze)",
    "last_word": "Last word",
    "synthetic_pairs": "Synthetic pairs",
    "synthetic_choice": "Synthetic choice",
}


def benchmark_label(name: str) -> str:
    """The benchmark's usual spelling; a name not known here, with spaces for underscores."""
    return _BENCHMARKS.get(name, name.replace("_", " ").capitalize())


def percent(fraction: float, digits: int = 1, signed: bool = False) -> str:
    """0.557 -> 55.7; `signed` shows the sign, with a real minus."""
    text = f"{100 * fraction:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def bounds(low: float, high: float, signed: bool = False) -> str:
    """An interval of fractions in percent: [58.5, 59.3]."""
    return f"[{percent(low, signed=signed)}, {percent(high, signed=signed)}]"


def p_value(p: float) -> str:
    """How a p-value is quoted: two digits, or < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def count(number: float) -> str:
    """49,850,368 -> 49.85M: four significant digits with the SI letter."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.4g}{letter}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    """418 s, 14 min, 3.2 h."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cost_text(cost: str, value: float) -> str:
    """A cost of training with its unit, where it is not plain: 1.024M tokens, 8.86e+12 FLOPs, 150 s."""
    if cost == "seconds":
        return duration(value)
    return f"{count(value)} tokens" if cost == "tokens" else f"{value:.2e} FLOPs"


def seeds_label(label: str, seeds: int) -> str:
    """A variant's name, and how many seeds its figures are a mean of."""
    return f"{label}, mean of {seeds} seeds" if seeds > 1 else label


def difference_text(value: float, digits: int = 3) -> str:
    """+0.057, −0.057 with a real minus, 0.000."""
    text = f"{value:+.{digits}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def some(labels: Sequence[str], most: int = 3) -> str:
    """Labels in a line: A and B; A, B, C and 9 others. Those with commas in them are parted by semicolons."""
    between = "; " if any("," in label for label in labels) else ", "
    if len(labels) <= most:
        return " and ".join(filter(None, [between.join(labels[:-1]), labels[-1]]))
    left = len(labels) - most
    return f"{between.join(labels[:most])} and {left} other{'s'[: left > 1]}"
