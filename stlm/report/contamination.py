"""The table of contamination: how many items of each benchmark stand in the training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stlm.errors import UserError
from stlm.evaluation.benchmarks import benchmark
from stlm.evaluation.made import made_settings
from stlm.evaluation.ngrams import SIZES
from stlm.files import read_record
from stlm.report.names import benchmark_label, percent
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Study


class Example(BaseModel):
    """Words that an item shares, and the document of the component's train split that has them first."""

    item: str
    words: str
    component: str
    document: int


class BenchmarkContamination(BaseModel):
    """Numbers of items; `long_enough` and `shared` by the length of the n-gram."""

    version: str
    items: int
    long_enough: dict[int, int]
    shared: dict[int, int]
    whole: int
    contaminated: int
    examples: list[Example]


class Leak(BaseModel):
    """Of a held-out split: word sequences that stand in train, as `stlm.tokens.leaks` measures them."""

    documents: int
    ngrams: int
    share: float | None
    above_half: int
    above_fifth: int
    worst: float | None


class HeldOut(BaseModel):
    """Leaks of val and test; sequences of `words` words, of which one in `one_in` was looked at."""

    words: int
    one_in: int
    val: Leak
    test: Leak


class CorpusContamination(BaseModel):
    documents: int
    bytes: int
    benchmarks: dict[str, BenchmarkContamination]
    held_out: HeldOut | None = None


class Contamination(BaseModel):
    """contamination.json: corpus -> benchmark -> numbers of items; `made`: what decides which are made."""

    sizes: list[int]
    made: dict[str, Any] | None = None
    code: dict[str, str | None] = {}
    corpora: dict[str, CorpusContamination]


def read_contamination(study: Study) -> Contamination:
    """The study's contamination.json. UserError: missing, damaged, of other corpora or benchmarks."""
    path, command = study.folder / "contamination.json", f"run: stlm contamination {study.name}"
    if not path.is_file():
        raise UserError(f"{path}: is missing; {command}")
    found = read_record(path, Contamination)
    if set(found.corpora) != set(study.corpora):
        raise UserError(
            f"{path}: is about {', '.join(found.corpora) or 'no corpus'}, but the runs train on "
            f"{', '.join(study.corpora)}; {command}"
        )
    made = made_settings(study.evaluation)
    if found.sizes != list(SIZES) or found.made != made:
        raise UserError(
            f"{path}: counted sequences of {_listed(found.sizes)} words, items made with {found.made}; now "
            f"it is {_listed(SIZES)} words, and the study asks for {made}; {command}"
        )
    asked = {b.name: b.version for b in map(benchmark, study.benchmarks)}
    for own in found.corpora.values():
        counted = {name: result.version for name, result in own.benchmarks.items()}
        if counted != asked:
            raise UserError(
                f"{path}: is about {_versions(counted)}, but the study scores {_versions(asked)}; {command}"
            )
    return found


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def _versions(benchmarks: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in benchmarks.items()) or "no benchmark"


def contamination_table(study: Study, contamination: Contamination) -> Table:
    """A row a benchmark: how many items, and how many share how much with each corpus of the study."""
    rows: list[Sequence[Cell] | Section] = []
    records: list[dict[str, object]] = []
    for corpus, own in contamination.corpora.items():
        rows.append(Section(f"{corpus}, train split: {own.documents:,} documents, {own.bytes / 1e6:,.1f} MB"))
        for name, counted in own.benchmarks.items():
            cells = [f"{benchmark_label(name)} (version {counted.version})", f"{counted.items:,}"]
            record: dict[str, object] = {"corpus": corpus, "benchmark": name, "version": counted.version}
            record["items"] = counted.items
            for n in contamination.sizes:
                cells += [f"{counted.long_enough[n]:,}", _share(counted.shared[n], counted.items)]
                record |= {f"at_least_{n}_words": counted.long_enough[n], f"share_{n}": counted.shared[n]}
            rows.append([Cell(text) for text in (*cells, _share(counted.whole, counted.items))])
            records.append(record | {"whole": counted.whole, "contaminated": counted.contaminated})
    header = ["", "items"]
    for n in contamination.sizes:
        header += [f"of {n} words\nor more", f"share {n} words\nin sequence"]
    return Table(
        name="contamination",
        title=f"Benchmark items that stand in the training text; study {study.name}",
        header=[*header, "whole item"],
        rows=rows,
        notes=_notes(contamination),
        records=records,
    )


def contamination_note(contamination: Contamination) -> str | None:
    """A line for tables of accuracies; None where no item shares a long n-gram or stands whole in a text."""
    parts = [
        f"{benchmark_label(name)} {counted.contaminated:,} of {counted.items:,}"
        + (f" ({corpus})" if len(contamination.corpora) > 1 else "")
        for corpus, own in contamination.corpora.items()
        for name, counted in own.benchmarks.items()
        if counted.contaminated
    ]
    if not parts:
        return None
    return (
        f"Items that share {max(contamination.sizes)} words in sequence with the training text, or stand in "
        f"it whole, are counted above like all others: {'; '.join(parts)} (table contamination)."
    )


def _share(number: int, of: int) -> str:
    if number == 0:
        return "0"
    fraction = number / of
    return f"{number:,} ({percent(fraction) if fraction >= 0.0005 else '< 0.1'}%)"


def _notes(contamination: Contamination) -> list[str]:
    notes = [
        "An item's text: the question or context and the right answer, of a minimal pair the good sentence, "
        "of Last word the passage. "
        "Words as in Brown et al. 2020 (appendix C): lower case, no punctuation, split at white space. All "
        "items of the split, whatever the limit (of Last word, those scored); all of the train split, "
        "whatever part of it a run sees. In "
        "brackets: the share of all items. Whole item: all of its words in sequence, however few. In "
        "generated text, which repeats its phrases by construction, a shared sequence is no leak.",
    ]
    for own in contamination.corpora.values():
        for name, counted in own.benchmarks.items():
            if counted.examples:
                first = counted.examples[0]
                notes.append(
                    f"{benchmark_label(name)}, for example {first.item}: “{_shortened(first.words)}” "
                    f"({first.component}, document {first.document:,})."
                )
    return notes


def _shortened(words: str, most: int = 20) -> str:
    listed = words.split()
    return words if len(listed) <= most else f"{' '.join(listed[:most])} …"
