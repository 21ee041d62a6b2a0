"""What watching a run costs: a training step of desk's baseline with and without looking at the layers.

    python benchmarks/watching.py [--steps 40]

Steps that are watched and steps that are not take turns in one process, on random tokens. Their medians, and
the share of time that watching takes at the study's `watch_every`, go to results/benchmarks/watching.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from machine import machine

from stlm.files import write_json
from stlm.model.build import build_model
from stlm.study.load import load_study
from stlm.study.runs import Run
from stlm.training.devices import choose_device
from stlm.training.optimizers import build_optimizer
from stlm.training.watch import Watch

RESULT = Path("results/benchmarks/watching.json")


def seconds(run: Run, steps: int) -> tuple[float, float]:
    """The median time of a step that is watched, and of one that is not."""
    where = choose_device(run.training)
    torch.manual_seed(0)
    model = build_model(run.model).to(where.device)
    optimizer = build_optimizer(model, run.training)

    def hidden(tokens_BL: torch.Tensor) -> torch.Tensor:
        with where.autocast():
            return model.hidden(tokens_BL)

    watch = Watch(model, 2, hidden, {})
    times: dict[bool, list[float]] = {True: [], False: []}
    for step in range(2, steps + 2):
        shape = (run.training.batch_size, run.model.context + 1)
        tokens = torch.randint(run.model.vocab_size, shape, device=where.device)
        start = time.perf_counter()
        with where.autocast():
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        watch.before_update(step, tokens)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
        optimizer.step()
        watch.after_update(step)
        optimizer.zero_grad(set_to_none=True)
        watch.record(step, loss.detach(), norm)
        watch.drain()
        times[watch.due(step)].append(time.perf_counter() - start)
    return median(times[True]), median(times[False])


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps in all, half of them watched")
    options = parser.parse_args()
    study = load_study("desk")
    run = study.runs[study.baseline]
    watched, plain = seconds(run, options.steps)
    result = {
        "model": f"{study.name}/{run.name}",
        "tokens a step": run.training.batch_size * run.model.context,
        "watch_every": run.training.watch_every,
        "seconds a step": round(plain, 4),
        "seconds a watched step": round(watched, 4),
        "share of the time": round((watched - plain) / (plain * run.training.watch_every), 5),
        "machine": machine(),
    }
    write_json(RESULT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
