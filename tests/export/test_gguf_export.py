"""`stlm export RUN FILE.gguf`: the file that llama.cpp loads.

The oracles are `gguf`, llama.cpp's own library, for what is stored, and the reader of `transformers`, which
is code of neither, for what it means.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from test_export import CONFIG, write_run
from test_llama import HARD, checkpoint, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from stlm.cli import main
from stlm.corpora.gguf_file import GgufFile
from stlm.errors import UserError
from stlm.export.gguf_export import export_gguf, stored_kinds
from stlm.export.gguf_tokenizer import gguf_tokenizer
from stlm.export.k_quants import quantize_q4_k, quantize_q6_k
from stlm.files import write_json
from stlm.model.config import ModelConfig
from stlm.model.llama import llama_weights
from stlm.options import GGUF_TYPES
from stlm.tokens.bpe import train_bpe
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.interface import EOT
from stlm.tokens.published import PublishedTokenizer, Vocabulary
from stlm.tokens.tokenizer import ByteTokenizer, Tokenizer, gpt2_tokenizer
from stlm.training.checkpoints import load_checkpoint

# Rows in whole blocks of every type.
WIDE = {"layers": 1, "width": 256, "heads": 4, "kv_heads": 2, "ffn_width": 512}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe("bpe-300", HARD * 3)


def published(bpe: Tokenizer, *before: dict, eot_first: bool = False) -> PublishedTokenizer:
    """`bpe` as a published vocabulary whose texts go through the steps `before` first."""
    content = json.loads(bpe.files["tokenizer.json"])
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, content["pre_tokenizer"]]}
    if eot_first:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: (id_ + 1) % 300 for token, id_ in vocabulary.items()} | {EOT: 0}
        content["added_tokens"][0]["id"] = 0
    return PublishedTokenizer("hf:a", Vocabulary.of(json.dumps(content).encode(), EOT), EOT)


def metadata(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tied": False, "kv_heads": 6, "rope_theta": 500.0, "norm_eps": 1e-2},
        {"kv_heads": 1, "layers": 3},
        {"sharing": {"what": "all"}, "lora": {"rank": 3, "alpha": 1.5}},
        {"low_rank": {"ffn": 5, "attention": 7}, "lora": {"rank": 2, "what": "attention"}},
        {"embedding_rank": 12},
        {"embedding_rank": 12, "tied": False},
    ],
    ids=["gqa-tied", "untied-theta-eps", "mqa", "albert-lora", "low-rank", "factorized", "factorized-untied"],
)
def test_in_float32_it_is_the_model(tmp_path: Path, bpe: Tokenizer, model: dict) -> None:
    """Weights come back to the bit, and logits of transformers' reader are ours."""
    ours = checkpoint(tmp_path / "checkpoints", bpe, **model)
    assert export_gguf(ours, tmp_path / "model.gguf", "F32").keys() == {"F32"}
    transformer, _ = load_checkpoint(ours)
    expected, read = llama_weights(transformer), GgufFile(tmp_path / "model.gguf")
    found = read.weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == np.float32 and (found[name] == weight.numpy()).all(), name
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    config = transformer.config
    assert theirs.config.max_position_embeddings == config.context == read.config["max_position_embeddings"]
    assert read.config["rope_theta"] == config.rope_theta and read.config["rms_norm_eps"] == config.norm_eps
    assert read.config["tie_word_embeddings"] == config.tied
    tokens_BL = torch.randint(300, (3, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours_BLV, theirs_BLV = transformer(tokens_BL), theirs(tokens_BL).logits
    assert ours_BLV.std() > 0.5
    torch.testing.assert_close(theirs_BLV, ours_BLV, rtol=0, atol=2e-5 * float(ours_BLV.abs().max()))
    assert float((theirs_BLV - ours_BLV).abs().max()) < 1e-3


def quantized(weight: np.ndarray, kind: Kind) -> np.ndarray:
    ours = {Kind.Q4_K: quantize_q4_k, Kind.Q6_K: quantize_q6_k}
    return ours[kind](weight) if kind in ours else gguf.quantize(weight, kind)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp has them: row 2i of a head is row i of its first half, 2i + 1 that of its second."""
    half = len(weight) // heads // 2
    order = [
        head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)
    ]
    return weight[order]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_each_type_stores_what_its_quantizer_says(tmp_path: Path, bpe: Tokenizer, kind: str) -> None:
    """To the bit; and transformers reads the same numbers and nearly the same logits."""
    ours = checkpoint(tmp_path / "checkpoints", bpe, tied=False, **WIDE)
    stored = export_gguf(ours, tmp_path / "model.gguf", kind)
    assert stored == ({"F32": 12} if kind == "F32" else {kind: 9, "F32": 3})
    transformer, _ = load_checkpoint(ours)
    weights = {name: weight.numpy() for name, weight in llama_weights(transformer).items()}
    found, block = tensors(tmp_path / "model.gguf"), "model.layers.0."
    expected = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output.weight": weights["lm_head.weight"],
        "blk.0.attn_q.weight": permuted(weights[block + "self_attn.q_proj.weight"], 4),
        "blk.0.attn_k.weight": permuted(weights[block + "self_attn.k_proj.weight"], 2),
        "blk.0.attn_v.weight": weights[block + "self_attn.v_proj.weight"],
        "blk.0.attn_output.weight": weights[block + "self_attn.o_proj.weight"],
        "blk.0.ffn_gate.weight": weights[block + "mlp.gate_proj.weight"],
        "blk.0.ffn_up.weight": weights[block + "mlp.up_proj.weight"],
        "blk.0.ffn_down.weight": weights[block + "mlp.down_proj.weight"],
    }
    norms = {"output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"}
    assert found.keys() == expected.keys() | norms
    assert all(found[name].tensor_type is Kind.F32 for name in norms)
    for name, weight in expected.items():
        assert found[name].tensor_type is Kind[kind]
        assert (found[name].data == quantized(weight, Kind[kind])).all(), name
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    read = GgufFile(tmp_path / "model.gguf").weights()
    for name, weight in theirs.state_dict().items():
        assert (read[name] == weight.numpy()).all(), name
    error = {"F32": 0, "F16": 4e-4, "Q8_0": 0.01, "Q6_K": 0.03, "Q4_K": 0.1, "Q4_0": 0.12}[kind]
    for name, weight in weights.items():
        assert np.linalg.norm(read[name] - weight) <= error * np.linalg.norm(weight), name


def test_the_metadata_is_what_llama_cpp_reads(tmp_path: Path, bpe: Tokenizer) -> None:
    export_gguf(checkpoint(tmp_path / "checkpoints", bpe, **WIDE), tmp_path / "model.gguf", "Q4_K")
    found = metadata(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 14,  # mostly Q4_K
        "general.quantization_version": 2,
        "llama.vocab_size": 300,
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.block_count": 1,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 299,
        "tokenizer.ggml.eos_token_id": 299,
        "tokenizer.ggml.eot_token_id": 299,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert found["tokenizer.ggml.tokens"][299] == EOT and len(set(found["tokenizer.ggml.tokens"])) == 300
    assert found["tokenizer.ggml.token_type"] == [1] * 299 + [3]
    assert len(found["tokenizer.ggml.merges"]) == 300 - 257


def check_ids(path: Path, tokenizer: Tokenizer, exact: bool = True) -> None:
    """Ids of transformers' reader, of ours, and the tokenizer's own are one. `exact`: in every text."""
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eot
    import tokenizers

    read = tokenizers.Tokenizer.from_str(GgufFile(path).tokenizer_json())
    assert GgufFile(path).starts_with == EOT
    compared = 0
    for text in texts():
        ids = tokenizer.encode(text)
        if EOT not in text:  # special tokens in a text are a setting of each reader
            assert read.encode(text, add_special_tokens=False).ids == ids, text
        if EOT not in text and (exact or not re.search(r"\s\s\d|\d\d", text)) and text.isascii() | exact:
            assert theirs.encode(text, add_special_tokens=False) == ids, text
            compared += 1
    assert compared > (150 if exact else 5)
    assert theirs.encode("a")[0] == tokenizer.eot, "llama.cpp and transformers add it"


def test_ids_of_a_trained_vocabulary(tmp_path: Path, bpe: Tokenizer) -> None:
    export_gguf(checkpoint(tmp_path / "checkpoints", bpe), tmp_path / "model.gguf", "F16")
    check_ids(tmp_path / "model.gguf", bpe)


def test_ids_of_published_vocabularies(tmp_path: Path, bpe: Tokenizer) -> None:
    """Whose end of text comes first, and which splits digits, as transformers' reader leaves out."""
    first = published(bpe, eot_first=True)
    export_gguf(checkpoint(tmp_path / "a", first), tmp_path / "first.gguf", "F16")
    assert metadata(tmp_path / "first.gguf")["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata(tmp_path / "first.gguf")["tokenizer.ggml.token_type"] == [3] + [1] * 299
    check_ids(tmp_path / "first.gguf", first)
    digits = published(bpe, DIGITS)
    export_gguf(checkpoint(tmp_path / "b", digits), tmp_path / "digits.gguf", "F16")
    assert metadata(tmp_path / "digits.gguf")["tokenizer.ggml.pre"] == "smollm"
    check_ids(tmp_path / "digits.gguf", digits, exact=False)


def test_ids_of_gpt2(tmp_path: Path, mirror: Path) -> None:
    gpt2 = gpt2_tokenizer(mirror / "tokenizers" / "gpt2")
    small = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1}
    export_gguf(checkpoint(tmp_path / "checkpoints", gpt2, **small), tmp_path / "model.gguf", "F16")
    check_ids(tmp_path / "model.gguf", gpt2)


@pytest.mark.parametrize(
    "before",
    [
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
    ],
    ids=["digits-together", "regex"],
)
def test_a_split_that_llama_cpp_has_no_name_for_is_refused(
    tmp_path: Path, bpe: Tokenizer, before: dict
) -> None:
    ours = checkpoint(tmp_path / "checkpoints", published(bpe, before))
    message = rf"tokenizer: hf:a splits texts in a way \({before['type']}, ByteLevel\) .*known: gpt-2, smollm"
    with pytest.raises(UserError, match=message + ".*`stlm export RUN FOLDER` exports it for transformers"):
        export_gguf(ours, tmp_path / "model.gguf", "F32")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"positions": "learned"}, r"model\.positions: learned is not what a Llama has \(rope\)"),
        ({"norm": "layernorm"}, r"model\.norm: layernorm"),
        ({"ffn": "gelu"}, r"model\.ffn: gelu"),
        ({"qk_norm": True}, r"model\.qk_norm: True"),
        ({"qkv_shift": True}, r"model\.qkv_shift: True"),
        ({"logit_softcap": 30.0}, r"model\.logit_softcap: 30\.0"),
        ({"value_embeddings": 2}, r"model\.value_embeddings: 2"),
        ({"bytes": {"width": 16}, "vocab_size": SYMBOLS}, r"model\.bytes: a byte-level model is no Llama"),
    ],
)
def test_what_is_no_llama_is_refused_before_its_weights_are_read(
    tmp_path: Path, bpe: Tokenizer, model: dict, message: str
) -> None:
    ours = checkpoint(tmp_path / "checkpoints", bpe, **model)
    (ours / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UserError, match=f"step-0000007: {message}.*A variant without it can be exported"):
        export_gguf(ours, tmp_path / "model.gguf", "F32")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_techniques_and_tokenizers_are_refused_by_name(tmp_path: Path, bpe: Tokenizer) -> None:
    ours = checkpoint(tmp_path / "a", ByteTokenizer())
    with pytest.raises(
        UserError, match="tokenizer: bytes has no byte-pair vocabulary; expected gpt2, bpe-N or"
    ):
        export_gguf(ours, tmp_path / "model.gguf", "F32")
    ours = checkpoint(tmp_path / "b", bpe)
    content = json.loads((ours / "config.json").read_text())
    content = {key: value for key, value in content.items() if key != "checksum"}
    write_json(ours / "config.json", {**content, "techniques": {"experts": {"experts": 4}}})
    with pytest.raises(UserError, match=r"techniques\.experts does not support .*export"):
        export_gguf(ours, tmp_path / "model.gguf", "F32")


