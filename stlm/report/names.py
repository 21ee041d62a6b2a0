"""Names in tables and plots, and how numbers are written there and in the records for programs."""

from __future__ import annotations

from collections.abc import Sequence

from stlm.units import count, duration

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
    "steps_arithmetic": "Steps, arithmetic",
    "steps_arithmetic_written": "Steps, arithmetic, written",
    "steps_entities": "Steps, entities",
    "steps_entities_written": "Steps, entities, written",
}


def benchmark_label(name: str) -> str:
    """The benchmark's usual spelling; an unknown name gets spaces in place of underscores."""
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


def rounded(value: float | None, digits: int | None) -> float | None:
    """A figure for programs; None where there is none. All digits are kept where `digits` is None."""
    return value if value is None or digits is None else round(value, digits)


def bounds_record(
    interval: tuple[float, float] | None, prefix: str = "", digits: int | None = None, scale: float = 1.0
) -> dict[str, float | None]:
    """An interval for programs: `prefix`low and `prefix`high, times `scale`; None where there is none."""
    low, high = (None, None) if interval is None else (rounded(scale * bound, digits) for bound in interval)
    return {f"{prefix}low": low, f"{prefix}high": high}


def p_record(p: float | None) -> float | None:
    """A p-value for programs: four significant digits."""
    return None if p is None else float(f"{p:.4g}")


def p_value(p: float) -> str:
    """How a p-value is quoted: two digits, or < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def cost_text(cost: str, value: float) -> str:
    """A cost of training (tokens, flops or seconds) with its unit: 1.024M tokens, 8.86e+12 FLOPs, 150 s."""
    if cost == "seconds":
        return duration(value)
    return f"{count(value)} tokens" if cost == "tokens" else f"{value:.2e} FLOPs"


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1 document, 1,200 documents."""
    return f"{number:,} {noun}{'s'[: number != 1]}"


def seeds_label(label: str, seeds: int) -> str:
    """A variant's name and, where there are several, the number of seeds that its figures average."""
    return f"{label}, mean of {seeds} seeds" if seeds > 1 else label


def difference_text(value: float, digits: int = 3) -> str:
    """+0.057, −0.057 with a real minus, 0.000."""
    text = f"{value:+.{digits}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def some(labels: Sequence[str], most: int = 3) -> str:
    """Labels in a line: A and B; A, B, C and 9 others. Semicolons separate labels that contain commas."""
    between = "; " if any("," in label for label in labels) else ", "
    if len(labels) <= most:
        return " and ".join(filter(None, [between.join(labels[:-1]), labels[-1]]))
    left = len(labels) - most
    return f"{between.join(labels[:most])} and {left} other{'s'[: left > 1]}"


def listing(sentence: str, items: Sequence[str]) -> str | None:
    """A sentence that ends with a list; None where there is nothing to list."""
    return f"{sentence}: {'; '.join(items)}." if items else None
