"""`stlm generate --prompts`: many texts at once are those of one at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_model import CONTEXT, OPTIONS, random_model, save_run

from stlm.cli import main
from stlm.generation.batch import Batch
from stlm.generation.generate import continuation
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.row_cache import RowCache
from stlm.techniques.early_exit import EarlyExit
from stlm.techniques.mixture_of_depths import MixtureOfDepths
from stlm.techniques.series_activation import SeriesActivation
from stlm.tokens.bpe import train_bpe
from stlm.tokens.tokenizer import ByteTokenizer, ChunkTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ("Once", "", "a much longer one, beyond the context", "né 🙂", "fifteen letters", "Once")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_of_different_lengths_are_the_rows_alone(options: dict) -> None:
    model = random_model(**options)
    tokens_BL = torch.randint(257, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    cache = RowCache(model.config, 3, torch.device("cpu"))
    with torch.inference_mode():
        whole_BLD = model.hidden(tokens_BL)
        held = [0, 0, 0]
        # Rows begin with 7, 3 and 1 tokens, then read on together, some of them, and anew.
        for rows, counts in (
            ((0, 1, 2), (7, 3, 1)),
            ((0, 1, 2), (1, 1, 1)),
            ((2,), (1,)),
            ((2, 0), (1, 1)),
            ((1,), (9,)),
            ((2, 0, 1), (1, 1, 1)),
            ((2, 0), (5, 16)),
        ):
            part_RL = []
            for row, count in zip(rows, counts, strict=True):
                held[row] = held[row] if count == 1 else 0
                part_RL.append(tokens_BL[row, held[row] : held[row] + count])
            if max(counts) == 1:
                layout = cache.extend(torch.tensor(rows), torch.tensor([held[row] for row in rows]))
                found = model.hidden(torch.stack(part_RL), layout)
            else:
                layout = cache.begin(rows, counts)
                found = model.hidden(torch.cat(part_RL)[None], layout)[0].split(counts)
            for row, count, found_LD in zip(rows, counts, found, strict=True):
                expected_LD = whole_BLD[row, held[row] : held[row] + count]
                torch.testing.assert_close(found_LD, expected_LD, atol=2e-5, rtol=1e-4)
                held[row] += count


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(temperature=1.3, top_k=99, min_p=0.001)], ids=str
)
@pytest.mark.parametrize("name", ["gqa", "learned", "fast recipe", "shared layers, adapters", "series"])
def test_texts_at_once_are_those_of_one_at_a_time(name: str, sampling: Sampling) -> None:
    """Their windows move at different times; they end at different times, too."""
    if name == "series":
        model = random_model(techniques=(SeriesActivation(),))
    else:
        model = random_model(**OPTIONS[name])
    generator = TokenGenerator(model, TOKENIZER)
    seeds = [7, 8, 9, 10, 11, 12]
    rows = Batch(generator, sampling).write(PROMPTS, seeds, 3 * CONTEXT)
    for row, prompt, seed in zip(rows, PROMPTS, seeds, strict=True):
        expected = "".join(continuation(generator, prompt, 3 * CONTEXT, sampling, seed))
        assert TOKENIZER.decode(row.drawn) == expected
        generator.start(prompt)
        assert row.dropped == generator.dropped
    if name == "fast recipe" and sampling.temperature:
        assert len({len(row.drawn) for row in rows}) > 1


def test_prompts_are_read_in_one_pass_and_a_token_of_each_text_in_one() -> None:
    model = random_model()
    read = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    Batch(TokenGenerator(model, TOKENIZER), Sampling(temperature=0)).write(["abc", "", "xy"], [0, 0, 0], 6)
    assert read == [(1, 4 + 1 + 3)] + [(3, 1)] * 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "results" / "toy" / "runs"
    tokenizer = train_bpe("bpe-270", ["the cat sat on the mat, né 🙂 " * 9])
    save_run(folder / "exits", tokenizer, techniques=(EarlyExit(),))
    save_run(folder / "routed", tokenizer, techniques=(MixtureOfDepths(capacity=0.5),))
    own = {"width": 16, "heads": 2, "ffn_width": 24}
    save_run(folder / "bytes", ChunkTokenizer("words", [b"the"]), bytes=own, tied=False)
    return folder


@pytest.fixture
def said(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run `stlm generate` in the project's folder; what it printed, on stdout and stderr, and its status."""
    monkeypatch.chdir(runs.parents[2])

    def say(*arguments: str) -> tuple[str, str, int]:
        status = main(["generate", *arguments])
        return *capsys.readouterr(), status

    return say


