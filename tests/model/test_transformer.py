"""The transformer: exact sizes, and agreement with an independent implementation."""

from __future__ import annotations

import math

import pytest
import torch

from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, training_flops_per_token
from stlm.model.rotary import rope_tables, rotate
from stlm.model.transformer import Transformer, sinusoidal_table

TINY = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 16, "vocab_size": 61}


@pytest.mark.parametrize(
    ("changes", "total", "paper"),
    [
        ({}, 25_731_584 + 8 * 3_014_656 + 17 * 512, 50),
        ({"positions": "sinusoidal", "ffn_width": 1320}, 47_203_328, 47),
        ({"positions": "learned", "ffn_width": 1320}, 47_203_328 + 512 * 512, 48),
        ({"ffn": "gelu", "ffn_width": 2304}, 49_857_536, 50),
        ({"dropout": 0.0, "ffn_width": 1320}, 47_203_328, 47),
    ],
)
def test_the_papers_rows_have_the_papers_sizes(changes, total, paper):
    """Table 1 of the paper, with GPT-2's vocabulary; the paper rounds to millions, 47.47M up."""
    counts = parameter_counts(ModelConfig(vocab_size=50257, **changes))
    assert counts.total == total
    assert counts.embedding + counts.non_embedding == total
    assert abs(counts.total / 1e6 - paper) < 0.6


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_counted_parameters_are_the_models(norm, ffn, positions, tied, kv_heads):
    config = ModelConfig(**{**TINY, "kv_heads": kv_heads}, norm=norm, ffn=ffn, positions=positions, tied=tied)
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(config).total
    logits_BLV = model(torch.randint(0, 61, (2, 16)))
    assert logits_BLV.shape == (2, 16, 61)
    assert logits_BLV.isfinite().all()


def test_flops_are_six_a_weight_and_token_without_attention():
    """With a context of almost nothing, six operations for each matrix weight that a token meets."""
    config = ModelConfig(**{**TINY, "context": 2})
    matrices = sum(p.numel() for p in Transformer(config).parameters() if p.dim() == 2)
    attention = 6 * 2 * config.layers * config.width
    assert training_flops_per_token(config) == pytest.approx(6 * matrices + attention)


