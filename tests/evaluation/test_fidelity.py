"""Two models' distributions of the next token, compared."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.errors import UserError
from stlm.evaluation import fidelity
from stlm.evaluation.fidelity import compare
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer

EOT = 0
CONFIG = ModelConfig(
    layers=1, width=16, heads=2, kv_heads=1, ffn_width=24, context=8, vocab_size=50, dropout=0.0
)
DOCUMENTS = [[3, 4, 5], list(range(1, 21)), [7], [9] * 16]


def random_model(changed: float = 0.0) -> Transformer:
    """A model; with `changed`, its weights are others by so much."""
    torch.manual_seed(1)
    model = Transformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(15 if parameter.dim() > 1 else 1)
            parameter.add_(torch.randn_like(parameter), alpha=changed)
    return model


def by_hand(before: Transformer, after: Transformer, most: int) -> dict[str, float]:
    divergences, same = [], []
    for document in DOCUMENTS:
        tokens = [EOT, *document]
        for begin in range(0, len(document), CONFIG.context):
            row = torch.tensor([tokens[:-1][begin : begin + CONFIG.context]])
            p, q = (F.softmax(model(row)[0].double(), dim=-1) for model in (before, after))
            divergences += (p * (p / q).log()).sum(dim=-1).tolist()
            same += (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()
    divergences, same = divergences[:most], same[:most]
    count = len(same)
    return {"kl_divergence": sum(divergences) / count, "agreement": sum(same) / count, "tokens": count}


@pytest.mark.parametrize("most", [2**16, 13])
@pytest.mark.parametrize("tokens", [2**12, 16])
@torch.no_grad()
def test_it_is_the_mean_over_the_texts_tokens(monkeypatch, most, tokens):
    monkeypatch.setattr(fidelity, "MOST_TOKENS", most)
    monkeypatch.setattr(fidelity, "_BATCH_TOKENS", tokens)
    monkeypatch.setattr(fidelity, "_LOGITS", 150)
    models = random_model(), random_model(0.1)
    found, expected = compare(*models, DOCUMENTS, EOT), by_hand(*models, most)
    assert found["tokens"] == expected["tokens"] == min(most, sum(map(len, DOCUMENTS)))
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found["agreement"] < 1


def test_a_model_is_nearest_to_itself():
    found = compare(random_model(), random_model(), DOCUMENTS, EOT)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-6) and found["agreement"] == 1


def test_weights_that_are_not_finite_are_refused():
    broken = random_model()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        compare(random_model(), broken, DOCUMENTS, EOT)
