"""Schedules: learning rates and dropout as functions of the step. Needs no torch.

docs/schedules.md plots each. A new schedule is a function here, an entry in its table, and a value of its key
in `stlm/training/config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from stlm.training.config import TrainingConfig


def _progress(config: TrainingConfig, step: int) -> float:
    """Share of the steps after the warm-up that are done at `step`: 0 at the peak, 1 at the last step."""
    return (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)


def _between(config: TrainingConfig, height: float) -> float:
    """The learning rate at `height`: 1 is the peak, 0 the minimum."""
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * height


def constant(config: TrainingConfig, step: int) -> float:
    """The peak until the end."""
    return config.learning_rate


def cosine(config: TrainingConfig, step: int) -> float:
    """Half a cosine from the peak to the minimum (Loshchilov and Hutter 2017, SGDR, eq. 5, one cycle)."""
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * (1 + math.cos(math.pi * _progress(config, step))) / 2


def linear(config: TrainingConfig, step: int) -> float:
    """A line from the peak to the minimum (Bergsma et al. 2025, "Straight to zero", with the minimum 0)."""
    return _between(config, 1 - _progress(config, step))


def wsd(config: TrainingConfig, step: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4): the peak, then a line to the minimum.

    The line takes the last `decay_share` of all steps, but none of the warm-up's. Its linear shape follows
    Hägele et al. 2024, section 3.
    """
    decay = min(config.decay_share * config.steps, config.steps - config.warmup_steps)
    return _between(config, min(1.0, (config.steps - step) / max(decay, 1)))


def inverse_sqrt(config: TrainingConfig, step: int) -> float:
    """The peak times sqrt(warm-up steps / step), at least the minimum (Vaswani et al. 2017, eq. 3)."""
    rate = config.learning_rate * math.sqrt(max(config.warmup_steps, 1) / step)
    return max(rate, config.min_learning_rate)


def one_cycle(config: TrainingConfig, step: int) -> float:
    """One cycle (Smith and Topin 2018), as in torch's OneCycleLR: up in a half cosine, down in another.

    It rises from a 25th of the peak during the warm-up steps, which should be many (torch's default: 30% of
    all steps); the linear warm-up is not used.
    """
    if step > config.warmup_steps:
        return cosine(config, step)
    rise = (1 - math.cos(math.pi * step / config.warmup_steps)) / 2
    return config.learning_rate * (1 + 24 * rise) / 25


LEARNING_RATES: dict[str, Callable[[TrainingConfig, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
    "one_cycle": one_cycle,
}


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 1): linear warm-up, then the recipe's schedule.

    The warm-up reaches the peak at its last step; a decay reaches the minimum at the last step of training
    (paper, Table 1: from 6e-4 to 6e-5).
    """
    if step <= config.warmup_steps and config.schedule != "one_cycle":
        return config.learning_rate * step / config.warmup_steps
    return LEARNING_RATES[config.schedule](config, step)


def _through(config: TrainingConfig, step: int) -> float:
    """The share of training that is done: 0 at the first step, 1 at the last."""
    return (step - 1) / max(1, config.steps - 1)


def dropout_constant(config: TrainingConfig, step: int) -> float:
    """The configured probability, throughout."""
    return 1.0


def dropout_linear(config: TrainingConfig, step: int) -> float:
    """A line between the factors `dropout_ends`; if it rises, a curriculum (Morerio et al. 2017)."""
    first, last = config.dropout_ends
    return first + (last - first) * _through(config, step)


def dropout_early(config: TrainingConfig, step: int) -> float:
    """Only in the first `dropout_share` of the steps (Liu et al. 2023, "Dropout reduces underfitting")."""
    return 1.0 if step <= config.dropout_share * config.steps else 0.0


def dropout_late(config: TrainingConfig, step: int) -> float:
    """Only after the first `dropout_share` of the steps (Liu et al. 2023, section 5)."""
    return 1.0 - dropout_early(config, step)


def dropout_triangular(config: TrainingConfig, step: int) -> float:
    """From 0 up to 1 and back, `dropout_cycles` times (the triangles of Smith 2017, cyclical rates)."""
    return 1.0 - abs(1.0 - 2.0 * ((_through(config, step) * config.dropout_cycles) % 1.0))


DROPOUTS: dict[str, Callable[[TrainingConfig, int], float]] = {
    "constant": dropout_constant,
    "linear": dropout_linear,
    "early": dropout_early,
    "late": dropout_late,
    "triangular": dropout_triangular,
}


def dropout_factor(config: TrainingConfig, step: int) -> float:
    """The factor, 0 to 1, of the dropout probabilities at optimizer step ``step`` (from 1)."""
    return DROPOUTS[config.dropout_schedule](config, step)
