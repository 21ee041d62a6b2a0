"""Estimates how long a study takes, and how much of a given time is left for training."""

from __future__ import annotations

from stlm.model.counts import training_flops_per_token
from stlm.new.fit import Fit
from stlm.new.speed import Speed

TECHNIQUES = 5  # rows of a study that `stlm new` writes
_START = 12.0  # seconds for the start of a run's two stages, on one core
_FIXED = 45.0  # seconds for fetching, counting and reporting
_TOKENIZED = 3e6  # approximate bytes tokenized a second
_CHECKPOINTS, _VALIDATIONS = 3, 11
_TEST_TOKENS, _VALIDATION_TOKENS = 100_000, 50_000
_QUESTION_TOKENS = 80
_TRAINING = 0.75  # training's share of the time without fixed costs; the rest is evaluation


def budget_flops(minutes: float, text_bytes: int, speed: Speed) -> float:
    """Floating-point operations that one training run may take in a study of `minutes`."""
    fixed = _FIXED + text_bytes / _TOKENIZED + TECHNIQUES * _START / speed.runs
    left = max(60 * minutes - fixed, 0.1 * 60 * minutes)
    return _TRAINING * left * speed.all_flops / TECHNIQUES


def study_seconds(fit: Fit, text_bytes: int, test_bytes: int, questions: int, speed: Speed) -> float:
    """Seconds that the study of `fit` takes, from fetching to its report."""
    runs = TECHNIQUES * fit.seeds
    # Windows of the test text overlap by half; a forward pass costs a third of a training step.
    test = 2 * min(_TEST_TOKENS, test_bytes / fit.bytes_a_token) * _CHECKPOINTS
    asked = (questions + 2 * min(200, questions)) * _QUESTION_TOKENS
    validated = _VALIDATIONS * min(_VALIDATION_TOKENS, test_bytes / fit.bytes_a_token)
    forward = (test + asked + validated) * training_flops_per_token(fit.model) / 3
    work = runs * (fit.flops + forward) / speed.all_flops
    return _FIXED + text_bytes / _TOKENIZED + runs * _START / speed.runs + work
