"""Loss spikes: on series whose spikes are known, and through a resume."""

from __future__ import annotations

import json
import math
import random

import pytest

from stlm.training.spikes import Spikes


def falling(steps: int, seed: int = 0, noise: float = 0.05) -> list[float]:
    """The loss of a healthy run: a power law with Gaussian noise."""
    rng = random.Random(seed)
    return [3 + 6 * (step + 10) ** -0.4 + rng.gauss(0, noise) for step in range(steps)]


def found(losses: list[float]) -> list[dict]:
    spikes = Spikes({})
    for step, loss in enumerate(losses, start=1):
        spikes.add(step, loss, grad_norm=step / 10)
    return spikes.found


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_healthy_run_has_none(noise):
    assert [own for seed in range(10) for own in found(falling(1500, seed, noise))] == []


def test_an_early_spike_stands_out_from_the_fall():
    """The losses of a real run: its 17th update overshot along a sharp direction, its 18th went back."""
    losses = [
        7.159,
        6.953,
        6.669,
        6.468,
        6.267,
        5.972,
        5.669,
        5.439,
        5.203,
        5.126,
        4.982,
        4.889,
        4.894,
        4.951,
    ]
    losses += [4.893, 4.847, 4.834, 8.836, 4.913, 4.881]
    (spike,) = found(losses)
    assert (spike["step"], spike["recovered_after"]) == (18, 1)
    assert spike["rise"] == pytest.approx(8.836 - (4.894 + 4.951) / 2, abs=1e-6)


def test_a_spike_has_its_step_size_and_end():
    losses = falling(400, noise=0.0)
    for place, height in ((299, 1.0), (300, 2.5), (301, 0.4)):
        losses[place] += height
    (spike,) = found(losses)
    assert spike["step"] == 300
    assert spike["loss"] == pytest.approx(losses[299], abs=1e-6)
    # The median of the 10 steps before, which fall without noise, lies between the 5th and the 6th.
    level = (losses[299 - 5] + losses[299 - 6]) / 2
    assert spike["level"] == pytest.approx(level, abs=1e-6)
    assert spike["rise"] == pytest.approx(losses[300] - level, abs=1e-6), "the largest, not the first"
    assert spike["grad_norm"] == 30.0
    assert spike["recovered_after"] == 3


def test_the_losses_of_a_spike_do_not_move_what_the_next_is_held_against():
    losses = [3.0 + 0.01 * (-1) ** step for step in range(200)]
    losses[100:140] = [5.0] * 40
    losses[150] = 4.0
    first, second = found(losses)
    assert (first["step"], first["recovered_after"]) == (101, 41)
    assert (second["step"], second["level"], second["recovered_after"]) == (
        151,
        pytest.approx(3, abs=0.02),
        1,
    )


def test_a_loss_that_never_comes_back_is_a_new_level():
    losses = falling(1000)
    losses[500:] = [loss + 1 for loss in losses[500:]]
    losses[900] += 3
    first, second = found(losses)
    assert (first["step"], first["recovered_after"]) == (501, None)
    assert second["step"] == 901 and second["level"] == pytest.approx(losses[899], abs=0.15)


def test_ripples_on_a_smooth_curve_are_none():
    losses = [3.0] * 100
    losses[80] = 3.19
    assert found(losses) == []
    losses[80] = 3.21
    assert [spike["step"] for spike in found(losses)] == [81]


def test_a_loss_that_is_not_finite_is_no_spike():
    losses = falling(100)
    losses[60:63] = [math.nan, math.inf, -math.inf]
    assert found(losses) == []


@pytest.mark.parametrize("cut", [5, 60, 101, 139, 170])
def test_its_state_as_json_goes_on_where_it_was(cut):
    losses = falling(300)
    losses[100:140] = [loss + 2 for loss in losses[100:140]]
    state: dict = {}
    for step, loss in enumerate(losses, start=1):
        if step == cut:
            state = json.loads(json.dumps(state))
        Spikes(state).add(step, loss, step / 10)
    assert state["found"] == found(losses)
    assert [spike["step"] for spike in state["found"]] == [101]
