"""How fast is a training step, beside nanoGPT's, transformers' and the machine's own peak?

    python benchmarks/training.py                    # both models, both dtypes; on a CPU some 15 minutes
    python benchmarks/training.py --model desk --dtype bfloat16 --rounds 5 --output desk.json
    python benchmarks/training.py --memory           # peak memory against batch and vocabulary, instead
    python benchmarks/training.py --emulate avx2 --model desk --dtype float32 --output avx2.json

Each side is a process of its own, set up as its users would have it (ours by `cpu_runtime`, theirs by the
defaults of torch), with the same threads, shapes, random tokens and arithmetic. In each round each side takes
some steps in turn, so that what else the machine does falls on all; the fastest step counts. The peak is that
of a product of matrices of 2,048 (8,192 on a GPU), measured in every round too. A step is forward, backward,
clipping and the optimizer's update; it waits for no data. Run it on an idle machine: beside other work the
peers' threads, which wait awake by torch's default, collapse (benchmarks/openmp_wait.py). `--emulate avx2`
restricts all sides, and the peak, to the instructions of a processor with AVX2 and no AVX-512 or bfloat16;
caches, memory and clock remain this machine's.

Writes results/benchmarks/training.json, or training_memory.json; a part of it (--model, --dtype, --side) goes
to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUTPUT = Path("results/benchmarks/training.json")
MEMORY = Path("results/benchmarks/training_memory.json")
# Restrict torch, its libraries and our kernels to a processor's instructions; set before torch is loaded.
EMULATIONS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "STLM_KERNELS_MARCH": "haswell",
    }
}
# Sequences a step: nanoGPT's and ours at the paper's shapes in the first measurement; desk's own.
MODELS = {
    "paper": ({"vocab_size": 50257, "dropout": 0.0}, 4),
    "desk": (
        {
            "layers": 4,
            "width": 256,
            "heads": 8,
            "kv_heads": 2,
            "ffn_width": 768,
            "context": 256,
            "vocab_size": 4096,
            "dropout": 0.0,
        },
        8,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="default: both")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: both")
    parser.add_argument("--side", action="append", help="default: all")
    parser.add_argument("--compiled", action="append", default=[], help="a side under torch.compile, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--emulate", choices=tuple(EMULATIONS), help="a processor with fewer instructions")
    parser.add_argument("--batch", type=int, help="sequences a step; default: 4 (paper), 8 (desk)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    part = [f"--{key}" for key in ("model", "dtype", "side", "emulate") if getattr(options, key)]
    if part and not options.output:
        parser.error(
            f"{', '.join(part)}: a part of {OUTPUT} would replace it; name another file with --output"
        )
    os.environ.update(EMULATIONS.get(options.emulate, {}))
    if options.worker:
        work(json.loads(options.worker))
    elif options.memory:
        measure_memory(options)
    else:
        measure_speed(options)
    return 0


def work(task: dict[str, Any]) -> None:
    """A side's process: for every number on stdin, so many steps; their seconds, the fastest, to stdout."""
    if task["side"] in ("stlm", "peak"):
        from stlm.cpu_runtime import tune_process

        tune_process()
    import torch
    from training_peers import SIDES

    from stlm.model.config import ModelConfig

    device, dtype = task["device"], task["dtype"]
    if device == "cuda" and dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if task["side"] == "peak":
        n = 8192 if device == "cuda" else 2048
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

        def once() -> None:
            torch.mm(a, b)

        parameters, calls = 2 * n**3, 10
    else:
        config = ModelConfig(**task["model"])
        step, parameters = SIDES[task["side"]](config, device, dtype, task["compiled"])
        shape = (task["batch"], config.context + 1)
        tokens = torch.randint(config.vocab_size, shape, device=device)

        def once() -> None:
            step(tokens)

        calls = 1
    for _ in range(3):
        once()
    print(json.dumps({"parameters": parameters}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line) * calls):
            begin = time.perf_counter()
            once()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": min(seconds), "memory": memory}), flush=True)


