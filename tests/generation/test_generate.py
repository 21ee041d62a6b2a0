"""`stlm generate`: text as it is drawn, its end, its errors."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_model import save_run

from stlm.cli import main
from stlm.generation.find import load_generator
from stlm.generation.generate import continuation
from stlm.generation.sampling import Sampling
from stlm.tokens.bpe import train_bpe
from stlm.tokens.chunks import END
from stlm.tokens.tokenizer import ByteTokenizer, ChunkTokenizer

GREEDY = Sampling(temperature=0)
EOT = 256
MARK = 257  # a symbol that is no text


class Script:
    """A generator that says the symbols of a list, one after the other, whatever it is given."""

    eot, unit, dropped = EOT, "symbols", 0

    def __init__(self, *symbols: int) -> None:
        self.symbols, self.given = list(symbols), []

    def start(self, prompt: str) -> torch.Tensor:
        self.given = [prompt]
        return self._logits()

    def next(self, symbol: int, largest: int | None = None) -> torch.Tensor:
        self.given.append(symbol)
        return self._logits()

    def piece(self, symbol: int) -> bytes:
        return b"" if symbol == MARK else bytes([symbol])

    def _logits(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.symbols[len(self.given) - 1]), 258).float()


def test_a_character_comes_when_all_of_its_bytes_are_there() -> None:
    said = "né 🙂!".encode()
    script = Script(*said, EOT)
    assert list(continuation(script, "p", 99, GREEDY, 0)) == [*("n", "", "é", " ", "", "", "", "🙂", "!", "")]
    assert script.given == ["p", *said]


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert (
        "".join(continuation(Script(0xFF, 65, 0xC3, 65, 0xF0, EOT), "", 99, GREEDY, 0))
        == "\ufffdA\ufffdA\ufffd"
    )
    # Cut by the length within a character.
    assert "".join(continuation(Script(65, 0xC3, 0xA9), "", 2, GREEDY, 0)) == "A\ufffd"


def test_the_length_counts_symbols_of_text() -> None:
    script = Script(65, MARK, 66, MARK, 67, 68)
    assert "".join(continuation(script, "", 3, GREEDY, 0)) == "ABC"
    # What comes after the last one is not asked for.
    assert script.given == ["", 65, MARK, 66, MARK]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "results" / "toy" / "runs" / "first"
    save_run(folder, train_bpe("bpe-270", ["the cat sat on the mat, né 🙂 " * 9]))
    return folder


@pytest.fixture
def said(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the verb in the project's folder; what it printed, on stdout and stderr, and its status."""
    monkeypatch.chdir(run.parents[3])

    def say(*arguments: str, stdin: bytes = b"") -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = main(["generate", *arguments])
        return *capsys.readouterr(), status

    return say


def test_runs_are_named_as_elsewhere(said, run: Path) -> None:
    text, _, status = said("toy/first", "the cat", "--tokens", "20")
    assert status == 0 and text.startswith("the cat") and text.endswith("\n") and len(text) > 20
    for name in ("toy/first@2", str(run), f"{run}@step-0000001", str(run / "checkpoints" / "step-0000002")):
        assert said(name, "the cat", "--tokens", "20")[0] == text, name
    assert said("toy/first", "-", "--tokens", "20", stdin=b"the cat")[0] == text
    assert said("toy/first", "the cat", "--tokens", "20", "--no-cache")[0] == text
    assert said("--tokens", "20", "toy/first", "--no-cache", "the cat")[0] == text


def test_samples_have_seeds_that_follow_one_another(said) -> None:
    three = said("toy/first", "né", "--tokens", "12", "--samples", "3", "--seed", "4")[0]
    alone = [said("toy/first", "né", "--tokens", "12", "--seed", seed)[0] for seed in ("4", "5", "6")]
    assert three == "---\n".join(alone) and len(set(alone)) == 3


def test_the_largest_seed_and_the_smallest_temperature(said) -> None:
    greedy = said("toy/first", "the cat", "--tokens", "9", "--temperature", "0")[0]
    coldest = ("--temperature", "1e-310", "--seed", str(2**64 - 2), "--samples", "2")
    assert said("toy/first", "the cat", "--tokens", "9", *coldest)[0] == f"{greedy}---\n{greedy}"


def test_a_prompt_longer_than_the_context_is_told(said) -> None:
    text, told, status = said("toy/first", "zq" * 30, "--tokens", "4")
    # 60 tokens and the end of text before them, of which 13 are read.
    assert "longer than the model's context: its first 47 tokens are not read" in told
    assert status == 0 and text.startswith("zq" * 30)
    assert said("toy/first", "zq", "--tokens", "40")[1] == ""


