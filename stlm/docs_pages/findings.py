"""docs/findings.md: a table of each study's committed results, put into the page that people write."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from stlm.docs_pages.committed import committed_documents, read_committed, read_table
from stlm.errors import UserError
from stlm.evaluation.statistics import SeedNoise, seed_noise
from stlm.files import write_text
from stlm.report.documents import (
    FEW_NOTE,
    Difference,
    Documents,
    amount_note,
    compare_seeds,
    interval_text,
)
from stlm.report.names import benchmark_label, bounds, count, difference_text, percent
from stlm.report.noise import noise_note
from stlm.report.results import TextRecord, TrainRecord
from stlm.report.table import Cell, Table, markdown
from stlm.report.unlike import Row, unlike_note

FINDINGS = Path("docs/findings.md")
_BENCHMARK, _MODE = "blimp", "harness"
# What a block shows: the study in short, or a table of its report by name.
_SHORT = "in short"
_BEGIN = "<!-- {what}: written by `stlm document` from results/{study}/ -->\n"
_END = "<!-- /table -->\n"
_BLOCK = re.compile(_BEGIN.format(what="([a-z0-9 -]+)", study="([a-z0-9_-]+)") + "(.*?)" + _END, re.DOTALL)


@dataclass
class _Variant:
    """A variant's first record, and by seed: bits per byte on test text (`text` says on how much), those of
    each document, accuracy, and its difference."""

    train: TrainRecord
    text: TextRecord
    bits: dict[int, float] = field(default_factory=dict)
    documents: dict[int, Documents | None] = field(default_factory=dict)
    accuracy: dict[int, float] = field(default_factory=dict)
    items: int = 0
    paired: dict[str, str] = field(default_factory=dict)


def studies_with_results(root: Path) -> list[str]:
    """Names of the studies whose report is in results/, in alphabetical order."""
    return sorted(path.parent.name for path in (root / "results").glob("*/metrics.json"))


def findings_page(root: Path = Path()) -> str:
    """The page with its tables as results/ has them; a study that it lacks is begun at its end.

    Raises UserError for a table of a study that has no results: what was not run is not in the findings.
    """
    text = (root / FINDINGS).read_text(encoding="utf-8")
    there = studies_with_results(root)
    named = [match[2] for match in _BLOCK.finditer(text)]
    absent = [study for study in named if study not in there]
    if absent:
        raise UserError(
            f"{FINDINGS}: has a table of {', '.join(absent)}, but results/{absent[0]}/metrics.json is "
            "missing: run the study, or take its section out"
        )
    page = _BLOCK.sub(lambda match: _block(root, match[2], match[1]), text)
    for study in there:
        if study not in named:
            page += f"\n## `{study}`\n\n{_block(root, study)}"
    return page


def write_findings(root: Path = Path()) -> Path:
    """Put the tables of results/ into docs/findings.md; its path."""
    write_text(root / FINDINGS, findings_page(root))
    return FINDINGS


def _block(root: Path, study: str, what: str = _SHORT) -> str:
    folder = root / "results" / study
    path = folder / "tables" / f"{what}.md"
    if what == _SHORT:
        table = markdown(findings_table(study, folder))
    elif path.is_file():
        table = read_table(path)
    else:
        raise UserError(
            f"{FINDINGS}: shows {path.relative_to(root)}, which is missing: run `stlm report {study}`"
        )
    return f"{_BEGIN.format(what=what, study=study)}{table}{_END}"


def findings_table(study: str, folder: Path) -> Table:
    """A row a variant of the study whose results are in `folder`, the baseline first."""
    variants = _read(folder)
    base = next(iter(variants.values()))
    bits = seed_noise({name: own.bits for name, own in variants.items()})
    accuracy = seed_noise({name: own.accuracy for name, own in variants.items()})
    scored = any(own.accuracy for own in variants.values())
    over_documents = {name: compare_seeds(own.documents, base.documents) for name, own in variants.items()}
    kept = any(over_documents.values())
    rows = []
    for own in variants.values():
        train = own.train
        row = [
            Cell(train.label),
            Cell(count(train.parameters.total)),
            Cell(f"{train.total_flops:.2e}"),
            Cell(count(train.tokens + (train.start.tokens if train.start else 0))),
            Cell(str(len(own.bits))),
            Cell(_mean(own.bits, 1, 3)),
            Cell("" if own is base else _difference(own, base, "bits", bits, 1, 3)),
        ]
        if kept:
            over = None if own is base else over_documents[train.variant]
            shown = "–" if over is None else interval_text(over.interval, over.few, signed=True)
            row.append(Cell("" if own is base else shown))
        if scored:
            row += [
                Cell(_mean(own.accuracy, 100, 1)),
                Cell("" if own is base else _accuracy(own, base, accuracy)),
            ]
        rows.append(row)
    header = ["", "parameters", "training FLOPs", "tokens", "seeds", "bits per byte (test)"]
    header.append(f"difference from {base.train.label}")
    if kept:
        header.append("over documents")
    if scored:
        header += [f"{benchmark_label(_BENCHMARK)} (%, n = {base.items:,})", "difference (points)"]
    return Table(
        name="findings",
        title=f"Study {study}",
        header=header,
        rows=rows,
        notes=[
            *_notes(variants, bits, accuracy, scored),
            amount_note((own.train.label, own.text) for own in variants.values()),
            *_document_notes(over_documents.values()),
            *filter(None, [_unlike(folder)]),
        ],
    )


def _document_notes(compared: Iterable[Difference | None]) -> list[str]:
    """What the column `over documents` says, where the study's runs kept the scores of their documents."""
    found = [own for own in compared if own is not None]
    if not found:
        return []
    note = (
        "Over documents: the difference's 95% interval when documents are resampled, paired; not other seeds."
    )
    return [note, *([FEW_NOTE] if any(own.few for own in found) else [])]


