"""Whatever bits a number has, kernels make of it what torch does: not-a-number with any payload stays it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.kernels.library import kernels, kernels_for

pytestmark = pytest.mark.skipif(not kernels().by_type, reason=f"no kernels: {kernels().why_none}")
TYPES = [torch.float32, torch.bfloat16]


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 bfloat16 numbers; of float32 as many drawn, half of them NaN, with the extremes."""
    if dtype == torch.bfloat16:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    bits[::2] |= 0x7F800000
    extremes = [0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF, 1, 0x007FFFFF, 0]
    bits[: len(extremes)] = extremes
    bits[len(extremes) : 2 * len(extremes)] = np.array(extremes, np.uint32) | 0x80000000
    return torch.from_numpy(bits.view(np.int32)).view(torch.float32)


def assert_same(found: Tensor, expected: Tensor, atol: float = 1e-36) -> None:
    """Not a number in the same places, elsewhere the same up to rounding and the end of float32's range."""
    found, expected = found.float(), expected.float()
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=atol, equal_nan=True)


def test_the_sample_holds_what_it_should():
    for dtype in TYPES:
        own = patterns(dtype)
        assert own.isnan().sum() >= 254 and own.isinf().any() and (own == 0).any()
        assert ((own != 0) & (own.abs() < 1e-38)).any(), "none below the smallest normal number"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", ["target", "other", "first of many"])
def test_cross_entropy(place, dtype):
    own = patterns(dtype)
    width, where = (40, 0) if place == "first of many" else (3, 1)
    logits = torch.linspace(-1, 1, width).to(dtype).repeat(len(own), 1)
    logits[:, where] = own
    targets = torch.full((len(own),), where if place == "target" else width - 1)
    exact = logits.float().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses, gradients = torch.empty(len(own)), logits.clone()
    kernels_for(logits).cross_entropy(len(own), width, gradients, targets, 0.0, True, losses)
    assert_same(losses, expected, atol=2e-6)
    assert_same(gradients, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_cross_entropy_of_capped_logits(dtype):
    own = patterns(dtype)
    logits = torch.zeros(len(own), 3, dtype=dtype)
    logits[:, 1] = own
    losses, gradients = torch.empty(len(own)), logits.clone()
    targets = torch.zeros(len(own), dtype=torch.int64)
    kernels_for(logits).cross_entropy(len(own), 3, gradients, targets, 10.0, True, losses)
    assert_same(losses, F.cross_entropy(10 * torch.tanh(logits.float() / 10), targets, reduction="none"))
    assert torch.equal(gradients.isnan().all(dim=1), own.isnan())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spoilt", ["gate", "up", "gradient"])
def test_swiglu(spoilt, dtype):
    own = patterns(dtype)
    parts = {name: torch.full_like(own, 0.75) for name in ("gate", "up", "gradient")}
    parts[spoilt] = own
    gate_up = torch.stack([parts["gate"], parts["up"]])
    exact = gate_up.float().requires_grad_()
    expected = F.silu(exact[0]) * exact[1]
    expected.backward(parts["gradient"].float())
    y, gradient, kernels = torch.empty_like(own), torch.empty_like(gate_up), kernels_for(own)
    kernels.swiglu(1, len(own), gate_up, y)
    kernels.swiglu_backward(1, len(own), parts["gradient"], gate_up, gradient)
    assert_same(y, expected.to(dtype))
    assert_same(gradient, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spoilt", ["x", "gain"])
def test_rms_norm(spoilt, dtype):
    """Whose argument and gain are float32 whatever the result's type."""
    own = patterns(torch.float32)
    # Squares beyond float32 are infinite here and in torch, which then differ in 0 and NaN.
    own = own[~(own.abs() > 1e18) | own.isnan()]
    x, gain = torch.ones(len(own), 4), torch.ones(4)
    if spoilt == "x":
        x[:, 2] = own
    else:
        x, gain = torch.ones(1, len(own)), own
    y, inverse = torch.empty_like(x, dtype=dtype), torch.empty(len(x))
    kernels_for(y).rms_norm(*x.shape, x, gain, 1e-5, y, inverse)
    assert_same(y, F.rms_norm(x, x.shape[1:], gain, 1e-5).to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spoilt", ["query", "key", "value"])
def test_attention(spoilt, dtype):
    """A position's query, key or value shows from there on; a block multiplies a later value by zero."""
    own = kernels_for(torch.empty(0, dtype=dtype))
    if own.attention is None:
        pytest.skip("no products of bfloat16 here")
    bad = patterns(dtype)
    bad = bad[bad.isnan()][:: 1 if dtype == torch.bfloat16 else 101]
    B, L, E, at = len(bad), 5, 2, 3
    qkv_BLSE = torch.full((B, L, 3, E), 0.5, dtype=dtype)
    qkv_BLSE[:, at, ["query", "key", "value"].index(spoilt), 1] = bad
    y_BLHE = torch.empty(B, L, 1, E, dtype=dtype)
    weights = torch.empty(B, own.attention_weights(L), dtype=dtype)
    own.attention(B, L, 1, 1, E, qkv_BLSE, None, None, 0, None, y_BLHE, weights)
    found_BLE = y_BLHE[:, :, 0].isnan()
    if spoilt == "value":
        assert found_BLE[:, at:, 1].all() and not found_BLE[..., 0].any()
    else:
        assert found_BLE[:, at].all()
        assert found_BLE[:, at + 1].all() == (spoilt == "key")
        assert not found_BLE[:, :at].any()
    dqkv_BLSE = torch.empty_like(qkv_BLSE)
    own.attention_backward(
        B, L, 1, 1, E, qkv_BLSE, None, None, 0, torch.ones_like(y_BLHE), weights, dqkv_BLSE
    )
    assert dqkv_BLSE.isnan().flatten(1).any(dim=1).all()
