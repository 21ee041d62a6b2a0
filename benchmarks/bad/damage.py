"""Files that were damaged since they were written or fetched: single flipped bits, cuts, other content."""

from __future__ import annotations

import gzip
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from bad.case import Case

Spoil = Callable[[Path], None]
_RUN = "results/tiny/runs/baseline"
_OTHER = "results/tiny/runs/learned"
_LAST = f"{_RUN}/checkpoints/step-0000006"
_TOKENS = "data/tokens/synthetic/bpe-320"
_PAIRS = "data/raw/synthetic_pairs/*.parquet"
_FLIPS = 3


def _find(project: Path, pattern: str) -> Path:
    """The first file of the project that a glob means."""
    found = sorted(path for path in project.glob(pattern) if path.is_file())
    if not found:
        raise LookupError(f"no file {pattern}")
    return found[0]


def flip(pattern: str, seed: int) -> Spoil:
    """One bit, drawn by a seed; of JSON one of a figure, as white space may change without harm."""

    def spoil(project: Path) -> None:
        path = _find(project, pattern)
        content = bytearray(path.read_bytes())
        places = [n for n, byte in enumerate(content) if path.suffix != ".json" or chr(byte).isdigit()]
        content[random.Random(seed).choice(places)] ^= 1
        path.write_bytes(content)

    return spoil


def cut(pattern: str, share: float) -> Spoil:
    """All but the first part of a file is lost."""

    def spoil(project: Path) -> None:
        path = _find(project, pattern)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return spoil


def lose(pattern: str) -> Spoil:
    """The file is gone."""

    def spoil(project: Path) -> None:
        _find(project, pattern).unlink()

    return spoil


def fewer_rows(pattern: str, rows: int) -> Spoil:
    """A Parquet file that is whole, with fewer rows."""

    def spoil(project: Path) -> None:
        import pyarrow.parquet as pq

        path = _find(project, pattern)
        pq.write_table(pq.read_table(path).slice(0, rows), path)

    return spoil


def instead(pattern: str, other: str) -> Spoil:
    """Another file, whole itself, in the place of a file."""

    def spoil(project: Path) -> None:
        shutil.copyfile(_find(project, other), _find(project, pattern))

    return spoil


def packed(pattern: str) -> Spoil:
    """The file compressed under its old name."""

    def spoil(project: Path) -> None:
        path = _find(project, pattern)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return spoil


