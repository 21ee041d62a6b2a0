"""How many tokens does text take under N of a published model's tokens, chosen for a corpus (`hf:NAME:N`)?

    python benchmarks/vocabulary.py     # about two minutes of one core

Reads data/raw/ (`stlm fetch` of the model, the corpora and the benchmarks). The tokens are counted on a part
of each corpus, evenly taken, and every twentieth document is held out. Beside them: as many of the corpus'
most frequent tokens, with all that lead to them; and the speed of encoding.

Writes results/benchmarks/vocabulary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tokenizers
from machine import machine

from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.files import write_json
from stlm.tokens.published import PublishedTokenizer, Vocabulary, fetched_tokenizer
from stlm.tokens.reduced import count_tokens, needed, with_tokens

OUTPUT = Path("results/benchmarks/vocabulary.json")
SIZES = (2048, 4096, 8192, 16384, 32768)
HELD_OUT = 20  # every so many documents one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--width", type=int, default=576, help="of the embedding, for the parameters saved")
    parser.add_argument("--corpora", nargs="+", default=["simple_wiki", "gutenberg_children", "leaner"])
    parser.add_argument("--benchmarks", nargs="+", default=["blimp", "hellaswag", "arc_easy"])
    parser.add_argument("--megabytes", type=float, default=6.0, help="of each corpus that are read")
    parser.add_argument("--items", type=int, default=2000, help="of each benchmark")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    whole = fetched_tokenizer(f"hf:{options.model}", options.raw / options.model)
    questions = {name: question_texts(options.raw, name, options.items) for name in options.benchmarks}
    content: dict[str, Any] = {
        "command": " ".join(["benchmarks/vocabulary.py", *sys.argv[1:]]),
        "machine": machine(),
        "model": options.model,
        "vocabulary": whole.vocab_size,
        "tiktoken": whole.is_fast,
        "width": options.width,
        "corpora": {},
    }
    for corpus in options.corpora:
        train, held_out = corpus_texts(options.raw / corpus, int(options.megabytes * 1e6))
        if "speed" not in content:
            content["speed"] = speeds(whole, train[: len(train) // 2])
            print(content["speed"], flush=True)
        rows = measure(whole, train, {corpus: held_out, **questions}, options.width)
        content["corpora"][corpus] = {
            "bytes": n_bytes(train),
            "held_out_bytes": n_bytes(held_out),
            "rows": rows,
        }
        for row in rows:
            print(corpus, json.dumps(row), flush=True)
        write_json(options.output, content)
    return 0


def corpus_texts(folder: Path, most: int) -> tuple[list[str], list[str]]:
    """About `most` bytes of a corpus' documents, evenly taken: to count, and held out."""
    files = sorted(folder.glob("train*.parquet")) or sorted(folder.glob("*.parquet"))
    column = json.loads((folder / "source.json").read_text())["text"]
    texts = [text for file in files for text in pq.read_table(file, columns=[column])[column].to_pylist()]
    every = max(1, round(n_bytes(texts[::50]) * 50 / most))
    texts = texts[::every]
    held_out = texts[::HELD_OUT]
    return [text for place, text in enumerate(texts) if place % HELD_OUT], held_out


def question_texts(raw: Path, name: str, items: int) -> list[str]:
    """The texts of every so many items of a benchmark, each option after its context."""
    benchmark = BENCHMARKS[name]
    _, found = benchmark.load(raw / benchmark.data_name)
    every = max(1, len(found) // items)
    return [option.context + option.continuation for item in found[::every] for option in item.options]


def measure(
    whole: PublishedTokenizer, train: Sequence[str], texts: dict[str, list[str]], width: int
) -> list[dict[str, Any]]:
    """A row for each N, and one for the whole vocabulary: how texts are written with tokens for `train`."""
    vocabulary, counts = whole.vocabulary, count_tokens(whole, train)
    rows = []
    for size in (*SIZES, None):
        row: dict[str, Any] = {"tokens": size or whole.vocab_size}
        tokenizer = whole
        if size is not None:
            begin = time.process_time()
            kept = needed(vocabulary, counts, size - 1)
            tokenizer = with_tokens(f"{whole.name}:{size}", whole, kept.ids)
            row["seconds_to_choose"] = round(time.process_time() - begin, 2)
            found = int(count_tokens(tokenizer, train).sum())
            frequent = with_tokens("frequent", whole, most_frequent(vocabulary, counts, size - 1))
            row["train_tokens"] = found
            row["predicted_too_many"] = round(kept.text_tokens / found - 1, 5)
            row["most_frequent_take_more"] = round(int(count_tokens(frequent, train).sum()) / found - 1, 4)
            row["unseen"] = int((counts[kept.ids] == 0).sum())
        row["parameters_saved"] = (whole.vocab_size - tokenizer.vocab_size) * width
        row["text"] = {name: lengths(tokenizer, some) for name, some in texts.items()}
        rows.append(row)
    return rows


def lengths(tokenizer: PublishedTokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Tokens a byte and characters a token."""
    tokens = int(count_tokens(tokenizer, texts).sum())
    characters = sum(map(len, texts))
    return {
        "tokens_per_byte": round(tokens / n_bytes(texts), 4),
        "characters_per_token": round(characters / tokens, 3),
    }


def most_frequent(vocabulary: Vocabulary, counts: np.ndarray, size: int) -> list[int]:
    """Bytes, then the most frequent tokens with all that lead to them, as long as there is room."""
    parts = dict(zip(vocabulary.products, vocabulary.merges, strict=True))
    kept = {id_ for id_ in range(len(counts)) if id_ not in parts and id_ not in vocabulary.special}

    def leading_to(token: int) -> set[int]:
        return set() if token in kept else {token}.union(*map(leading_to, parts[token]))

    for token in np.argsort(-counts, kind="stable").tolist():
        if token in parts and len(kept) + len(wanted := leading_to(token)) <= size:
            kept |= wanted
    return sorted(kept)


def speeds(whole: PublishedTokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Megabytes a second of one core, best of three, and whether both write the same tokens."""
    library = tokenizers.Tokenizer.from_str(whole.files["tokenizer.json"].decode())
    library.encode_special_tokens = True

    def other(text: str) -> Any:
        return library.encode(text, add_special_tokens=False).ids

    equal = all(whole.encode_array(text).tolist() == other(text) for text in texts[:200])
    size = n_bytes(texts) / 1e6
    return {
        "equal": equal,
        "ours": round(size / best(whole.encode_array, texts), 2),
        "tokenizers": round(size / best(other, texts), 2),
    }


def best(encode: Callable[[str], object], texts: Sequence[str]) -> float:
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        for text in texts:
            encode(text)
        seconds.append(time.process_time() - begin)
    return min(seconds)


def n_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


if __name__ == "__main__":
    raise SystemExit(main())
