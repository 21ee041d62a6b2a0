"""The loss on kept answers: against its definition in float64, and against the whole divergence."""

from __future__ import annotations

import math

import pytest
import torch

from stlm.teaching import loss as module
from stlm.teaching.draw import largest, padded, sample, weights_of
from stlm.teaching.loss import taught_loss
from stlm.teaching.states import states_loss

N, V, D, E, K = 90, 101, 16, 24, 5


def inputs(scale: float = 0.5) -> list[torch.Tensor]:
    """Hidden states and heads of student and teacher: [N, D], [V, D], [N, E], [V, E]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (N, E), (V, E))
    x, weight, teacher, head = (torch.randn(shape, generator=generator) * scale for shape in shapes)
    return [x.requires_grad_(), weight.requires_grad_(), teacher, head]


TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))


def answers(teacher, head, T=1.0, top=False, seed=0, count=K):
    logits = torch.full((N, padded(V)), -torch.inf)
    logits[:, :V] = teacher.detach() @ head.detach().T / T
    w = weights_of(logits)
    if top:
        return largest(w, count)
    return sample(w, torch.rand(N, count, generator=torch.Generator().manual_seed(seed)))


def definition(x, weight, kept, share, T, softcap):
    """In float64, position by position."""
    logits = x.double() @ weight.double().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    log_p = torch.log_softmax(logits / T, dim=1)
    next_token = -log_p.gather(1, TARGETS[:, None]).mean()
    log_q, own = kept.log_q_CK.double(), log_p.gather(1, kept.ids_CK)
    if kept.log_rest_C is None:
        divergence = (log_q - own).mean()
    else:
        q, r = log_q.exp(), kept.log_rest_C.double().exp()
        inside = (q * (log_q - own)).sum(dim=1)
        divergence = (inside + r * (r.log() - torch.log1p(-own.exp().sum(dim=1)))).mean()
    return (1 - share) * next_token + share * divergence, next_token, divergence


@pytest.mark.parametrize("top", [False, True], ids=["sampled", "top"])
@pytest.mark.parametrize(
    ("share", "T", "softcap"),
    [(1.0, 1.0, 0.0), (0.3, 1.0, 0.0), (0.0, 1.0, 0.0), (0.7, 2.0, 0.0), (0.6, 1.0, 5.0), (1.0, 3.0, 4.0)],
)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_value_and_gradients_are_those_of_the_definition(monkeypatch, top, share, T, softcap, kernels):
    if not kernels:
        monkeypatch.setattr(module, "kernels_for", lambda x: None)
    monkeypatch.setitem(module._LOGITS, "cpu", 40 * V)  # in parts
    ours, theirs = inputs(), inputs()
    kept = answers(*ours[2:], T, top)
    found = taught_loss(*ours[:2], TARGETS, *kept, share, T, softcap)
    expected = definition(*theirs[:2], kept, share, T, softcap)
    for value, wanted in zip(found, expected, strict=True):
        assert value.item() == pytest.approx(wanted.item(), rel=2e-5, abs=1e-6)
    found.loss.backward()
    expected[0].backward()
    for own, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert not found.next_token.requires_grad and not found.divergence.requires_grad


@pytest.mark.parametrize("count", [1, 4])
def test_the_mean_of_sampled_estimates_is_the_whole_divergence(count):
    exact = inputs()
    log_q = torch.log_softmax(exact[2] @ exact[3].T, dim=1)
    log_p = torch.log_softmax(exact[0] @ exact[1].T, dim=1)
    value = (log_q.exp() * (log_q - log_p)).sum(dim=1).mean()
    value.backward()
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in exact[:2]]

    def projections(tensors):
        return [(x.grad * y).sum().item() for x, y in zip(tensors[:2], directions, strict=True)]

    expected = torch.tensor([value.item(), *projections(exact)], dtype=torch.float64)
    found = []
    for seed in range(400):
        drawn = inputs()
        loss = taught_loss(*drawn[:2], TARGETS, *answers(*drawn[2:], seed=seed, count=count)).loss
        loss.backward()
        found.append([loss.item(), *projections(drawn)])
    found = torch.tensor(found, dtype=torch.float64)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - expected) / error).abs().max() < 4.5
    assert (error > 0).all() and error[0] < 0.05 * expected[0]


def test_a_teacher_equal_to_the_student_teaches_nothing():
    """Of the most likely tokens to the bit of float16's rounding; of sampled ones in expectation."""
    x, weight, _, _ = inputs()
    log_p = torch.log_softmax(x @ weight.T, dim=1).detach()
    loss = taught_loss(x, weight, TARGETS, *answers(x, weight, top=True)).loss
    loss.backward()
    assert abs(loss.item()) < 1e-6 and x.grad.abs().max() < 1e-8 and weight.grad.abs().max() < 1e-7
    # The values cancel token by token; the mean of the gradients is zero.
    gradients = []
    for seed in range(300):
        y = x.detach().clone().requires_grad_()
        loss = taught_loss(y, weight.detach(), TARGETS, *answers(y, weight, seed=seed)).loss
        loss.backward()
        assert abs(loss.item()) < 1e-6
        gradients.append(y.grad[0].clone())
    gradients = torch.stack(gradients).double()
    error = gradients.std(dim=0) / math.sqrt(len(gradients))
    assert (gradients.mean(dim=0) / error).abs().max() < 4.5 and log_p.isfinite().all()


