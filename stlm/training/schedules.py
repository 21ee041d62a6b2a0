"""Learning rates over training: small functions of the step."""

from __future__ import annotations

import math

from stlm.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 1): linear warm-up, then cosine or constant.

    The warm-up reaches the peak at its last step, the cosine the minimum at the last step of training
    (paper, Table 1: from 6e-4 to 6e-5).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
