"""The process that trains a byte-pair vocabulary: texts from stdin, tokenizer.json to stdout.

The library's Rust code runs for minutes without checking Python's signals. In a separate process, which
:func:`stlm.tokens.bpe.train_bpe` starts and ends, training stops as soon as the command does.

Input: texts, each after its length in bytes (4 bytes, little-endian), then a length of `END`. Stdin stays
open; when it closes the parent has ended, and this process ends too. Output on stderr: the library's
progress, as JSON lines. Imports are minimal, so that the process starts in a tenth of a second.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator

LENGTH = struct.Struct("<I")
END = 2**32 - 1
# Bytes of the longest pre-token that is not cut. The longest of any corpus here has 207.
LONGEST = 1000


def main(merges: int) -> None:
    """Train up to `merges` merges on the texts of stdin; write the tokenizer to stdout.

    The cost of a merge grows with the length of each word that it changes, so a word of a million letters
    would take hours. Pre-tokens of more than `LONGEST` bytes are cut, for training only: time is linear in
    the length of any text, and a corpus without such words gets the same vocabulary, to the bit.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # After the first of the two, each character stands for a byte.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [byte_level, pre_tokenizers.FixedLength(length=LONGEST)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
        progress_format="json",
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.pre_tokenizer = byte_level
    sys.stdout.buffer.write(tokenizer.to_str().encode())
    sys.stdout.flush()


def _texts() -> Iterator[str]:
    while (length := LENGTH.unpack(_read(LENGTH.size))[0]) != END:
        yield _read(length).decode()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _read(size: int) -> bytes:
    content = sys.stdin.buffer.read(size)
    if len(content) < size:
        os._exit(1)  # the parent has ended
    return content


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(int(sys.argv[1]))
