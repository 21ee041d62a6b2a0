"""What waiting asleep (OMP_WAIT_POLICY=PASSIVE) costs and saves in training on a CPU.

    python benchmarks/openmp_wait.py

Times training steps of the desk study's baseline with both policies, alone and beside one busy process, side
by side; writes benchmarks/results/openmp_wait.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from stlm.files import write_json

RESULT = Path(__file__).parent / "results" / "openmp_wait.json"
STEPS = 6
CHILD = """
import sys, time, torch
from stlm.study import load_study
from stlm.model.transformer import Transformer
from stlm.training.devices import choose_device
from stlm.training.optimizers import build_optimizer
study = load_study("desk")
run = study.runs[study.baseline]
where = choose_device(run.training)
model = Transformer(run.model)
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
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CHILD, str(STEPS)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, write, print."""
    result: dict[str, dict[str, float]] = {}
    for name in ("alone", "beside one busy process"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if name != "alone" else None
        try:
            times = {policy: [step_seconds(policy) for _ in range(3)] for policy in ("ACTIVE", "PASSIVE")}
        finally:
            if busy:
                busy.kill()
        best = {policy: round(min(values), 4) for policy, values in times.items()}
        result[name] = {**best, "ACTIVE / PASSIVE": round(best["ACTIVE"] / best["PASSIVE"], 2)}
    write_json(RESULT, {"cores": os.cpu_count(), "unit": "seconds a step, best of three medians", **result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
