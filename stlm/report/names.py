"""How things are called in tables and plots, and how numbers are written there."""

from __future__ import annotations

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
