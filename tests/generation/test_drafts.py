"""`stlm generate --draft` and `stlm drafts`: texts, what is told, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_model import save_run

from stlm.cli import main
from stlm.generation import drafts
from stlm.techniques.early_exit import EarlyExit
from stlm.tokens.bpe import train_bpe
from stlm.tokens.tokenizer import ChunkTokenizer

TEXT = "the cat sat on the mat, né 🙂 " * 9


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "results" / "toy" / "runs"
    tokenizer = train_bpe("bpe-270", [TEXT])
    save_run(folder / "exits", tokenizer, techniques=(EarlyExit(),))
    save_run(folder / "small", tokenizer, layers=1, width=16, context=8)
    save_run(folder / "other", train_bpe("bpe-270", ["a dog ran to the far, far hills " * 9]))
    save_run(
        folder / "bytes",
        ChunkTokenizer("words", [b"the"]),
        bytes={"width": 16, "heads": 2, "ffn_width": 24},
        tied=False,
    )
    return folder


@pytest.fixture
def said(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a verb in the project's folder; what it printed, on stdout and stderr, and its status."""
    monkeypatch.chdir(runs.parents[2])

    def say(*arguments: str) -> tuple[str, str, int]:
        status = main(list(arguments))
        return *capsys.readouterr(), status

    return say


GREEDY = ("generate", "toy/exits", "the né", "--tokens", "40", "--temperature", "0")


def test_greedy_text_is_the_same_with_every_draft(said) -> None:
    text = said(*GREEDY)[0]
    for draft in ("exit-1", "exit-2", "toy/small", "toy/small@1", "results/toy/runs/small", "toy/exits"):
        for more in ((), ("--draft-length", "1"), ("--draft-length", "30"), ("--fallback", "0.3")):
            found, told, status = said(*GREEDY, "--draft", draft, *more)
            assert (found, status) == (text, 0), (draft, more)
            length = more[1] if more[:1] == ("--draft-length",) else "4"
            # One line, of what became of the drafts.
            counts = (
                r"([\d.]+%|none) of \d+ drafted tokens accepted, [\d.]+ tokens for each pass of the model\n"
            )
            assert re.fullmatch(f"draft {draft}, {length} tokens: {counts}", told), told
    assert "100.0% of" in said(*GREEDY, "--draft", "toy/exits")[1]


def test_samples_with_a_draft_have_seeds_and_streams_of_their_own(said) -> None:
    asked = ("generate", "toy/exits", "né", "--tokens", "30", "--top-k", "40", "--draft", "exit-2")
    three = said(*asked, "--samples", "3", "--seed", "4")[0]
    alone = [said(*asked, "--seed", seed)[0] for seed in ("4", "5", "6")]
    assert three == "---\n".join(alone) and len(set(alone)) == 3
    shorter = said(*asked[:4], "9", *asked[5:], "--seed", "4")[0]
    assert alone[0].startswith(shorter[:-2])
    told = said("generate", "toy/exits", "zq" * 30, "--tokens", "4", "--draft", "toy/small")[1]
    assert "its first 47 tokens are not read" in told


def test_a_run_and_its_export_draft_for_each_other(said, tmp_path: Path) -> None:
    folder = str(tmp_path / "exported")
    assert said("export", "toy/exits", folder)[2] == 0
    text = said(*GREEDY)[0]
    for name, draft in (("toy/exits", folder), (folder, "toy/exits"), (folder, "toy/small")):
        found, told, status = said(GREEDY[0], name, *GREEDY[2:], "--draft", draft)
        assert (found, status) == (text, 0)
        assert ("100.0% of" in told) == (draft != "toy/small")