def test_the_most_likely_tokens_give_a_lower_bound_that_grows_with_them():
    x, weight, teacher, head = inputs(1.0)
    log_q = torch.log_softmax(teacher @ head.T, dim=1)
    log_p = torch.log_softmax(x @ weight.T, dim=1)
    whole = (log_q.exp() * (log_q - log_p)).sum(dim=1).mean().item()
    bounds = [
        taught_loss(x, weight, TARGETS, *answers(teacher, head, top=True, count=count)).loss.item()
        for count in (1, 5, 20, 80)
    ]
    assert bounds == sorted(bounds) and bounds[0] < 0.9 * whole and bounds[-1] <= whole * 1.0001
    assert bounds[-1] > 0.99 * whole


def test_rounded_answers_are_normalized_and_autocast_is_near():
    exact, rounded = inputs(), inputs()
    kept = answers(*exact[2:], top=True)
    halves = [None if part is None else part.half() if part.is_floating_point() else part for part in kept]
    with torch.autocast("cpu", torch.bfloat16):
        found = taught_loss(*rounded[:2], TARGETS, *halves, 0.5)
    expected = taught_loss(*exact[:2], TARGETS, *kept, 0.5)
    found.loss.backward()
    expected.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    for own, other in zip(rounded[:2], exact[:2], strict=True):
        assert (own.grad - other.grad).norm() < 0.02 * other.grad.norm()


def test_no_more_logits_than_said_are_held(monkeypatch):
    sizes = []
    monkeypatch.setitem(module._LOGITS, "cpu", 40 * V)
    losses = module._losses
    monkeypatch.setattr(module, "_losses", lambda z, *rest: sizes.append(len(z)) or losses(z, *rest))
    x, weight, teacher, head = inputs()
    taught_loss(x, weight, TARGETS, *answers(teacher, head))
    assert sizes == [40, 40, 10]


def test_losses_on_states():
    one, other = torch.randn(7, 5), torch.randn(7, 5)
    assert states_loss(one, one, "mse").item() == 0
    assert states_loss(2 * one, one, "cosine").item() == pytest.approx(0, abs=1e-6)
    assert states_loss(torch.zeros(7, 5), other, "mse").item() == pytest.approx(1)
    cosine = (one * other).sum(dim=1) / one.norm(dim=1) / other.norm(dim=1)
    assert states_loss(one, other, "cosine").item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