def test_rows_that_are_no_whole_blocks(tmp_path: Path, bpe: Tokenizer) -> None:
    """An error that names the matrices and what fits; with a fallback, only they are stored in it."""
    config = {**WIDE, "ffn_width": 352, "vocab_size": 300}  # 11 blocks of 32; of 256, none
    with pytest.raises(
        UserError,
        match=r"--type Q4_K: rows must divide by 256; those of model\.layers\.\*\.mlp\.down_proj\.weight "
        r"have 352 weights\. Give --fallback TYPE .*; F32, F16, Q8_0, Q4_0 fit them",
    ):
        stored_kinds(ModelConfig(**config), "Q4_K", None)
    with pytest.raises(
        UserError, match=r"--fallback Q6_K: rows must divide by 256, and those of .*F16 and F32"
    ):
        stored_kinds(ModelConfig(**config), "Q4_K", "Q6_K")
    with pytest.raises(
        UserError, match=r"--type Q8_0: rows must divide by 32; .*embed_tokens.* have 33 or 48 weights"
    ):
        odd = {"layers": 3, "width": 48, "heads": 4, "kv_heads": 2, "ffn_width": 33, "vocab_size": 300}
        stored_kinds(ModelConfig(**odd), "Q8_0", None)
    ours = checkpoint(tmp_path / "checkpoints", bpe, **config)
    assert export_gguf(ours, tmp_path / "model.gguf", "Q4_K", "Q8_0") == {"Q4_K": 7, "F32": 3, "Q8_0": 1}
    found = tensors(tmp_path / "model.gguf")
    assert found["blk.0.ffn_down.weight"].tensor_type is Kind.Q8_0
    assert found["blk.0.ffn_up.weight"].tensor_type is Kind.Q4_K
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert theirs.config.intermediate_size == 352


