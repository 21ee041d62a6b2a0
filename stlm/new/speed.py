"""Measures how fast this machine trains a model, by a few real steps."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from stlm.model.config import ModelConfig
from stlm.model.counts import training_flops_per_token
from stlm.training.config import TrainingConfig

_SECONDS = 2.0  # approximate duration of a timing; the first two steps of a large model may take longer


@dataclass(frozen=True)
class Speed:
    """Floating-point operations a second of one run, and the number of runs in parallel."""

    flops: float
    runs: int
    device: str

    @property
    def all_flops(self) -> float:
        """Floating-point operations a second of all parallel runs."""
        return self.flops * self.runs


def parallel_runs(runs: int) -> tuple[int, int]:
    """(parallel runs, threads of each) on a CPU, as `snakemake --cores all` divides it among `runs`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // runs)
    return min(runs, cores // threads), threads


def measure(model: ModelConfig, batch_size: int, runs: int) -> Speed:
    """Time steps of `model` on `batch_size` rows of random tokens, for a study of `runs` runs."""
    import torch

    from stlm.model.build import build_model
    from stlm.training.devices import choose_device
    from stlm.training.optimizers import build_optimizer

    config = TrainingConfig(compile=False)
    device = choose_device(config)
    at_a_time, threads = (1, torch.get_num_threads())
    if device.device.type == "cpu":
        at_a_time, threads = parallel_runs(runs)
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
    # The first step allocates memory; the median of the others includes the effect of other work.
    median = sorted(times[1:])[len(times[1:]) // 2]
    flops = batch_size * model.context * training_flops_per_token(model) / median
    name = device.name if device.device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)} a run"
    return Speed(flops, at_a_time, name)
