"""An exported checkpoint gives, in `transformers`, the same logits and the same token ids."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stlm.errors import UserError
from stlm.export.llama import export_llama
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.tokens.bpe import train_bpe
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.interface import EOT
from stlm.tokens.published import PublishedTokenizer, Vocabulary
from stlm.tokens.tokenizer import ByteTokenizer, Tokenizer, gpt2_tokenizer
from stlm.training.checkpoints import checkpoint_name, load_checkpoint, save_checkpoint

HARD = [
    "",
    " ",
    "a",
    "The end <|endoftext|> is text, <|endoftext|><|endoftext|> twice <|endoftext",
    "<|endoftext|>",
    "don't  stop\t\n\n  it's 2024, I'LL we've\r\n ",
    "naïve café 水は水 🙂\u200d👩 \U0010ffff e\u0301",
    " " * 300 + "x" + "\n" * 200 + "  \n  y  ",
    "\xa0\u3000\x85\x1c\u2028 1234567890 12 345,678.90",
    "\0a\0\0 [title] ## ?!;; 'S 's",
]


def texts() -> list[str]:
    """Hard texts, and mixtures of their pieces with letters of all alphabets."""
    draw = random.Random(5)
    mixed = [
        "".join(
            draw.choice([draw.choice(HARD)[:12], chr(draw.randrange(1, 0xD800)), " ", "\n", "to", "9"])
            for _ in range(15)
        )
        for _ in range(200)
    ]
    return HARD + mixed


def checkpoint(folder: Path, tokenizer: Tokenizer, **model: object) -> Path:
    """A random model of that tokenizer, with norms that are not all ones, as a run's checkpoint."""
    torch.manual_seed(1)
    config = {"layers": 2, "width": 48, "heads": 6, "kv_heads": 2, "ffn_width": 40, "context": 64} | model
    transformer = build_model(ModelConfig(**{"vocab_size": tokenizer.vocab_size, **config}))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1.0))
    save_checkpoint(folder / checkpoint_name(7), transformer, {"step": 7, "tokens": 70})
    tokenizer.save(folder / "tokenizer")
    return folder / checkpoint_name(7)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe("bpe-300", HARD * 3)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tied": False},
        {"kv_heads": 6, "rope_theta": 500.0, "norm_eps": 1e-2},
        {"kv_heads": 1, "dropout": 0.1},
        {"sharing": {"what": "all"}, "lora": {"rank": 3, "alpha": 1.5}},
        {"layers": 4, "sharing": {"what": "ffn", "order": "sandwich"}, "lora": {"rank": 2, "what": "ffn"}},
        {"low_rank": {"ffn": 5, "attention": 7}, "lora": {"rank": 2, "what": "attention"}},
        {"embedding_rank": 12},
        {"embedding_rank": 12, "tied": False},
    ],
    ids=[
        *("gqa-tied", "untied", "mha-theta-eps", "mqa"),
        *("albert-lora", "sandwich-lora", "low-rank", "factorized", "factorized-untied"),
    ],
)
def test_logits(tmp_path: Path, bpe: Tokenizer, model: dict) -> None:
    ours = checkpoint(tmp_path / "checkpoints", bpe, **model)
    export_llama(ours, tmp_path / "llama")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.max_position_embeddings == 64 and theirs.dtype == torch.float32
    transformer, _ = load_checkpoint(ours)
    tokens_BL = torch.randint(300, (3, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = transformer(tokens_BL), theirs(tokens_BL).logits
    assert expected.std() > 0.5
    # Products are rounded otherwise from processor to processor, in proportion to what is summed.
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def check_ids(folder: Path, tokenizer: Tokenizer) -> None:
    exported = AutoTokenizer.from_pretrained(folder)
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.eot, tokenizer.eot)
    assert len(exported) == tokenizer.vocab_size and exported.model_max_length == 64
    for text in texts():
        ids = exported.encode(text)
        assert ids == tokenizer.encode(text), text
        assert exported(text)["input_ids"] == exported.encode(text, add_special_tokens=False) == ids
        assert exported.decode(ids) == text
    assert exported.decode([tokenizer.eot]) == "<|endoftext|>"


def test_ids_of_a_trained_vocabulary(tmp_path: Path, bpe: Tokenizer) -> None:
    export_llama(checkpoint(tmp_path / "checkpoints", bpe), tmp_path / "llama")
    check_ids(tmp_path / "llama", bpe)


def test_ids_of_a_published_vocabulary(tmp_path: Path, bpe: Tokenizer) -> None:
    """Its end of text has the first id."""
    content = json.loads(bpe.files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (id_ + 1) % 300 for token, id_ in vocabulary.items()} | {EOT: 0}
    content["added_tokens"][0]["id"] = 0
    published = PublishedTokenizer("hf:a", Vocabulary.of(json.dumps(content).encode(), EOT), EOT)
    assert published.eot == 0
    export_llama(checkpoint(tmp_path / "checkpoints", published), tmp_path / "llama")
    check_ids(tmp_path / "llama", published)


def test_ids_of_gpt2(tmp_path: Path, mirror: Path) -> None:
    gpt2 = gpt2_tokenizer(mirror / "tokenizers" / "gpt2")
    small = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1}
    export_llama(checkpoint(tmp_path / "checkpoints", gpt2, **small), tmp_path / "llama")
    check_ids(tmp_path / "llama", gpt2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"positions": "learned"}, r"model\.positions: learned.*\(rope\)"),
        ({"positions": "sinusoidal"}, r"model\.positions: sinusoidal"),
        ({"norm": "layernorm"}, r"model\.norm: layernorm.*\(rmsnorm\)"),
        ({"ffn": "gelu"}, r"model\.ffn: gelu.*\(swiglu\)"),
        ({"ffn": "relu2"}, r"model\.ffn: relu2.*\(swiglu\)"),
        ({"qk_norm": True}, r"model\.qk_norm: True.*\(False\)"),
        ({"qkv_shift": True}, r"model\.qkv_shift: True.*\(False\)"),
        ({"logit_softcap": 30.0}, r"model\.logit_softcap: 30\.0.*\(0\.0\)"),
        ({"value_embeddings": 2}, r"model\.value_embeddings: 2.*\(0\)"),
        (
            {"bytes": {"width": 16}, "vocab_size": SYMBOLS},
            r"step-0000007: model\.bytes: a byte-level model is no Llama, which reads tokens; .*generate",
        ),
    ],
)
def test_what_is_no_llama_is_refused(tmp_path: Path, bpe: Tokenizer, model: dict, message: str) -> None:
    ours = checkpoint(tmp_path / "checkpoints", bpe, **model)
    with pytest.raises(UserError, match=message):
        export_llama(ours, tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_bytes_and_foreign_tokenizers_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    ours = checkpoint(tmp_path / "checkpoints", ByteTokenizer())
    with pytest.raises(
        UserError, match="tokenizer: bytes has no byte-pair vocabulary; expected gpt2, bpe-N or hf:NAME"
    ):
        export_llama(ours, tmp_path / "llama")
    shutil.rmtree(tmp_path / "checkpoints" / "tokenizer")
    bpe.save(tmp_path / "checkpoints" / "tokenizer")
    with pytest.raises(UserError, match=r"the model has 257 tokens, its tokenizer bpe-300 300; delete"):
        export_llama(ours, tmp_path / "llama")
