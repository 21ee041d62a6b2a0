"""The verb `stlm new`: examine a text, choose what fits it, write a corpus and a study."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stlm.corpora.formats import DataFile, default_cut, known_suffix
from stlm.corpora.text_files import Cut
from stlm.errors import UserError, shortened
from stlm.evaluation.benchmarks import LAST_WORD
from stlm.files import write_text
from stlm.model.config import ModelConfig
from stlm.new.estimate import TECHNIQUES, budget_flops, study_seconds
from stlm.new.fit import FEW_BYTES, LEAST_BYTES, Fit, TextSize, fit
from stlm.new.look import Look, look
from stlm.new.sources import Sources, find_sources, text_column
from stlm.new.speed import Speed
from stlm.new.write import Chosen, Corpus, corpus_entry, study_text
from stlm.study.catalogues import (
    PARAMS,
    append_entry,
    load_benchmarks,
    load_corpora,
    load_models,
    load_vocabularies,
)
from stlm.study.load import load_study
from stlm.study.names import LONGEST_NAME, NOT_STUDIES, is_name, study_names
from stlm.tokens.splits import FEW_UNITS, held_out
from stlm.units import byte_size

_SOME_DOCUMENTS = 100  # with fewer, held-out splits get a handful
_LEAST_QUESTIONS = 100  # of last_word; with fewer, the interval exceeds ten points to each side


@dataclass(frozen=True)
class Wishes:
    """The options on the command line in addition to name and paths."""

    column: str | None = None
    documents: str | None = None
    separator: str = ""
    minutes: float = 30.0
    force: bool = False


def new(
    name: str,
    paths: Sequence[str],
    wishes: Wishes | None = None,
    measure: Callable[[ModelConfig, int, int], Speed] | None = None,
) -> str:
    """Write the corpus and the study `name` for the text at `paths`; a report for people.

    `measure` times training on this machine (default: `stlm.new.speed.measure`). Raises UserError before
    anything is written.
    """
    wishes = wishes or Wishes()
    if measure is None:
        from stlm.new.speed import measure
    check_name(name, wishes.force)
    sources = find_sources(paths)
    column, of_column = text_column(sources.all_files, wishes.column)
    cut, of_cut, found = _cut_and_look(sources, column, wishes)
    report = _found(sources, found, [of_cut, of_column])
    if not found.sizes or found.all_bytes < LEAST_BYTES:
        raise UserError(
            f"--text: {found.all_bytes:,} bytes of text in {found.documents:,} documents are too few for any "
            f"study; the least is {LEAST_BYTES:,}, and below {FEW_BYTES:,} differences are mostly chance"
        )
    chosen = _choose(name, sources, found, column, cut, wishes, measure)
    _write(name, chosen)
    report += _advice(chosen, wishes)
    return "\n".join(report)


def check_name(name: str, force: bool) -> None:
    """Raise UserError unless the name is valid for a study, and free (or `force` is set)."""
    if not is_name(name) or name in NOT_STUDIES:
        letters = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
        proposal = re.sub(r"[^a-z0-9_]+", "-", letters).strip("-_")
        why = "is the name of a file in params/" if name in NOT_STUDIES else "cannot name a study"
        valid = is_name(proposal) and proposal not in NOT_STUDIES
        hint = f" (for example {proposal})" if valid else ""
        raise UserError(
            f"{shortened(name)!r} {why}: a name is lower-case letters without accents, digits, _ and - "
            f"between them, at most {LONGEST_NAME}, and begins with a letter{hint}"
        )
    other = dict.fromkeys(load_benchmarks(), "benchmark")
    other |= dict.fromkeys(load_vocabularies(), "vocabulary") | dict.fromkeys(load_models(), "model")
    if name in other:
        raise UserError(f"{name!r} is the name of a {other[name]}, which has data/raw/{name}; choose another")
    taken = [f"the corpus {name} in params/corpora.yaml"] if name in load_corpora() else []
    taken += [f"the study params/{name}.yaml"] if name in study_names() else []
    if taken and not force:
        raise UserError(
            f"{' and '.join(taken)}: there already; choose another name, or replace it with --force"
        )


def _cut_and_look(sources: Sources, column: str, wishes: Wishes) -> tuple[Cut, str, Look]:
    """How text files are cut into documents, a note about it, and the findings."""
    files = sources.all_files
    texts = [path for path in files if known_suffix(path) == "text"]
    given = Cut(documents=wishes.documents, separator=wishes.separator)  # type: ignore[arg-type]
    if (wishes.documents or wishes.separator) and not texts:
        flag = "--documents" if wishes.documents else "--separator"
        raise UserError(f"{flag}: there are no text files to cut; in other formats a row is a document")
    if wishes.documents and wishes.separator:
        raise UserError("--documents and --separator both say where documents end; give one")
    _check_separator(wishes.separator)
    if not texts:
        return Cut(), "a row is a document", look(files, column=column)
    if given != Cut():
        note = (
            f"cut by --separator {wishes.separator}"
            if wishes.separator
            else f"a {wishes.documents} is a document"
        )
        return given, note, look(files, column=column, cut=given)
    cut, why = default_cut([DataFile.of(path) for path in texts])
    if cut.separator:
        return cut, f"text files are cut at these lines, as {why}", look(files, column=column, cut=cut)
    found = look(files, column=column, cut=cut)
    return cut, "a file is a document (other ways: --documents line or paragraph, --separator REGEX)", found


def _check_separator(pattern: str) -> None:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UserError(f"--separator {shortened(pattern)!r}: not a regular expression: {error}") from None
    except (RecursionError, OverflowError):
        raise UserError(f"--separator {shortened(pattern)!r}: too deep or too large an expression") from None
    if pattern and compiled.fullmatch(""):
        raise UserError(f"--separator {pattern!r} matches the empty text, so it would cut everywhere")


def _found(sources: Sources, found: Look, notes: Sequence[str]) -> list[str]:
    """The findings, one line each."""
    about = "about " if found.sampled else ""
    formats = ", ".join(f"{count:,} {name}" for name, count in found.formats.most_common())
    lines = [
        f"{_count(found.files, 'file')} ({formats}), {byte_size(found.file_bytes)}, in {sources.root}",
        f"{about}{_count(found.documents, 'document')}, {about}{byte_size(found.all_bytes)} of text, "
        f"{about}{round(found.characters * found.scale):,} characters",
    ]
    if found.sampled:
        how = "; how far files are compressed was assumed" if found.assumed else ""
        lines.append(
            f"counted in {_count(found.read_files, 'file')}, {byte_size(found.read_bytes)}, and "
            f"extrapolated{how}"
        )
    lines += [note for note in notes if note]
    lines.append(f"language: {found.language.name} (a guess)")
    if set(sources.files) != {"train"}:
        declared = ", ".join(f"{split} {len(paths):,}" for split, paths in sources.files.items())
        lines.append(f"splits declared by file names are kept: {declared} files")
        if sources.unmarked:
            lines.append(f"{_count(sources.unmarked, 'file')} without a split in the name: train")
    if sources.unknown:
        kinds = ", ".join(f"{name} ({count:,})" for name, count in sources.unknown.most_common(5))
        lines.append(f"left out, suffixes of no known format: {kinds}")
    if sources.hidden:
        lines.append(f"left out, hidden: {_count(sources.hidden, 'file')}")
    if found.documents < FEW_UNITS:
        lines.append(
            f"few documents ({found.documents:,}): they are cut into passages, the last 10% of each held out"
        )
    elif found.documents < _SOME_DOCUMENTS:
        lines.append(
            f"few documents ({found.documents:,}): the validation and test splits get a handful at most"
        )
    return ["Found:", *(f"  {line}" for line in [*lines, *found.oddities])]


def _count(number: int, what: str) -> str:
    """A number with its noun: 1 file, 2 files."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _choose(
    name: str,
    sources: Sources,
    found: Look,
    column: str,
    cut: Cut,
    wishes: Wishes,
    measure: Callable[[ModelConfig, int, int], Speed],
) -> Chosen:
    """All choices, with two timings: of a small model, to choose a size, and of the chosen one."""
    train, test = _split_bytes(sources, found)
    text = TextSize(train, found.words, found.quantile(0.75), _bytes_a_token(found.sample))
    first = fit(text, 0)
    speed = measure(first.model, _rows(first), TECHNIQUES)
    best = fit(text, budget_flops(wishes.minutes, found.all_bytes, speed))
    speed = measure(best.model, _rows(best), TECHNIQUES)
    questions = _questions(found, test)
    flops = budget_flops(wishes.minutes, found.all_bytes, speed)
    for _ in range(4):
        best = fit(text, flops)
        seconds = study_seconds(best, found.all_bytes, test, questions, speed)
        if seconds <= 66 * wishes.minutes or best.limit == "least":
            break
        flops *= 54 * wishes.minutes / seconds  # evaluation takes more than its share
    if best.limit == "text":
        seeds = max(1, min(3, int(60 * wishes.minutes / seconds)))
        best = replace(best, seeds=seeds)
        seconds = study_seconds(best, found.all_bytes, test, questions, speed)
    about = f"{byte_size(found.all_bytes)} of text in {_count(found.documents, 'document')}"
    files = dict(sources.patterns)
    corpus = Corpus(name, _path(sources.root), files, column, cut, found.language, about)
    return Chosen(corpus, best, questions, train, found.documents, seconds / 60, speed.device)


