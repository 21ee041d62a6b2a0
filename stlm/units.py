"""Numbers with their units, as people read them."""

from __future__ import annotations


def count(number: float, digits: int = 4) -> str:
    """49,850,368 -> 49.85M: significant digits and a letter for thousands, millions, billions, trillions."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.{digits}g}{letter}"
    return f"{number:.{digits}g}"


def byte_size(n_bytes: float, digits: int = 3) -> str:
    """715,269 -> 715 kB: significant digits and a decimal unit, bytes to TB."""
    value, unit = n_bytes, "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if float(f"{value:.{digits}g}") < 1000:
            break
        value, unit = value / 1000, larger
    whole = unit == "bytes" or value >= 10**digits
    return f"{value:,.0f} {unit}" if whole else f"{value:.{digits}g} {unit}"


def duration(seconds: float) -> str:
    """418 s, 14 min, 3.2 h."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
