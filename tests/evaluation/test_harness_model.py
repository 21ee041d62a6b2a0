"""Our model in lm_eval: the answers that its own model gives on the exported checkpoint, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_run import save_llama

from stlm.corpora.synthetic import choice, corpus
from stlm.errors import UserError
from stlm.evaluation.harness_command import main
from stlm.evaluation.harness_model import StlmLM, _choose
from stlm.export.llama import export_llama
from stlm.generation.tokens import TokenGenerator, window_begin
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.layout import CausalRows
from stlm.techniques.base import Technique
from stlm.techniques.encoder_decoder import EncoderDecoder
from stlm.techniques.pauses import Pauses
from stlm.techniques.series_activation import SeriesActivation
from stlm.tokens.bpe import train_bpe
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoint_names import find_checkpoint
from stlm.training.checkpoints import save_checkpoint

CONTEXT = 48
STORIES = corpus(1, 40)["text"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("harness") / "run"
    save_llama(folder, train_bpe("bpe-500", STORIES), CONTEXT)
    return folder


@pytest.fixture(scope="module")
def ours(run: Path) -> StlmLM:
    return StlmLM(run=str(run), device="cpu")


@pytest.fixture(scope="module")
def theirs(run: Path) -> HFLM:
    export_llama(find_checkpoint(str(run)), run / "llama")
    return HFLM(pretrained=str(run / "llama"), device="cpu", dtype="float32", batch_size=4)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, own, number) for number, own in enumerate(arguments)]


def test_loglikelihoods(ours: StlmLM, theirs: HFLM) -> None:
    pairs = [(text[: 7 * i], text[7 * i : 7 * i + 40]) for i, text in enumerate(STORIES[:12])]
    # What the model says itself is what is greedy.
    said = ours.generate_until(requests("generate_until", ("Tom had", {"until": [], "max_gen_toks": 3})))[0]
    asked = requests(
        "loglikelihood", ("Tom had", said), ("  ends in space ", "x"), (STORIES[0] * 9, " end"), *pairs
    )
    expected = theirs.loglikelihood(asked)
    found = ours.loglikelihood(asked)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found].count(True) >= 1 and not all(greedy for _, greedy in found)


def test_rolling_loglikelihoods_of_texts_longer_than_the_context(ours: StlmLM, theirs: HFLM) -> None:
    asked = requests(
        "loglikelihood_rolling", *((text,) for text in ("".join(STORIES[:5]), "a", "", STORIES[7]))
    )
    # lm_eval cannot take a batch without windows, so the empty text is left out there.
    expected = theirs.loglikelihood_rolling([asked[i] for i in (0, 1, 3)])
    found = ours.loglikelihood_rolling(asked)
    assert len(ours.tok_encode(asked[0].args[0])) > 4 * CONTEXT
    assert [found[i] for i in (0, 1, 3)] == pytest.approx(expected, abs=1e-3)
    assert found[2] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["."], "max_gen_toks": 20},
        {"until": ["e", "zzz"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_new_tokens": 30},
    ],
)
def test_greedy_generation(ours: StlmLM, theirs: HFLM, options: dict) -> None:
    contexts = ["Tom had", "One day", STORIES[3], "x", STORIES[4][:60], "Ann"]
    asked = requests("generate_until", *((context, options) for context in contexts))
    expected = theirs.generate_until(asked)
    assert ours.generate_until(asked) == expected
    assert len(set(expected)) > 1


def test_in_bfloat16(run: Path, ours: StlmLM) -> None:
    half = StlmLM(run=str(run), device="cpu", dtype="bfloat16")
    asked = requests("loglikelihood", *((text[:30], text[30:60]) for text in STORIES[:10]))
    for one, other in zip(half.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert one[0] == pytest.approx(other[0], rel=0.02, abs=0.2)
    rows = [ours.tok_encode(text)[:n] for n, text in enumerate(STORIES[:8], 1)]
    exact, rounded = (lm.model.next_logits(rows) for lm in (ours, half))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.05)


def test_generation_past_the_context(ours: StlmLM) -> None:
    """More tokens than fit, which lm_eval's own model refuses: the window moves on as in `stlm generate`."""
    asked = requests("generate_until", ("Tom", {"until": ["<none>"], "max_gen_toks": 2 * CONTEXT}), ("", {}))
    long, _ = ours.generate_until(asked)
    tokens = ours.stlm_tokenizer.encode("Tom")
    for _ in range(2 * CONTEXT):
        window = torch.tensor([tokens[window_begin(len(tokens), CONTEXT) :]])
        with torch.no_grad():
            tokens.append(int(ours.model.transformer(window)[0, -1].argmax()))
        if tokens[-1] == ours.eot_token_id:
            break
    assert long == ours.stlm_tokenizer.decode(tokens[len(ours.stlm_tokenizer.encode("Tom")) :])


