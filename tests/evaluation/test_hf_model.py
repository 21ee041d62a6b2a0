"""Folders of `transformers`: loaded without foreign code, tried out, scored as lm_eval scores them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from tiny_hf import CONTEXT, STORIES, VOCABULARY, save, tokenizer
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from stlm.errors import UserError
from stlm.evaluation.hf_folder import weights_sha256
from stlm.evaluation.hf_model import HfRequestEncoder, load_hf
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.model.segments import Segments


def requests() -> list[tuple[str, str]]:
    draw = random.Random(1)
    pairs = [("", " A story."), ("Tom ", "had"), (STORIES[0] * 5, " end."), (" ", "x"), ("é水", "🙂 ")]
    for text in STORIES[:20]:
        cut = text.index(" ", draw.randrange(1, 60))
        pairs.append((text[:cut], text[cut : cut + 30]))
    return pairs


@pytest.mark.parametrize(
    ("name", "adds_bos", "packs", "calls_head"),
    [
        ("gpt2", False, True, False),
        ("llama", True, True, False),
        ("opt", True, None, False),
        # The logits are scaled after the head.
        ("cohere", False, True, True),
        # Its window is narrower than its context: a mask of ours would widen it.
        ("mistral", True, False, False),
    ],
)
def test_log_probabilities_are_lm_evals(
    tmp_path: Path, name: str, adds_bos: bool, packs: bool | None, calls_head: bool
) -> None:
    save(tmp_path, name, adds_bos)
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=4)
    model, own = load_hf(tmp_path)
    assert model.packs is packs or packs is None
    assert model.calls_head == calls_head
    assert (model.config.context, model.config.vocab_size, own.adds_bos) == (CONTEXT, VOCABULARY, adds_bos)
    assert own.eot == theirs.prefix_token_id == 0
    # A context of white space is none here; lm_eval's own model fails on it where nothing is added.
    pairs = [pair for pair in requests() if pair[0].strip() or not pair[0]]
    expected = theirs.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    ours = TokenModel(model, HfRequestEncoder(own)).loglikelihoods(
        [Request(*pair) for pair in pairs], greedy=True
    )
    assert [score.logprob for score in ours] == pytest.approx([e[0] for e in expected], abs=1e-3)
    assert [score.greedy for score in ours] == [e[1] for e in expected]
    assert ours[2].truncated


@pytest.mark.parametrize("name", ["gpt2", "llama", "cohere", "mistral"])
def test_in_bfloat16(tmp_path: Path, name: str) -> None:
    model, own = load_hf(save(tmp_path, name))
    asked = [Request(*pair) for pair in requests() if pair[0].strip()]
    encoder = HfRequestEncoder(own)
    exact = TokenModel(model, encoder).loglikelihoods(asked)
    half = TokenModel(model, encoder, precision="bfloat16").loglikelihoods(asked)
    for one, other in zip(half, exact, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=0.03, abs=0.3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "cohere"])
def test_rows_that_several_sequences_share(tmp_path: Path, name: str) -> None:
    """In segments, against each sequence alone; the logits of some tokens against all logits."""
    model, _ = load_hf(save(tmp_path, name))
    draw = torch.Generator().manual_seed(2)
    row_1L = torch.randint(VOCABULARY, (1, 40), generator=draw)
    paths = np.arange(9), np.r_[0:5, 9:20], np.r_[0:5, 9:12, 20:40]
    positions = np.r_[0:9, 5:16, 8:28]
    segments = Segments(positions, [(9, paths[0]), (11, paths[1]), (20, paths[2])], torch.device("cpu"))
    with torch.inference_mode():
        hidden = model.hidden(row_1L, segments)
        packed = model.head(hidden)[0]
        for path in paths:
            alone = model.model(row_1L[:, path]).logits[0]
            torch.testing.assert_close(packed[path], alone, atol=1e-4, rtol=1e-4)
        rows = torch.tensor([3, 17])
        some = model.hidden(row_1L, segments, rows)
        torch.testing.assert_close(model.head(some, slice(5, 9)), packed[rows, 5:9], atol=1e-4, rtol=1e-4)
        tokens = torch.tensor([7, 2])
        torch.testing.assert_close(model.logit(some, tokens), packed[rows, tokens], atol=1e-4, rtol=1e-4)


def test_a_model_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer(False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bert is not causal"):
        load_hf(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer(False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="t5 is an encoder-decoder"):
        load_hf(tmp_path)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_hf(tmp_path)
    save(tmp_path, "llama")
    with pytest.raises(UserError, match="context: 129 is longer than the 128 positions"):
        load_hf(tmp_path, context=129)
    assert load_hf(tmp_path, context=20)[0].config.context == 20

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="the weights lack 9 of the model's tensors"):
        load_hf(tmp_path)
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **code}))
    (tmp_path / "own.py").write_text("raise SystemExit('foreign code ran')\n")
    with pytest.raises(UserError, match="transformers cannot load it"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights as \*\.safetensors \(found .*pytorch_model\.bin"):
        load_hf(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("wte.weight", float("nan")), ("h.1.ln_1.bias", float("inf"))])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    save(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    (key,) = [key for key in weights if key.endswith(name)]
    weights[key][3] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.safetensors: the tensor {key} has NaN or infinite values"):
        load_hf(tmp_path)


def test_finite_weights_whose_logits_are_not(tmp_path: Path) -> None:
    save(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    (key,) = [key for key in weights if key.endswith("ln_f.weight")]
    weights[key] += 3e38
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="logits are NaN or infinite, though its weights are not"):
        load_hf(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_missing_tokenizer_is_told(tmp_path: Path, name: str) -> None:
    save(tmp_path, name)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError) as told:
        load_hf(tmp_path)
    for part in (
        str(tmp_path),
        "tokenizer",
        "(found config.json, generation_config.json, model.safetensors)",
    ):
        assert part in str(told.value)
    if name == "gpt2":  # of which transformers makes an empty one
        assert "expected tokenizer.json, or vocab.json and merges.txt" in str(told.value)
        (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
        with pytest.raises(
            UserError, match=r"the tokenizer: .*; expected tokenizer\.json, or .*\(found .*, vocab\.json\)"
        ):
            load_hf(tmp_path)


def test_an_empty_or_a_broken_tokenizer_is_told(tmp_path: Path) -> None:
    save(tmp_path, "gpt2")
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    empty = {**whole, "added_tokens": [], "model": {**whole["model"], "vocab": {}, "merges": []}}
    path.write_text(json.dumps(empty))
    with pytest.raises(UserError, match=r"no tokenizer: .* makes no token of a text; expected"):
        load_hf(tmp_path)
    path.write_text(json.dumps(whole)[:1000])
    with pytest.raises(UserError, match="transformers cannot load it, the tokenizer: "):
        load_hf(tmp_path)


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    """By its highest id: it may have fewer tokens than the model and ids beyond the model's."""
    save(tmp_path, "gpt2")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 5000
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer has 5,001 tokens, the model's embedding 400"):
        load_hf(tmp_path)


