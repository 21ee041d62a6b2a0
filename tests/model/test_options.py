"""The model's options beside the paper's: sizes, definitions, and that without them nothing changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, training_flops_per_token
from stlm.model.dropout import Dropout
from stlm.model.layout import CausalRows
from stlm.model.segments import Segments
from stlm.model.transformer import Transformer

TINY = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 16, "vocab_size": 61}
OPTIONS = [
    {"qk_norm": True},
    {"logit_softcap": 0.5},
    {"ffn": "relu2"},
    {"qkv_shift": True},
    {"zero_init": True},
    {"value_embeddings": 1},
    {
        "value_embeddings": 2,
        "qk_norm": True,
        "qkv_shift": True,
        "logit_softcap": 3.0,
        "ffn": "relu2",
        "zero_init": True,
    },
]
# Ways to fewer parameters, whose counts are tested in test_sharing.py.
REDUCED = [
    {"sharing": {"what": "all"}, "lora": {"rank": 3}, "qkv_shift": True},
    {"low_rank": {"ffn": 6, "attention": 5}},
    {"embedding_rank": 8, "logit_softcap": 3.0},
    {"embedding_rank": 8, "tied": False},
]


def strong(**options: object) -> Transformer:
    """A model whose every weight shows in the logits."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1.0))
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counted_parameters_and_flops_are_the_models(options):
    config = ModelConfig(**TINY, **options)
    model = Transformer(config)
    counts = parameter_counts(config)
    assert sum(p.numel() for p in model.parameters()) == counts.total
    tables = sum(p.numel() for name, p in model.named_parameters() if "embedding" in name)
    assert counts.embedding == tables
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) + 61 * 32
    attention = 2 * config.layers * config.context / 2 * config.width
    assert training_flops_per_token(config) == pytest.approx(6 * (matrices + attention))


@pytest.mark.parametrize("options", OPTIONS + REDUCED, ids=str)
def test_packed_sequences_and_parts_of_the_head_give_the_same_logits(options):
    """What evaluation computes: sequences in one row, chosen positions, the head in parts, single logits."""
    model = strong(**options)
    tokens = torch.randint(0, 61, (13,))
    first, second = tokens[:8], torch.cat([tokens[:4], tokens[8:]])  # two sequences of four common tokens
    segments = Segments(
        np.array([*range(8), *range(4, 9)]),
        [(8, np.arange(8)), (5, np.array([0, 1, 2, 3, 8, 9, 10, 11, 12]))],
        torch.device("cpu"),
    )
    with torch.no_grad():
        packed = model.head(model.hidden(tokens[None], segments))[0]
        torch.testing.assert_close(packed[:8], model(first[None])[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed[8:], model(second[None])[0, 4:], atol=1e-4, rtol=1e-4)
        rows_N = torch.tensor([3, 7])
        hidden_ND = model.hidden(first[None], None, rows_N)
        torch.testing.assert_close(model.head(hidden_ND), packed[rows_N], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.head(hidden_ND, slice(20, 40)), model.head(hidden_ND)[:, 20:40])
        targets_N = torch.tensor([5, 60])
        torch.testing.assert_close(
            model.logit(hidden_ND, targets_N), model.head(hidden_ND)[torch.arange(2), targets_N]
        )
        x_BL, y_BL = first[None, :-1], first[None, 1:]
        expected = F.cross_entropy(model(x_BL)[0], y_BL[0]).item()
        assert model.loss(x_BL, y_BL).item() == pytest.approx(expected, rel=1e-5)


def test_normalized_queries_and_keys_do_not_feel_the_size_of_their_weights():
    for qk_norm in (True, False):
        model = strong(qk_norm=qk_norm)
        tokens_BL = torch.randint(0, 61, (1, 16))
        with torch.no_grad():
            before = model(tokens_BL)
            for block in model.blocks:
                block.attention.qkv.weight[:48].mul_(10)  # queries 32 rows, keys 16
            assert torch.allclose(before, model(tokens_BL), atol=1e-3) == qk_norm


def test_qk_norm_is_torchs_rmsnorm_head_by_head():
    model = strong(qk_norm=True)
    attention = model.blocks[0].attention
    qk_BLHE = torch.randn(2, 5, 6, 8)
    q_norm, k_norm = torch.nn.RMSNorm(8, eps=1e-5), torch.nn.RMSNorm(8, eps=1e-5)
    q_norm.weight, k_norm.weight = attention.q_gain, attention.k_gain
    expected = torch.cat([q_norm(qk_BLHE[:, :, :4]), k_norm(qk_BLHE[:, :, 4:])], dim=2)
    torch.testing.assert_close(attention._normalize(qk_BLHE), expected)


def test_capped_logits_are_bounded_and_small_ones_are_left():
    model = strong(logit_softcap=5.0)
    plain = strong()
    tokens_BL = torch.randint(0, 61, (2, 16))
    with torch.no_grad():
        capped, free = model(tokens_BL), plain(tokens_BL)
    assert free.abs().max() > 5 >= capped.abs().max()
    torch.testing.assert_close(capped, 5 * (free / 5).tanh())


def test_squared_relu_is_its_definition():
    ffn = strong(ffn="relu2").blocks[0].ffn
    x_BLD = torch.randn(1, 3, 32)
    hidden = (x_BLD @ ffn.up.weight.T).clamp(min=0) ** 2
    torch.testing.assert_close(ffn(x_BLD), hidden @ ffn.down.weight.T)


def test_shifted_queries_keys_and_values_are_a_convolution_of_width_two():
    attention = strong(qkv_shift=True).blocks[0].attention
    qkv_BLX = torch.randn(2, 7, 64)
    kernel_X12 = torch.stack([attention.shift.detach(), torch.ones(64)], dim=1)[:, None]
    padded_BXL = F.pad(qkv_BLX.transpose(1, 2), (1, 0))
    expected_BXL = F.conv1d(padded_BXL, kernel_X12, groups=64)
    torch.testing.assert_close(attention._shift(qkv_BLX, CausalRows(7)), expected_BXL.transpose(1, 2))
    # It starts as none: a new model is the one without.
    plain, new = Transformer(ModelConfig(**TINY)), Transformer(ModelConfig(**TINY, qkv_shift=True))
    assert new.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    tokens_BL = torch.randint(0, 61, (2, 16))
    with torch.no_grad():  # for training, the plain block alone is one operation, with other rounding
        torch.testing.assert_close(new(tokens_BL), plain(tokens_BL), atol=0, rtol=0)


def test_blocks_that_start_at_zero_are_the_identity_and_learn():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY, zero_init=True))
    tokens_BL = torch.randint(0, 61, (2, 17))
    x_BLD = model.embedding(tokens_BL[:, :-1])
    torch.testing.assert_close(model.hidden(tokens_BL[:, :-1]), model.norm(x_BLD), atol=0, rtol=0)
    model.loss(tokens_BL[:, :-1], tokens_BL[:, 1:]).backward()
    assert model.blocks[0].ffn.down.weight.grad.abs().max() > 0