def llama_with_the_weights_of(model: Transformer):
    """transformers' Llama, its separate projections filled from our joint ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=c.ffn_width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            max_position_embeddings=c.context,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            tie_word_embeddings=c.tied,
            attn_implementation="eager",
        )
    ).eval()
    ours, theirs = model.state_dict(), {}
    theirs["model.embed_tokens.weight"] = ours["embedding.weight"]
    theirs["model.norm.weight"] = ours["norm.weight"]
    theirs["lm_head.weight"] = ours["output.weight"]
    for i in range(c.layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        qkv = ours[a + "attention.qkv.weight"]
        sizes = [c.heads * c.head_width] + [c.kv_heads * c.head_width] * 2
        for name, part in zip("qkv", qkv.split(sizes), strict=True):
            theirs[f"{b}self_attn.{name}_proj.weight"] = part
        theirs[b + "self_attn.o_proj.weight"] = ours[a + "attention.out.weight"]
        gate, up = ours[a + "ffn.gate_up.weight"].chunk(2)
        theirs[b + "mlp.gate_proj.weight"], theirs[b + "mlp.up_proj.weight"] = gate, up
        theirs[b + "mlp.down_proj.weight"] = ours[a + "ffn.down.weight"]
        theirs[b + "input_layernorm.weight"] = ours[a + "attention_norm.weight"]
        theirs[b + "post_attention_layernorm.weight"] = ours[a + "ffn_norm.weight"]
    llama.load_state_dict(theirs)
    return llama


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_llama(kv_heads, tied):
    """RoPE, SwiGLU, RMSNorm and GQA, with weights large enough for a wrong part to show."""
    torch.manual_seed(kv_heads)
    config = ModelConfig(
        layers=3,
        width=64,
        heads=8,
        kv_heads=kv_heads,
        ffn_width=96,
        context=40,
        vocab_size=97,
        tied=tied,
        rope_theta=500.0,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 1.0))
        tokens_BL = torch.randint(0, 97, (3, 40))
        ours = model(tokens_BL)
        theirs = llama_with_the_weights_of(model)(tokens_BL).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rotary_products_depend_on_distance_alone():
    cos, sin = rope_tables(32, 8, 10000.0)
    torch.manual_seed(0)
    q_HLE, k_HLE = torch.randn(1, 1, 8).expand(1, 32, 8), torch.randn(1, 1, 8).expand(1, 32, 8)
    products_LL = (rotate(q_HLE, cos, sin) @ rotate(k_HLE, cos, sin).transpose(1, 2))[0]
    for distance in (0, 1, 7):
        diagonal = products_LL.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_sinusoids_are_those_of_vaswani():
    table_LD = sinusoidal_table(50, 16)
    for position, pair in [(0, 0), (1, 0), (17, 3), (49, 7)]:
        angle = position / 10000 ** (2 * pair / 16)
        assert table_LD[position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table_LD[position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned"])
def test_no_position_sees_the_future_and_order_matters(positions):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY, positions=positions)).eval()
    tokens_BL = torch.randint(0, 61, (1, 16))
    changed_BL = tokens_BL.clone()
    changed_BL[0, 9] = (changed_BL[0, 9] + 1) % 61
    swapped_BL = tokens_BL.clone()
    swapped_BL[0, [2, 3]] = torch.tensor([4, 5])
    tokens_BL[0, [2, 3]] = torch.tensor([5, 4])
    with torch.no_grad():
        before, after = model(tokens_BL), model(changed_BL)
        assert not torch.allclose(before[:, 9:], after[:, 9:])
        changed_BL[0, [2, 3]] = torch.tensor([5, 4])
        torch.testing.assert_close(before[:, :9], model(changed_BL)[:, :9])
        assert not torch.allclose(before[:, -1], model(swapped_BL)[:, -1], atol=1e-6)


@pytest.mark.parametrize("key", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(key):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY, **{key: 0.5}))
    tokens_BL = torch.randint(0, 61, (2, 16))
    model.train()
    assert not torch.allclose(model(tokens_BL), model(tokens_BL))
    model.eval()
    torch.testing.assert_close(model(tokens_BL), model(tokens_BL), atol=0, rtol=0)


def test_a_fresh_model_guesses_uniformly_and_masked_loss_is_a_sum():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY)).eval()
    x_BL, y_BL = torch.randint(0, 61, (4, 16)), torch.randint(0, 61, (4, 16))
    with torch.no_grad():
        mean = model.loss(x_BL, y_BL).item()
        assert mean == pytest.approx(math.log(61), abs=0.1)
        mask_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        mask_BL[1, :5] = True
        alone = torch.nn.functional.cross_entropy(model(x_BL)[1, :5], y_BL[1, :5], reduction="sum")
        assert model.loss(x_BL, y_BL, mask_BL).item() == pytest.approx(alone.item(), rel=1e-5)
        assert model.loss(x_BL, y_BL, torch.ones_like(mask_BL)).item() / 64 == pytest.approx(mean, rel=1e-5)


def test_a_network_with_hooks_gets_all_tokens_in_scoring(monkeypatch):
    """Without hooks it computes parts of them, to the same output."""
    model = Transformer(ModelConfig(**TINY)).eval()
    monkeypatch.setattr("stlm.model.block._PART_BYTES", 1)
    tokens_BL = torch.randint(0, model.config.vocab_size, (9, 16))
    seen: list[int] = []
    with torch.no_grad():
        expected = model(tokens_BL)
        hook = model.blocks[0].ffn.register_forward_hook(lambda _, given, output: seen.append(output.numel()))
        found = model(tokens_BL)
        hook.remove()
    assert seen == [9 * 16 * model.config.width]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
