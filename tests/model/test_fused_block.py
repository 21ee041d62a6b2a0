"""A block's halves in one operation give what the modules give, and give way where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stlm.kernels import library
from stlm.kernels.library import kernels, kernels_for
from stlm.model import fused_block, head_loss, transformer
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer

own = kernels().by_type.get(torch.float32)
needs_products = pytest.mark.skipif(own is None or own.product is None, reason="no kernels of products")


@pytest.mark.skipif(
    own is None or own.product is not None or "avx2" not in Path("/proc/cpuinfo").read_text(),
    reason="the tests here run by themselves, or no processor can run them",
)
def test_with_the_kernels_of_a_processor_without_avx512():
    """The tests of this file, where this processor's own kernels have no products."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__],
        env={**os.environ, library.MARCH: "haswell"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "17 passed" in result.stdout, result.stdout


def model_of(**changes) -> Transformer:
    torch.manual_seed(0)
    config = {"layers": 2, "width": 40, "heads": 4, "kv_heads": 2, "ffn_width": 52, "context": 70}
    model = Transformer(ModelConfig(**{**config, "vocab_size": 131, "dropout": 0.0, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def loss_and_gradients(model: Transformer, tokens: torch.Tensor) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fused(monkeypatch):
    """The number of halves computed in one operation so far."""
    count = {"attention_half": 0, "feed_forward_half": 0}
    for name in count:
        whole = getattr(fused_block, name)

        def counted(*arguments, name=name, whole=whole, **keys):
            count[name] += 1
            return whole(*arguments, **keys)

        monkeypatch.setattr(transformer, name, counted)
    return count


# Widths that fill no panel, one tile and several blocks of them; more rows than a block has.
@needs_products
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.1},
        {"positions": "learned", "context": 260, "kv_heads": 1},
        {"width": 288, "heads": 3, "kv_heads": 3, "ffn_width": 300, "vocab_size": 1000},
        {"logit_softcap": 3.0, "tied": False},
    ],
)
def test_the_loss_and_all_gradients_are_those_of_the_modules(changes, fused, monkeypatch):
    model = model_of(**changes)
    tokens = torch.randint(model.config.vocab_size, (3, model.config.context + 1))
    loss, gradients = loss_and_gradients(model, tokens)
    assert fused == {"attention_half": 2, "feed_forward_half": 2}
    for name in ("product", "product_weight", "head_loss"):
        monkeypatch.setattr(own, name, None)
    expected_loss, expected = loss_and_gradients(model, tokens)
    assert fused == {"attention_half": 2, "feed_forward_half": 2}
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=2e-5 * scale, rtol=1e-4, msg=name)


@needs_products
def test_any_number_of_threads_gives_the_same_products():
    """All but the gains' gradients, whose sums over rows the threads share."""
    model = model_of()
    tokens, before, results = torch.randint(131, (8, 71)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_gradients(model, tokens))
    finally:
        torch.set_num_threads(before)
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        for name, gradient in gradients.items():
            if name.startswith("blocks") and "norm" not in name:
                assert torch.equal(gradient, results[0][1][name]), name


@needs_products
def test_a_module_with_a_hook_is_called(fused):
    model, seen = model_of(), []
    model.blocks[0].ffn.down.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.blocks[1].attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    loss_and_gradients(model, torch.randint(131, (2, 71)))
    assert len(seen) == 2 and fused == {"attention_half": 1, "feed_forward_half": 1}


@needs_products
def test_what_has_no_kernel_runs_its_modules(fused):
    tokens = torch.randint(131, (2, 71))
    for changes in (
        {"ffn": "gelu", "qk_norm": True},
        {"norm": "layernorm"},
        {"ffn": "relu2", "qkv_shift": True},
    ):
        loss_and_gradients(model_of(**changes), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss_and_gradients(model_of(), tokens)
    assert not any(fused.values())


@needs_products
def test_frozen_matrices_get_no_gradient():
    model = model_of(tied=False)
    for parameter in (model.blocks[0].ffn.down.weight, model.blocks[1].attention.qkv.weight):
        parameter.requires_grad_(False)
    model.output.weight.requires_grad_(False)
    loss, gradients = loss_and_gradients(model, torch.randint(131, (2, 71)))
    assert loss.isfinite() and {"blocks.0.ffn.down.weight", "output.weight"}.isdisjoint(gradients)
    assert "blocks.0.ffn.gate_up.weight" in gradients


@needs_products
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows(bad):
    """In the rows that read it, and in no others."""
    x, weight, y = torch.ones(20, 40), torch.randn(33, 40), torch.empty(20, 33)
    x[3, 5] = bad
    own.product(20, 40, 33, x, weight, 0, None, y)
    assert not y[3].isfinite().any() and y[[0, 2, 4, 19]].isfinite().all()
    gradient = torch.empty(40, 33)
    own.product_weight(20, 33, 40, x, y.nan_to_num(), gradient)
    assert not gradient[5].isfinite().any() and gradient[[4, 6]].isfinite().all()


@needs_products
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 16, 1), (5, 3, 7), (130, 33, 300), (100, 64, 513), (37, 100, 256)]
)
def test_products_of_any_shape(M, N, K):
    generator = torch.Generator().manual_seed(0)
    x, w, add = (torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (M, N)))
    expected, scale = (x.double() @ w.double().T).float(), K**0.5
    y = torch.full((M, N), torch.nan)
    own.product(M, K, N, x, w, 0, add, y)
    torch.testing.assert_close(y, expected + add, atol=1e-6 * scale, rtol=1e-5)
    own.product(M, K, N, x, w.T.contiguous(), 1, None, y)
    torch.testing.assert_close(y, expected, atol=1e-6 * scale, rtol=1e-5)
    gradient = torch.full((N, K), torch.nan)
    own.product_weight(M, K, N, add, x, gradient)
    torch.testing.assert_close(gradient, add.T @ x, atol=1e-5 * M**0.5, rtol=1e-4)


@needs_products
def test_the_head_of_residuals_without_a_gradient():
    x, weight, targets = torch.randn(70, 24), torch.randn(50, 24, requires_grad=True), torch.arange(70) % 50
    assert kernels_for(x).head_loss is not None
    loss = head_loss.head_loss(x, weight, targets)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    (gradient,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(head_loss.head_loss(x, weight, targets), expected)
