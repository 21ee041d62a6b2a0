"""What the study `paper` costs: measured on this machine for a micro-batch, estimated for the whole.

    python benchmarks/paper_cost.py [--batches 3] [--batch-size 4] [--peak-tflops 181 --use 0.4]

Writes benchmarks/results/paper_cost.json. Memory is the process's (CPU) or the allocator's (CUDA) peak while
it trains on micro-batches, of the recipe's size unless `--batch-size` says otherwise: a CPU has no fused
attention with dropout and needs far more memory than a GPU. Time is FLOPs over the speed measured, and over
the speed of a GPU of `--peak-tflops` (dense bfloat16) of which `--use` is reached.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from machine import machine

from stlm.files import write_json
from stlm.model.build import build_model
from stlm.model.counts import training_flops_per_token
from stlm.study.load import load_study
from stlm.training.devices import choose_device
from stlm.training.optimizers import build_optimizer

RESULT = Path(__file__).parent / "results" / "paper_cost.json"


def estimated_gpu_memory(run) -> float:
    """Bytes at the peak of a step with fused attention: what autograd keeps, by hand from the model's code.

    Weights, gradients and AdamW's moments in float32 (16 bytes a parameter); logits and their gradient, each
    in bfloat16 and float32 (12 bytes); per layer the inputs of the norms (float32), of the products and of
    the activation (bfloat16), and the dropout masks.
    """
    m = run.model
    tokens = run.training.batch_size * m.context
    kv_width = m.kv_heads * m.head_width
    kept = 2 * 4 * m.width + 2 * (2 * m.width + (2 * m.width + 2 * kv_width) + m.width) + 2 * m.width
    kept += 2 * (4 if m.ffn == "swiglu" else 2) * m.ffn_width
    return 16 * run.parameters.total + 12 * tokens * m.vocab_size + m.layers * tokens * kept


def measure(run, batches: int, batch_size: int) -> dict:
    """Train on random tokens: seconds a micro-batch (median) and peak memory in bytes."""
    where = choose_device(run.training)
    torch.manual_seed(0)
    model = build_model(run.model).to(where.device)
    loss_of = torch.compile(model.loss) if where.compiled else model.loss
    optimizer = build_optimizer(model, run.training)
    shape = (batch_size, run.model.context + 1)
    seconds = []
    for index in range(batches + 1):
        tokens = torch.randint(0, run.model.vocab_size, shape, device=where.device)
        start = time.perf_counter()
        with where.autocast():
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        if where.device.type == "cuda":
            torch.cuda.synchronize()
        if index:  # the first one warms up (and compiles)
            seconds.append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"  micro-batch {index}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
    if where.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        scale = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {
        "device": where.name,
        "precision": where.precision,
        "compiled": where.compiled,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "seconds_per_micro_batch": round(sorted(seconds)[len(seconds) // 2], 3),
        "peak_memory_gb": round(peak / 1e9, 2),
    }


def main() -> None:
    """Measure, estimate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="sequences in a micro-batch; default: the recipe's")
    parser.add_argument("--peak-tflops", type=float, default=181.0, help="default: an L40, the paper's GPU")
    parser.add_argument("--use", type=float, default=0.4, help="share of the peak reached")
    options = parser.parse_args()
    study = load_study("paper")
    run = study.runs[study.baseline]
    batch_size = options.batch_size or run.training.batch_size
    measured = measure(run, options.batches, batch_size)
    per_token = training_flops_per_token(run.model)
    speed = batch_size * run.model.context * per_token / measured["seconds_per_micro_batch"]
    gpu_seconds = run.flops / (options.peak_tflops * 1e12 * options.use)
    result = {
        "study": "paper",
        "run": run.name,
        "parameters": run.parameters.total,
        "tokens": run.tokens,
        "flops": run.flops,
        "weights_gradients_and_optimizer_gb": round(16 * run.parameters.total / 1e9, 2),
        "estimated_gpu_memory_gb": round(estimated_gpu_memory(run) / 1e9, 1),
        "measured": {**measured, "machine": machine(), "tflops": round(speed / 1e12, 3)},
        "days_a_run_here": round(run.flops / speed / 86400, 1),
        "assumed_gpu": {"peak_tflops": options.peak_tflops, "use": options.use},
        "hours_a_run_on_assumed_gpu": round(gpu_seconds / 3600, 1),
    }
    write_json(RESULT, result)
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
