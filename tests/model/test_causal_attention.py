"""Attention by blocks is torch's attention, its gradients too."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.model.causal_attention import causal_attention
from stlm.model.config import ModelConfig
from stlm.model.rotary import rope_tables, rotate
from stlm.model.transformer import Transformer

# There are kernels for the second alone.
TYPES = [torch.float64, torch.float32]


def inputs(length: int, heads: int, kv_heads: int, dtype: torch.dtype, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, length, n, width, generator=generator, dtype=dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def by_blocks(q, k, v, sees=None, rope=None):
    return causal_attention(torch.cat([q, k, v], dim=2), q.shape[2], sees, rope)


def by_torch(q, k, v, sees=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, sees, is_causal=sees is None, enable_gqa=True)
    return y.transpose(1, 2)


def compare(found, expected, own, reference) -> None:
    """Results and gradients."""
    torch.testing.assert_close(found, expected)
    weights_BLHE = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    (found * weights_BLHE).sum().backward()
    (expected * weights_BLHE).sum().backward()
    for mine, theirs in zip(own, reference, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# One block, a part of one, several with a part at the end.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 5, 31, 33, 64, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_it_is_torchs_attention(length, heads, kv_heads, masked, dtype):
    sees = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(2)) < 0.5
    sees = (sees | torch.eye(length, dtype=torch.bool)).tril() if masked else None
    own, reference = inputs(length, heads, kv_heads, dtype), inputs(length, heads, kv_heads, dtype)
    compare(by_blocks(*own, sees), by_torch(*reference, sees), own, reference)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 5, 24, 40, 64, 96])
def test_heads_of_any_width(width, dtype):
    own, reference = inputs(70, 4, 2, dtype, width), inputs(70, 4, 2, dtype, width)
    compare(by_blocks(*own), by_torch(*reference), own, reference)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [(), (2,)], ids=["the same positions", "positions a row"])
def test_it_rotates_queries_and_keys(rows, dtype):
    tables = rope_tables(300, 8, 100.0)
    places = torch.randint(0, 300, (*rows, 70), generator=torch.Generator().manual_seed(3))
    rope = tuple(table.to(dtype)[places].unsqueeze(-2) for table in tables)
    own, reference = inputs(70, 4, 2, dtype), inputs(70, 4, 2, dtype)
    q, k, v = reference
    expected = by_torch(rotate(q, *rope), rotate(k, *rope), v)
    compare(by_blocks(*own, rope=rope), expected, own, reference)


@pytest.mark.parametrize(
    ("width", "rotated", "masked"),
    [(8, False, False), (8, True, False), (5, False, True), (64, True, True)],
)
def test_in_bfloat16_it_is_as_near_to_float32_as_torchs(width, rotated, masked, operations):
    """Its gradients too."""
    torch.manual_seed(0)
    sees = (torch.rand(2, 1, 100, 100) < 0.5) | torch.eye(100, dtype=torch.bool)
    sees = sees.tril() if masked else None
    tables = rope_tables(300, width, 100.0) if rotated else ()
    # With a mask, positions of their own for each row.
    places = torch.randint(0, 300, (2, 100)) if masked else slice(100)
    rope = tuple(table[places].unsqueeze(-2) for table in tables) or None
    exact, own, theirs = (inputs(100, 4, 2, torch.float32, width) for _ in range(3))

    def rotated_by_torch(q, k, v):
        return by_torch(*((rotate(x, *rope) for x in (q, k)) if rope else (q, k)), v, sees)

    expected = rotated_by_torch(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_blocks(*(x.bfloat16() for x in own), sees, rope)
    assert found.dtype == torch.bfloat16
    reference = rotated_by_torch(*(x.bfloat16() for x in theirs))
    for y in (expected, found, reference):
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    pairs = zip(
        [expected, *(x.grad for x in exact)],
        [found, *(x.grad for x in own)],
        [reference, *(x.grad for x in theirs)],
        strict=True,
    )
    for true, mine, other in pairs:
        error, theirs_error = ((y.float() - true).abs().mean() for y in (mine, other))
        assert error < 2 * theirs_error


def test_training_and_scoring_see_the_same_model(operations):
    torch.manual_seed(0)
    config = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=100, vocab_size=61)
    model = Transformer(config)
    tokens_BL = torch.randint(0, 61, (3, 100))
    torch.testing.assert_close(model.train()(tokens_BL), model.eval()(tokens_BL))
