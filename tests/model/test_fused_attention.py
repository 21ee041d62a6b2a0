"""Copies of key/value heads, which a GPU wants, change no result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stlm.model import fused_attention as module
from stlm.model.fused_attention import copies_heads, fused_attention


@pytest.mark.parametrize("masked", [False, True])
def test_copied_heads_are_groups(masked, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
    sees = torch.rand(2, 1, 9, 9, generator=generator) < 0.5
    sees = sees | torch.eye(9, dtype=torch.bool) if masked else None
    results = []
    for copies in (False, True):
        monkeypatch.setattr(module, "copies_heads", lambda *arguments, copies=copies: copies)
        y = fused_attention(q, k, v, sees)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_when_a_gpu_gets_copies():
    half, single = (SimpleNamespace(is_cuda=True, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    sees = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert not copies_heads(half, None), "flash attention takes groups"
    assert copies_heads(half, sees) and copies_heads(single, None)
    assert not copies_heads(torch.zeros(1), sees)