def test_weights_beyond_float16_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    from stlm.training.checkpoints import save_checkpoint

    ours = checkpoint(tmp_path / "checkpoints", bpe)
    model, _ = load_checkpoint(ours)
    with torch.no_grad():
        model.blocks[1].ffn.down.weight[3, 4] = 7e4
    save_checkpoint(ours, model, {"step": 7, "tokens": 70})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight: a weight of 70000 .*--type F32"):
        export_gguf(ours, tmp_path / "model.gguf", "F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"], "nothing half-written"
    export_gguf(ours, tmp_path / "model.gguf", "F32")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("results/toy/runs/first")
    write_run(folder, CONFIG.model_copy(update={"ffn_width": 64}))
    return folder


def test_the_file_carries_the_model_card(run: Path, capsys) -> None:
    Path("data/raw/tiny").mkdir(parents=True)
    source = {"kind": "hub", "repo": "someone/tiny", "revision": "f" * 40, "files": {"a.parquet": "0" * 64}}
    write_json(Path("data/raw/tiny/source.json"), {"licence": "CC BY 4.0", "source": source})
    assert main(["export", "toy/first@5", "out/first.gguf", "--type", "q8_0"]) == 0
    assert re.search(r"wrote out/first.gguf: .*B, tensors: 15 of Q8_0, 5 of F32", capsys.readouterr().out)
    found = metadata(Path("out/first.gguf"))
    assert found["general.name"] == "The first (toy/first)" and found["general.license"] == "unknown"
    assert found["general.dataset.0.name"] == "tiny"
    assert found["general.dataset.0.description"] == (
        f"licence: CC BY 4.0; from: someone/tiny at revision {'f' * 40}"
    )
    assert found["general.dataset.0.repo_url"] == "https://huggingface.co/datasets/someone/tiny"
    assert "1,600 tokens of tiny" in found["general.description"]
    assert (found["stlm.training_tokens"], found["stlm.step"], found["stlm.run"]) == (1600, 5, "first")
    card = found["stlm.model_card"]
    assert "# The first (toy/first)" in card and "**1.2500 bits per byte**" in card and "CC BY 4.0" in card


