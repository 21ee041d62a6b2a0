"""The parts of a block that have kernels give torch's results and the gradients that autograd derives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.model.fused import RMSNorm, swiglu


def gradients(function, *tensors):
    for tensor in tensors:
        tensor.grad = None
    y = function(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weights).sum().backward()
    return y, [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16)])
def test_rms_norm_is_torchs(shape, operations):
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x, gain = torch.randn(shape, requires_grad=True), norm.weight
    y, found = gradients(lambda x, _: norm(x), x, gain)
    expected_y, expected = gradients(lambda x, gain: F.rms_norm(x, (16,), gain, 1e-5), x, gain)
    torch.testing.assert_close(y, expected_y)
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference)


def test_rms_norm_in_front_of_products_is_of_their_type(operations):
    """As if autocast had rounded it: the same numbers, and gradients as near."""
    torch.manual_seed(0)
    norm, linear = RMSNorm(64, eps=1e-5), torch.nn.Linear(64, 32, bias=False)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 64, requires_grad=True)
    results = {}
    for narrow in (False, True):
        norm.narrow = narrow
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
            z, found = gradients(lambda x, gain: linear(norm(x)).float(), x, norm.weight)
        assert y.dtype == (torch.bfloat16 if narrow and operations == "kernels" else torch.float32)
        results[narrow] = [y.bfloat16(), z, *found]
    assert torch.equal(results[True][0], results[False][0])
    assert norm(x).dtype == torch.float32
    for own, other in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(own, other)


def test_rms_norm_of_other_layouts_and_types(operations):
    torch.manual_seed(0)
    norm = RMSNorm(8, eps=1e-5).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x.transpose(0, 1)).transpose(0, 1), (x,))
    wide, norm = torch.randn(3, 4, 8, requires_grad=True), RMSNorm(8, eps=1e-5)
    y, found = gradients(lambda x: norm(x.transpose(0, 1)), wide)
    expected_y, expected = gradients(lambda x: F.rms_norm(x.transpose(0, 1), (8,), eps=1e-5), wide)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(found, expected)
    half = RMSNorm(8, eps=1e-5).bfloat16()
    half(torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


def test_rms_norm_of_zeros_has_finite_gradients(operations):
    x = torch.zeros(2, 8, requires_grad=True)
    _, (gradient,) = gradients(RMSNorm(8, eps=1e-5), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 66), (0, 24)])
def test_swiglu_is_torchs(dtype, shape, operations):
    torch.manual_seed(0)
    gate_up = (torch.randn(shape) * 5).to(dtype).requires_grad_()

    def plain(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    y, found = gradients(swiglu, gate_up)
    expected_y, expected = gradients(plain, gate_up)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(found[0], expected[0])


def test_without_gradients_too(operations):
    with torch.no_grad():
        torch.testing.assert_close(
            RMSNorm(8, eps=1e-5)(torch.ones(2, 8)), torch.ones(2, 8), atol=1e-5, rtol=0
        )
        y = swiglu(torch.tensor([[-200.0, 200.0, 3.0, 3.0]]))
        torch.testing.assert_close(y, torch.tensor([[0.0, 600.0]]))
