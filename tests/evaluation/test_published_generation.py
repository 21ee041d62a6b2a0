"""`stlm generate` with published models: tokens as transformers draws them, texts, the window, names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
from tiny_hf import CONTEXT, STORIES, VOCABULARY, save
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.hf_model import load_hf
from stlm.evaluation.hf_tokenizer import HfTokenizer
from stlm.generation.generate import continuation
from stlm.generation.published import HfGenerator, LlamaGenerator, _Pieces, load_published
from stlm.generation.sampling import Sampling

GREEDY = Sampling(temperature=0)
STUDY = """
description: A study with a published model.
corpus: synthetic
tokenizer: bytes
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 48, context: 64}
training: {steps: 30, warmup_steps: 2, batch_size: 4}
variants: {baseline: {}}
published:
  tiny: {folder: models/tiny}
"""


def drawn(generator: HfGenerator, prompt: str, count: int, sampling: Sampling = GREEDY) -> list[int]:
    """Tokens drawn one by one, ends of texts among them."""
    numbers, tokens = torch.Generator().manual_seed(3), []
    logits_V = generator.start(prompt)
    while len(tokens) < count:
        tokens.append(int(sampling.choose(logits_V, numbers)))
        logits_V = generator.next(tokens[-1])
    return tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "mistral"])
def test_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Greedy, within the context; and with the cache as without, past it, sampled."""
    model, tokenizer = load_hf(save(tmp_path, name), packing=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = STORIES[0][:50]
    ids = [tokenizer.eot, *tokenizer.encode(prompt)]
    # Rows of no token are not drawn here; eos would end the text.
    none = [*range(len(tokenizer.ids), VOCABULARY), tokenizer.eos]
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, suppress_tokens=none)[
        0, len(ids) :
    ].tolist()
    generator = HfGenerator(model, tokenizer)
    generator._empty_V[tokenizer.eos] = True
    assert drawn(generator, prompt, 40) == expected
    warm = Sampling(temperature=1.0, top_k=30)
    for start in (prompt, STORIES[0] * 9):
        plain = HfGenerator(model, tokenizer, cached=False)
        with_cache = drawn(generator, start, CONTEXT + 30, warm)
        plain._empty_V[tokenizer.eos] = True
        assert drawn(plain, start, CONTEXT + 30, warm) == with_cache
        assert plain.dropped == generator.dropped > 0


def test_with_a_draft_greedy_tokens_are_the_models(tmp_path: Path, capsys) -> None:
    names = ("gpt2", "llama", "opt", "mistral")
    for name in names:
        save(tmp_path / name, name)
    prompt = STORIES[0][:50]

    def said(name: str, *more: str) -> tuple[str, str, int]:
        asked = ("--tokens", str(CONTEXT + 30), "--temperature", "0", *more)
        capsys.readouterr()
        status = main(["generate", str(tmp_path / name), prompt, *asked])
        return *capsys.readouterr(), status

    for name, draft in (("gpt2", "llama"), ("llama", "opt"), ("opt", "opt")):
        text, told, status = said(name, "--draft", str(tmp_path / draft))
        assert status == 0 and text == said(name)[0]
        assert ("100.0% of" in told) == (name == draft)
    # A window of 16 tokens keeps no others.
    for name, draft in (("mistral", "gpt2"), ("gpt2", "mistral")):
        text, told, status = said(name, "--draft", str(tmp_path / draft))
        assert status == 2 and "/mistral: the cache of mistral does not keep all tokens" in told
    told = said("gpt2", "--draft", "exit-1")[1]
    assert "--draft exit-1: " in told and "gpt2 has neither exits nor further heads to draft with" in told
    assert "a published model, for which nothing is measured" in said("gpt2", "--draft", "auto")[1]
    assert main(["drafts", str(tmp_path / "gpt2"), "exit-1"]) == 2
    assert "gpt2: a published model; expected a run" in capsys.readouterr().err


def test_rows_without_a_token_are_not_drawn(tmp_path: Path) -> None:
    model, tokenizer = load_hf(save(tmp_path, "gpt2"), packing=False)
    generator = HfGenerator(model, tokenizer)
    logits_V = generator.start("")
    assert len(tokenizer.ids) < VOCABULARY
    assert torch.isneginf(logits_V[len(tokenizer.ids) :]).all()
    assert torch.isfinite(logits_V[: len(tokenizer.ids)]).all()


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece's of Llama: spaces are \u2581, unknown letters bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"Atextnolis,:!", "\u2581t", "\u2581te"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    bpe = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("\u2581", "t"), ("\u2581t", "e")], unk_token="<unk>", byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def test_the_text_of_each_token() -> None:
    own = HfTokenizer(metaspace(), "own")
    pieces = _Pieces(own)
    text = "At ten, n\u00e9 \U0001f642 !"
    ids = own.encode(text)
    assert b"".join(pieces[token] for token in ids).decode() == " " + text
    assert pieces[own.ids["</s>"]] == b"</s>"


