"""How near to the processor's peak a teacher answers: python benchmarks/teaching.py data/raw/smollm2_135m

The peak is that of a product of two matrices of 2048 rows in bfloat16, as in benchmarks/evaluation.py, in as
many threads. Each thread computes batches of its own, or all threads one batch. Rounds take turns, and the
fastest of each counts, as other programs may be running. Writes results/benchmarks/teaching.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from stlm.cpu_runtime import tune_process
from stlm.files import write_json
from stlm.model.flops import forward_flops
from stlm.teaching.draw import largest, sample
from stlm.teaching.subset import Subset
from stlm.teaching.teacher import Teacher
from stlm.training.published import load_published

OUT = Path("results/benchmarks/teaching.json")
BATCH = 4096
PEAK_SIZE = 2048


def subset(words: int, kept: int) -> Subset:
    """A made-up part of a vocabulary: the first tokens, to which the others' mass goes at random."""
    pieces = np.concatenate([np.arange(kept), np.random.default_rng(0).integers(0, kept, words - kept)])
    return Subset(np.arange(kept), pieces)


def ask(teacher: Teacher, context: int, top_k: int | None) -> dict[str, float]:
    """One batch; the seconds of its states, of its distributions, and of what is kept of them."""
    tokens = torch.randint(teacher.vocabulary, (BATCH // context, context))
    begin = time.perf_counter()
    hidden = teacher.states(tokens, None)[-1].flatten(0, 1)
    states, keeping = time.perf_counter() - begin, 0.0
    for here, q in teacher.distributions(hidden):
        started = time.perf_counter()
        if top_k is None:
            sample(q, torch.rand(here.stop - here.start, 16))
        else:
            largest(q, top_k)
        keeping += time.perf_counter() - started
    whole = time.perf_counter() - begin
    return {"states": states, "distributions": whole - states - keeping, "keeping": keeping}


def in_threads(work: Callable[[], Any], threads: int) -> tuple[float, list[Any]]:
    """Seconds until each of so many threads has done `work` alone, and what they found."""
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        begin = time.perf_counter()
        found = [task.result() for task in [pool.submit(work) for _ in range(threads)]]
        return time.perf_counter() - begin, found


def product() -> None:
    """The product whose speed is the peak."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).bfloat16() for _ in range(2))
    for _ in range(10):
        a @ b


def main() -> None:
    """Measure every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a published model")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tune_process()
    threads, context = torch.get_num_threads(), options.context
    network = load_published(Path(options.model))
    flops = BATCH // context * forward_flops(network, context)
    words = network.config.vocab_size
    whole = Teacher(network, None, torch.bfloat16)
    part = Teacher(network, subset(words, words // 3), torch.bfloat16)
    part.model = whole.model
    cases = {"16 sampled": (whole, None), "32 largest": (whole, 32), "16 sampled, a third": (part, None)}
    peaks, found = [], {name: [] for name in (*cases, "16 sampled, one batch")}
    for _ in range(options.rounds):
        seconds, _ = in_threads(product, threads)
        peaks.append(threads * 10 * 2 * PEAK_SIZE**3 / seconds / 1e9)
        for name, (teacher, top_k) in cases.items():
            seconds, parts = in_threads(lambda t=teacher, k=top_k: ask(t, context, k), threads)
            found[name].append((seconds / threads, parts[0]))
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        parts = ask(whole, context, None)
        found["16 sampled, one batch"].append((time.perf_counter() - begin, parts))
    peak = max(peaks)
    result = {"machine": machine(), "model": Path(options.model).name, "context": context, "threads": threads}
    result["peak_gflops"] = round(peak, 1)
    for name, rounds in found.items():
        seconds, parts = min(rounds, key=lambda one: one[0])
        result[name] = {
            "tokens_per_second": round(BATCH / seconds, 1),
            "gflops": round(flops / seconds / 1e9, 1),
            "share_of_peak": round(flops / seconds / 1e9 / peak, 3),
            "shares_of_time": {key: round(value / sum(parts.values()), 3) for key, value in parts.items()},
        }
        print(name, result[name])
    write_json(OUT, result)


if __name__ == "__main__":
    main()
