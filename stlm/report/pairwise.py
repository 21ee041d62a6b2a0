"""`stlm compare A B`: two models on the items and documents on which both were scored."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from stlm.errors import UserError, nearest
from stlm.evaluation.predictions import Facts, read_facts, unlike
from stlm.evaluation.statistics import Interval, holm
from stlm.integrity import check_beside
from stlm.project import where_to_stand
from stlm.report.comparison import SIGN, SIGN_ITEMS, Accuracy, Paired, accuracy, by_mode, mark, paired
from stlm.report.documents import (
    FEW,
    FEW_NOTE,
    Difference,
    Documents,
    interval_text,
    read_documents,
)
from stlm.report.documents import compare as compare_documents
from stlm.report.names import bounds_record, difference_text, percent
from stlm.report.run_files import read_checkpoints, read_outcomes
from stlm.text_table import text_table
from stlm.training.checkpoint_names import RESULTS, is_file, is_folder, split_step
from stlm.units import byte_size

_ITEMS, _DOCUMENTS = "items.parquet", "documents.parquet"


@dataclass(frozen=True)
class Predictions:
    """One checkpoint of an items.parquet; `facts` are its metadata, None where it has none."""

    path: Path
    checkpoint: str
    step: int
    facts: Facts | None

    def __str__(self) -> str:
        name = f"{self.facts.study}/{self.facts.run}" if self.facts else str(self.path)
        return f"{name}@{self.step}"

    def outcomes(self) -> dict[tuple[str, str], pd.DataFrame]:
        """The items of each (benchmark, mode)."""
        found = by_mode(read_outcomes(self.path, self.checkpoint))
        if self.facts is not None:
            said = {(name, mode) for name, scored in self.facts.benchmarks.items() for mode in scored.metrics}
            for benchmark, mode in found:
                if (benchmark, mode) not in said:
                    raise UserError(
                        f"{self.path}: has rows of {benchmark} in {mode} mode, which its metadata "
                        "does not name; evaluate again"
                    )
        return found

    def metrics(self, benchmark: str, mode: str) -> list[str]:
        """The metrics of the benchmark in the mode; acc alone where the file does not say."""
        if self.facts is None:
            return ["acc"]
        return self.facts.benchmarks[benchmark].metrics.get(mode, [])


@dataclass(frozen=True)
class Row:
    """One score of two models: the accuracy of each on the common items, and B compared with A."""

    benchmark: str
    version: str | None
    mode: str
    metric: str
    a: Accuracy
    b: Accuracy
    paired: Paired


@dataclass(frozen=True)
class TextComparison:
    """Two models on the same documents, and the difference of B from A."""

    a: Documents
    b: Documents
    difference: Difference


@dataclass(frozen=True)
class PairwiseComparison:
    """The result of `stlm compare`; `text`: bits per byte, if of the same documents; `warnings`: caveats."""

    a: Predictions
    b: Predictions
    rows: list[Row]
    warnings: list[str]
    text: TextComparison | None = None


def find_predictions(name: str) -> Predictions:
    """The predictions that `name` refers to, at its last checkpoint or at the step after an @.

    `name` is a run's folder, an items.parquet, or STUDY/RUN for results/STUDY/runs/RUN (or published/RUN).
    Raises UserError naming the nearest run where there is none.
    """
    place, step = split_step(name)
    path = _items_file(place)
    check_beside(path.with_name("evaluation.json"), path.name)
    checkpoints = read_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path}: holds no item: no benchmark was scored")
    chosen = max(checkpoints) if step is None else step
    if chosen not in checkpoints:
        listed = ", ".join(map(str, checkpoints))
        raise UserError(f"{name}: {path} has no checkpoint of step {step} (found: {listed})")
    return Predictions(path, checkpoints[chosen], chosen, _facts(path, checkpoints))


def compare(a: Predictions, b: Predictions, force: bool = False) -> PairwiseComparison:
    """Compare B with A on the items of each benchmark, mode and metric that they share.

    Raises UserError where they were scored by different or unknown rules or files (with `force` only a
    warning), and where they share no item.
    """
    refusals, warnings = _unlike(a, b)
    if refusals and not force:
        listed = "".join(f"\n  {reason}" for reason in refusals)
        raise UserError(
            f"{a} and {b} cannot be compared:{listed}\nEvaluate again what is older (`stlm evaluate STUDY "
            "RUN`), or give --force to compare all the same"
        )
    first, other = a.outcomes(), b.outcomes()
    rows = []
    for benchmark, mode in [key for key in first if key in other]:
        items, others = first[benchmark, mode], other[benchmark, mode]
        common = items.index.intersection(others.index)
        if len(common) < max(len(items), len(others)):
            warnings.append(
                f"{benchmark}: {len(items):,} against {len(others):,} items were scored; the {len(common):,} "
                "that both have are compared"
            )
        if not len(common):
            continue
        items, others = items.loc[common], others.loc[common]
        version = a.facts.benchmarks[benchmark].version if a.facts else None
        for metric in [m for m in a.metrics(benchmark, mode) if m in b.metrics(benchmark, mode)]:
            measured = accuracy(items, metric), accuracy(others, metric)
            rows.append(Row(benchmark, version, mode, metric, *measured, paired(items, others, metric)))
    if not rows:
        have = [", ".join(dict.fromkeys(b for b, _ in scored)) for scored in (first, other)]
        raise UserError(f"{a} and {b} have no item in common: scored were {have[0]} against {have[1]}")
    adjusted = holm([row.paired.p for row in rows])
    rows = [
        replace(row, paired=replace(row.paired, adjusted=p)) for row, p in zip(rows, adjusted, strict=True)
    ]
    forced = [f"{reason} (--force)" for reason in refusals]
    text = compare_text((a.path, a.step), (b.path, b.step))
    if isinstance(text, str):
        warnings, text = [*warnings, text], None
    return PairwiseComparison(a, b, rows, list(dict.fromkeys([*forced, *warnings])), text)


def as_json(found: PairwiseComparison) -> str:
    """The comparison for programs, in ASCII; accuracies, differences and bounds are fractions."""
    sides = {
        name: {
            "items": str(side.path),
            "checkpoint": side.checkpoint,
            "step": side.step,
            "facts": side.facts and side.facts.model_dump(mode="json"),
        }
        for name, side in (("a", found.a), ("b", found.b))
    }
    rows = [
        {"benchmark": row.benchmark, "version": row.version, "mode": row.mode, "metric": row.metric}
        | {"n": row.paired.n, "a": _accuracy(row.a), "b": _accuracy(row.b)}
        | {"difference": row.paired.difference, **_bounds(row.paired)}
        | {"better": row.paired.better, "worse": row.paired.worse}
        | {"p": row.paired.p, "p_holm": row.paired.adjusted}
        for row in found.rows
    ]
    text = {"bits_per_byte": None if found.text is None else _text_json(found.text)}
    return json.dumps(sides | {"warnings": found.warnings, "comparisons": rows} | text, indent=2)


def as_text(found: PairwiseComparison) -> str:
    """The comparison for the terminal, in at most 100 columns: a block a mode and metric."""
    lines = [f"{letter}  {_description(side)}" for letter, side in (("A", found.a), ("B", found.b))]
    versions = {row.benchmark: row.version for row in found.rows if row.version is not None}
    if versions:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        blocks.setdefault((row.mode, row.metric), []).append(row)
    head = ["", "items", "A", "B", "B - A", "B>A", "A>B", "p", "Holm"]
    shown = text_table([head, *(_cells(row) for rows in blocks.values() for row in rows)], gap=" ")
    body = iter(shown[1:])
    for (mode, metric), rows in blocks.items():
        lines += ["", f"{mode} mode, {metric}", shown[0]]
        for row in rows:
            lines.append(next(body))
            if row.paired.clustered is not None:
                lines.append(f"  over {row.a.groups} groups{_over_groups(row)}")
    lines += [
        "",
        "In percent and points, with 95% intervals: Wilson for A and B, bootstrap over items for B - A;",
        "over groups: cluster-robust for A and B, whole groups resampled for B - A.",
        "B>A, A>B: items on which B's credit is higher, lower; p: exact McNemar test of these counts;",
        f"Holm: p adjusted for the {len(found.rows)} tests shown; {SIGN} where it is below 0.05,",
        f"{SIGN_ITEMS} where it is but the interval over groups includes zero.",
        *([] if found.text is None else _text_lines(found.text)),
        *(f"warning: {warning}" for warning in found.warnings),
    ]
    return "\n".join(lines)


def print_comparison(a: str, b: str, force: bool = False, machine_readable: bool = False) -> None:
    """Print the comparison of two names (see `find_predictions`); warnings go to stderr with JSON."""
    found = compare(find_predictions(a), find_predictions(b), force)
    print(as_json(found) if machine_readable else as_text(found))
    if machine_readable:
        for warning in found.warnings:
            print(f"warning: {warning}", file=sys.stderr)


def _items_file(name: str) -> Path:
    path = Path(name)
    if is_file(path):
        return path
    study, _, run = name.partition("/")
    folders = [path, RESULTS / study / "runs" / run, RESULTS / study / "published" / run]
    for folder in folders if run else folders[:1]:
        if is_file(folder / _ITEMS):
            return folder / _ITEMS
    for folder in folders if run else folders[:1]:
        if is_folder(folder):
            raise UserError(f"{folder}: has no {_ITEMS}; `stlm evaluate` writes it")
    known = [f"{p.parts[-4]}/{p.parts[-2]}" for p in RESULTS.glob(f"*/*/*/{_ITEMS}")]
    raise UserError(
        f"{name!r} is no run's folder, no {_ITEMS} and no STUDY/RUN in {RESULTS}/"
        f"{nearest(name, known) if RESULTS.is_dir() else where_to_stand()}"
    )


def _facts(path: Path, checkpoints: dict[int, str]) -> Facts | None:
    """The file's metadata; UserError where it lists other checkpoints than the rows have."""
    facts = read_facts(path)
    if facts is not None:
        said = {checkpoint.step: name for name, checkpoint in facts.checkpoints.items()}
        if said != checkpoints:
            raise UserError(
                f"{path}: its rows are of {', '.join(checkpoints.values())}, its metadata speaks of "
                f"{', '.join(said.values()) or 'no checkpoint'}; evaluate again"
            )
    return facts