@pytest.mark.parametrize(
    ("run", "more"),
    [
        ("exits", ()),
        ("exits", ("--batch", "2")),
        ("exits", ("--draft", "exit-2")),
        ("exits", ("--no-cache",)),
        ("routed", ()),
        ("bytes", ()),
    ],
)
def test_each_line_is_what_the_prompt_alone_gives(said, run: str, more: tuple[str, ...]) -> None:
    prompts = ["the cat", "né 🙂 \u2028 sat", "zq" * 20, 'a "quoted" \\ one']
    objects = [{"prompt": one, "id": 1} for one in prompts[1:]]
    lines = [json.dumps(prompts[0]), "", *map(json.dumps, objects)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    Path("prompts.txt").write_text("\r\n".join([*prompts, ""]))
    asked = ("--tokens", "12", "--seed", "3", "--top-k", "50")
    draft = more if "--batch" not in more else ()
    text, told, status = said(f"toy/{run}", "--prompts", "prompts.jsonl", "--samples", "2", *asked, *more)
    assert status == 0 and bool(told) == ("--draft" in more)
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == [one for one in prompts for _ in range(2)]
    assert [line["seed"] for line in lines] == [3, 4] * 4
    assert said(f"toy/{run}", "--prompts", "prompts.txt", "--samples", "2", *asked, *more)[0] == text
    # Of the long prompt and of others, each seed once.
    for line in (lines[0], lines[3], lines[4]):
        alone, told, _ = said(
            f"toy/{run}", line["prompt"], *asked[:2], "--seed", str(line["seed"]), *asked[4:], *draft
        )
        assert alone == line["prompt"] + line["text"] + "\n"
        assert (f"first {line.get('dropped')} " in told) == ("are not read" in told)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"a", ("a prompt", "--prompts", "some.txt"), "--prompts: expected without a PROMPT"),
        (b"a", ("--prompts", "some.txt", "a prompt"), "--prompts: expected without a PROMPT"),
        (b"a", (), "required: PROMPT"),
        (b"a", ("--prompts", "none.txt"), "none.txt: cannot be read: "),
        (b" \n\n", ("--prompts", "some.txt"), "some.txt has no prompts; expected one a line"),
        (b"a\xff", ("--prompts", "some.txt"), "some.txt is not UTF-8"),
        (b'"a"\n{', ("--prompts", "some.jsonl"), r"some.jsonl, line 2: not valid JSON"),
        (b'{"text": "a"}', ("--prompts", "some.jsonl"), "line 1: expected a text, or an object"),
        (b'"a"\n\n7', ("--prompts", "some.jsonl"), "line 3: expected a text"),
        (b'"a\\ud800"', ("--prompts", "some.jsonl"), "lone surrogate"),
        (b"a", ("--prompts", "some.txt", "--seed", str(2**64)), "--seed: 18446744073709551616: expected"),
    ],
)
def test_mistakes(said, content: bytes, arguments: tuple[str, ...], message: str) -> None:
    for name in ("some.txt", "some.jsonl"):
        Path(name).write_bytes(content)
    text, told, status = said("toy/exits", *arguments)
    assert (status, text) == (2, "") and re.search(message, told), told
