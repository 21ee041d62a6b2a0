"""How many benchmark items, and how much held-out text, the training text contains: two tables."""

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
    """Words that an item shares with the training text, and the first document of train that has them."""

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
    """Word sequences of a held-out split that also occur in train, as `stlm.tokens.leaks` counts them."""

    documents: int
    ngrams: int
    share: float | None
    above_half: int
    above_fifth: int
    worst: float | None


class HeldOut(BaseModel):
    """Leaks of val and test: sequences of `words` words, of which one in `one_in` was looked up."""

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
    """contamination.json: corpus -> benchmark -> numbers of items; `made`: settings of generated items."""

    sizes: list[int]
    made: dict[str, Any] | None = None
    code: dict[str, str | None] = {}
    corpora: dict[str, CorpusContamination]


def read_contamination(study: Study) -> Contamination:
    """The study's contamination.json. UserError where it is missing, damaged, or of another study's data."""
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
    for corpus in found.corpora.values():
        counted = {name: result.version for name, result in corpus.benchmarks.items()}
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
    """A row per benchmark and corpus: the number of items, and how many share n-grams with the corpus."""
    rows: list[Sequence[Cell] | Section] = []
    records: list[dict[str, object]] = []
    for corpus, counts in contamination.corpora.items():
        size = f"{counts.documents:,} documents, {counts.bytes / 1e6:,.1f} MB"
        rows.append(Section(f"{corpus}, train split: {size}"))
        for name, counted in counts.benchmarks.items():
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
    """A note for tables of accuracies; None where no item is contaminated."""
    parts = [
        f"{benchmark_label(name)} {counted.contaminated:,} of {counted.items:,}"
        + (f" ({corpus})" if len(contamination.corpora) > 1 else "")
        for corpus, counts in contamination.corpora.items()
        for name, counted in counts.benchmarks.items()
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
    for counts in contamination.corpora.values():
        for name, counted in counts.benchmarks.items():
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


def leaks_table(study: Study, contamination: Contamination) -> Table | None:
    """A row per held-out split; None where no corpus was measured (tokenized by an earlier version)."""
    rows: list[Sequence[Cell] | Section] = []
    records: list[dict[str, object]] = []
    words = 0
    for corpus, counts in contamination.corpora.items():
        if counts.held_out is None:
            continue
        words = counts.held_out.words
        size = f"{counts.documents:,} documents, {counts.bytes / 1e6:,.1f} MB"
        one_in = counts.held_out.one_in
        drawn = "" if one_in == 1 else f"; one in {one_in} sequences looked at"
        rows.append(Section(f"{corpus}, train split: {size}{drawn}"))
        for split, leak in (("val", counts.held_out.val), ("test", counts.held_out.test)):
            cells = [
                split,
                f"{leak.documents:,}",
                f"{leak.ngrams:,}",
                "–" if leak.share is None else f"{leak.share:.2%}",
                f"{leak.above_half:,}",
                f"{leak.above_fifth:,}",
                "–" if leak.worst is None else f"{leak.worst:.0%}",
            ]
            rows.append([Cell(text) for text in cells])
            records.append({"corpus": corpus, "split": split, **leak.model_dump()})
    if not rows:
        return None
    notes = [
        "Words as in the table of contamination. Near-duplicate documents are in one split, unless the "
        "source declares its splits; what is left are quotations, set phrases and what the source repeats."
    ]
    return Table(
        name="leaks",
        title=f"Held-out text that stands in the training text; study {study.name}",
        header=[
            "",
            "documents",
            f"sequences of\n{words} words",
            "of these\nin train",
            "documents\nabove a half",
            "above\na fifth",
            "most of\na document",
        ],
        rows=rows,
        notes=notes,
        records=records,
    )
