"""Published models in Llama's layout as models of ours: logits of transformers, and back by export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tiny_llama import ENTRY, save, write_gguf
from transformers import AutoModelForCausalLM

from stlm.corpora.config import ModelEntry
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.export.llama import export_llama
from stlm.model.config import ModelConfig
from stlm.model.llama import (
    NotLlamaError,
    check_llama_weights,
    llama_config,
    llama_shapes,
    llama_weights,
    own_weights,
    read_llama_config,
)
from stlm.model.transformer import Transformer
from stlm.study.catalogues import load_models
from stlm.tokens.published import fetched_tokenizer
from stlm.training.checkpoints import checkpoint_name, save_checkpoint
from stlm.training.published import load_published, published_config

SMALL = ModelConfig(layers=2, width=48, heads=6, kv_heads=2, ffn_width=40, context=64, vocab_size=100)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}, "num_hidden_layers": 3},
    ],
    ids=["tied", "untied", "mha", "mqa-eps", "theta"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "source", dtype, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_published(folder)
    assert ours.config == published_config(folder) and not ours.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())
    tokens_BL = torch.randint(384, (3, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(tokens_BL), theirs(tokens_BL).logits
    assert expected.std() > 1
    # Rounding is in proportion to what is summed, and these logits are large; transformers also rounds the
    # rotary angles, whose error grows with the position.
    torch.testing.assert_close(found, expected, atol=3e-5 * float(expected.abs().max()), rtol=0)


def test_it_is_trained_as_any_model(tmp_path: Path) -> None:
    """A tied head is one parameter with the embedding, and gradients are those of transformers."""
    folder = save(tmp_path / "source")
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load_published(folder)
    assert ours.output.weight is ours.embedding.weight
    tokens_BL = torch.randint(384, (2, 33), generator=torch.Generator().manual_seed(0))
    ours.train().loss(tokens_BL[:, :-1], tokens_BL[:, 1:]).backward()
    theirs.train()(tokens_BL, labels=tokens_BL).loss.backward()
    expected = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(
        ours.embedding.weight.grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=0
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_come_back_to_the_bit(tied: bool) -> None:
    """Llama -> ours -> Llama, and ours -> Llama -> ours, whatever the weights."""
    config = SMALL.model_copy(update={"tied": tied})
    draw = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in llama_shapes(config).items()}
    model = Transformer(config)
    model.load_state_dict(own_weights(config, weights))
    back = llama_weights(model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    state = own_weights(config, back)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert read_llama_config(json.loads(json.dumps(llama_config(config)))) == config


def test_the_file_is_not_mapped(tmp_path: Path) -> None:
    """What is written over the file later does not change the model."""
    folder = save(tmp_path / "source")
    ours = load_published(folder)
    before = ours.embedding.weight.detach().clone()
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(ours.embedding.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type: 'mistral', expected 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures: .*Sequence"),
        ({"attention_bias": True}, r"attention_bias: True"),
        ({"mlp_bias": True}, r"mlp_bias: True"),
        ({"hidden_act": "gelu"}, r"hidden_act: 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling: \{"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_parameters: .*scales the rotary positions"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters: .*or rotates a part"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: "),
        ({"head_dim": 16}, r"head_dim: 16 is not hidden_size / num_attention_heads \(8\)"),
        ({"num_key_value_heads": 4}, r"its sizes describe no model: .*kv_heads"),
        ({"num_hidden_layers": "two"}, r"its sizes describe no model"),
        ({"num_attention_heads": 0}, r"its sizes describe no model"),
        ({"vocab_size": None}, r"vocab_size"),
    ],
)
def test_what_is_no_plain_llama_is_refused_by_key(change: dict, message: str) -> None:
    with pytest.raises(NotLlamaError, match=message):
        read_llama_config({**llama_config(SMALL), **change})


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_refused_by_key(key: str) -> None:
    with pytest.raises(NotLlamaError, match=f"{key}: this key is missing"):
        read_llama_config({name: value for name, value in llama_config(SMALL).items() if name != key})


def test_an_older_file_is_read() -> None:
    """As version 4 of transformers wrote it: other keys for the same, and numbers without a point."""
    older = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "is_llama_config": True},
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192},
        **{"rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
        **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu", "use_cache": True},
    }
    root = Path(__file__).parents[2]
    assert read_llama_config(older) == load_models(root)["smollm2_135m"].model.config


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig

    least = {
        **{"model_type": "llama", "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 6, "vocab_size": 100, "max_position_embeddings": 64},
    }
    theirs, ours = LlamaConfig(**least), read_llama_config(least)
    assert ours.kv_heads == theirs.num_key_value_heads and ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"no tensor model.norm.weight"),
        (lambda w: w.update(extra=torch.ones(3)), r"a tensor extra, which a plain Llama"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(47)}),
            r"model.norm.weight is torch.float32 \[47\], expected \[48\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            r"model.norm.weight is torch.int8",
        ),
        (lambda w: w["model.norm.weight"].fill_(torch.inf), r"model.norm.weight has NaN or infinite"),
        (lambda w: w.update({"lm_head.weight": torch.ones(100, 48)}), r"lm_head.weight differs"),
    ],
)
def test_other_weights_are_refused_by_tensor(change, message: str) -> None:
    weights = {name: torch.randn(shape) for name, shape in llama_shapes(SMALL).items()}
    check_llama_weights(SMALL, dict(weights))
    change(weights)
    with pytest.raises(NotLlamaError, match=message):
        check_llama_weights(SMALL, weights)


def test_what_may_stand_beside_the_weights_is_dropped() -> None:
    weights = {name: torch.randn(shape) for name, shape in llama_shapes(SMALL).items()}
    more = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    found = {**weights, **more}
    check_llama_weights(SMALL, found)
    assert found.keys() == weights.keys()


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_published(tmp_path / "none")
    folder = save(tmp_path / "biased", attention_bias=True)
    with pytest.raises(UserError, match=r"biased: not a plain Llama: attention_bias: True"):
        load_published(folder)
    folder = save(tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other: not a plain Llama: model.norm.weight has NaN"):
        load_published(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"truncated or no safetensors"):
        load_published(folder)


def test_export_writes_the_parent_back(tmp_path: Path) -> None:
    """A checkpoint with a published model's weights and tokenizer is exported as what was fetched."""
    fetched = tmp_path / "raw/tiny"
    entry = {
        **ENTRY,
        "sources": [{"kind": "folder", "path": str(tmp_path), "files": {"model.gguf": "a.gguf"}}],
    }
    write_gguf(tmp_path / "a.gguf", GGMLQuantizationType.Q8_0)
    fetch(ModelEntry.model_validate(entry), fetched)
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(7)
    save_checkpoint(checkpoint, load_published(fetched), {"step": 7, "tokens": 70})
    fetched_tokenizer("hf:tiny", fetched).save(checkpoint.parent / "tokenizer")
    export_llama(checkpoint, tmp_path / "exported")
    before, after = (load_file(folder / "model.safetensors") for folder in (fetched, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (json.loads((f / "config.json").read_text()) for f in (fetched, tmp_path / "exported"))
    ends = {"bos_token_id", "eos_token_id"}  # of an exported model, both are the token that starts texts
    assert first.keys() == second.keys()
    assert all(first[key] == second[key] for key in first.keys() - ends)
