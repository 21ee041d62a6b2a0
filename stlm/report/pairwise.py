"""`stlm compare A B`: two models on the items and documents on which both were scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from stlm.errors import UserError, nearest
from stlm.evaluation.predictions import Facts, read_facts, unlike
from stlm.evaluation.statistics import Interval
from stlm.integrity import check_listed
from stlm.project import folder_hint
from stlm.report.comparison import SIGN, SIGN_ITEMS, Accuracy, Paired, accuracy, adjust, by_mode, paired
from stlm.report.documents import FEW_NOTE, Difference, Documents, interval_text, read_documents
from stlm.report.documents import compare as compare_documents
from stlm.report.names import bounds_record, difference_text, percent, plural
from stlm.report.run_files import read_checkpoints, read_outcomes
from stlm.text_table import text_table
from stlm.training.checkpoint_names import RESULTS, is_file, is_folder, split_step
from stlm.units import byte_size

_ITEMS, _DOCUMENTS = "items.parquet", "documents.parquet"


class Predictions(NamedTuple):
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
        outcomes = by_mode(read_outcomes(self.path, self.checkpoint))
        for benchmark, mode in outcomes if self.facts is not None else ():
            described = self.facts.benchmarks.get(benchmark)
            if described is None or mode not in described.metrics:
                raise UserError(
                    f"{self.path}: has rows of {benchmark} in {mode} mode, which its metadata "
                    "does not name; evaluate again"
                )
        return outcomes

    def metrics(self, benchmark: str, mode: str) -> list[str]:
        """The metrics of the benchmark in the mode; acc alone where the file does not say."""
        if self.facts is None:
            return ["acc"]
        return self.facts.benchmarks[benchmark].metrics.get(mode, [])


class Row(NamedTuple):
    """One score of two models: the accuracy of each on the common items, and B compared with A."""

    benchmark: str
    version: str | None
    mode: str
    metric: str
    a: Accuracy
    b: Accuracy
    paired: Paired


class TextComparison(NamedTuple):
    """Two models on the same documents, and the difference of B from A."""

    a: Documents
    b: Documents
    difference: Difference


class PairwiseComparison(NamedTuple):
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
    check_listed(path.with_name("evaluation.json"), path.name)
    checkpoints = read_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path}: holds no item: no benchmark was scored")
    step = max(checkpoints) if step is None else step
    if step not in checkpoints:
        listed = ", ".join(map(str, checkpoints))
        raise UserError(f"{name}: {path} has no checkpoint of step {step} (found: {listed})")
    facts, described = read_facts(path), checkpoints
    if facts is not None:
        described = {checkpoint.step: key for key, checkpoint in facts.checkpoints.items()}
    if described != checkpoints:
        raise UserError(
            f"{path}: its rows are of {', '.join(checkpoints.values())}, its metadata speaks of "
            f"{', '.join(described.values()) or 'no checkpoint'}; evaluate again"
        )
    return Predictions(path, checkpoints[step], step, facts)


def compare(a: Predictions, b: Predictions, force: bool = False) -> PairwiseComparison:
    """Compare B with A on the items of each benchmark, mode and metric that they share.

    Raises UserError where they were scored by different or unknown rules or files (with `force` only a
    warning), and where they share no item.
    """
    silent = dict.fromkeys(side.path for side in (a, b) if side.facts is None)
    reason = "does not say how it was scored (written by an earlier version of STLM)"
    refusals, warnings = [f"{path}: {reason}" for path in silent], []
    if not silent:
        refusals, warnings = unlike(a.facts, b.facts)
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
        items, others = items.loc[common], others.loc[common]
        version = a.facts.benchmarks[benchmark].version if a.facts else None
        shared = [metric for metric in a.metrics(benchmark, mode) if metric in b.metrics(benchmark, mode)]
        for metric in shared if len(common) else ():
            measured = accuracy(items, metric), accuracy(others, metric)
            rows.append(Row(benchmark, version, mode, metric, *measured, paired(items, others, metric)))
    if not rows:
        have = [", ".join(dict.fromkeys(b for b, _ in scored)) for scored in (first, other)]
        raise UserError(f"{a} and {b} have no item in common: scored were {have[0]} against {have[1]}")
    adjust(row.paired for row in rows)
    forced = [f"{reason} (--force)" for reason in refusals]
    text = compare_text((a.path, a.step), (b.path, b.step))
    if isinstance(text, str):
        warnings, text = [*warnings, text], None
    return PairwiseComparison(a, b, rows, list(dict.fromkeys([*forced, *warnings])), text)


def as_json(comparison: PairwiseComparison) -> str:
    """The comparison for programs, in ASCII; accuracies, differences and bounds are fractions."""

    def bounds(measured: Accuracy | Paired) -> dict[str, float | None]:
        return bounds_record(measured.interval) | bounds_record(measured.clustered, "clustered_")

    content: dict[str, Any] = {
        name: {
            "items": str(side.path),
            "checkpoint": side.checkpoint,
            "step": side.step,
            "facts": side.facts and side.facts.model_dump(mode="json"),
        }
        for name, side in (("a", comparison.a), ("b", comparison.b))
    }
    content["warnings"] = comparison.warnings
    content["comparisons"] = [
        {"benchmark": row.benchmark, "version": row.version, "mode": row.mode, "metric": row.metric}
        | {"n": row.paired.n}
        | {
            name: {"accuracy": side.value, **bounds(side), "groups": side.groups or None}
            for name, side in (("a", row.a), ("b", row.b))
        }
        | {"difference": row.paired.difference, **bounds(row.paired)}
        | {"better": row.paired.better, "worse": row.paired.worse}
        | {"p": row.paired.p, "p_holm": row.paired.adjusted}
        for row in comparison.rows
    ]
    content["bits_per_byte"] = None
    if (text := comparison.text) is not None:
        content["bits_per_byte"] = {
            "documents": len(text.a),
            "bytes": int(text.a.n_bytes.sum()),
            "few_documents": text.difference.few,
            "a": {"bits_per_byte": text.a.bits_per_byte, **bounds_record(text.a.interval)},
            "b": {"bits_per_byte": text.b.bits_per_byte, **bounds_record(text.b.interval)},
            "difference": text.difference.value,
            **bounds_record(text.difference.interval),
        }
    return json.dumps(content, indent=2)


def as_text(comparison: PairwiseComparison) -> str:
    """The comparison for the terminal, in at most 100 columns: a block a mode and metric."""
    lines = [f"A  {_description(comparison.a)}", f"B  {_description(comparison.b)}"]
    versions = {row.benchmark: row.version for row in comparison.rows if row.version is not None}
    if versions:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in comparison.rows:
        blocks.setdefault((row.mode, row.metric), []).append(row)
    head = ["", "items", "A", "B", "B - A", "B>A", "A>B", "p", "Holm"]
    cells = [_cells(row) for rows in blocks.values() for row in rows]
    head, *body = text_table([head, *cells], gap=" ")
    shown = iter(body)
    for (mode, metric), rows in blocks.items():
        lines += ["", f"{mode} mode, {metric}", head]
        for row in rows:
            lines.append(next(shown))
            if row.paired.clustered is not None:
                sides = (("A", row.a.clustered), ("B", row.b.clustered), ("B - A", row.paired.clustered))
                intervals = [f"{name} {_short(interval)}" for name, interval in sides if interval is not None]
                lines.append("; ".join([f"  over {row.a.groups} groups", *intervals]))
    lines += [
        "",
        "In percent and points, with 95% intervals: Wilson for A and B, bootstrap over items for B - A;",
        "over groups: cluster-robust for A and B, whole groups resampled for B - A.",
        "B>A, A>B: items on which B's credit is higher, lower; p: exact McNemar test of these counts;",
        f"Holm: p adjusted for the {len(comparison.rows)} tests shown; {SIGN} where it is below 0.05,",
        f"{SIGN_ITEMS} where it is but the interval over groups includes zero.",
    ]
    if comparison.text is not None:
        a, b, (value, interval, few) = comparison.text
        documents, size = plural(len(a), "document"), byte_size(int(a.n_bytes.sum()), digits=4)
        first, other = (f"{x.bits_per_byte:.4f} {interval_text(x.interval, x.few)}" for x in (a, b))
        difference = f"{difference_text(value, 4)} {interval_text(interval, few, signed=True)}"
        lines += [
            "",
            f"bits per byte of test text ({documents}, {size})",
            f"A {first}; B {other}; B - A {difference}",
            "with 95% intervals over documents, of B - A paired: not over seeds.",
            *([FEW_NOTE] if interval is not None and few else []),
        ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in comparison.warnings)])


def print_comparison(a: str, b: str, force: bool = False, machine_readable: bool = False) -> None:
    """Print the comparison of two names (see `find_predictions`); warnings go to stderr with JSON."""
    comparison = compare(find_predictions(a), find_predictions(b), force)
    print(as_json(comparison) if machine_readable else as_text(comparison))
    if machine_readable:
        for warning in comparison.warnings:
            print(f"warning: {warning}", file=sys.stderr)


def _items_file(name: str) -> Path:
    path = Path(name)
    if is_file(path):
        return path
    study, _, run = name.partition("/")
    folders = [path, *(RESULTS / study / kind / run for kind in ("runs", "published") if run)]
    for folder in folders:
        if is_file(folder / _ITEMS):
            return folder / _ITEMS
    for folder in folders:
        if is_folder(folder):
            raise UserError(f"{folder}: has no {_ITEMS}; `stlm evaluate` writes it")
    known = [f"{p.parts[-4]}/{p.parts[-2]}" for p in RESULTS.glob(f"*/*/*/{_ITEMS}")]
    raise UserError(
        f"{name!r} is no run's folder, no {_ITEMS} and no STUDY/RUN in {RESULTS}/"
        f"{nearest(name, known) if RESULTS.is_dir() else folder_hint()}"
    )


def _description(side: Predictions) -> str:
    if side.facts is None:
        return str(side)
    facts = side.facts
    weights = facts.checkpoints[side.checkpoint].weights_sha256[:12]
    seed = "" if facts.seed is None else f", seed {facts.seed}"
    prefix = "" if facts.prefix is None else f"; texts after {facts.prefix}"
    return f"{side} ({facts.label}{seed}; weights {weights}{prefix}; {facts.precision}, {facts.device})"


def _cells(row: Row) -> list[str]:
    test = row.paired
    return [
        row.benchmark,
        str(test.n),
        f"{percent(row.a.value)} {_short(row.a.interval)}",
        f"{percent(row.b.value)} {_short(row.b.interval)}",
        f"{percent(test.difference, signed=True)}{test.sign or ' '} {_short(test.interval)}",
        *(str(test.better), str(test.worse), _p(test.p), _p(test.adjusted)),
    ]


def _short(interval: Interval) -> str:
    return f"[{percent(interval.low)},{percent(interval.high)}]"


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"


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
        check_listed(file.with_name("evaluation.json"), _DOCUMENTS)
    first, other = (read_documents(file, step) for file, (_, step) in zip(files, (a, b), strict=True))
    if (difference := compare_documents(other, first)) is None:
        sizes = f"{len(first):,} against {len(other):,}"
        return f"bits per byte are not compared: measured on other documents ({sizes})"
    return TextComparison(first, other, difference)
