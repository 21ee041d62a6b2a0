"""Training of byte-pair vocabularies with the library `tokenizers`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from threading import Thread
from typing import IO

import tokenizers
from tqdm import tqdm

from stlm.errors import UserError
from stlm.tokens import bpe_worker
from stlm.tokens.tokenizer import EOT, Tokenizer, bpe_vocab_size, trained_tokenizer

# Characters: the library holds 256 texts at a time, and dozens of bytes for each character it works on.
_PART = 1 << 14
_FARTHEST = 1 << 20  # characters
# Positions where GPT-2's pre-tokenization always ends a piece: before white space after another character,
# before punctuation after a letter or a digit, between an ASCII letter and a digit. Its pattern never looks
# back across the start of a piece, and looks ahead only from white space.
_CUT = re.compile(r"(?<=\S)(?=[ \n])|(?<=[^\W_])(?=[!-/:-@\[-^`{-~、。，])|(?<=[A-Za-z])(?=[0-9])")


def train_bpe(name: str, texts: Iterable[str], progress: bool = False) -> Tokenizer:
    """Train `bpe-N` (N ids: 256 bytes, N - 257 merges, the end of text) on `texts`, which may be a stream.

    Memory grows only with the number of distinct words, time with the length of the texts and the number of
    merges: words of more than 1,000 bytes are cut for training (see :func:`stlm.tokens.bpe_worker.main`).
    Equal texts in equal order give equal bits. Pairs that occur once are not merged; texts with too few pairs
    for N are a `UserError`. Training runs in a child process, which ends with this process, or when an
    exception (ctrl-C) leaves this function. `progress`: show a bar of the merges.
    """
    size = bpe_vocab_size(name)
    tokenizer = tokenizers.Tokenizer.from_str(_train(texts, size - 257, progress))
    found = tokenizer.get_vocab_size() + 1
    if found < size:
        raise UserError(
            f"tokenizer {name!r}: the corpus has pairs for a vocabulary of {found} only; "
            f"choose bpe-{found} or smaller, or a larger corpus"
        )
    # Added last, so that the ids of merges do not depend on it; other libraries need it in tokenizer.json.
    tokenizer.add_special_tokens([EOT])
    return trained_tokenizer(name, tokenizer.to_str(pretty=True).encode())


def _train(texts: Iterable[str], merges: int, progress: bool) -> str:
    """The tokenizer.json that the child process trains on `texts`."""
    # With `-P` and the parent's path, the child imports the same modules in any working directory.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", bpe_worker.__name__, str(merges)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    messages: deque[str] = deque(maxlen=20)
    teller = Thread(target=_tell, args=(child.stderr, merges, progress, messages), daemon=True)
    teller.start()
    try:
        with suppress(BrokenPipeError):  # the child ended early, and reports why
            for text in texts:
                for part in _parts(text):
                    content = part.encode()
                    child.stdin.write(bpe_worker.LENGTH.pack(len(content)) + content)
            child.stdin.write(bpe_worker.LENGTH.pack(bpe_worker.END))
            child.stdin.flush()
        result = child.stdout.read()
        status = child.wait()
    finally:
        child.kill()
        child.wait()
        with suppress(BrokenPipeError):
            child.stdin.close()
        teller.join()
        child.stdout.close()
    if status == -signal.SIGINT:  # ctrl-C also reaches the child, perhaps before this process
        raise KeyboardInterrupt
    if status < 0:
        raise UserError(
            f"the training of the vocabulary was ended by signal {-status}; signal 9 comes most often of too "
            "little memory"
        )
    if status > 0:
        raise RuntimeError("the training of the vocabulary failed: " + "\n".join(messages))
    return result.decode()


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of about `_PART` characters, cut only where the pre-tokenization ends a piece.

    If a million characters have no such position, the cut is arbitrary: in nearly every such text it falls
    in a word that is cut for training anyway.
    """
    start = 0
    while len(text) - start > 2 * _PART:
        place = _CUT.search(text, start + _PART, start + _FARTHEST)
        stop = place.start() if place else min(start + _FARTHEST, len(text))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _tell(stderr: IO[bytes], merges: int, progress: bool, messages: deque[str]) -> None:
    """Show the child's progress in merges; collect its other lines in `messages`."""
    bar = None
    for line in stderr:
        try:
            report = json.loads(line)
            stage, current = report["stage"], report["current"]
        except (ValueError, TypeError, KeyError):
            messages.append(line.decode(errors="replace").rstrip())
            continue
        if bar is None:
            bar = tqdm(total=merges, desc="merges", unit=" merges", disable=not progress)
        if stage == "Compute merges":
            bar.update(min(current, merges) - bar.n)
    if bar is not None:
        bar.close()
    stderr.close()
