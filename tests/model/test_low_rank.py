"""Factorized matrices and embeddings: how they start, what they equal, what cutting loses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts
from stlm.model.inherit import inherit
from stlm.model.projection import Dense, LowRank, factorize, projections

TINY = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 16, "vocab_size": 61}
LARGE = {**TINY, "width": 128, "ffn_width": 256}


def test_a_cut_matrix_is_the_nearest_of_its_rank():
    """Eckart and Young 1936: what is lost is the discarded singular values."""
    torch.manual_seed(0)
    weight_YX = torch.randn(20, 31)
    left_YR, right_RX = factorize(weight_YX, 6)
    assert (left_YR.shape, right_RX.shape) == ((20, 6), (6, 31))
    singular = np.linalg.svd(weight_YX.double().numpy(), compute_uv=False)
    lost = (weight_YX - left_YR @ right_RX).norm().item()
    assert lost == pytest.approx(math.sqrt((singular[6:] ** 2).sum()), rel=1e-5)
    torch.testing.assert_close(left_YR.norm(dim=0), right_RX.norm(dim=1))


def test_products_of_factors_start_with_the_variance_of_a_dense_matrix():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**LARGE, low_rank={"ffn": 16, "attention": 24}))
    dense = build_model(ModelConfig(**LARGE))
    for (name, own), (_, of) in zip(projections(model), projections(dense), strict=True):
        product = own.left.weight @ own.right.weight
        assert product.std().item() == pytest.approx(of.weight.std().item(), rel=0.05), name
        # Balanced, as Khodak et al. 2021 have them.
        assert own.left.weight.norm().item() == pytest.approx(own.right.weight.norm().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("low_rank", "ranks"),
    [
        ({"qkv": 9}, {"attention.qkv": 9}),
        ({"out": 5, "up": 6}, {"attention.out": 5, "ffn.gate_up": 6}),
        ({"ffn": 8, "down": 3}, {"ffn.gate_up": 8, "ffn.down": 3}),
        ({"attention": 4, "qkv": 7, "down": 2}, {"attention.qkv": 7, "attention.out": 4, "ffn.down": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ffn", ["swiglu", "relu2"])
def test_the_named_matrices_alone_are_factorized(low_rank, ranks, ffn):
    torch.manual_seed(0)
    config = ModelConfig(**TINY, ffn=ffn, low_rank=low_rank)
    model = build_model(config)
    found = {
        name.split(".", 2)[2]: own.right.out_features
        for name, own in projections(model)
        if isinstance(own, LowRank)
    }
    assert found == {name if ffn == "swiglu" else name.replace("gate_", ""): r for name, r in ranks.items()}
    counts = parameter_counts(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.total < parameter_counts(ModelConfig(**TINY, ffn=ffn)).total
    # A cut of trained weights leaves the other matrices as they are.
    source = build_model(ModelConfig(**TINY, ffn=ffn))
    cut = {name.split(".", 2)[2] for name in inherit(model, source).by_matrix}
    assert cut == found.keys()
    whole = dict(source.named_parameters())
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters() if name in whole)


def test_ranks_of_networks_are_recorded_as_before():
    config = ModelConfig(**TINY, low_rank={"ffn": 6})
    assert config.model_dump()["low_rank"] == {"ffn": 6, "attention": None}
    named = ModelConfig(**TINY, low_rank={"down": 6})
    assert ModelConfig.model_validate(named.model_dump()) == named != config


def test_factors_of_zero_products_can_learn():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY, low_rank={"ffn": 6}, zero_init=True))
    tokens_BL = torch.randint(0, 61, (2, 17))
    model.loss(tokens_BL[:, :-1], tokens_BL[:, 1:]).backward()
    down = model.blocks[0].ffn.down
    assert not (down.left.weight @ down.right.weight).any()
    assert down.left.weight.grad.abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_factorized_embedding_is_the_product_of_its_factors(tied):
    """Logits, loss and gradients, against a model with the products as its tables."""
    torch.manual_seed(0)
    config = ModelConfig(**TINY, embedding_rank=8, tied=tied, logit_softcap=4.0)
    model = build_model(config).eval()
    dense = build_model(config.model_copy(update={"embedding_rank": None, "tied": False})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        given = {k: v for k, v in model.state_dict().items() if k.startswith(("blocks.", "norm."))}
        given["embedding.weight"] = model.embedding.weight @ model.embedding_up
        back_DR = model.embedding_up.T if tied else model.output_down
        given["output.weight"] = model.output.weight @ back_DR.T
        dense.load_state_dict(given)
    x_BL, y_BL = torch.randint(0, 61, (2, 3, 16))
    torch.testing.assert_close(model(x_BL), dense(x_BL), atol=1e-5, rtol=1e-4)
    loss = model.loss(x_BL, y_BL)
    assert loss.item() == pytest.approx(dense.loss(x_BL, y_BL).item(), rel=1e-5)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(x_BL).flatten(0, 1), y_BL.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)
    rows_N, tokens_N = torch.tensor([2, 30]), torch.tensor([5, 60])
    hidden_NR = model.hidden(x_BL, None, rows_N)
    logits_NV = model.head(hidden_NR)
    torch.testing.assert_close(logits_NV, model(x_BL).flatten(0, 1)[rows_N], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.logit(hidden_NR, tokens_N), logits_NV[torch.arange(2), tokens_N])


def test_a_factorized_table_starts_with_the_variance_of_a_whole_one():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**LARGE, "vocab_size": 2000}, embedding_rank=32, tied=False))
    for table_VR, matrix_RD in (
        (model.embedding.weight, model.embedding_up),
        (model.output.weight, model.output_down.T),
    ):
        assert (table_VR @ matrix_RD).std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "sharing", [None, {"what": "all"}, {"what": "ffn", "order": "cyclic", "units": 1}], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_inherits_what_its_ranks_hold(sharing, tied):
    """A source whose matrices have the rank already loses nothing, another what its singular values say."""
    torch.manual_seed(0)
    base = ModelConfig(**TINY, sharing=sharing, tied=tied)
    config = base.model_copy(
        update=ModelConfig(
            **TINY, low_rank={"ffn": 9, "attention": 7}, embedding_rank=8, lora={"rank": 2}
        ).model_dump(include={"low_rank", "embedding_rank", "lora"})
    )
    config = ModelConfig.model_validate(config.model_dump(warnings=False))
    source, model = build_model(base).eval(), build_model(config).eval()
    tokens_BL = torch.randint(0, 61, (2, 16))
    truncation = inherit(model, source)
    ranks = {"attention": 7, "ffn": 9}
    matrices = {name: own for name, own in source.named_modules() if isinstance(own, Dense)}
    unique = {own.weight: name for name, own in reversed(matrices.items())}
    assert truncation.by_matrix.keys() == {
        *unique.values(),
        "embedding",
        *(() if tied else ("output",)),
    }
    lost = whole = 0.0
    for name, error in truncation.by_matrix.items():
        weight = (matrices[name] if name in matrices else getattr(source, name)).weight
        rank = next((r for part, r in ranks.items() if f".{part}." in name), 8)
        squares = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False) ** 2
        assert error == pytest.approx(math.sqrt(squares[rank:].sum() / squares.sum()), rel=1e-4), name
        lost, whole = lost + squares[rank:].sum(), whole + squares.sum()
    assert truncation.error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)

    # Cut once more, the products lose nothing: the logits are those of the dense products.
    with torch.no_grad():
        for name, own in projections(model):
            if isinstance(own, LowRank):
                matrices[name].weight.copy_(own.left.weight @ own.right.weight)
        source.embedding.weight.copy_(model.embedding.weight @ model.embedding_up)
        if not tied:
            source.output.weight.copy_(model.output.weight @ model.output_down.T)
    assert inherit(model, source).error < 1e-5
    torch.testing.assert_close(model(tokens_BL), source(tokens_BL), atol=1e-5, rtol=1e-4)


def test_equal_models_inherit_everything():
    torch.manual_seed(0)
    source, model = (build_model(ModelConfig(**TINY, low_rank={"ffn": 6})) for _ in range(2))
    assert inherit(model, source) == (0.0, {})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), source.parameters(), strict=True))
