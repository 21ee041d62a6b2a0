"""Training of byte-pair vocabularies: any words, a bar that tells the truth, an end when asked."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tokenizers
from raw_samples import stories
from tokenizers import decoders, models, pre_tokenizers, trainers

from stlm.corpora.synthetic import corpus
from stlm.errors import UserError
from stlm.tokens.bpe import _PART, _parts, train_bpe

CHINESE = "".join(random.Random(3).choices("天地玄黃宇宙洪荒日月盈昃辰宿列張，。", k=3 * _PART))
HEX = random.Random(4).randbytes(3 * _PART).hex()


def plain(size: int, texts: list[str]) -> str:
    """The tokenizer.json of a trainer that sees each text whole."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str(pretty=True)


def test_without_long_words_the_bits_are_those_of_the_plain_trainer() -> None:
    """Long documents are handed over in parts: with spaces, without, of digits among letters."""
    texts = [
        *corpus(0, 60)["text"],
        *stories(200),
        " \n\n".join(stories(300, seed=2)),  # cut between the characters of white space, if wrongly cut
        CHINESE,
        HEX,
        "a  'll don't\t\n 12 ²3 é" * (_PART // 4),
        "-" * 990 + " " + "x" * 999,  # just short enough
    ]
    assert train_bpe("bpe-500", texts).files["tokenizer.json"].decode() == plain(500, texts)


@pytest.mark.parametrize("text", [CHINESE, HEX, "word " * _PART, "😀 " * 3 * _PART, "", "x"])
def test_parts_are_cut_where_pieces_end(text: str) -> None:
    parts = list(_parts(text))
    assert "".join(parts) == text
    assert len(parts) > 1 or len(text) < 2
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [piece for part in parts for piece, _ in cutter.pre_tokenize_str(part)]
    assert pieces == [piece for piece, _ in cutter.pre_tokenize_str(text)]


@pytest.mark.parametrize("letters", ["ACGT", "=", "0123456789", " "])
def test_a_word_of_many_letters_takes_time_by_its_length(letters: str) -> None:
    """The cut: seconds, where the trainer alone takes minutes."""
    word = "".join(random.Random(5).choices(letters, k=300_000))
    begin = time.monotonic()
    tokenizer = train_bpe("bpe-400", [*stories(200), word])
    assert time.monotonic() - begin < 15
    assert tokenizer.decode(tokenizer.encode(word)) == word


LONG = (
    "import random, signal; from stlm.tokens.bpe import train_bpe\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell leaves it ignored
    "train_bpe('bpe-60000', [''.join(random.Random(0).choices('abcdefghij', k=1_000_000))], True)"
)


def seen(path: Path) -> tuple[int, int]:
    """Merges made and wanted, by what stands last in a log of progress."""
    counts = re.findall(r"(\d+)/(\d+) \[", path.read_text())
    return tuple(map(int, counts[-1])) if counts else (0, 0)


def running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_tells_how_far_it_is_and_ends_at_a_signal(tmp_path: Path, number: int) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", LONG], stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not 0 < seen(log)[0]:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        done, total = seen(log)
        assert done < total == 60_000 - 257
        (worker,) = children(process.pid)
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(20) == -number
        while running(worker) and time.monotonic() - begin < 20:
            time.sleep(0.02)
        assert time.monotonic() - begin < 3  # one, and what a busy machine adds
        assert not running(worker)
    finally:
        process.kill()
        process.wait()


def test_a_worker_that_is_killed_is_told() -> None:
    def texts() -> Iterator[str]:
        yield from stories(10)
        os.kill(children(os.getpid())[-1], signal.SIGKILL)
        yield from stories(5000)

    with pytest.raises(UserError, match="ended by signal 9"):
        train_bpe("bpe-300", texts())


def test_an_error_of_the_texts_passes_through() -> None:
    def texts() -> Iterator[str]:
        yield "a text"
        raise UserError("the file is corrupt")

    before = children(os.getpid())  # of other tests in this process
    with pytest.raises(UserError, match="the file is corrupt"):
        train_bpe("bpe-300", texts())
    assert set(children(os.getpid())) <= set(before)
