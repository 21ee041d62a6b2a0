"""Accuracy by group: BLiMP's paradigms and phenomena, MMLU's subjects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stlm.report.results import RunResult


def group_records(results: Mapping[str, RunResult]) -> list[dict[str, Any]]:
    """Accuracy by paradigm, phenomenon, subject ... of every run's last checkpoint, as flat records."""
    return [
        {"run": name, "benchmark": benchmark, "version": scored.version, "mode": mode}
        | {"grouping": grouping, "group": group}
        | {
            "percent": round(100 * a.value, 3),
            "low": round(100 * a.low, 3),
            "high": round(100 * a.high, 3),
            "n": a.n,
        }
        for name, result in results.items()
        for benchmark, scored in result.last.benchmarks.items()
        for mode, outcome in scored.modes.items()
        for grouping, groups in outcome.groups.items()
        for group, a in groups.items()
    ]