_TRAIN = "train tiny baseline"
_EVALUATE = "evaluate tiny baseline"
_GENERATE = "generate tiny/baseline once"
_EXPORT = "export tiny/baseline out"
_TOKENIZE = "tokenize synthetic bpe-400"
_TOKENIZE_AGAIN = "run: stlm tokenize synthetic bpe-320"
_FETCH_PAIRS = "run: stlm fetch synthetic_pairs"
_TRAIN_AGAIN = "run: stlm train tiny baseline"
_EVALUATE_AGAIN = "run: stlm evaluate tiny baseline"
# A file, the command that reads it, and what the message must say to run.
_READ = [
    ("data/raw/synthetic/*.parquet", _TOKENIZE, "run: stlm fetch synthetic"),
    ("data/raw/synthetic/source.json", _TOKENIZE, "run: stlm fetch synthetic"),
    (_PAIRS, _EVALUATE, _FETCH_PAIRS),
    (_PAIRS, "evaluate tiny other", _FETCH_PAIRS),
    (_PAIRS, "contamination tiny", _FETCH_PAIRS),
    ("data/raw/synthetic_choice/*.parquet", _EVALUATE, "run: stlm fetch synthetic_choice"),
    ("data/raw/synthetic_pairs/source.json", _EVALUATE, _FETCH_PAIRS),
    (f"{_TOKENS}/train-*.arrow", _TRAIN, _TOKENIZE_AGAIN),
    (f"{_TOKENS}/train-*.arrow", "contamination tiny", _TOKENIZE_AGAIN),
    (f"{_TOKENS}/val-*.arrow", _TRAIN, _TOKENIZE_AGAIN),
    (f"{_TOKENS}/test-*.arrow", _EVALUATE, _TOKENIZE_AGAIN),
    (f"{_TOKENS}/meta.json", _TRAIN, _TOKENIZE_AGAIN),
    (f"{_TOKENS}/meta.json", "report tiny", _TOKENIZE_AGAIN),
    (f"{_TOKENS}/tokenizer/tokenizer.json", _TRAIN, _TOKENIZE_AGAIN),
    (f"{_TOKENS}/tokenizer/tokenizer-name.json", _TRAIN, _TOKENIZE_AGAIN),
    (".state/half/baseline/state.pt", "train half baseline", "delete .state/half/baseline"),
    (f"{_LAST}/model.safetensors", _GENERATE, "train"),
    (f"{_LAST}/model.safetensors", _EVALUATE, "train"),
    (f"{_LAST}/config.json", _GENERATE, _TRAIN_AGAIN),
    (f"{_LAST}/config.json", _EXPORT, _TRAIN_AGAIN),
    (f"{_RUN}/checkpoints/tokenizer/tokenizer.json", _GENERATE, _TRAIN_AGAIN),
    (f"{_RUN}/checkpoints/tokenizer/tokenizer-name.json", _EXPORT, _TRAIN_AGAIN),
    (f"{_RUN}/train.json", "report tiny", _TRAIN_AGAIN),
    (f"{_RUN}/train.json", _EXPORT, _TRAIN_AGAIN),
    (f"{_RUN}/curve.csv", "report tiny", "stlm train tiny baseline"),
    (f"{_RUN}/evaluation.json", "report tiny", _EVALUATE_AGAIN),
    (f"{_RUN}/items.parquet", "report tiny", _EVALUATE_AGAIN),
    (f"{_RUN}/items.parquet", "compare tiny/baseline tiny/learned", _EVALUATE_AGAIN),
    ("results/tiny/published/other/items.parquet", "report tiny", "run: stlm evaluate tiny other"),
    ("results/tiny/published/other/evaluation.json", "report tiny", "run: stlm evaluate tiny other"),
    ("results/tiny/contamination.json", "report tiny", "run: stlm contamination tiny"),
]
_OTHERS = [
    ("a benchmark of 5 rows", _EVALUATE, fewer_rows(_PAIRS, 5), _FETCH_PAIRS),
    (
        "a corpus of 50 rows",
        _TOKENIZE,
        fewer_rows("data/raw/synthetic/*.parquet", 50),
        "stlm fetch synthetic",
    ),
    ("a packed shard", _TRAIN, packed(f"{_TOKENS}/val-*.arrow"), _TOKENIZE_AGAIN),
    ("a lost shard", _TRAIN, lose(f"{_TOKENS}/train-*.arrow"), _TOKENIZE_AGAIN),
    ("a lost benchmark", _EVALUATE, lose(_PAIRS), _FETCH_PAIRS),
    ("a lost tokenizer", _TRAIN, lose(f"{_TOKENS}/tokenizer/tokenizer.json"), _TOKENIZE_AGAIN),
    ("val for train", _TRAIN, instead(f"{_TOKENS}/train-*.arrow", f"{_TOKENS}/val-*.arrow"), _TOKENIZE_AGAIN),
    (
        "items of another run",
        "report tiny",
        instead(f"{_RUN}/items.parquet", f"{_OTHER}/items.parquet"),
        _EVALUATE_AGAIN,
    ),
    ("another curve", "report tiny", instead(f"{_RUN}/curve.csv", f"{_OTHER}/curve.csv"), _TRAIN_AGAIN),
    (
        "an earlier checkpoint's weights",
        _GENERATE,
        instead(f"{_LAST}/model.safetensors", f"{_RUN}/checkpoints/step-0000003/model.safetensors"),
        "damaged",
    ),
]


def cases() -> list[Case]:
    """Flipped bits and cuts of every file that a verb reads, and some others."""
    made = []
    for pattern, command, expects in _READ:
        name, arguments = f"{command}: {pattern}", tuple(command.split())
        for seed in range(_FLIPS):
            made.append(Case(f"{name}: bit {seed}", arguments, flip(pattern, seed), expects))
        made += [Case(f"{name}: {share:.0%}", arguments, cut(pattern, share), expects) for share in (0, 0.5)]
    for name, command, spoil, expects in _OTHERS:
        made.append(Case(f"{command}: {name}", tuple(command.split()), spoil, expects))
    return made
