"""Models of fewer parameters are scored by the same code: float32 as slowly, bfloat16 near it."""

from __future__ import annotations

import pytest
import slow_reference as reference
import torch

from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.tokens.tokenizer import ByteTokenizer

REQUESTS = [
    Request("the cat", f" {verb} on the {place}") for verb in ("sat", "ran") for place in ("mat", "sea")
]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def transformer(request):
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            layers=4,
            width=32,
            heads=4,
            kv_heads=2,
            ffn_width=64,
            context=48,
            vocab_size=257,
            tied=request.param,
            sharing={"what": "all", "order": "sandwich"},
            lora={"rank": 2},
            low_rank={"ffn": 8},
            embedding_rank=16,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 if parameter.dim() == 2 else parameter)
    return model


def test_scores_are_those_of_full_logits(transformer):
    tokenizer = ByteTokenizer()
    found = TokenModel(transformer, RequestEncoder(tokenizer)).loglikelihoods(REQUESTS)
    for score, request in zip(found, REQUESTS, strict=True):
        expected = reference.harness(transformer, tokenizer, request)[0]
        assert score.logprob == pytest.approx(expected, abs=1e-3)


def test_bfloat16_is_near_and_has_shared_weights_once(transformer):
    encoder = RequestEncoder(ByteTokenizer())
    exact = TokenModel(transformer, encoder).loglikelihoods(REQUESTS)
    half = TokenModel(transformer, encoder, precision="bfloat16")
    for a, b in zip(exact, half.loglikelihoods(REQUESTS), strict=True):
        assert b.logprob == pytest.approx(a.logprob, rel=0.03, abs=0.2)
    blocks = half.transformer.blocks
    assert blocks[1].attention.qkv.weight.dtype == torch.bfloat16
    assert blocks[1].attention.qkv.weight is blocks[2].attention.qkv.weight
    assert blocks[1].ffn.down.left.weight is not blocks[0].ffn.down.left.weight
    # The table of factors, which scores of near ties rest on, is untouched.
    assert half.transformer.embedding.weight.dtype == torch.float32
    assert transformer.blocks[1].attention.qkv.weight.dtype == torch.float32
