"""Our attention, by a kernel and by torch's products of blocks, beside torch's fused one, on a CPU.

    python benchmarks/attention.py

For some shapes, in float32 and bfloat16: the fastest of several forward and backward passes of each, in turns
in one process.
Writes results/benchmarks/attention.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from stlm.cpu_runtime import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from machine import machine  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from stlm.files import write_json  # noqa: E402
from stlm.kernels import library  # noqa: E402
from stlm.model.causal_attention import causal_attention  # noqa: E402

OUTPUT = Path("results/benchmarks/attention.json")
# Sequences, length, query heads, key/value heads, width of a head.
SHAPES = [
    (4, 512, 16, 4, 32),
    (8, 256, 8, 2, 32),
    (4, 512, 8, 8, 64),
    (2, 1024, 12, 12, 64),
    (16, 128, 8, 2, 16),
]


def kernel(q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
    """Ours."""
    return causal_attention(torch.cat([q_BLHE, k_BLKE, v_BLKE], dim=2), q_BLHE.shape[2])


def blocks(q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
    """Ours where there are no kernels."""
    with mock.patch.object(library, "kernels", return_value=library.Found({})):
        return kernel(q_BLHE, k_BLKE, v_BLKE)


def fused(q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
    """torch's own."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLKE, v_BLKE))
    y_BHLE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y_BHLE.transpose(1, 2)


def seconds(attention: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    """Of one call and its backward pass."""
    begin = time.perf_counter()
    y = attention(*tensors)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    rows = []
    for B, L, H, K, E in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(B, L, n, E, dtype=dtype).requires_grad_() for n in (H, K, K)]
            sides = (kernel, blocks, fused)
            for side in sides:
                seconds(side, tensors)
            times = [[seconds(side, tensors) for side in sides] for _ in range(options.rounds)]
            best = {
                side.__name__: min(own) for side, own in zip(sides, zip(*times, strict=True), strict=True)
            }
            rows.append(
                {
                    "shape": f"{B} x {L}, {H} heads of {E}, {K} of keys",
                    "dtype": str(dtype).removeprefix("torch."),
                    **{f"{name}_ms": round(1e3 * own, 2) for name, own in best.items()},
                    "ratio": round(best["fused"] / best["kernel"], 2),
                    "blocks_ratio": round(best["fused"] / best["blocks"], 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write_json(OUTPUT, {"rounds": options.rounds, "machine": machine(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
