"""The timing of real steps."""

from __future__ import annotations

import torch

from stlm.new.fit import SHAPES
from stlm.new.speed import measure


def test_a_measured_speed_is_that_of_real_steps_and_leaves_torch_as_it_was(monkeypatch) -> None:
    monkeypatch.setattr("stlm.new.speed._SECONDS", 0.1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    before = torch.get_num_threads()
    found = measure(SHAPES[0].config(512, 64), 4, 5)
    assert 1e6 < found.flops < 1e15
    if not torch.cuda.is_available():
        assert found.runs == 2 and found.device == "1 thread a run" and found.all_flops == 2 * found.flops
    assert torch.get_num_threads() == before
