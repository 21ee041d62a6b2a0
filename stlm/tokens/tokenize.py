"""Tokenize a corpus: raw text in, Arrow shards out.

Three passes stream over the text: a survey (which documents, in which split), the training of a vocabulary if
needed, and the encoding on all cores. Everything is built in a temporary folder next to the target, which is
renamed when complete. After a kill, the next call continues from the finished shards, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import disk_errors, read_json, replace_directory, write_record
from stlm.integrity import Listed, check_files, check_listed
from stlm.tokens.ahead import ahead
from stlm.tokens.published import PublishedTokenizer
from stlm.tokens.raw import RawComponent, raw_components
from stlm.tokens.shards import SPLITS, Document, write_shard
from stlm.tokens.splits import DROPPED
from stlm.tokens.summary import summary
from stlm.tokens.survey import MEMORY, Survey, in_passages, survey
from stlm.tokens.tokenizer import DESCRIPTION, Tokenizer, check_tokenizer
from stlm.tokens.vocabulary import Batch, batches, make_tokenizer, published_tokenizer

SHARD_BYTES = 64 << 20
_FORMAT = 3


def tokenize_corpus(
    raw_folder: Path,
    out_folder: Path,
    tokenizer_name: str,
    vocabulary_folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    progress: bool = True,
    memory_bytes: int = MEMORY,
) -> dict[str, Any]:
    """Tokenize `data/raw/<corpus>/` into `out_folder`, which it replaces; the content of its meta.json.

    `tokenizer_name`: gpt2 or hf:NAME (from the files of `vocabulary_folder`, data/raw/NAME), hf:NAME:N (the N
    of its tokens that the train split needs), bytes, bpe-N (trained on the train split), or words, spaces or
    stride-N (the chunks of all splits of the corpus).
    Memory: about four shards of `shard_bytes`, and a few megabytes of text a worker (default: one a core).
    The output does not depend on `workers`. Raises `UserError` for bad input and a failing disk.
    """
    published = published_tokenizer(tokenizer_name, vocabulary_folder)
    components = in_passages(raw_components(raw_folder))
    partial = out_folder.parent / f".{out_folder.name}.partial"
    plan = _plan(components, tokenizer_name, published, shard_bytes)
    try:
        with disk_errors(out_folder):
            _prepare(partial, plan)
            counts = survey(components, partial, progress, memory_bytes)
            tokenizer = make_tokenizer(
                tokenizer_name,
                published,
                vocabulary_folder,
                components,
                counts,
                partial / "tokens",
                progress,
            )
            journal = Journal(partial / "journal.jsonl")
            with tqdm(
                total=counts.text_bytes,
                desc=f"tokenize {raw_folder.name}",
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar:
                _encode(components, counts, tokenizer, partial / "tokens", journal, shard_bytes, workers, bar)
            meta = _meta(raw_folder.name, tokenizer, components, counts, journal)
            meta["tokenizer_sha256"] = check_tokenizer(partial / "tokens" / "tokenizer")
            write_record(partial / "tokens" / "meta.json", meta)
            replace_directory(partial / "tokens", out_folder)
            shutil.rmtree(partial)
    except Exception:
        # Bad input or a full disk. After a kill the folder remains, and the next call continues from it.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for line in summary(meta):
        print(line, file=sys.stderr)
    return meta


def _plan(
    components: Sequence[RawComponent],
    tokenizer_name: str,
    published: PublishedTokenizer | None,
    shard_bytes: int,
) -> dict[str, Any]:
    """Everything that the output depends on: a killed run is continued only if this is the same."""
    return {
        "format": _FORMAT,
        "libraries": {"tokenizers": tokenizers.__version__, "tiktoken": tiktoken.__version__},
        "tokenizer": tokenizer_name,
        "published": {
            file: hashlib.sha256(content).hexdigest()
            for file, content in (published.files if published is not None else {}).items()
        },
        "shard_bytes": shard_bytes,
        "components": [
            {
                "name": component.name,
                "weight": component.weight,
                "columns": [component.text, component.group, component.split_column],
                "splits": list(component.splits),
                "pieces": component.pieces,
                "files": dict(zip(component.files, component.sha256, strict=True)),
            }
            for component in components
        ],
    }


def _prepare(partial: Path, plan: dict[str, Any]) -> None:
    """Keep in `partial` only what this plan can continue from."""
    tokens = partial / "tokens"
    finished = _finished(partial, plan)
    if finished is None:
        shutil.rmtree(partial, ignore_errors=True)
        tokens.mkdir(parents=True)
        write_record(partial / "plan.json", plan)
        return
    for path in tokens.iterdir():
        if path.is_file() and path.name not in finished:
            path.unlink()  # written or half-written, but not yet in the journal


def _finished(partial: Path, plan: dict[str, Any]) -> set[str] | None:
    """The shards that a killed run of this plan had finished; None if there is nothing to continue from.

    A killed run is continued only if all of its files are intact.
    """
    tokens = partial / "tokens"
    if not (partial / "plan.json").exists() or not tokens.is_dir():
        return None
    try:
        if read_json(partial / "plan.json") != plan:
            return None
        check_listed(partial / "survey.json", "splits")
        if (tokens / "tokenizer" / DESCRIPTION).exists():
            check_tokenizer(tokens / "tokenizer")
        shards = Journal(partial / "journal.jsonl").shards
        check_files(Listed(tokens / shard["path"], shard["sha256"], shard["size"]) for shard in shards)
    except UserError as error:
        print(f"{error}\n(tokenizing from the start)", file=sys.stderr)
        return None
    return {shard["path"] for shard in shards}


class Journal:
    """The finished shards, one line each: the SHA-256 of the rest, and the entry of meta.json as JSON.

    The entry also has its `component`, `split` and the `row` of its last document. A damaged line is a
    `UserError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # killed in the middle of the line
                os.truncate(path, sum(map(len, lines[:-1])))
                lines.pop()
            self.shards = [self._checked(line) for line in lines]

    def _checked(self, line: bytes) -> dict[str, Any]:
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise UserError(f"{self.path}: damaged: a line is not what its SHA-256 says")
        return json.loads(text)

    def add(self, shard: dict[str, Any]) -> None:
        text = json.dumps(shard)
        with self.path.open("a") as file:
            file.write(f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards.append(shard)

    def of(self, component: str, split: str) -> list[dict[str, Any]]:
        return [s for s in self.shards if (s["component"], s["split"]) == (component, split)]


class _Shards:
    """The growing shards of one split of one component; those in the journal are not made again."""

    def __init__(self, folder: Path, component: str, split: str, journal: Journal, shard_bytes: int) -> None:
        self.folder, self.component, self.split = folder, component, split
        self.journal, self.shard_bytes = journal, shard_bytes
        finished = journal.of(component, split)
        self.number = len(finished)
        self.last_row = finished[-1]["row"] if finished else -1
        self.documents: list[Document] = []
        self.size = 0

    def add(self, row: int, document: Document) -> None:
        """Append a document; the shard is written first where it would grow too large. One always fits."""
        if self.documents and self.size + document.tokens.nbytes > self.shard_bytes:
            self.flush()
        self.documents.append(document)
        self.size += document.tokens.nbytes
        self.last_row = row

    def flush(self) -> None:
        if not self.documents:
            return
        path = self.folder / f"{self.split}-{self.component}-{self.number:05d}.arrow"
        shard = write_shard(path, self.documents)
        self.journal.add({**shard, "component": self.component, "split": self.split, "row": self.last_row})
        self.documents, self.size = [], 0
        self.number += 1


def _encode(
    components: Sequence[RawComponent],
    counts: Survey,
    tokenizer: Tokenizer,
    folder: Path,
    journal: Journal,
    shard_bytes: int,
    workers: int | None,
    bar: tqdm,
) -> None:
    """Encode the kept documents that are in no finished shard, in order, into their splits' shards."""
    shards = [
        [_Shards(folder, component.name, split, journal, shard_bytes) for split in SPLITS]
        for component in components
    ]
    finished = [[split.last_row for split in splits] for splits in shards]
    workers = workers or len(os.sched_getaffinity(0))
    stop = Event()
    with ThreadPoolExecutor(workers) as pool, ExitStack() as stack:
        stack.callback(stop.set)  # ctrl-C waits for the document in hand, not for the batches

        def encode(batch: Batch) -> list[tuple[int, int, Document]]:
            return [
                (row, split, _document(tokenizer, text))
                for row, text, split in zip(count(batch.first), batch.texts, batch.splits.tolist())
                if split != DROPPED and not stop.is_set() and row > finished[batch.component][split]
            ]

        tasks = ((batch, pool.submit(encode, batch)) for batch in batches(components, counts))
        current = 0
        for batch, task in ahead(tasks, workers + 1):
            # Those before are complete: of a mix only one component's shards are held.
            for component in shards[current : batch.component]:
                for split in component:
                    split.flush()
            current = batch.component
            for row, split, document in task.result():
                shards[batch.component][split].add(row, document)
            bar.update(sum(len(text or b"") for text in batch.texts))
    for split in shards[current]:
        split.flush()


def _document(tokenizer: Tokenizer, content: bytes) -> Document:
    text = content.decode()
    tokens = np.append(tokenizer.encode_array(text), tokenizer.dtype.type(tokenizer.eot))
    return Document(tokens, len(content), len(text))


def _meta(
    corpus: str, tokenizer: Tokenizer, components: Sequence[RawComponent], counts: Survey, journal: Journal
) -> dict[str, Any]:
    def split(component: str, name: str) -> dict[str, Any]:
        shards = [
            {key: value for key, value in shard.items() if key not in ("component", "split", "row")}
            for shard in journal.of(component, name)
        ]
        totals = {
            key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes", "chars")
        }
        return {**totals, "shards": shards}

    return {
        "corpus": corpus,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": tokenizer.dtype.name,
        "components": {
            component.name: {
                "weight": component.weight,
                "splits": {name: split(component.name, name) for name in SPLITS},
            }
            for component in components
        },
        "documents": counts.counts,
        "splitting": counts.splitting,
        "leaks": counts.leaks,
    }
