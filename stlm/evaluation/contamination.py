"""Contamination: which benchmark items of a study occur, in part or whole, in its training text.

Brown et al. 2020 (GPT-3, appendix C) call an item dirty if it shares an n-gram of words with any training
document, and choose n between 8 and 13 by the length of a benchmark's items. Both extremes are counted here:
13, the usual sign of contamination, and 8, for short items, where chance phrases match too. Items are also
counted if all of their words occur in the training text in sequence, however few: for a short sentence
(BLiMP's `Books sold.`), this only says that its words occur. `stlm.tokens.words` defines words.

The text of an item (`Item.answered_text`) is the question, context or passage with the right answer, as one
string, without the words of a prompt; for a minimal pair, the good sentence; for WinoGrande, the sentence
with the right name in the blank; for a passage of held-out text (`last_word`), the whole passage. Wrong
answers do not count. All items of the split are searched, whatever the study's limit (for `last_word`: those
scored). The training text is the whole train split of a run's corpus, whichever part a run sees.

Generated text (the synthetic corpus) repeats its short phrases by construction: there, a shared n-gram shows
how narrow the grammar is, not that items leaked, and only whole items are informative.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stlm.evaluation.benchmarks import FileBenchmark, TextBenchmark, benchmark
from stlm.evaluation.ngrams import NOT_FOUND, SIZES, NGrams, pieces
from stlm.evaluation.text_items import items_from_text, text_item_settings
from stlm.files import atomic_path, read_json, remove_leftovers, write_record
from stlm.outputs import CONTAMINATION, names
from stlm.provenance import code_version
from stlm.study.runs import Study
from stlm.tokens.shards import ComponentTokens, read_split
from stlm.tokens.tokenizer import load_tokenizer

RAW = Path("data/raw")
_EXAMPLES = 3
ITEMS_SCHEMA = pa.schema(
    [
        ("corpus", pa.dictionary(pa.int32(), pa.string())),
        ("benchmark", pa.dictionary(pa.int32(), pa.string())),
        ("item", pa.string()),
        *((f"shares_{n}", pa.bool_()) for n in SIZES),
        ("whole", pa.bool_()),
    ]
)


class _Questions(NamedTuple):
    """A benchmark's items: their ids and texts."""

    name: str
    version: str
    split: str
    ids: list[str]
    texts: list[str]


def measure_contamination(study: Study, raw: Path = RAW) -> None:
    """Write `contamination.json` and `contaminated-items.parquet` to the study's folder, each atomically.

    The first has counts and a few examples by corpus and benchmark; the second has a row for each item that
    shares anything, so that an analysis can leave it out. `raw` holds a folder for each benchmark. Raises
    UserError for missing or damaged benchmarks and token shards.
    """
    code = code_version()
    fetched = list(_questions(study, raw))
    corpora: dict[str, Any] = {}
    tables = [ITEMS_SCHEMA.empty_table()]
    for corpus, folder in study.training_texts.items():
        components = read_split(folder, "train")
        questions = [*fetched, *_made_questions(study, folder)]
        ngrams = NGrams((text for asked in questions for text in asked.texts), SIZES)
        if questions:
            _scan(ngrams, components, folder, f"contamination {corpus}")
        corpora[corpus] = {
            "split": "train",
            "documents": sum(len(component) for component in components),
            "bytes": sum(int(shard.n_bytes.sum()) for c in components for shard in c.shards),
            "benchmarks": {},
            # Measured when the corpus was tokenized: held-out text that also occurs in train.
            "held_out": read_json(folder / "meta.json").get("leaks"),
        }
        first = 0
        for asked in questions:
            texts = np.arange(first, first + len(asked.ids))
            result, table = _outcome(ngrams, asked, texts, corpus, components)
            corpora[corpus]["benchmarks"][asked.name] = result
            tables.append(table)
            first += len(asked.ids)
    for name in names(CONTAMINATION):
        remove_leftovers(study.folder, name)
    with atomic_path(study.folder / "contaminated-items.parquet") as temporary:
        pq.write_table(pa.concat_tables(tables).unify_dictionaries(), temporary, compression="zstd")
    about = {"study": study.name, "sizes": SIZES, "made": text_item_settings(study.evaluation), "code": code}
    write_record(
        study.folder / "contamination.json",
        {**about, "corpora": corpora},
        lists=["contaminated-items.parquet"],
    )


