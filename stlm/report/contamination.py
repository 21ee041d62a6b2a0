"""How many benchmark items, and how much held-out text, the training text contains: two tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stlm.errors import UserError
from stlm.evaluation.benchmarks import benchmark
from stlm.evaluation.ngrams import SIZES
from stlm.evaluation.text_items import text_item_settings
from stlm.files import read_record
from stlm.report.names import benchmark_label, percent
from stlm.report.table import Section, Table
from stlm.study.runs import Study

_MOST_WORDS = 20  # of an example


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

    def section(self, corpus: str, more: str = "") -> Section:
        """The row above those of a corpus, with its size."""
        size = f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB"
        return Section(f"{corpus}, train split: {size}{more}")


class Contamination(BaseModel):
    """contamination.json: corpus -> benchmark -> numbers of items; `made`: settings of generated items."""

    sizes: list[int]
    made: dict[str, Any] | None = None
    code: dict[str, str | None] = {}
    corpora: dict[str, CorpusContamination]


def read_contamination(study: Study) -> Contamination:
    """The study's contamination.json. UserError where it is missing, damaged, or of another study's data."""
    path = study.folder / "contamination.json"

    def check(agrees: bool, problem: str) -> None:
        if not agrees:
            raise UserError(f"{path}: {problem}; run: stlm contamination {study.name}")

    check(path.is_file(), "is missing")
    record, made = read_record(path, Contamination), text_item_settings(study.evaluation)
    about, trained = ", ".join(record.corpora) or "no corpus", ", ".join(study.corpora)
    check(set(record.corpora) == set(study.corpora), f"is about {about}, but the runs train on {trained}")
    counted = f"counted sequences of {_listed(record.sizes)} words, items made with {record.made}"
    asked = f"now it is {_listed(SIZES)} words, and the study asks for {made}"
    check(record.sizes == list(SIZES) and record.made == made, f"{counted}; {asked}")
    scored = {b.name: b.version for b in map(benchmark, study.benchmarks)}
    for corpus in record.corpora.values():
        versions = {name: result.version for name, result in corpus.benchmarks.items()}
        about = f"is about {_versions(versions)}, but the study scores {_versions(scored)}"
        check(versions == scored, about)
    return record


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def _versions(benchmarks: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in benchmarks.items()) or "no benchmark"


def contamination_table(study: Study, contamination: Contamination) -> Table | None:
    """A row per benchmark and corpus: the number of items, and how many share n-grams with the corpus.

    None where no benchmark is scored.
    """
    if not study.benchmarks:
        return None

    def columns(corpus: str, name: str, counted: BenchmarkContamination) -> Iterator[tuple]:
        items = counted.items
        named = {"corpus": corpus, "benchmark": name, "version": counted.version}
        yield "", f"{benchmark_label(name)} (version {counted.version})", named
        yield "items", f"{items:,}", {"items": items}
        for n in contamination.sizes:
            long, shared = counted.long_enough[n], counted.shared[n]
            yield f"of {n} words\nor more", f"{long:,}", {f"at_least_{n}_words": long}
            yield f"share {n} words\nin sequence", _share(shared, items), {f"share_{n}": shared}
        record = {"whole": counted.whole, "contaminated": counted.contaminated}
        yield "whole item", _share(counted.whole, items), record

    rows: list[Section | Iterator[tuple]] = []
    for corpus, counts in contamination.corpora.items():
        benchmarks = counts.benchmarks.items()
        rows += [counts.section(corpus), *(columns(corpus, name, counted) for name, counted in benchmarks)]
    title = f"Benchmark items that stand in the training text; study {study.name}"
    return Table.of_columns("contamination", title, rows, _notes(contamination))


def contamination_note(contamination: Contamination) -> str | None:
    """A note for tables of accuracies; None where no item is contaminated."""
    listed = [
        f"{benchmark_label(name)} {counted.contaminated:,} of {counted.items:,}"
        + (f" ({corpus})" if len(contamination.corpora) > 1 else "")
        for corpus, counts in contamination.corpora.items()
        for name, counted in counts.benchmarks.items()
        if counted.contaminated
    ]
    if not listed:
        return None
    return (
        f"Items that share {max(contamination.sizes)} words in sequence with the training text, or stand in "
        f"it whole, are counted above like all others: {'; '.join(listed)} (table contamination)."
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
            for first in counted.examples[:1]:
                words = first.words.split()
                shown = first.words if len(words) <= _MOST_WORDS else " ".join([*words[:_MOST_WORDS], "…"])
                notes.append(
                    f"{benchmark_label(name)}, for example {first.item}: “{shown}” "
                    f"({first.component}, document {first.document:,})."
                )
    return notes


def leaks_table(study: Study, contamination: Contamination) -> Table | None:
    """A row per held-out split; None where no corpus was measured (tokenized by an earlier version)."""
    measured = {name: counts for name, counts in contamination.corpora.items() if counts.held_out}
    if not measured:
        return None
    words = list(measured.values())[-1].held_out.words

    def columns(corpus: str, split: str, leak: Leak) -> Iterator[tuple]:
        yield "", split, {"corpus": corpus, "split": split}
        yield "documents", f"{leak.documents:,}", {"documents": leak.documents}
        yield f"sequences of\n{words} words", f"{leak.ngrams:,}", {"ngrams": leak.ngrams}
        yield "of these\nin train", "–" if leak.share is None else f"{leak.share:.2%}", {"share": leak.share}
        yield "documents\nabove a half", f"{leak.above_half:,}", {"above_half": leak.above_half}
        yield "above\na fifth", f"{leak.above_fifth:,}", {"above_fifth": leak.above_fifth}
        yield "most of\na document", "–" if leak.worst is None else f"{leak.worst:.0%}", {"worst": leak.worst}

    rows: list[Section | Iterator[tuple]] = []
    for corpus, counts in measured.items():
        held_out = counts.held_out
        drawn = "" if held_out.one_in == 1 else f"; one in {held_out.one_in} sequences looked at"
        splits = (("val", held_out.val), ("test", held_out.test))
        rows += [counts.section(corpus, drawn), *(columns(corpus, *split) for split in splits)]
    return Table.of_columns(
        "leaks",
        f"Held-out text that stands in the training text; study {study.name}",
        rows,
        [
            "Words as in the table of contamination. Near-duplicate documents are in one split, unless the "
            "source declares its splits; what is left are quotations, set phrases and what the source "
            "repeats."
        ],
    )