class Side:
    """A worker's process and what it said."""

    def __init__(self, **task: Any) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps(task)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parameters = self._answer()["parameters"]
        self.seconds: list[float] = []
        self.memory = 0

    def run(self, steps: int) -> None:
        """So many steps; the fastest is kept."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.memory = answer["memory"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side's process failed; its message is above")
        return json.loads(line)


def measure_speed(options: argparse.Namespace) -> None:
    """All models and dtypes, each side in turns; writes after each."""
    from machine import machine
    from training_peers import SIDES

    from stlm.files import write_json

    names = options.side or list(SIDES)
    content: dict[str, Any] = {
        "command": " ".join(["benchmarks/training.py", *sys.argv[1:]]),
        "device": options.device,
        "machine": machine(),
        **({"emulated": options.emulate} if options.emulate else {}),
        "models": {},
    }
    for name in options.model or MODELS:
        model, batch = MODELS[name]
        batch = options.batch or batch
        for dtype in options.dtype or ("float32", "bfloat16"):
            task = {"model": model, "batch": batch, "device": options.device, "dtype": dtype}
            sides = {"peak": Side(side="peak", compiled=False, **task)}
            for side in names:
                sides[side] = Side(side=side, compiled=False, **task)
                if side in options.compiled:
                    sides[f"{side} compiled"] = Side(side=side, compiled=True, **task)
            for _ in range(options.rounds):
                for side in sides.values():
                    side.run(options.steps)
            for side in sides.values():
                side.close()
            found = figures(model, batch, sides.pop("peak"), sides)
            content["models"].setdefault(name, {"model": model, "batch": batch})[dtype] = found
            write_json(options.output or OUTPUT, content)
            print(name, dtype, json.dumps(content["models"][name][dtype], indent=1), flush=True)


def figures(model: Mapping[str, Any], batch: int, peak: Side, sides: Mapping[str, Side]) -> dict[str, Any]:
    """What the sides' seconds mean; `ratios`: how much faster than each peer ours is, if it was measured."""
    from stlm.model.config import ModelConfig
    from stlm.model.counts import parameter_counts, training_flops_per_token

    config = ModelConfig(**model)
    tokens = batch * config.context
    peak_flops = peak.parameters / min(peak.seconds)
    found = {}
    for side, own in sides.items():
        # nanoGPT's blocks are larger than ours: its own operations are counted.
        more = own.parameters - parameter_counts(config).total
        flops = tokens * (training_flops_per_token(config) + 6 * more)
        found[side] = {
            "parameters": own.parameters,
            "seconds_a_step": round(min(own.seconds), 4),
            "seconds_of_rounds": [round(value, 4) for value in own.seconds],
            "tokens_per_second": round(tokens / min(own.seconds), 1),
            "gflops": round(flops / min(own.seconds) / 1e9, 1),
            "mfu": round(flops / min(own.seconds) / peak_flops, 3),
            "peak_memory_mb": round(own.memory / 2**20),
        }
    speeds = {side: value["tokens_per_second"] for side, value in found.items()}
    ours = [speed for side, speed in speeds.items() if side.startswith("stlm")]
    peers = {side: speed for side, speed in speeds.items() if not side.startswith("stlm")}
    return {
        "peak_gflops": round(peak_flops / 1e9, 1),
        "sides": found,
        "ratios": {side: round(max(ours) / speed, 2) for side, speed in peers.items()} if ours else {},
    }


def measure_memory(options: argparse.Namespace) -> None:
    """Peak memory of a step, ours and our first version's, each in a process of its own."""
    from machine import machine

    from stlm.files import write_json

    model = MODELS["paper"][0]
    rows = []
    for vocabulary in (4096, 16384, 50257):
        for batch in (1, 4, 16):
            row: dict[str, Any] = {"vocabulary": vocabulary, "tokens_a_batch": batch * 512}
            for side in ("stlm", "first"):
                own = Side(
                    side=side,
                    compiled=False,
                    model={**model, "vocab_size": vocabulary},
                    batch=batch,
                    device=options.device,
                    dtype="bfloat16",
                )
                own.run(1)
                own.close()
                row[f"{side}_mb"] = round(own.memory / 2**20)
            rows.append(row)
            print(row, flush=True)
            write_json(options.output or MEMORY, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    sys.exit(main())
