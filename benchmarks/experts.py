"""What a step with experts costs, beside the dense model of equal active parameters.

    python benchmarks/experts.py                                # both dtypes; on a CPU some five minutes
    python benchmarks/experts.py --dtype float32 --rounds 3 --output part.json
    python benchmarks/experts.py --device cuda

The models are of desk's shape (4 layers of width 256, SwiGLU 768), with 16 rows of 256 tokens: dense; four
experts, top 1, of the dense network's width (the bound is 1.25 times the dense step); four experts, top 2, of
half of it. In each round each model takes some steps in turn, in one process, so that what else the machine
does falls on all; a ratio is of the fastest steps. A step is forward with all parts of the loss, backward,
clipping and the optimizer's update, on random tokens; the router is new and its load about even. Run it on an
idle machine.

Writes results/benchmarks/experts.json; a part of it, or another shape, goes to --output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from stlm.cpu_runtime import tune_process

OUTPUT = Path("results/benchmarks/experts.json")
SHAPE = {"layers": 4, "width": 256, "heads": 8, "kv_heads": 2, "ffn_width": 768, "context": 256}
SHAPE |= {"vocab_size": 4096, "dropout": 0.0}
SIDES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "four experts, top 1": {"experts": 4, "top": 1},
    "four experts, top 2": {"experts": 4, "top": 2},
}
BOUND = 1.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=N", help="of the model's shape")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    own = options.dtype or options.set or options.batch != 16 or options.optimizer != "adamw"
    if (own or options.device != "cpu") and not options.output:
        parser.error(f"this would replace {OUTPUT}; name another file with --output")
    tune_process()
    from machine import machine

    from stlm.files import write_json

    shape = SHAPE | {key: int(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    content: dict[str, Any] = {
        "command": " ".join(["benchmarks/experts.py", *sys.argv[1:]]),
        "device": options.device,
        "machine": machine(),
        "model": shape,
        "tokens a step": options.batch * shape["context"],
        "bound of top 1": BOUND,
    }
    for dtype in options.dtype or ("float32", "bfloat16"):
        content[dtype] = measure(shape, dtype, options)
        write_json(options.output or OUTPUT, content)
        print(dtype, json.dumps(content[dtype], indent=1), flush=True)
    return 0


def measure(shape: dict[str, Any], dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The seconds of a step of each side, and their ratios to the dense model's."""
    from stlm.model.config import ModelConfig
    from stlm.model.counts import parameter_counts, training_flops_per_token
    from stlm.techniques.experts import Experts

    config = ModelConfig(**shape)
    sides = {name: () if keys is None else (Experts(**keys),) for name, keys in SIDES.items()}
    steps = {name: stepper(config, techniques, dtype, options) for name, techniques in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds[name] += [step() for _ in range(options.steps)]
    found = {}
    for name, techniques in sides.items():
        counts = parameter_counts(config, techniques)
        found[name] = {
            "parameters": counts.total,
            "active parameters": counts.active or counts.total,
            "training FLOPs a token": training_flops_per_token(config, techniques=techniques),
            "seconds a step, fastest": round(min(seconds[name]), 5),
            "seconds a step, median": round(median(seconds[name]), 5),
            "times the dense step": round(min(seconds[name]) / min(seconds["dense"]), 3),
            "times the dense step, of medians": round(median(seconds[name]) / median(seconds["dense"]), 3),
        }
    return found


def stepper(config: Any, techniques: tuple, dtype: str, options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    import torch

    from stlm.model.build import build_model
    from stlm.study.runs import Run
    from stlm.training.config import TrainingConfig
    from stlm.training.objective import Objective, total
    from stlm.training.optimizers import build_optimizer

    torch.manual_seed(0)
    half = dtype == "bfloat16"
    model = build_model(config, techniques).to(options.device).train()
    training = TrainingConfig(
        steps=1000, warmup_steps=0, batch_size=options.batch, optimizer=options.optimizer
    )
    run = Run(
        study="benchmark",
        name="step",
        variant="step",
        label="step",
        paper_row=None,
        seed=0,
        corpus="random",
        tokenizer="random",
        model=config,
        training=training,
        techniques={technique.key(): technique for technique in techniques},
    )
    objective = Objective(run)
    optimizer = build_optimizer(model, training, torch.bfloat16 if half else torch.float32)
    shape = (options.batch, config.context + 1)
    tokens_BM = torch.randint(config.vocab_size, shape, device=options.device)

    def step() -> float:
        begin = time.perf_counter()
        objective.before_step(model, 1)
        with torch.autocast(options.device, torch.bfloat16, enabled=half):
            loss = total(objective(objective.forward(model, tokens_BM, None, 1)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        objective.after_step(model, 1)
        optimizer.zero_grad(set_to_none=True)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return step


if __name__ == "__main__":
    sys.exit(main())
