"""The head and the loss in parts are torch's cross-entropy of whole logits, the gradients too."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.model import head_loss as module
from stlm.model.head_loss import head_loss


@pytest.fixture(params=["whole", "parts"])
def parts(request, monkeypatch, operations):
    """All at once, and in parts of 64 positions, whose softmax takes 3 at a time: both cut at the end."""
    if request.param == "parts":
        monkeypatch.setitem(module._LOGITS, "cpu", 64 * 101)
        monkeypatch.setitem(module._PROBABILITIES, "cpu", 3 * 101)


def inputs(positions: int = 150) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(positions, 16, generator=generator).requires_grad_()
    weight_VD = torch.randn(101, 16, generator=generator).requires_grad_()
    return x_ND, weight_VD, torch.randint(0, 101, (positions,), generator=generator)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_it_is_torchs_cross_entropy(parts, softcap, factor):
    x, weight, targets = inputs()
    x_t, weight_t, _ = inputs()
    loss = head_loss(x, weight, targets, softcap)
    logits = x_t @ weight_t.T
    expected = F.cross_entropy(logits if not softcap else softcap * torch.tanh(logits / softcap), targets)
    torch.testing.assert_close(loss, expected)
    (factor * loss).backward()
    (factor * expected).backward()
    torch.testing.assert_close(x.grad, x_t.grad)
    torch.testing.assert_close(weight.grad, weight_t.grad)


def test_under_autocast_it_is_as_near_to_float32_as_torchs(parts):
    x, weight, targets = inputs()
    F.cross_entropy(x @ weight.T, targets).backward()
    exact = x.grad, weight.grad

    def errors(loss_of) -> list[float]:
        x, weight, _ = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(x, weight)
        assert loss.dtype == torch.float32
        loss.backward()
        pairs = zip((x.grad, weight.grad), exact, strict=True)
        return [(own - other).norm().item() for own, other in pairs]

    own = errors(lambda x, weight: head_loss(x, weight, targets))
    theirs = errors(lambda x, weight: F.cross_entropy(F.linear(x, weight).float(), targets))
    assert all(mine < 1.5 * other for mine, other in zip(own, theirs, strict=True))


def test_only_what_is_asked_for_gets_a_gradient(parts):
    x, weight, targets = inputs()
    expected = head_loss(x, weight, targets).item()
    with torch.no_grad():
        assert head_loss(x, weight, targets).item() == expected
    head_loss(x.detach(), weight, targets).backward()
    assert weight.grad is not None and x.grad is None
    weight.grad = None
    head_loss(x, weight.detach(), targets).backward()
    assert x.grad is not None and weight.grad is None


def test_a_hopeless_target_costs_what_it_should(operations):
    """Its probability is nothing in float32, its loss is not."""
    x, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [300.0]])
    loss = head_loss(x, weight, torch.tensor([0]))
    assert loss.item() == pytest.approx(300.0)
    loss.backward()
    assert x.grad.item() == pytest.approx(300.0)


@pytest.mark.parametrize(("count", "most"), [(2048, 667), (2048, 10**9), (100, 1), (12288, 667), (1, 5)])
def test_parts_are_even(count, most):
    size = module._even_part(count, most)
    sizes = [min(size, count - begin) for begin in range(0, count, size)]
    assert size % 64 == 0 and sum(sizes) == count
    assert len(sizes) == 1 or size <= max(64, 2 * most)
