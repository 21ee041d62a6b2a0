"""How near to the processor's peak a teacher answers: python benchmarks/teaching.py data/raw/smollm2_135m

The peak is that of a product of two matrices of 2048 rows in bfloat16, as in benchmarks/evaluation.py. Shares
of it are of the threads' own CPU time, which other programs change little; tokens a second are by the clock.
Each thread computes batches of its own, or all threads one batch. Rounds take turns; the fastest counts.
Writes results/benchmarks/teaching.json.
"""

from __future__ import annotations

import argparse
import json
import os
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
    """One batch; the thread's seconds for its states, its distributions, and what is kept of them."""
    tokens = torch.randint(teacher.vocabulary, (BATCH // context, context))
    begin = time.thread_time()
    hidden = teacher.states(tokens, None)[-1].flatten(0, 1)
    states, keeping = time.thread_time() - begin, 0.0
    for here, q in teacher.distributions(hidden):
        started = time.thread_time()
        if top_k is None:
            sample(q, torch.rand(here.stop - here.start, 16))
        else:
            largest(q, top_k)
        keeping += time.thread_time() - started
    whole = time.thread_time() - begin
    return {"states": states, "distributions": whole - states - keeping, "keeping": keeping}


def in_threads(work: Callable[[], Any], threads: int) -> tuple[float, list[Any]]:
    """Seconds until each of so many threads has done `work` alone, and what they found."""
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        begin = time.perf_counter()
        found = [task.result() for task in [pool.submit(work) for _ in range(threads)]]
        return time.perf_counter() - begin, found


def peak() -> float:
    """The operations of a product of matrices in a second of this thread, in billions: the best of five."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(5):
        begin = time.thread_time()
        a @ b
        seconds.append(time.thread_time() - begin)
    return 2 * PEAK_SIZE**3 / min(seconds) / 1e9


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
    peaks: list[float] = []
    found: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in cases}
    together = []
    for _ in range(options.rounds):
        peaks += in_threads(peak, threads)[1]
        for name, (teacher, top_k) in cases.items():
            seconds, parts = in_threads(lambda t=teacher, k=top_k: ask(t, context, k), threads)
            found[name] += [(seconds, part) for part in parts]
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        ask(whole, context, None)
        together.append(time.perf_counter() - begin)
    best = max(peaks)
    result: dict[str, Any] = {"machine": machine(), "model": Path(options.model).name, "context": context}
    result |= {"threads": threads, "peak_gflops_of_a_thread": round(best, 1)}
    for name, rounds in found.items():
        parts = min((parts for _, parts in rounds), key=lambda one: sum(one.values()))
        cpu = sum(parts.values())
        result[name] = {
            "tokens_per_second_of_a_thread": round(BATCH / cpu, 1),
            "gflops_of_a_thread": round(flops / cpu / 1e9, 1),
            "share_of_peak": round(flops / cpu / 1e9 / best, 3),
            "shares_of_time": {key: round(value / cpu, 3) for key, value in parts.items()},
        }
    # By the clock, and so with what else was running.
    alone = min(seconds for seconds, _ in found["16 sampled"])
    result["clock"] = {
        "load": [round(load, 1) for load in os.getloadavg()],
        "tokens_per_second": round(BATCH * threads / alone, 1),
        "tokens_per_second_one_batch": round(BATCH / min(together), 1),
    }
    print(json.dumps(result, indent=2))
    write_json(OUT, result)


if __name__ == "__main__":
    main()