def _read(folder: Path) -> dict[str, _Variant]:
    """Variants in the report's order, from the files of their runs."""
    statistics = read_table(folder / "tables" / "statistics.csv")
    rows = [row for row in csv.DictReader(io.StringIO(statistics)) if row["kind"] == "run"]
    paired = {
        row["run"]: row
        for row in rows  # the last checkpoint's come last
        if (row["benchmark"], row["metric"]) == (_BENCHMARK, "acc") and row["mode"] == _MODE
    }
    variants: dict[str, _Variant] = {}
    for run, train, last, _ in read_committed(folder):
        own = variants.setdefault(train.variant, _Variant(train, last.perplexity))
        own.bits[train.seed] = last.perplexity.bits_per_byte
        own.documents[train.seed] = committed_documents(folder, run, last)
        modes = last.benchmarks[_BENCHMARK].modes if _BENCHMARK in last.benchmarks else {}
        if _MODE in modes:
            scored = modes[_MODE].acc
            own.accuracy[train.seed], own.items, own.paired = scored.value, scored.n, paired.get(run, {})
    return variants


def _unlike(folder: Path) -> str | None:
    """Which of the study's runs were not made alike."""
    committed = read_committed(folder)
    return unlike_note([Row(train.variant, train.label, train, scored) for _, train, _, scored in committed])


def _mean(values: Mapping[int, float], scale: float, digits: int) -> str:
    if not values:
        return "–"
    text = f"{scale * mean(values.values()):.{digits}f}"
    return text + (f" ± {scale * stdev(values.values()):.{digits}f}" if len(values) > 1 else "")


def _difference(
    own: _Variant,
    base: _Variant,
    figure: Literal["bits", "accuracy"],
    noise: SeedNoise | None,
    scale: float,
    digits: int,
) -> str:
    """The mean over common seeds, with its 95% interval where the noise of seeds is known."""
    values, references = getattr(own, figure), getattr(base, figure)
    differences = [value - references[seed] for seed, value in values.items() if seed in references]
    if not differences:
        return "–"
    value = scale * mean(differences)
    if noise is None:
        return difference_text(value, digits)
    half = scale * noise.half_width(differences, (own.train.variant, base.train.variant))
    interval = f"[{difference_text(value - half, digits)}, {difference_text(value + half, digits)}]"
    return f"{difference_text(value, digits)} {interval}"


def _accuracy(own: _Variant, base: _Variant, noise: SeedNoise | None) -> str:
    """Over seeds where there are several; else over items, as the report tested it."""
    if noise is not None or not own.paired.get("difference"):
        return _difference(own, base, "accuracy", noise, 100, 1)
    value, low, high = (float(own.paired[f"difference{end}"]) / 100 for end in ("", "_low", "_high"))
    sign = "*" if own.paired["p_holm"] and float(own.paired["p_holm"]) < 0.05 else ""
    groups = [own.paired.get(f"difference_clustered_{end}") for end in ("low", "high")]
    if sign and all(groups) and float(groups[0]) <= 0 <= float(groups[1]):
        sign = "†"
    return f"{percent(value, signed=True)}{sign} {bounds(low, high, signed=True)}"


def _notes(
    variants: Mapping[str, _Variant], bits: SeedNoise | None, accuracy: SeedNoise | None, scored: bool
) -> list[str]:
    if bits is None:
        notes = [
            "One seed: how far another would move these figures is not known from this study. Bits per byte "
            "are of the test split, after the last step."
        ]
        if scored:
            notes.append(
                "Intervals of accuracies are over items, at 95%; *: p < 0.05, McNemar's exact test after "
                "Holm's correction for the tests of its mode in the study; †: so too, but not shown for "
                "other paradigms, as an interval over whole ones includes zero. They do not speak for "
                "another seed."
            )
        return notes
    seeds = max(len(own.bits) for own in variants.values())
    labels = {name: own.train.label for name, own in variants.items()}
    return [
        f"±: standard deviation over the {seeds} seeds. In brackets 95% intervals of differences, paired by "
        f"seed, from the noise of the seeds of all variants together (standard deviation {bits.sd:.4f} bits "
        f"per byte{f', {100 * accuracy.sd:.1f} points' if accuracy else ''}; {bits.dof} "
        f"degree{'s'[: bits.dof > 1]} of freedom), not adjusted for their number. Bits per byte are of the "
        "test split, after the last step.",
        noise_note(bits, labels, "of bits per byte"),
        *([noise_note(accuracy, labels, f"of {benchmark_label(_BENCHMARK)}")] if accuracy else []),
    ]
