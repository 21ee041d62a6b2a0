"""Sampling and the largest of a distribution, against numpy's; projection to a part of a vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.teaching.draw import BLOCK, largest, padded, sample, weights_of
from stlm.teaching.subset import Subset
from stlm.teaching.teacher import Teacher


def weights(positions: int, words: int, seed: int = 0) -> torch.Tensor:
    """Weights [C, V], with zeros to whole blocks."""
    logits = torch.randn(positions, words, generator=torch.Generator().manual_seed(seed)) * 2
    filled = torch.full((positions, padded(words)), -torch.inf)
    filled[:, :words] = logits
    return weights_of(filled)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    words, drawn = 5 * BLOCK - 7, 50
    w = weights(20, words)
    uniform = torch.rand(20, drawn, generator=torch.Generator().manual_seed(1))
    kept = sample(w, uniform)
    q = w.double().numpy() / w.double().sum(dim=1, keepdim=True).numpy()
    for row in range(20):
        expected = np.searchsorted(q[row].cumsum(), uniform[row].numpy().astype(float), side="right")
        # Rounding may move a draw that is at the border of two tokens.
        assert (kept.ids_CK[row].numpy() != expected).sum() <= 1
    ids = kept.ids_CK.numpy()
    np.testing.assert_allclose(kept.log_q_CK, np.log(np.take_along_axis(q, ids, 1)), atol=1e-5)


def test_draws_follow_the_distribution():
    words, draws = 300, 200_000
    w = weights(1, words)
    uniform = torch.rand(1, draws, generator=torch.Generator().manual_seed(2))
    counts = np.bincount(sample(w, uniform).ids_CK[0].numpy(), minlength=words)[:words]
    expected = draws * (w[0, :words].double() / w.double().sum()).numpy()
    common = expected > 5
    observed, wanted = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_with_a_probability(u):
    w = torch.zeros(1, 3 * BLOCK)
    w[0, [5, 200, 201, 300]] = torch.tensor([1e-3, 1.0, 1e-30, 0.5])
    kept = sample(w, torch.tensor([[u]]))
    assert kept.ids_CK.item() == (5 if u == 0 else 300) and kept.log_q_CK.isfinite().all()


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_largest_are_those_of_a_sort(count):
    words = 7 * BLOCK - 3
    w = weights(30, words)
    kept = largest(w, count)
    q = w.double() / w.double().sum(dim=1, keepdim=True)
    expected = q.sort(dim=1, descending=True)
    assert torch.equal(kept.ids_CK, expected.indices[:, :count])
    torch.testing.assert_close(kept.log_q_CK.double(), expected.values[:, :count].log(), atol=1e-5, rtol=0)
    rest = 1 - expected.values[:, :count].sum(dim=1)
    torch.testing.assert_close(kept.log_rest_C.exp().double(), rest, atol=1e-6, rtol=1e-3)


SIZES = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48, "context": 16, "dropout": 0.0}


def model(words: int = 300, **keys) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(ModelConfig(**SIZES, vocab_size=words, **keys))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return made.eval()


def subset() -> Subset:
    """100 of 300 tokens: the even ones below 200; what is missing goes to one of them."""
    parents = np.arange(0, 200, 2)
    pieces = np.arange(300) * 7 % 100
    pieces[parents] = np.arange(100)
    return Subset(parents, pieces)


def distribution(teacher: Teacher, tokens: torch.Tensor) -> torch.Tensor:
    """[N, V], by its parts."""
    x = teacher.states(tokens, None)[-1].flatten(0, 1)
    parts = [q / q.sum(dim=1, keepdim=True) for _, q in teacher.distributions(x)]
    return torch.cat(parts)[:, : teacher.vocabulary]


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (2.0, 0.0), (1.5, 4.0)])
def test_a_teachers_distribution_is_the_models(temperature, softcap):
    network, tokens = model(logit_softcap=softcap), torch.randint(300, (3, 16))
    expected = torch.softmax(network(tokens).detach() / temperature, dim=-1).flatten(0, 1)
    found = distribution(Teacher(network, temperature=temperature), tokens)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_projection_sums_to_one_and_gives_what_is_missing_to_first_pieces():
    part, network = subset(), model()
    tokens = torch.randint(100, (2, 16))
    found = distribution(Teacher(network, part), tokens)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(32))
    whole = torch.softmax(network(torch.from_numpy(part.parents_V)[tokens]).detach(), dim=-1).flatten(0, 1)
    expected = torch.zeros(32, 100)
    for word, piece in enumerate(part.first_pieces_W):
        expected[:, piece] += whole[:, word]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_projection_is_the_identity_where_nothing_is_cut():
    everything = Subset(np.arange(300), np.arange(300))
    q = torch.rand(4, 300)
    assert torch.equal(everything.project(q), q)


def test_losses_are_those_of_the_model():
    network, tokens = model(), torch.randint(300, (3, 17))
    found = Teacher(network).losses(tokens)
    logits = network(tokens[:, :-1]).detach().transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_states_are_those_after_the_layers_and_bfloat16_is_near():
    network, tokens = model(), torch.randint(300, (3, 16))
    with torch.no_grad():
        first, last = network.residuals(tokens, after=[0])
    *states, head = Teacher(network).states(tokens, None, (1, 2))
    assert torch.equal(states[0], first) and torch.equal(states[1], last)
    torch.testing.assert_close(head, network.finish(last))
    exact = distribution(Teacher(model()), tokens)
    rounded = distribution(Teacher(model(), dtype=torch.bfloat16), tokens)
    divergence = (exact * (exact.log() - rounded.log())).sum(dim=1).mean()
    assert 0 < divergence < 1e-3
