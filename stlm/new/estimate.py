"""How long a study takes, and what of a given time is left for training."""

from __future__ import annotations

from stlm.model.counts import training_flops_per_token
from stlm.new.fit import Fit
from stlm.new.speed import Speed

TECHNIQUES = 5  # rows of a study that `stlm new` writes
_START = 12.0  # seconds that a run's two stages take to start, on one core
_FIXED = 45.0  # of fetching, counting and reporting
_TOKENIZED = 3e6  # bytes tokenized a second, about
_CHECKPOINTS, _VALIDATIONS = 3, 11
_TEST_TOKENS, _VALIDATION_TOKENS = 100_000, 50_000
_QUESTION_TOKENS = 80
_TRAINING = 0.75  # share of the time between the fixed costs that training may take; the rest is evaluation


def budget_flops(minutes: float, text_bytes: int, speed: Speed) -> float:
    """Floating-point operations that one training may take, for a study of so many minutes."""
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