def test_value_embeddings_start_as_the_model_without_and_reach_the_last_layers_alone():
    torch.manual_seed(0)
    plain = Transformer(ModelConfig(**TINY)).eval()
    model = Transformer(ModelConfig(**TINY, value_embeddings=1)).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["value_embeddings.0.weight"], [])
    tokens_BL = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(model(tokens_BL), plain(tokens_BL), atol=0, rtol=0)
    # A table that takes the values away leaves the last layer's attention with nothing to add.
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.zero_()
        before = model(tokens_BL)
        model.value_embeddings[0].weight.normal_()
        assert not torch.allclose(before, model(tokens_BL))
        model.blocks[1].attention.out.weight.zero_()
        torch.testing.assert_close(before, model(tokens_BL))


def test_more_value_embeddings_than_layers_are_refused():
    with pytest.raises(ValueError, match="value_embeddings: 3 is more than the model has layers: 2"):
        ModelConfig(**TINY, value_embeddings=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scheduled_dropout_drops_the_share_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    dropout, x = Dropout(0.4), torch.ones(400, 400, dtype=dtype)
    for factor in (0.0, 0.05, 0.5, 1.0):
        dropout.schedule(factor, x.device)
        y = dropout(x)
        share = 0.4 * factor
        assert (y == 0).float().mean().item() == pytest.approx(share, abs=0.004)
        assert y.max().item() == pytest.approx(1 / (1 - share), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert y.float().mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(dropout.eval()(x), x)


def test_a_schedule_reaches_every_dropout_and_is_no_state():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY, dropout=0.5, attention_dropout=0.5))
    names = set(model.state_dict())
    tokens_BL = torch.randint(0, 61, (2, 16))
    exact = model.eval()(tokens_BL)
    model.train()
    assert not torch.allclose(model(tokens_BL), exact)
    model.schedule_dropout(0.0)
    torch.testing.assert_close(model(tokens_BL), exact)
    model.schedule_dropout(1.0)
    assert not torch.allclose(model(tokens_BL), exact)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_a_schedule_compiles_no_step_anew(attention_dropout):
    """One graph; where attention's dropout is scheduled, parts of one. The first steps compile all."""
    torch._dynamo.reset()
    config = ModelConfig(**{**TINY, "layers": 1}, dropout=0.2, attention_dropout=attention_dropout)
    model, counter = Transformer(config), CompileCounter()
    loss = torch.compile(model.loss, backend=counter)
    for step in range(12):
        model.schedule_dropout(step / 12)
        tokens_BL = torch.randint(0, 61, (2, 17))
        assert math.isfinite(loss(tokens_BL[:, :-1], tokens_BL[:, 1:]).item())
        if step == 2:
            compiled = counter.frame_count
    assert counter.frame_count == compiled
    assert attention_dropout or compiled == 1