@pytest.fixture(scope="module")
def byte_run(run: Path) -> Path:
    folder = run.with_name("bytes")
    own = {"width": 16, "heads": 2, "ffn_width": 24}
    save_run(folder, ChunkTokenizer("words", [b"the", b" cat"]), bytes=own, tied=False)
    return folder


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3, "top_p": 0.9}, {"top_k": 40, "min_p": 0.02}, {"temperature": 1.0, "top_p": 0.99}],
    ids=str,
)
def test_a_byte_level_model_writes_bytes(said, byte_run: Path, options: dict[str, float]) -> None:
    """With the cache and without, and what is drawn symbol by symbol from its logits."""
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    asked = ("toy/bytes", "the né", "--tokens", "90", "--samples", "2", "--seed", "1", *flags)
    text, told, status = said(*asked)
    assert (status, told) == (0, "")
    assert said(*asked, "--no-cache")[0] == text

    sampling, expected = Sampling(**{"temperature": 0.8, **options}), []
    for seed in (1, 2):
        generator = load_generator(byte_run / "checkpoints" / "step-0000002", torch.device("cpu"), False)
        numbers, content = torch.Generator().manual_seed(seed), b""
        logits_S = generator.start("the né")
        while len(content) < 90:
            symbol = int(sampling.choose(logits_S, numbers))
            assert logits_S[symbol] > -torch.inf, "the rules of words"
            if symbol == generator.eot:
                break
            content += b"" if symbol == END else bytes([symbol])
            logits_S = generator.next(symbol)
        expected.append("the né" + content.decode(errors="replace") + "\n")
    assert text == "---\n".join(expected)
    # Of characters that came in two steps.
    assert "top_k" in options or any("\x80" <= letter < "\ufffd" for letter in text.replace("né", ""))


def test_what_a_byte_level_model_forgets_of_a_prompt_is_told_in_bytes(said, byte_run: Path) -> None:
    told = said("toy/bytes", "the cat " * 20, "--tokens", "1")[1]
    # Of 40 closed words, the last 9 are read; the space at the end is a word begun.
    assert f"its first {len('the cat ' * 15 + 'the')} bytes are not read" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("toy/frist", "a"), "toy/frist: neither a run's folder .* \\(did you mean 'toy/first'\\?\\)"),
        (
            ("toy/first@7", "a"),
            r"toy/first@7: results/toy/runs/first has no checkpoint of step 7 \(found: 1, 2\)",
        ),
        (("toy/first", "a", "--top-p", "0"), "top-p: 0.0: expected a number above 0"),
        (
            ("toy/first", "a", "--seed", str(2**64)),
            "--seed: 18446744073709551616: expected at most 18446744073709551615, with --samples 1",
        ),
        (
            ("toy/first", "a", "--seed", str(2**64 - 2), "--samples", "3"),
            "at most 18446744073709551613, with",
        ),
        (("toy/first", "a", "--device", "tpu"), "--device tpu: expected cpu, cuda or cuda:N"),
        (("toy/first", "a", "--device", "cuda:99"), r"--device cuda:99: torch finds \d+ CUDA"),
        (("toy/first", "a\udcff"), r"lone surrogate \('\\udcff' at character 1\)"),
        (("toy/first", "-"), "the prompt on stdin is not UTF-8"),
    ],
)
def test_mistakes(said, arguments: tuple[str, ...], message: str) -> None:
    text, told, status = said(*arguments, stdin=b"\xff")
    assert status == 2 and text == ""
    assert re.search(message, told), told


def test_a_run_without_its_checkpoints(said, run: Path) -> None:
    other = run.with_name("other")
    other.mkdir(exist_ok=True)
    (other / "curve.csv").write_text("step\n")
    assert "results/toy/runs/other: has no checkpoints; `dvc pull`" in said("toy/other", "a")[1]


def test_what_is_no_checkpoint_is_passed_over(said, run: Path) -> None:
    text = said("toy/first", "the cat", "--tokens", "9")[0]
    for name in ("step-abc", "step-", "step-\u0663", "step-" + "9" * 200):
        (run / "checkpoints" / name).mkdir()
    assert said("toy/first", "the cat", "--tokens", "9")[0] == text
    for name in (f"toy/first@{'9' * 5000}", "toy/" + "a" * 300, "toy/fi\0rst", "", "/"):
        assert said(name, "a")[2] == 2, name


def test_weights_that_are_gone_are_not_replaced_by_earlier_ones(said, run: Path) -> None:
    last = run / "checkpoints" / "step-0000002" / "model.safetensors"
    content = last.read_bytes()
    last.unlink()
    assert "step-0000002/model.safetensors: no such file" in said("toy/first", "a")[1]
    last.write_bytes(content)


def test_a_tokenizer_of_another_model_is_told(said, run: Path) -> None:
    folder = run / "checkpoints" / "tokenizer"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    ByteTokenizer().save(folder)
    assert re.search(r"the model has 270 tokens, its tokenizer bytes 257", said("toy/first", "a")[1])
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def process(run: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The verb in a process of its own, in a locale whose alphabet is ASCII."""
    return subprocess.Popen(
        [sys.executable, "-m", "stlm", "generate", str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        # Tests that a shell started in the background ignore ctrl-C, which a process inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_text_streams_until_its_reader_leaves(run: Path) -> None:
    with process(run, "né", "--tokens", "1000000", "--temperature", "0") as writer:
        assert writer.stdout.read(40).decode(errors="replace").startswith("né")  # long before the end
        writer.stdout.close()
        assert writer.wait(60) == 141
        assert writer.stderr.read() == b""


def test_ctrl_c_ends_it(run: Path) -> None:
    with process(run, "a", "--tokens", "1000000", "--temperature", "0") as writer:
        assert writer.stdout.read(1) == b"a"
        time.sleep(0.2)
        writer.send_signal(signal.SIGINT)
        told = writer.communicate(timeout=60)[1]
    assert writer.returncode == 130 and told == b"\ninterrupted\n"
