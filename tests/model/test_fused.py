"""Backward passes written by hand give the gradients that autograd derives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.model.fused import RMSNorm, by_hand, swiglu


def gradients(function, *tensors):
    for tensor in tensors:
        tensor.grad = None
    y = function(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weights).sum().backward()
    return y, [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16)])
def test_rms_norm_is_torchs(shape):
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x, gain = torch.randn(shape, requires_grad=True), norm.weight
    assert by_hand(x)
    y, found = gradients(lambda x, _: norm(x), x, gain)
    expected_y, expected = gradients(lambda x, gain: F.rms_norm(x, (16,), gain, 1e-5), x, gain)
    torch.testing.assert_close(y, expected_y)
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference)


def test_rms_norm_of_other_layouts_and_types():
    torch.manual_seed(0)
    norm = RMSNorm(8, eps=1e-5).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x.transpose(0, 1)).transpose(0, 1), (x,))
    half = RMSNorm(8, eps=1e-5).bfloat16()
    half(torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


def test_rms_norm_of_zeros_has_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    _, (gradient,) = gradients(RMSNorm(8, eps=1e-5), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_torchs(dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)

    def plain(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    y, found = gradients(swiglu, gate_up)
    expected_y, expected = gradients(plain, gate_up)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(found[0], expected[0])


def test_without_gradients_the_operations_are_torchs():
    with torch.no_grad():
        assert not by_hand(torch.zeros(1))
        torch.testing.assert_close(
            RMSNorm(8, eps=1e-5)(torch.ones(2, 8)), torch.ones(2, 8), atol=1e-5, rtol=0
        )