def with_technique(folder: Path, technique: Technique) -> StlmLM:
    """A random model, saved in `folder`, that hardly ever ends a text."""
    torch.manual_seed(1)
    sizes = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48, "context": 32}
    model = build_model(ModelConfig(vocab_size=257, tied=False, **sizes), [technique]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        model.output.weight[256] *= 0.01
    save_checkpoint(folder / "checkpoints" / "step-0000001", model, {"step": 1, "tokens": 1})
    ByteTokenizer().save(folder / "checkpoints" / "tokenizer")
    return StlmLM(run=str(folder), device="cpu")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "technique",
    [EncoderDecoder(), Pauses(place="answer", count=2), SeriesActivation()],
    ids=lambda one: one.key(),
)
def test_past_the_context_it_writes_as_generate_does(tmp_path: Path, technique: Technique, cached) -> None:
    lm = with_technique(tmp_path, technique)
    found = lm._generate([[], [65]], [], 80, {})
    generator = TokenGenerator(lm.model.transformer, ByteTokenizer(), cached)
    for prompt, written in zip(("", "A"), found, strict=True):
        logits_V, expected = generator.start(prompt), []
        if prompt:  # the harness puts no end of text before it
            generator.restart([65])
            generator._prompt_end = 0
            logits_V = generator.read([], last=1)[0]
        while len(expected) < 80:
            expected.append(int(logits_V.argmax()))
            logits_V = generator.next(expected[-1])
        assert written == expected and len(set(expected[40:])) > 2


def test_an_encoder_decoder_encodes_the_prompt(tmp_path: Path) -> None:
    lm = with_technique(tmp_path, EncoderDecoder())
    model = lm.model.transformer
    found = lm._generate([list(b"Tom had"), list(b"x"), []], [], 8, {})
    for prompt, written in zip((b"Tom had", b"x", b""), found, strict=True):
        tokens = list(prompt) or [lm.eot_token_id]
        answers = torch.tensor([len(tokens) - 1])
        for symbol in written:
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([tokens]), CausalRows(len(tokens), answers))
            assert symbol == int(model.head(hidden[0, -1]).argmax())
            tokens.append(symbol)


def test_sampling_draws_from_the_distribution_asked_for() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probabilities.log().expand(40_000, 4)

    def shares(**sampling: float) -> list[float]:
        drawn = _choose(logits, {"do_sample": True, **sampling})
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.015)
    squares = (probabilities**2 / (probabilities**2).sum()).tolist()
    assert shares(temperature=0.5) == pytest.approx(squares, abs=0.015)
    assert shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.015)
    assert shares(top_p=0.8) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.015)
    assert shares(top_p=0.01) == [1, 0, 0, 0]
    # Of the two kept, the first alone reaches 0.6.
    assert shares(top_k=2, top_p=0.6) == [1, 0, 0, 0]
    assert _choose(logits[:1], {"temperature": 0.0}).tolist() == [0]


