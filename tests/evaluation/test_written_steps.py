"""Questions that need several steps: the answer's line is scored, also after what the model itself writes."""

from __future__ import annotations

import json

import pytest
import torch

from stlm.corpora.config import SyntheticSource
from stlm.corpora.synthetic import write
from stlm.errors import UserError
from stlm.evaluation import scoring, writing
from stlm.evaluation.benchmarks import benchmark
from stlm.evaluation.benchmarks.items import Writing
from stlm.evaluation.benchmarks.steps import read
from stlm.evaluation.byte_model import ChunkRequests
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.report.schema import EvaluationRecord
from stlm.tokens.tokenizer import ByteTokenizer

ROWS = [
    {"question": "3 + 5 = ?", "options": [str(n) for n in range(10)], "label": 8, "steps": 1},
    {"question": "3 + 5 - 9 = ?", "options": [str(n) for n in range(10)], "label": 9, "steps": 2},
]
STORY = {"question": "Anna and Ben swap. Who?", "options": ["Ben", "Anna"], "label": 1, "steps": 1}
EOT = ByteTokenizer().eot


def random_model() -> Transformer:
    torch.manual_seed(3)
    sizes = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 24, "context": 64}
    model = Transformer(ModelConfig(vocab_size=257, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def test_the_line_of_the_answer_follows_the_question_of_a_document():
    first, second, story = read([*ROWS, STORY])
    assert first.options[8].request("harness") == Request("3 + 5 = ?", "\nAnswer: 8", begins=True)
    assert (first.gold, first.groups, second.groups) == (8, ("1",), ("2",))
    assert [option.words for option in story.options] == ["Ben", "Anna"]
    assert story.answered_text == "Anna and Ben swap. Who? Anna"


@torch.no_grad()
def test_a_context_that_begins_a_document_follows_the_end_of_text():
    request = Request("ab", "\nAnswer: 8", begins=True)
    tokenizer = ByteTokenizer()
    (own,), (other,) = (RequestEncoder(tokenizer)([one]) for one in (request, request._replace(begins=False)))
    assert own.tokens.tolist() == [EOT, *b"ab\nAnswer: 8"] and (own.n_context, own.starts_with_eot) == (
        3,
        True,
    )
    assert other.tokens.tolist() == own.tokens.tolist()[1:] and other.n_context == 2
    model = random_model()
    (score,) = TokenModel(model, RequestEncoder(tokenizer)).loglikelihoods([request])
    logprobs = model(torch.tensor([own.tokens[:-1].tolist()])).log_softmax(dim=-1)[0]
    expected = sum(float(logprobs[place - 1, own.tokens[place]]) for place in range(3, len(own.tokens)))
    assert score.logprob == pytest.approx(expected, abs=1e-4) and score.n_tokens == len("\nAnswer: 8")


def test_a_byte_level_model_reads_it_after_an_end_of_text_too():
    from stlm.tokens.tokenizer import ChunkTokenizer

    requests = [Request("ab cd", "\nAnswer: 8", begins=begins) for begins in (True, False)]
    own, other = ChunkRequests(ChunkTokenizer("spaces", [b"ab", b" cd"]))(requests)
    assert own.tokens.tolist() == [0, *other.tokens.tolist()] and own.n_context == other.n_context + 1


class Script:
    """A generator that writes what it is told to, byte by byte, and then ends its text."""

    eot = EOT

    def __init__(self, text: str) -> None:
        self.bytes, self.prompts, self.read = [*text.encode(), EOT], [], 0

    def logits(self) -> torch.Tensor:
        found = torch.zeros(257)
        found[self.bytes[self.read]] = 9.0
        return found

    def start(self, prompt: str) -> torch.Tensor:
        self.prompts.append(prompt)
        self.read = 0
        return self.logits()

    def next(self, symbol: int, largest: int | None = None) -> torch.Tensor:
        assert symbol == self.bytes[self.read]
        self.read += 1
        return self.logits()

    def piece(self, symbol: int) -> bytes:
        return bytes([symbol])


@pytest.mark.parametrize(
    ("text", "before", "symbols", "unfinished"),
    [
        ("\n3 + 5 = 8\nAnswer: 8", "\n3 + 5 = 8", 18, 0),
        ("\nAnswer: 8", "", 8, 0),
        ("\n3 + 5", "\n3 + 5", 6, 1),  # the text ends
        ("\n3 + 5 = 8 and so on and on", "\n3 + 5 = 8 and so on", 20, 1),  # cut
    ],
)
def test_what_is_written_comes_before_every_option(monkeypatch, text, before, symbols, unfinished):
    script = Script(text)
    monkeypatch.setattr(writing, "_generator", lambda model: script)
    items = list(read(ROWS))
    found = writing.write_before(None, items, Writing("\nAnswer:", most=20))
    assert script.prompts == ["3 + 5 = ?", "3 + 5 - 9 = ?"]
    assert (found.symbols, found.unfinished) == (2 * symbols, 2 * unfinished)
    assert found.record == {"symbols": symbols, "unfinished": 2 * unfinished}
    for own, item in zip(found.items, items, strict=True):
        assert own.gold == item.gold and own.answered_text == item.answered_text
        for option, plain in zip(own.options, item.options, strict=True):
            assert option == plain._replace(continuation=before + plain.continuation)


def test_a_model_writes_what_is_most_probable_and_is_scored_after_it():
    model, items = random_model(), list(read(ROWS))
    scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
    found = writing.write_before(scorer, items, Writing("\nAnswer:", most=12))
    scores = scoring.score(scorer, found.items, ["harness"])["harness"]
    for item, plain, of_options in zip(found.items, items, scores, strict=True):
        tokens = [EOT, *plain.options[0].context.encode()]
        drawn = b""
        while len(drawn) < 12 and (best := int(model(torch.tensor([tokens]))[0, -1].argmax())) != EOT:
            drawn += bytes([best])
            tokens.append(best)
        text = drawn.decode(errors="replace")
        assert item.options[0].continuation == text + "\nAnswer: 0"
        # Among the options, only what follows the shared text matters.
        tokens = [EOT, *(plain.options[0].context + text + "\nAnswer: ").encode()]
        expected = model(torch.tensor([tokens]))[0, -1].log_softmax(dim=-1)[list(b"0123456789")]
        logprobs = torch.tensor([score.logprob for score in of_options])
        torch.testing.assert_close(
            (logprobs - logprobs[0]).float(), expected - expected[0], atol=1e-3, rtol=1e-3
        )
    assert found.unfinished == len(items)


def test_a_model_of_another_library_is_refused():
    class Other(torch.nn.Module):
        pass

    scorer = TokenModel(random_model(), RequestEncoder(ByteTokenizer()))
    scorer.transformer = Other()
    with pytest.raises(UserError, match=r"Other writes no text in an evaluation.*leave the benchmark out"):
        writing.write_before(scorer, list(read(ROWS)), Writing("\nAnswer:", most=12))


def test_accuracies_are_broken_down_by_steps_and_what_was_written_is_recorded(run):
    for part in ("steps_arithmetic", "steps_entities"):
        folder = run.tokens_folder.parents[2] / "raw" / part
        folder.mkdir(parents=True)
        write(SyntheticSource(kind="synthetic", part=part, seed=4, size=16), folder)
    names = ["steps_arithmetic", "steps_entities", "steps_arithmetic_written"]
    evaluate_run(run, EvaluationConfig(benchmarks=names, checkpoints="last", limit=8))
    record = json.loads((run.folder / "evaluation.json").read_text())
    EvaluationRecord.model_validate(record)
    (scored,) = [one["benchmarks"] for one in record["checkpoints"].values()]
    for name in names:
        assert scored[name]["modes"].keys() == {"harness"}
        groups = scored[name]["modes"]["harness"]["groups"]["steps"]
        assert groups.keys() <= {"1", "2", "3", "4"} and sum(one["n"] for one in groups.values()) == 8
    assert "written" not in scored["steps_arithmetic"]
    assert scored["steps_arithmetic_written"]["written"]["symbols"] > 0
    assert benchmark("steps_arithmetic_written").data_name == "steps_arithmetic"
