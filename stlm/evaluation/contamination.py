"""Contamination: which items of a study's benchmarks stand, in part or whole, in the text it trains on.

Brown et al. 2020 (GPT-3, appendix C) call an item dirty that shares an n-gram of words with any training
document, and choose n between 8 and 13 by the length of a benchmark's items. Both ends are counted here: 13,
the usual sign of contamination, and 8, for short items, where chance phrases match as well. Items all of
whose words stand in the training text in sequence are counted too, however few: of a short sentence (BLiMP's
`Books sold.`) that says only that its words occur. `stlm.evaluation.ngrams` says what a word is.

What counts as an item's text (`Item.own_text`): the question, context or passage and the right answer, as one
string, without the words of a prompt; of a minimal pair the good sentence; of WinoGrande the sentence with
the right name in the blank; of a passage of held-out text (`last_word`), all of it. Wrong answers do not
count. All items of the split are looked at, whatever the study's limit (of `last_word`, those scored); the
training text is the train split of a run's corpus, all of it, whichever part a run sees (as there).

Generated text (the synthetic corpus) repeats its short phrases by construction: there, a shared n-gram says
how narrow the grammar is, not that items leaked, and only whole items are news.
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
from stlm.evaluation.made import made_items, made_settings
from stlm.evaluation.ngrams import NOT_FOUND, SIZES, NGrams, pieces
from stlm.files import atomic_path, read_json, remove_leftovers, write_record
from stlm.layout import CONTAMINATION, names
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
    """A benchmark's items: the ids, and what counts as their texts."""

    name: str
    version: str
    split: str
    ids: list[str]
    texts: list[str]


def measure_contamination(study: Study, raw: Path = RAW) -> None:
    """Write `contamination.json` and `contaminated-items.parquet` to the study's folder, each atomically.

    The first has counts and a few examples by corpus and benchmark; the second a row for each item that
    shares anything, so that it can be left out of an analysis. `raw` holds a folder for each benchmark.
    Raises UserError for missing or damaged benchmarks and token shards.
    """
    code = code_version()
    fetched = list(_questions(study, raw))
    corpora: dict[str, Any] = {}
    tables = [ITEMS_SCHEMA.empty_table()]
    for corpus, folder in study.training_texts.items():
        components = read_split(folder, "train")
        questions = [*fetched, *_made_questions(study, folder)]
        ngrams = NGrams((text for own in questions for text in own.texts), SIZES)
        if questions:
            _scan(ngrams, components, folder, f"contamination {corpus}")
        corpora[corpus] = {
            "split": "train",
            "documents": sum(len(component) for component in components),
            "bytes": sum(int(shard.n_bytes.sum()) for c in components for shard in c.shards),
            "benchmarks": {},
            # Measured when the corpus was tokenized: held-out text that stands in train.
            "held_out": read_json(folder / "meta.json").get("leaks"),
        }
        first = 0
        for own in questions:
            texts = np.arange(first, first + len(own.ids))
            result, table = _outcome(ngrams, own, texts, corpus, components)
            corpora[corpus]["benchmarks"][own.name] = result
            tables.append(table)
            first += len(own.ids)
    for name in names(CONTAMINATION):
        remove_leftovers(study.folder, name)
    with atomic_path(study.folder / "contaminated-items.parquet") as temporary:
        pq.write_table(pa.concat_tables(tables).unify_dictionaries(), temporary, compression="zstd")
    about = {"study": study.name, "sizes": SIZES, "made": made_settings(study.evaluation), "code": code}
    write_record(
        study.folder / "contamination.json",
        {**about, "corpora": corpora},
        beside=["contaminated-items.parquet"],
    )


def _questions(study: Study, raw: Path) -> Iterator[_Questions]:
    for name in study.benchmarks:
        chosen = benchmark(name)
        if not isinstance(chosen, FileBenchmark):
            continue  # made of each corpus
        split, items = chosen.load(raw / chosen.data_name)
        yield _Questions(
            name, chosen.version, split, [item.id for item in items], [item.own_text for item in items]
        )


def _made_questions(study: Study, folder: Path) -> Iterator[_Questions]:
    """Items made of a corpus's own test text."""
    for name in study.benchmarks:
        chosen = benchmark(name)
        if isinstance(chosen, TextBenchmark):
            items = made_items(chosen, folder, study.evaluation)
            yield _Questions(
                name, chosen.version, "test", [item.id for item in items], [item.own_text for item in items]
            )


def _scan(ngrams: NGrams, components: list[ComponentTokens], folder: Path, label: str) -> None:
    """Look for the n-grams in every document; their numbers go on from component to component."""
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
                # Without the end of text, which is the last token.
                for text in pieces(document.tokens[:-1], decode, ngrams.overlap):
                    yield number, text
                bar.update(document.n_bytes)

        ngrams.scan(documents())


def _outcome(
    ngrams: NGrams, own: _Questions, texts: np.ndarray, corpus: str, components: list[ComponentTokens]
) -> tuple[dict[str, Any], pa.Table]:
    """A benchmark's part of contamination.json, and its rows of contaminated-items.parquet."""
    whole = ngrams.found_whole[texts]
    firsts = {n: ngrams.found(n)[texts] for n in SIZES}
    is_whole = whole != NOT_FOUND
    shares = {n: first != NOT_FOUND for n, first in firsts.items()}
    listed = np.flatnonzero(np.logical_or.reduce([*shares.values(), is_whole]))
    examples = [
        _example(own.ids[i], ngrams.words_of(int(texts[i])), int(whole[i]), components)
        for i in np.flatnonzero(is_whole)[:_EXAMPLES]
    ]
    for n in reversed(SIZES):
        # Where the longer n-gram is shared, the shorter is no news.
        longer = [shares[m] for m in SIZES if m > n]
        fresh = shares[n] & ~np.logical_or.reduce([*longer, is_whole])
        examples += [
            _example(own.ids[i], *ngrams.example(n, int(texts[i])), components)
            for i in np.flatnonzero(fresh)[:_EXAMPLES]
        ]
    result = {
        "version": own.version,
        "split": own.split,
        "items": len(own.ids),
        "long_enough": {str(n): int((ngrams.lengths[texts] >= n).sum()) for n in SIZES},
        "shared": {str(n): int(shares[n].sum()) for n in SIZES},
        "whole": int(is_whole.sum()),
        "contaminated": int((shares[SIZES[-1]] | is_whole).sum()),
        "examples": examples,
    }
    columns = [
        pa.array([corpus] * len(listed), ITEMS_SCHEMA.field("corpus").type),
        pa.array([own.name] * len(listed), ITEMS_SCHEMA.field("benchmark").type),
        pa.array([own.ids[i] for i in listed], pa.string()),
        *(pa.array(shares[n][listed]) for n in SIZES),
        pa.array(is_whole[listed]),
    ]
    return result, pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)


def _example(item: str, words: str, document: int, components: list[ComponentTokens]) -> dict[str, Any]:
    """An item, the words that it shares, and the first document that has them, counted in its component."""
    ends = np.cumsum([len(component) for component in components])
    number = int(np.searchsorted(ends, document, side="right"))
    component = components[number]
    return {
        "item": item,
        "words": words,
        "component": component.name,
        "document": document - int(ends[number]) + len(component),
    }