def test_sampling_as_transformers_filters() -> None:
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1)) * 3
    kept = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(9)(None, logits / 0.8)).isfinite()
    torch.manual_seed(3)
    drawn = torch.stack(
        [
            _choose(logits, {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.7})
            for _ in range(400)
        ]
    )
    found = torch.zeros_like(kept).scatter(1, drawn.T, True)
    assert not (found & ~kept).any()
    assert (found & kept).sum() > 0.9 * kept.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "run=FOLDER is missing"),
        ({"run": "nowhere"}, "nowhere: neither a run's folder"),
        ({"run": "RUN", "dtype": "float16"}, "dtype=float16: expected float32 or bfloat16"),
        ({"run": "RUN", "device": "tpu7"}, "--device tpu7: expected cpu, cuda"),
        ({"run": "RUN", "devise": "cpu"}, r"devise: not an argument.*did you mean 'device'"),
    ],
)
def test_wrong_arguments(run: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StlmLM(**{key: str(run) if value == "RUN" else value for key, value in arguments.items()})


def test_the_last_checkpoint_is_taken(tmp_path: Path) -> None:
    first = save_llama(tmp_path, ByteTokenizer(), CONTEXT)
    (tmp_path / "checkpoints" / "step-0000001").rename(tmp_path / "checkpoints" / "step-0000009")
    last = tmp_path / "checkpoints" / "step-0000010"
    save_llama(tmp_path, ByteTokenizer(), CONTEXT).rename(last)
    assert first.name == "step-0000001"
    assert find_checkpoint(str(tmp_path)) == last
    assert find_checkpoint(f"{tmp_path}@9").name == "step-0000009"
    assert StlmLM(run=str(tmp_path), device="cpu").tokenizer_name.startswith("stlm-bytes-")


def test_unknown_ways_to_generate_are_refused(ours: StlmLM) -> None:
    with pytest.raises(UserError, match="gen_kwargs num_beams: not supported"):
        ours.generate_until(requests("generate_until", ("a", {"until": ["."], "num_beams": 3})))


def write_tasks(folder: Path) -> None:
    """Three tasks on local rows: choices, perplexity, generation."""
    items = pa.table(choice(3, 12))
    pq.write_table(items, folder / "items.parquet")
    data = {
        "dataset_path": "parquet",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "items.parquet")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
    }
    tasks = {
        "stories_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{ctx}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "{{label}}",
        },
        "stories_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{ctx}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "stories_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{ctx}}",
            "doc_to_target": "{{endings[0]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, own in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **own}))


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process, which has imported the harness; it knows tasks of --include_path alone."""
    # Reading the 14,000 files of the harness's own tasks takes most of half a minute.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    # The command registers the model, which this module's imports have done.
    monkeypatch.delitem(model_registry._objs, "stlm")
    # It would write to this test's stderr for ever.
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        return main()

    return call


def test_the_command(command_line, run: Path, tmp_path: Path, ours: StlmLM, capsys) -> None:
    write_tasks(tmp_path)
    tasks = "stories_choice,stories_rolling,stories_generate"
    status = command_line(
        *("--model", "stlm", "--model_args", f"run={run}", "--tasks", tasks),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"),
    )
    assert status == 0
    assert "stories_choice" in capsys.readouterr().out
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["config"]["model"] == "stlm" and len(results["config"]["model_sha"]) == 64
    bits = results["results"]["stories_rolling"]["bits_per_byte,none"]
    texts = choice(3, 12)["ctx"]
    nats = -sum(ours.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts))))
    assert bits == pytest.approx(
        nats / torch.tensor(2.0).log().item() / sum(len(t.encode()) for t in texts), rel=1e-4
    )
    assert 0 <= results["results"]["stories_choice"]["acc,none"] <= 1


def test_the_command_says_what_is_wrong(command_line, tmp_path: Path, capsys) -> None:
    write_tasks(tmp_path)
    status = command_line(
        *("--model", "stlm", "--model_args", "run=nowhere", "--tasks", "stories_choice"),
        *("--include_path", str(tmp_path)),
    )
    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nowhere: neither a run's folder")


# As if the package were not installed, for a Python that finds this module at its start.
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
"""


def test_the_command_without_the_harness(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-m", "stlm.evaluation.harness_command", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: the reference harness is not installed; run: pip install 'stlm[harness]'"
    )