def _rows(chosen: Fit) -> int:
    """Rows of a micro-batch for timing, few enough that it is short."""
    return max(1, min(chosen.tokens_a_step, 4096) // chosen.context)


def _split_bytes(sources: Sources, found: Look) -> tuple[int, int]:
    """Approximate UTF-8 bytes of train and test: of the declared splits, or 5% or 1% of train."""
    total = sum(path.stat().st_size for path in sources.all_files) or 1
    sizes = {
        split: found.all_bytes * sum(path.stat().st_size for path in paths) / total
        for split, paths in sources.files.items()
    }
    share = held_out(False, found.documents)
    held = {split: sizes[split] if split in sizes else share * sizes["train"] for split in ("val", "test")}
    train = sizes["train"] - sum(size for split, size in held.items() if split not in sizes)
    return round(train), round(held["test"])


def _bytes_a_token(sample: Sequence[str]) -> Callable[[int], float | None]:
    """Mean bytes of a token by vocabulary size, of a vocabulary trained on most of the sample."""
    from stlm.tokens.bpe import train_bpe

    # Train on a part, and a tenth larger: the vocabulary must be possible on the train split alone. The
    # effect on the length of a token is smaller than chance.
    parts = [text[: -(-len(text) * 4 // 5)] for text in sample]

    @functools.cache
    def ratio(size: int) -> float | None:
        try:
            tokenizer = train_bpe(f"bpe-{size + size // 10}", parts)
        except UserError:
            return None
        probe = [text[:20_000] for text in sample[:: max(1, len(sample) // 50)]]
        tokens = sum(len(tokenizer.encode_array(text)) for text in probe)
        return sum(len(text.encode(errors="replace")) for text in probe) / max(tokens, 1)

    return ratio


def _questions(found: Look, test_bytes: int) -> int:
    """Approximate number of last_word questions in the test split; 0 if there are too few."""
    if not found.language.spaced:
        return 0
    sample_bytes = sum(len(text.encode(errors="replace")) for text in found.sample)
    made = len(LAST_WORD.make(found.sample, 10**6, 0))
    expected = round(made / sample_bytes * test_bytes)
    return min(expected, LAST_WORD.default_limit) if expected >= _LEAST_QUESTIONS else 0


def _path(root: Path) -> str:
    """The folder for the entry: relative if it is in the project, otherwise absolute."""
    project = Path(os.path.abspath("."))
    return root.relative_to(project).as_posix() if root.is_relative_to(project) else str(root)


def _write(name: str, chosen: Chosen) -> None:
    """Write both files, after the study has been loaded and checked in a copy of params/."""
    corpora = PARAMS / "corpora.yaml"
    entry = append_entry(corpora.read_text(encoding="utf-8"), name, corpus_entry(chosen.corpus))
    study = study_text(chosen)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PARAMS
        copy.mkdir()
        for path in PARAMS.glob("*.yaml"):
            shutil.copyfile(path, copy / path.name)
        (copy / "corpora.yaml").write_text(entry, encoding="utf-8")
        (copy / f"{name}.yaml").write_text(study, encoding="utf-8")
        load_study(name, root=Path(folder))
    write_text(corpora, entry)
    write_text(PARAMS / f"{name}.yaml", study)


def _advice(chosen: Chosen, wishes: Wishes) -> list[str]:
    """Lines that say what was chosen and what to run."""
    best, name = chosen.fit, chosen.corpus.name
    lines = [
        "Chosen:",
        f"  vocabulary bpe-{best.vocabulary}, {best.bytes_a_token:.1f} bytes a token; context "
        f"{best.context} tokens",
        f"  model of {best.parameters / 1e6:.2f}M parameters, width {best.model.width}, "
        f"{best.model.layers} layers",
        f"  {best.steps:,} steps, {best.tokens / 1e6:.2f}M tokens, {best.epochs:.1f} passes over the "
        "training text",
        f"  {TECHNIQUES} techniques, {best.seeds} seed{'s' * (best.seeds > 1)}; "
        f"benchmarks: {'last_word' if chosen.last_word else 'none'}",
        f"Estimated time: {chosen.minutes:.0f} minutes ({chosen.speed})"
        if chosen.minutes >= 1.5
        else f"Estimated time: a minute ({chosen.speed})",
    ]
    if chosen.minutes > 1.25 * wishes.minutes:
        why = "the smallest study of this kind" if best.limit == "least" else "evaluation takes most of it"
        lines.append(f"That is more than the {wishes.minutes:g} minutes asked for: {why}")
    if chosen.train_bytes < FEW_BYTES:
        lines.append(
            f"Caution: {byte_size(chosen.train_bytes)} of training text is little, below "
            f"{byte_size(FEW_BYTES)} differences between techniques are mostly chance"
        )
    return [
        *lines,
        f"Wrote params/{name}.yaml, each choice explained in it, and the entry {name} of "
        "params/corpora.yaml.",
        f"Run it: make all STUDY={name}",
    ]