def _questions(study: Study, raw: Path) -> Iterator[_Questions]:
    for name in study.benchmarks:
        chosen = benchmark(name)
        if not isinstance(chosen, FileBenchmark):
            continue  # made from each corpus
        split, items = chosen.load(raw / chosen.data_name)
        yield _Questions(
            name, chosen.version, split, [item.id for item in items], [item.answered_text for item in items]
        )


def _made_questions(study: Study, folder: Path) -> Iterator[_Questions]:
    """Items made from a corpus's test text."""
    for name in study.benchmarks:
        chosen = benchmark(name)
        if isinstance(chosen, TextBenchmark):
            items = items_from_text(chosen, folder, study.evaluation)
            yield _Questions(
                name,
                chosen.version,
                "test",
                [item.id for item in items],
                [item.answered_text for item in items],
            )


def _scan(ngrams: NGrams, components: list[ComponentTokens], folder: Path, label: str) -> None:
    """Search every document for the n-grams; document numbers continue across components."""
    decode = load_tokenizer(folder / "tokenizer").decode_bytes
    watched = sys.stderr.isatty()
    with tqdm(
        total=sum(int(shard.n_bytes.sum()) for c in components for shard in c.shards),
        desc=label,
        unit="B",
        unit_scale=True,
        mininterval=0.5 if watched else 10.0,
        dynamic_ncols=True,
    ) as bar:

        def documents() -> Iterator[tuple[int, bytes]]:
            for number, document in enumerate(d for component in components for d in component):
                # Without the end of text, the last token.
                for text in pieces(document.tokens[:-1], decode, ngrams.overlap):
                    yield number, text
                bar.update(document.n_bytes)

        ngrams.scan(documents())


def _outcome(
    ngrams: NGrams, questions: _Questions, texts: np.ndarray, corpus: str, components: list[ComponentTokens]
) -> tuple[dict[str, Any], pa.Table]:
    """A benchmark's entry in contamination.json, and its rows in contaminated-items.parquet."""
    whole = ngrams.found_whole[texts]
    firsts = {n: ngrams.found(n)[texts] for n in SIZES}
    is_whole = whole != NOT_FOUND
    shares = {n: first != NOT_FOUND for n, first in firsts.items()}
    listed = np.flatnonzero(np.logical_or.reduce([*shares.values(), is_whole]))
    examples = [
        _example(questions.ids[i], ngrams.words_of(int(texts[i])), int(whole[i]), components)
        for i in np.flatnonzero(is_whole)[:_EXAMPLES]
    ]
    for n in reversed(SIZES):
        # Leave out items that share the longer n-gram: they share the shorter one, too.
        longer = [shares[m] for m in SIZES if m > n]
        fresh = shares[n] & ~np.logical_or.reduce([*longer, is_whole])
        examples += [
            _example(questions.ids[i], *ngrams.example(n, int(texts[i])), components)
            for i in np.flatnonzero(fresh)[:_EXAMPLES]
        ]
    result = {
        "version": questions.version,
        "split": questions.split,
        "items": len(questions.ids),
        "long_enough": {str(n): int((ngrams.lengths[texts] >= n).sum()) for n in SIZES},
        "shared": {str(n): int(shares[n].sum()) for n in SIZES},
        "whole": int(is_whole.sum()),
        "contaminated": int((shares[SIZES[-1]] | is_whole).sum()),
        "examples": examples,
    }
    columns = [
        pa.array([corpus] * len(listed), ITEMS_SCHEMA.field("corpus").type),
        pa.array([questions.name] * len(listed), ITEMS_SCHEMA.field("benchmark").type),
        pa.array([questions.ids[i] for i in listed], pa.string()),
        *(pa.array(shares[n][listed]) for n in SIZES),
        pa.array(is_whole[listed]),
    ]
    return result, pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)


def _example(item: str, words: str, document: int, components: list[ComponentTokens]) -> dict[str, Any]:
    """An item, the words that it shares, and the first document with them, numbered in its component."""
    ends = np.cumsum([len(component) for component in components])
    number = int(np.searchsorted(ends, document, side="right"))
    component = components[number]
    return {
        "item": item,
        "words": words,
        "component": component.name,
        "document": document - int(ends[number]) + len(component),
    }
