"""What it costs and saves, in training on a CPU, that threads wait asleep for one another, or awake.

    python benchmarks/openmp_wait.py

Times training steps of the desk study's baseline with threads that wait awake (OMP_WAIT_POLICY=ACTIVE),
asleep (PASSIVE), and awake for so many turns, then asleep (`cpu_runtime` sets 1,000), alone and beside one
busy process, in turns; writes results/benchmarks/openmp_wait.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from machine import machine

from stlm.files import write_json

RESULT = Path("results/benchmarks/openmp_wait.json")
POLICIES = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{
        f"{turns} turns": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(turns)}
        for turns in (1000, 4000, 10000, 30000)
    },
}
STEPS = 16
CHILD = """
import sys, time, torch
from stlm.study.load import load_study
from stlm.model.build import build_model
from stlm.training.devices import choose_device
from stlm.training.optimizers import build_optimizer
study = load_study("desk")
run = study.runs[study.baseline]
where = choose_device(run.training)
model = build_model(run.model)
optimizer = build_optimizer(model, run.training)
seconds = []
for step in range(int(sys.argv[1])):
    start = time.perf_counter()
    tokens = torch.randint(0, run.model.vocab_size, (run.training.batch_size, run.model.context + 1))
    with where.autocast():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - start)
print(sorted(seconds)[len(seconds) // 2])
"""


def step_seconds(policy: str) -> float:
    """The median time of a training step, in a process of its own."""
    environment = {**os.environ, **POLICIES[policy], "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CHILD, str(STEPS)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, write, print."""
    known = {"machine": machine(), "cores": os.cpu_count()}
    result: dict[str, dict[str, float]] = {}
    for name in ("alone", "beside one busy process"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if name != "alone" else None
        try:
            rounds = [{policy: step_seconds(policy) for policy in POLICIES} for _ in range(3)]
        finally:
            if busy:
                busy.kill()
        result[name] = {policy: round(min(own[policy] for own in rounds), 4) for policy in POLICIES}
    write_json(RESULT, {**known, "unit": "seconds a step, best of three medians", **result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