def test_a_text_that_is_not_the_models_is_said_to_be_none(said) -> None:
    told = said(*GREEDY, "--draft", "toy/small", "--rollback", "50", "--fallback", "0.1")[1]
    assert told.startswith("--rollback 50: the text is not toy/exits's own: tokens of toy/small stay where")
    assert said(*GREEDY, "--draft", "toy/small", "--rollback", "50")[0] != said(*GREEDY)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("toy/exits", "a", "--draft", "exit-3"),
            r"--draft exit-3: toy/exits has no such draft \(did you mean 'exit-\d'\?\); expected "
            r"an exit \(exit-N\) or further heads \(ahead-N\) of the model, or the STUDY/RUN or folder of ",
        ),
        (
            ("toy/small", "a", "--draft", "exit-1"),
            r"--draft exit-1: toy/small has neither exits nor further heads to draft with; expected an exit "
            r"\(exit-N\) or further heads \(ahead-N\) of the model, or the STUDY/RUN or folder of another",
        ),
        (("toy/exits", "a", "--draft", "toy/smal"), r"toy/smal: neither .* \(did you mean 'toy/small'\?\)"),
        (("toy/exits", "a", "--draft", "toy/other"), "--draft toy/other: the tokenizers differ: token"),
        (("toy/exits", "a", "--draft", "toy/bytes"), "--draft: toy/bytes is a byte-level model"),
        (("toy/bytes", "a", "--draft", "toy/small"), "--draft: toy/bytes is a byte-level model"),
        (("toy/bytes", "a", "--draft", "exit-1"), "--draft: toy/bytes is a byte-level model"),
        (("toy/exits", "a", "--draft", "exit-1", "--no-cache"), "--no-cache: expected without --draft"),
        (("toy/exits", "a", "--draft-length", "3"), "--draft-length: expected together with --draft"),
        (("toy/exits", "a", "--fallback", "0.5"), "--fallback: expected together with --draft"),
        (("toy/exits", "a", "--rollback", "2"), "--rollback: expected together with --draft"),
        (("toy/exits", "a", "--draft", "exit-1", "--fallback", "2"), "--fallback: 2.0: expected a prob"),
        (("toy/exits", "a", "--draft", "auto"), "are not measured; run: stlm drafts toy/exits"),
        (("toy/exits", "a", "--draft", "auto", "--draft-length", "3"), "--draft auto chooses the length"),
    ],
)
def test_mistakes(said, arguments: tuple[str, ...], message: str) -> None:
    text, told, status = said("generate", *arguments)
    assert (status, text) == (2, "") and re.search(message, told), told


def test_a_technique_that_does_not_support_drafts_is_refused(said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EarlyExit, "supports", EarlyExit.supports - {"drafts"})
    for name, draft in (("toy/exits", "exit-1"), ("toy/small", "toy/exits")):
        _, told, status = said("generate", name, "a", "--draft", draft)
        assert status == 2
        assert "error: toy/exits: techniques.early_exit does not support speculative decoding" in told


def test_the_measured_table_chooses_draft_and_length(said, runs: Path) -> None:
    asked = ("drafts", "toy/exits", "--lengths", "2", "5", "--tokens", "8", "--rounds", "1")
    text, told, status = said(*asked)
    assert (status, told) == (0, "")
    rows = [line.split() for line in text.splitlines()]
    assert [row[:2] for row in rows[2:]] == [[f"exit-{n}", k] for n in "12" for k in "25"]
    assert rows[1][0] == "none" and rows[1][2] == "1.00" and sum(row[-1] == "auto" for row in rows) == 1
    (path,) = Path(".state/drafts").glob("*.json")

    def measured(*rates: float) -> None:
        """The table with other rates."""
        table = drafts.read_record(path, drafts.Table)
        for row, rate in zip(table.rows, rates, strict=True):
            row.tokens_per_second = rate
        drafts.write_record(path, table.model_dump())

    measured(10, 11, 9, 8, 12)
    found, told, status = said(*GREEDY, "--draft", "auto")
    assert status == 0 and found == said(*GREEDY)[0]
    assert told.startswith("--draft auto: exit-2, 5 tokens\ndraft exit-2, 5 tokens: ")
    measured(13, 11, 9, 8, 12)
    found, told, status = said(*GREEDY, "--draft", "auto")
    assert (found, status) == (said(*GREEDY)[0], 0)
    assert told == "--draft auto: none, as no draft that was measured is faster than the model alone\n"

    assert said("drafts", "toy/exits", "toy/small", *asked[2:3], "3", *asked[5:])[2] == 0
    measured(1, 2)
    assert said(*GREEDY, "--draft", "auto")[1].startswith("--draft auto: toy/small, 3 tokens\n")
    # Weights of the draft, or of the model, that were not measured.
    save_run(runs / "small", train_bpe("bpe-270", [TEXT]), layers=1, width=24, heads=2, context=8)
    _, told, status = said(*GREEDY, "--draft", "auto")
    assert status == 2
    assert "the weights of toy/small have changed since it was measured; run: stlm drafts toy/exits" in told
    assert "of toy/small are not measured" in said("generate", "toy/small", "a", "--draft", "auto")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("toy/other",),
            "toy/other has neither exits nor further heads to draft with; expected other models as drafts, "
            "by STUDY/RUN or folder",
        ),
        (("toy/bytes",), "toy/bytes has neither exits nor further heads"),
        (("toy/bytes", "toy/small"), "toy/bytes is a byte-level model"),
        (("toy/exits", "exit-9"), "--draft exit-9: toy/exits has no such draft"),
        (("toy/exit",), "did you mean 'toy/exits'"),
    ],
)
def test_what_cannot_be_measured(said, arguments: tuple[str, ...], message: str) -> None:
    text, told, status = said("drafts", *arguments, "--tokens", "4", "--rounds", "1")
    assert (status, text) == (2, "") and re.search(message, told), told