def _unlike(a: Predictions, b: Predictions) -> tuple[list[str], list[str]]:
    silent = [side.path for side in (a, b) if side.facts is None]
    if silent:
        return [
            f"{path}: does not say how it was scored (written by an earlier version of STLM)"
            for path in dict.fromkeys(silent)
        ], []
    return unlike(a.facts, b.facts)


def _description(side: Predictions) -> str:
    if side.facts is None:
        return str(side)
    facts = side.facts
    weights = facts.checkpoints[side.checkpoint].weights_sha256[:12]
    seed = "" if facts.seed is None else f", seed {facts.seed}"
    prefix = "" if facts.prefix is None else f"; texts after {facts.prefix}"
    return f"{side} ({facts.label}{seed}; weights {weights}{prefix}; {facts.precision}, {facts.device})"


def _cells(row: Row) -> list[str]:
    comparison = row.paired
    sign = mark(comparison) or " "
    return [
        row.benchmark,
        str(comparison.n),
        f"{percent(row.a.value)} {_short(row.a.interval)}",
        f"{percent(row.b.value)} {_short(row.b.interval)}",
        f"{percent(comparison.difference, signed=True)}{sign} {_short(comparison.interval)}",
        str(comparison.better),
        str(comparison.worse),
        _p(comparison.p),
        _p(comparison.adjusted),
    ]


