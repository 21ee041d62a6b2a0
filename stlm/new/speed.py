"""How fast this machine trains a model: a few real steps, timed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from stlm.model.config import ModelConfig
from stlm.model.counts import training_flops_per_token
from stlm.training.config import TrainingConfig

_SECONDS = 2.0  # that the timing of one model takes, about; a large model's first two steps may take longer


@dataclass(frozen=True)
class Speed:
    """Floating-point operations a second of one run, and how many runs go side by side."""

    flops: float
    runs: int
    where: str

    @property
    def all_flops(self) -> float:
        """Of all runs that are at work together."""
        return self.flops * self.runs


def side_by_side(runs: int) -> tuple[int, int]:
    """(runs at a time, threads of each) on a CPU, as `snakemake --cores all` shares it among `runs`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // runs)
    return min(runs, cores // threads), threads


def measure(model: ModelConfig, batch_size: int, runs: int) -> Speed:
    """Time steps of `batch_size` rows of random tokens: `model` is that of one of `runs` runs of a study."""
    import torch

    from stlm.model.build import build_model
    from stlm.training.devices import choose_device
    from stlm.training.optimizers import build_optimizer

    config = TrainingConfig(compile=False)
    device = choose_device(config)
    at_a_time, threads = (1, torch.get_num_threads())
    if device.device.type == "cpu":
        at_a_time, threads = side_by_side(runs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = build_model(model).to(device.device)
        optimizer = build_optimizer(network, config, device.dtype)
        assert model.vocab_size is not None
        tokens = torch.randint(model.vocab_size, (batch_size, model.context + 1), device=device.device)
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - begin < _SECONDS and len(times) < 200):
            start = time.perf_counter()
            with device.autocast():
                loss = network.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    # The first steps allocate; the median of the others bears what else the machine does.
    own = sorted(times[1:])[len(times[1:]) // 2]
    flops = batch_size * model.context * training_flops_per_token(model) / own
    where = device.name if device.device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)} a run"
    return Speed(flops, at_a_time, where)
