"""Schedules and optimizer groups."""

from __future__ import annotations

import pytest
import torch

from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.training.config import TrainingConfig
from stlm.training.optimizers import build_optimizer
from stlm.training.schedules import learning_rate


def test_the_papers_schedule():
    """Table 1: 5,000 steps of warm-up to 6e-4, cosine to 6e-5 at step 25,000."""
    config = TrainingConfig()
    assert learning_rate(config, 1) == pytest.approx(6e-4 / 5000)
    assert learning_rate(config, 5000) == pytest.approx(6e-4)
    assert learning_rate(config, 15000) == pytest.approx((6e-4 + 6e-5) / 2)
    assert learning_rate(config, 25000) == pytest.approx(6e-5)
    rates = [learning_rate(config, step) for step in range(5000, 25001, 500)]
    assert rates == sorted(rates, reverse=True)


def test_the_schedule_is_torchs_cosine():
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1e-3, min_learning_rate=1e-4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=1e-4)
    for step in range(10, 101):
        assert learning_rate(config, step) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        reference.step()


def test_constant_schedule_and_no_warmup():
    config = TrainingConfig(steps=10, warmup_steps=0, schedule="constant")
    assert {learning_rate(config, step) for step in range(1, 11)} == {6e-4}


def test_gains_do_not_decay_and_matrices_do():
    model = Transformer(ModelConfig(layers=2, width=32, heads=2, kv_heads=1, ffn_width=48, vocab_size=50))
    optimizer = build_optimizer(model, TrainingConfig())
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for p in free["params"]) == 5 * 32
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert total == sum(p.numel() for p in model.parameters())
