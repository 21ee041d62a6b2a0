"""Schedules of the learning rate and of dropout, against torch's and against their definitions."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch.optim import lr_scheduler

from stlm.training.config import TrainingConfig
from stlm.training.schedules import DROPOUTS, LEARNING_RATES, dropout_factor, learning_rate

STEPS, WARMUP = 100, 10


def rates(schedule: str, **keys: object) -> list[float]:
    """The learning rates of steps 1 to 100."""
    config = {"steps": STEPS, "warmup_steps": WARMUP, "learning_rate": 1e-3, "min_learning_rate": 1e-4} | keys
    return [learning_rate(TrainingConfig(schedule=schedule, **config), s) for s in range(1, STEPS + 1)]


def torchs(make, steps: int) -> list[float]:
    """The learning rates that a scheduler of torch gives before its first step, after it, and so on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_every_key_has_its_function():
    for key, functions in (("schedule", LEARNING_RATES), ("dropout_schedule", DROPOUTS)):
        assert set(get_args(TrainingConfig.model_fields[key].annotation)) == set(functions)
        assert all(function.__doc__ for function in functions.values())


@pytest.mark.parametrize("schedule", sorted(LEARNING_RATES))
def test_the_peak_ends_the_warmup_and_the_minimum_is_honoured(schedule):
    found = rates(schedule)
    assert found[WARMUP - 1] == max(found) == pytest.approx(1e-3)
    assert found[:WARMUP] == sorted(found[:WARMUP])
    assert found[WARMUP:] == sorted(found[WARMUP:], reverse=True)
    assert min(found[WARMUP:]) >= 1e-4 * (1 - 1e-12)
    if schedule not in ("constant", "inverse_sqrt"):
        assert found[-1] == pytest.approx(1e-4)
        assert rates(schedule, min_learning_rate=0.0)[-1] == pytest.approx(0.0, abs=1e-18)
    # None of them fails where there is no warm-up, or nothing but a warm-up.
    assert rates(schedule, warmup_steps=0)[0] == pytest.approx(1e-3, rel=0.02)
    assert rates(schedule, warmup_steps=STEPS)[-1] == pytest.approx(1e-3)


def test_linear_is_torchs():
    reference = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=STEPS - WARMUP), 91)
    assert rates("linear")[WARMUP - 1 :] == pytest.approx(reference, rel=1e-9)


def test_one_cycle_is_torchs():
    reference = torchs(
        lambda o: lr_scheduler.OneCycleLR(
            o,
            max_lr=1e-3,
            total_steps=STEPS + 1,  # torch's first rate is that of our step 0
            pct_start=31 / (STEPS + 1),
            final_div_factor=1e-3 / 25 / 1e-4,
            cycle_momentum=False,
        ),
        STEPS + 1,
    )
    assert rates("one_cycle", warmup_steps=30) == pytest.approx(reference[1:], rel=1e-9)


def test_wsd_is_stable_then_a_line():
    found = rates("wsd", decay_share=0.25, min_learning_rate=0.0)
    assert set(found[WARMUP - 1 : 75]) == {1e-3}
    assert found[75:] == pytest.approx([1e-3 * left / 25 for left in range(24, -1, -1)])
    # A decay longer than what the warm-up leaves is the linear schedule.
    assert rates("wsd", decay_share=1.0) == pytest.approx(rates("linear"))


def test_inverse_square_root_is_that_of_vaswani():
    """Equation 3: proportional to min(step^-0.5, step * warmup^-1.5)."""
    found = rates("inverse_sqrt", min_learning_rate=0.0)
    expected = [1e-3 * math.sqrt(WARMUP) * min(s**-0.5, s * WARMUP**-1.5) for s in range(1, STEPS + 1)]
    assert found == pytest.approx(expected)
    assert rates("inverse_sqrt", min_learning_rate=5e-4)[-1] == 5e-4


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dropout_schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"dropout_schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"dropout_schedule": "linear", "dropout_ends": (0.2, 1.0)}, [0.2, 0.4, 0.6, 0.8, 1.0]),
        ({"dropout_schedule": "early"}, [1, 1, 0, 0, 0]),
        ({"dropout_schedule": "early", "dropout_share": 0.6}, [1, 1, 1, 0, 0]),
        ({"dropout_schedule": "late"}, [0, 0, 1, 1, 1]),
        ({"dropout_schedule": "late", "dropout_share": 1.0}, [0, 0, 0, 0, 0]),
        ({"dropout_schedule": "triangular"}, [0, 0.5, 1, 0.5, 0]),
        ({"dropout_schedule": "triangular", "dropout_cycles": 2}, [0, 1, 0, 1, 0]),
    ],
)
def test_dropout_factors(keys, expected):
    config = TrainingConfig(steps=5, warmup_steps=0, **keys)
    assert [dropout_factor(config, step) for step in range(1, 6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", sorted(DROPOUTS))
def test_one_step_of_training_has_a_factor(schedule):
    config = TrainingConfig(steps=1, warmup_steps=0, dropout_schedule=schedule)
    assert 0 <= dropout_factor(config, 1) <= 1


def test_impossible_factors_are_refused():
    with pytest.raises(ValueError, match=r"dropout_ends: \[1.0, 1.5\]"):
        TrainingConfig(dropout_ends=(1.0, 1.5))