def _over_groups(row: Row) -> str:
    parts = (("A", row.a.clustered), ("B", row.b.clustered), ("B - A", row.paired.clustered))
    return "".join(f"; {name} {_short(interval)}" for name, interval in parts if interval is not None)


def _short(interval: Interval) -> str:
    return f"[{percent(interval.low)},{percent(interval.high)}]"


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"


def _accuracy(found: Accuracy) -> dict[str, Any]:
    return {"accuracy": found.value, **_bounds(found), "groups": found.groups or None}


def _bounds(found: Accuracy | Paired) -> dict[str, float | None]:
    return bounds_record(found.interval) | bounds_record(found.clustered, "clustered_")


def compare_text(a: tuple[Path, int], b: tuple[Path, int]) -> TextComparison | str | None:
    """Compare the documents.parquet next to two items.parquet, each at a step; or the reason why not.

    None where neither exists: both were evaluated by an earlier version. Raises UserError where one is
    unreadable or damaged.
    """
    files = [items.with_name(_DOCUMENTS) for items, _ in (a, b)]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        return f"bits per byte are not compared: no {missing[0]} (evaluated by an earlier version of STLM)"
    for file in files:
        check_beside(file.with_name("evaluation.json"), _DOCUMENTS)
    first, other = (read_documents(file, step) for file, (_, step) in zip(files, (a, b), strict=True))
    found = compare_documents(other, first)
    if found is None:
        sizes = f"{len(first):,} against {len(other):,}"
        return f"bits per byte are not compared: measured on other documents ({sizes})"
    return TextComparison(first, other, found)


def _text_lines(found: TextComparison) -> list[str]:
    """The comparison for the terminal."""
    documents, size = len(found.a), byte_size(int(found.a.n_bytes.sum()), digits=4)
    parts = [
        f"{name} {side.bits_per_byte:.4f} {interval_text(side.interval, side.few)}"
        for name, side in (("A", found.a), ("B", found.b))
    ]
    difference = found.difference
    shown = interval_text(difference.interval, difference.few, signed=True)
    lines = [
        "",
        f"bits per byte of test text ({documents:,} document{'s'[: documents > 1]}, {size})",
        f"{'; '.join(parts)}; B - A {difference_text(difference.value, 4)} {shown}",
        "with 95% intervals over documents, of B - A paired: not over seeds.",
    ]
    return [*lines, FEW_NOTE] if any(FEW in line for line in lines) else lines


def _text_json(found: TextComparison) -> dict[str, Any]:
    """The comparison for programs."""
    difference = found.difference
    return {
        "documents": len(found.a),
        "bytes": int(found.a.n_bytes.sum()),
        "few_documents": difference.few,
        "a": {"bits_per_byte": found.a.bits_per_byte, **bounds_record(found.a.interval)},
        "b": {"bits_per_byte": found.b.bits_per_byte, **bounds_record(found.b.interval)},
        "difference": difference.value,
        **bounds_record(difference.interval),
    }