def test_ids_beyond_the_rows_are_named(tmp_path: Path) -> None:
    """Added tokens too, whether a text has them or not; ids up to the last row are padding's."""
    save(tmp_path, "gpt2")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    first = len(content["model"]["vocab"])
    for id_ in range(first, VOCABULARY + 1):
        content["added_tokens"].append({**content["added_tokens"][0], "id": id_, "content": f"<{id_}>"})
        path.write_text(json.dumps(content))
        if id_ == VOCABULARY - 1:
            assert load_hf(tmp_path)[1].vocab_size == VOCABULARY
    told = r"401 tokens, the model's embedding 400: 1 have no row, first '<400>' \(400\)"
    with pytest.raises(UserError, match=told):
        load_hf(tmp_path)


def test_weights_of_whole_numbers_are_named(tmp_path: Path) -> None:
    save(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    (key,) = [key for key in weights if key.endswith("ln_f.weight")]
    weights[key] = weights[key].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"the tensor {key} is of I8; expected F64"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a JSON list"),
        ("{}", "weight_map: expected the names of tensors"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"lists gone\.safetensors, not in the folder \(found "),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"lists \.\./x\.safetensors, not in the folder"),
    ],
)
def test_an_index_of_weights_is_checked(tmp_path: Path, content: str, message: str) -> None:
    save(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path)


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def test_whatever_a_library_raises_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "gpt2")
    for error in (Panic("index out of bounds\nnote: run with"), ZeroDivisionError("division by zero")):

        def fail(*arguments: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
        with pytest.raises(UserError) as told:
            load_hf(tmp_path)
        assert "transformers cannot load it, the tokenizer: " in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "gpt2", ', r"config\.json: not readable as JSON"),
        (b"\xff\xfe{", r"config\.json: not readable as JSON"),
        (b"[]", r"config\.json: a JSON list; expected an object"),
        (b'{"model_type": "gtp2"}', "transformers cannot load it, the model: "),
        (b'{"model_type": "gpt2", "n_embd": "many"}', "transformers cannot load it, the model: "),
    ],
)
def test_an_unreadable_configuration_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    save(tmp_path, "gpt2")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path)


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    save(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    for content in (path.read_bytes()[:3000], b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"safetensors: {len(content):,} bytes, truncated or no safetensors"
        ):
            load_hf(tmp_path)


def test_the_digest_covers_weights_and_configuration(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    first = weights_sha256(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_sha256(tmp_path) != first