def test_tokens_that_join_in_another_way_are_refused() -> None:
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    own = HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]"), "own")
    with pytest.raises(UserError, match=r"own: its tokens are joined .* \(WordPiece\)"):
        _Pieces(own)


def test_published_models_are_named_as_in_params_or_by_their_folder(project: Path, capsys) -> None:
    save(Path("models/tiny"), "llama", adds_bos=True)
    capsys.readouterr()  # transformers' progress bar
    Path("params/own.yaml").write_text(STUDY)

    def said(*arguments: str) -> tuple[str, str, int]:
        status = main(["generate", *arguments])
        return *capsys.readouterr(), status

    asked = ("Tom had", "--tokens", "30", "--top-k", "9", "--seed", "2", "--samples", "2")
    text, told, status = said("own/tiny", *asked)
    assert (status, told) == (0, "") and text.startswith("Tom had") and "\n---\nTom had" in text
    for more in (("models/tiny",), ("own/tiny", "--no-cache")):
        assert said(more[0], *asked, *more[1:])[0] == text
    with pytest.raises(ValueError, match="packing=False"):
        HfGenerator(*load_hf(Path("models/tiny")))
    model, tokenizer = load_hf(Path("models/tiny"), packing=False)
    sampling = Sampling(temperature=0.8, top_k=9)
    pieces = continuation(HfGenerator(model, tokenizer), "Tom had", 30, sampling, 2)
    assert text.split("\n---\n")[0] == "Tom had" + "".join(pieces)
    # The setting of params/, which the folder alone does not have.
    Path("params/own.yaml").write_text(STUDY.replace("models/tiny}", "models/tiny, prefix: </s>}"))
    assert said("own/tiny", *asked)[0] != text == said("models/tiny", *asked)[0]

    for name, message in (
        ("own/tny", r"own/tny: neither .*did you mean 'own/tiny'\?"),
        ("models", r"models: neither a run's folder"),
    ):
        _, told, status = said(name, "a")
        assert status == 2 and re.search(message, told), told
    for name in ("own/tiny", "models/tiny"):
        _, told, status = said(name, "a", "--readout", "exit-1")
        assert status == 2 and f"--readout: {name!r}: a published model has no readouts" in told
    config = Path("models/tiny/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    _, told, status = said("own/tiny", "a")
    assert status == 2 and told.count("\n") == 1 and "the weights lack 9" in told


def test_a_prompt_longer_than_the_context(project: Path, capsys) -> None:
    save(Path("models/tiny"), "gpt2")
    count = len(AutoTokenizer.from_pretrained("models/tiny")(STORIES[0] * 9)["input_ids"])
    assert main(["generate", "models/tiny", STORIES[0] * 9, "--tokens", "1"]) == 0
    begin = -(-(count + 1 - CONTEXT) // (CONTEXT // 2)) * (CONTEXT // 2)
    assert f"its first {begin - 1:,} tokens are not read" in capsys.readouterr().err


def test_a_plain_llama_writes_by_our_transformer_what_transformers_writes(tmp_path: Path) -> None:
    """Greedy and sampled, past the context, with the cache and without; padding rows are never drawn."""
    folder, device = save(tmp_path, "llama"), torch.device("cpu")
    theirs = HfGenerator(*load_hf(folder, packing=False))
    for cached in (True, False):
        ours = load_published(folder, device, cached)
        assert type(ours) is LlamaGenerator and ours.eot == theirs.eot == 1
        for sampling in (GREEDY, Sampling(temperature=1.0, top_k=30)):
            expected = drawn(theirs, STORIES[0][:50], CONTEXT + 30, sampling)
            assert drawn(ours, STORIES[0][:50], CONTEXT + 30, sampling) == expected
        assert ours.dropped == theirs.dropped > 0
        logits_V, expected_V = ours.start(""), theirs.start("")
        assert torch.equal(torch.isneginf(logits_V), torch.isneginf(expected_V))
        assert torch.isneginf(logits_V).sum() == VOCABULARY - len(ours.vocabulary()) - 1
        torch.testing.assert_close(logits_V, expected_V, atol=1e-3, rtol=0)
        assert ours.vocabulary() == theirs.vocabulary()
    assert type(load_published(save(tmp_path / "gpt2", "gpt2"), device)) is HfGenerator