def test_a_checkpoint_alone_has_no_card(run: Path) -> None:
    (run / "train.json").unlink()
    assert main(["export", str(run / "checkpoints" / "step-0000005"), "a.gguf"]) == 0
    assert metadata(Path("a.gguf"))["general.name"] == "step-0000005"
    assert all(tensor.tensor_type is Kind.F32 for tensor in tensors(Path("a.gguf")).values()), "the default"


def test_what_is_there_is_not_overwritten(run: Path, capsys) -> None:
    def refused(*arguments: str) -> str:
        assert main(["export", "toy/first", *arguments]) == 2
        return capsys.readouterr().err

    assert main(["export", "toy/first@5", "a.gguf"]) == 0
    first = Path("a.gguf").read_bytes()
    assert "a.gguf: is there already; --force replaces a GGUF file" in refused("a.gguf")
    assert Path("a.gguf").read_bytes() == first
    assert main(["export", "toy/first", "a.gguf", "--force", "--type", "F16"]) == 0
    assert Path("a.gguf").read_bytes() != first
    Path("notes.gguf").write_text("mine")
    assert "notes.gguf: is no GGUF file, and not replaced" in refused("notes.gguf", "--force")
    Path("folder.gguf").mkdir()
    assert "folder.gguf: is a folder; name a file" in refused("folder.gguf")
    assert "--type: is for a GGUF file, whose name ends in .gguf; found model" in refused(
        "model", "--type", "F16"
    )
    assert "--fallback: is for a GGUF file" in refused("model", "--fallback", "F16")
    assert "rows must divide by 256; those of " in refused("b.gguf", "--type", "Q4_K")
    assert "invalid choice: 'Q5_K'" in refused("b.gguf", "--type", "Q5_K")
    assert (
        "no checkpoint of step 7" in (main(["export", "toy/first@7", "b.gguf"]), capsys.readouterr().err)[1]
    )
    assert not Path("b.gguf").exists() and not Path("model").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run: Path, capsys) -> None:
    Path("locked").mkdir(mode=0o500)
    assert main(["export", "toy/first", "locked/a.gguf"]) == 2
    assert "locked/a.gguf: cannot write: permission denied" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(self) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    assert main(["export", "toy/first", "a.gguf"]) == 2
    assert "a.gguf: cannot write: no space left on the disk" in capsys.readouterr().err
    assert not list(Path().glob("*a.gguf*")) and not list(Path().glob(".*a.gguf*"))


def test_a_vocabulary_of_bytes_alone_is_refused(bpe: Tokenizer) -> None:
    content = json.loads(bpe.files["tokenizer.json"])
    kept = sorted((id_, token) for token, id_ in content["model"]["vocab"].items() if len(token) == 1)
    content["model"] |= {"vocab": {token: new for new, (_, token) in enumerate(kept)}, "merges": []}
    content["added_tokens"][0]["id"] = len(kept)
    only = PublishedTokenizer("hf:a:257", Vocabulary.of(json.dumps(content).encode(), EOT), EOT)
    with pytest.raises(
        UserError, match=r"tokenizer: hf:a:257 has no merges, without which llama\.cpp reads no"
    ):
        gguf_tokenizer(only)


def test_the_writer_knows_our_tokenizers(bpe: Tokenizer) -> None:
    found = gguf_tokenizer(bpe)
    assert found.pre == "gpt-2" and len(found.tokens) == len(found.types) == 300
    assert all(left + right in found.tokens for left, right in map(str.split, found.merges))
