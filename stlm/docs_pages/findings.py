"""docs/findings.md: a table of each study's committed results, put into the page that people write."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from stlm.docs_pages.blocks import block, fill, studies_shown
from stlm.docs_pages.committed import CommittedVariant, differences, read_committed, read_variants
from stlm.errors import UserError
from stlm.evaluation.statistics import SeedNoise, seed_noise
from stlm.files import write_text
from stlm.report.comparison import SIGN, SIGN_ITEMS, significant
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.names import benchmark_label, bounds, count, difference_text, percent, plural
from stlm.report.notes import noise_note
from stlm.report.table import Table, markdown, read_table
from stlm.report.unlike import Row, unlike_note

FINDINGS = Path("docs/findings.md")
_BENCHMARK, _MODE = "blimp", "harness"
# What a block shows: the study in short, or a table of its report by name.
_SHORT = "in short"


def studies_with_results(root: Path) -> list[str]:
    """Names of the studies whose report is in results/, in alphabetical order."""
    return sorted(path.parent.name for path in (root / "results").glob("*/metrics.json"))


def findings_page(root: Path = Path()) -> str:
    """The page with its tables as results/ has them; a study that it lacks is begun at its end.

    Raises UserError for a table of a study that has no results: what was not run is not in the findings.
    """
    text = (root / FINDINGS).read_text(encoding="utf-8")
    present, named = studies_with_results(root), studies_shown(text)
    absent = [study for study in named if study not in present]
    if absent:
        raise UserError(
            f"{FINDINGS}: has a table of {', '.join(absent)}, but results/{absent[0]}/metrics.json is "
            "missing: run the study, or take its section out"
        )
    page = fill(FINDINGS, text, lambda what, study: _block(root, study, what))
    return page + "".join(
        f"\n## `{study}`\n\n{_block(root, study)}\n" for study in present if study not in named
    )


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
    return block(what, table, study, end="table")


def findings_table(study: str, folder: Path) -> Table:
    """A row a variant of the study whose results are in `folder`, the baseline first."""
    variants, tests = read_variants(folder), _tests(folder)
    base_name, base = next(iter(variants.items()))
    accuracies = {name: _accuracies(variant) for name, variant in variants.items()}
    scored = any(accuracies.values())
    bits_noise = seed_noise({name: variant.bits for name, variant in variants.items()})
    accuracy_noise = seed_noise(accuracies)
    over_documents = {name: variant.compare(base) for name, variant in variants.items()}

    def columns(name: str, variant: CommittedVariant) -> Iterator[tuple[str, str]]:
        train, is_base, difference = variant.train, variant is base, partial(_difference, (name, base_name))
        yield "", train.label
        yield "parameters", count(train.parameters.total)
        yield "training FLOPs", f"{train.total_flops:.2e}"
        yield "tokens", count(train.tokens_in_all)
        yield "seeds", str(len(variant.bits))
        yield "bits per byte (test)", _mean(variant.bits, 1, 3)
        shared = differences(variant.bits, base.bits)
        yield f"difference from {base.label}", "" if is_base else difference(shared, bits_noise, 1, 3)
        if any(over_documents.values()):
            over = over_documents[name]
            text = "–" if over is None else interval_text(over.interval, over.few, signed=True)
            yield "over documents", "" if is_base else text
        if scored:
            label = f"{benchmark_label(_BENCHMARK)} (%, n = {_items(base):,})"
            yield label, _mean(accuracies[name], 100, 1)
            shared = differences(accuracies[name], accuracies[base_name])
            text = difference(shared, accuracy_noise, 100, 1)
            test = tests.get(list(variant.trains.values())[-1].run, {}) if accuracies[name] else {}
            if accuracy_noise is None and test.get("difference"):
                text = _over_items(test)
            yield "difference (points)", "" if is_base else text

    compared = [over for over in over_documents.values() if over is not None]
    rows = [Row(train.variant, train.label, train, scores) for train, _, scores in read_committed(folder)]
    return Table.of_columns(
        "findings",
        f"Study {study}",
        [columns(*variant) for variant in variants.items()],
        [
            *_notes(variants, bits_noise, accuracy_noise, scored),
            amount_note((variant.label, variant.text) for variant in variants.values()),
            "Over documents: the difference's 95% interval when documents are resampled, paired; not other "
            "seeds."
            if compared
            else None,
            FEW_NOTE if any(over.few for over in compared) else None,
            unlike_note(rows),
        ],
    )


def _accuracies(variant: CommittedVariant) -> dict[int, float]:
    """The accuracy of the one benchmark that the table shows, by seed."""
    scored = {seed: last.accuracy(_BENCHMARK, _MODE) for seed, last in variant.last.items()}
    return {seed: accuracy.value for seed, accuracy in scored.items() if accuracy is not None}


def _items(base: CommittedVariant) -> int:
    """The number of items that the baseline answered last."""
    scored = [last.accuracy(_BENCHMARK, _MODE) for last in reversed(base.last.values())]
    return next((accuracy.n for accuracy in scored if accuracy is not None), 0)


def _tests(folder: Path) -> dict[str, dict[str, str]]:
    """By run, the row of statistics.csv for the benchmark that the table shows, at the last checkpoint."""
    statistics = read_table(folder / "tables" / "statistics.csv")
    wanted = {"kind": "run", "benchmark": _BENCHMARK, "metric": "acc", "mode": _MODE}
    rows = csv.DictReader(io.StringIO(statistics))  # the last checkpoint comes last
    return {row["run"]: row for row in rows if wanted.items() <= row.items()}


def _mean(values: Mapping[int, float], scale: float, digits: int) -> str:
    if not values:
        return "–"
    text = f"{scale * mean(values.values()):.{digits}f}"
    return text + (f" ± {scale * stdev(values.values()):.{digits}f}" if len(values) > 1 else "")


def _difference(
    models: tuple[str, str], shared: list[float], noise: SeedNoise | None, scale: float, digits: int
) -> str:
    """The mean over common seeds, with its 95% interval where the noise of seeds is known."""
    if not shared:
        return "–"
    value = scale * mean(shared)
    text = difference_text(value, digits)
    if noise is None:
        return text
    half = scale * noise.half_width(shared, models)
    return f"{text} [{difference_text(value - half, digits)}, {difference_text(value + half, digits)}]"


def _over_items(test: Mapping[str, str]) -> str:
    """The difference over items, as the report tested it."""
    value, low, high = (float(test[f"difference{end}"]) / 100 for end in ("", "_low", "_high"))
    sign = SIGN if test["p_holm"] and significant(float(test["p_holm"])) else ""
    groups = [test.get(f"difference_clustered_{end}") for end in ("low", "high")]
    if sign and all(groups) and float(groups[0]) <= 0 <= float(groups[1]):
        sign = SIGN_ITEMS
    return f"{percent(value, signed=True)}{sign} {bounds(low, high, signed=True)}"


def _notes(
    variants: Mapping[str, CommittedVariant], bits: SeedNoise | None, accuracy: SeedNoise | None, scored: bool
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
    seeds = max(len(variant.bits) for variant in variants.values())
    labels = {name: variant.train.label for name, variant in variants.items()}
    return [
        f"±: standard deviation over the {seeds} seeds. In brackets 95% intervals of differences, paired by "
        f"seed, from the noise of the seeds of all variants together (standard deviation {bits.sd:.4f} bits "
        f"per byte{f', {100 * accuracy.sd:.1f} points' if accuracy else ''}; {plural(bits.dof, 'degree')} of "
        "freedom), not adjusted for their number. Bits per byte are of the test split, after the last step.",
        noise_note(bits, labels, "of bits per byte"),
        *([noise_note(accuracy, labels, f"of {benchmark_label(_BENCHMARK)}")] if accuracy else []),
    ]
