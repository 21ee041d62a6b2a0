"""How fast is a training step of a byte-level model, beside the model of tokens with the same core?

    python benchmarks/bytes.py                         # all shapes; on two CPU cores some ten minutes
    python benchmarks/bytes.py --shape desk --rounds 5 --output desk.json

Both read the same batches of real text, tokenized already (data/tokens/gutenberg_children/), and take steps
in turns in one process, in the arithmetic that training takes on this machine; the fastest step of each
counts. A step is forward, backward, clipping and the optimizer's update. Tokens of the byte-level model are
chunks at the tokens' boundaries, so that tokens/s compare.

Writes results/benchmarks/bytes.json; a part of it (--shape, --side) goes to --output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stlm.cpu_runtime import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from machine import machine  # noqa: E402
from torch import nn  # noqa: E402

from stlm.files import write_json  # noqa: E402
from stlm.model.build import build_model  # noqa: E402
from stlm.model.config import ModelConfig  # noqa: E402
from stlm.model.counts import parameter_counts  # noqa: E402
from stlm.tokens.batches import Batches  # noqa: E402
from stlm.tokens.chunks import SYMBOLS  # noqa: E402
from stlm.tokens.tokenizer import load_tokenizer, tokens_table  # noqa: E402
from stlm.training.config import TrainingConfig  # noqa: E402
from stlm.training.devices import Device, choose_device  # noqa: E402
from stlm.training.optimizers import build_optimizer  # noqa: E402

OUTPUT = Path("results/benchmarks/bytes.json")
# The core's model, the tokenizer, and sequences a step: the study `bytes`, `desk`, and the paper's baseline.
SHAPES: dict[str, tuple[dict[str, int], str, int]] = {
    "bytes": (
        {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn_width": 384, "context": 256},
        "bpe-4096",
        8,
    ),
    "desk": (
        {"layers": 4, "width": 256, "heads": 8, "kv_heads": 2, "ffn_width": 768, "context": 256},
        "bpe-4096",
        8,
    ),
    "paper": ({}, "gpt2", 4),
}
# What takes the place of embedding and head; None: tokens.
SIDES: dict[str, dict[str, Any] | None] = {
    "tokens": None,
    "bytes": {},
    "bytes, query": {"pooling": "query"},
    "bytes, dimension 128": {"width": 128, "heads": 4, "ffn_width": 384},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES), help="default: all")
    parser.add_argument("--side", action="append", choices=tuple(SIDES), help="default: all")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens/gutenberg_children"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if (options.shape or options.side) and not options.output:
        parser.error(f"a part of {OUTPUT} would replace it; name another file with --output")
    where = choose_device(TrainingConfig())
    content: dict[str, Any] = {
        "command": " ".join(["benchmarks/bytes.py", *sys.argv[1:]]),
        "device": where.name,
        "precision": where.precision,
        "machine": machine(),
        "shapes": {},
    }
    for name in options.shape or SHAPES:
        found = measure(name, options, where)
        content["shapes"][name] = found
        print(name, json.dumps(found, indent=1), flush=True)
        write_json(options.output or OUTPUT, content)
    return 0


def measure(name: str, options: argparse.Namespace, where: Device) -> dict[str, Any]:
    """All sides of a shape, in turns."""
    shape, tokenizer_name, batch = SHAPES[name]
    folder = options.tokens / tokenizer_name
    tokenizer = load_tokenizer(folder / "tokenizer")
    core = ModelConfig(**shape)
    batches = Batches(folder, core.context, batch, seed=0)
    tokens = [torch.from_numpy(batches.batch(step)).to(where.device) for step in range(options.steps)]
    names = options.side or list(SIDES)
    configs = {
        side: ModelConfig(
            **shape,
            bytes=SIDES[side],
            vocab_size=tokenizer.vocab_size if SIDES[side] is None else SYMBOLS,
        )
        for side in names
    }
    steps = {}
    for side, config in configs.items():
        torch.manual_seed(0)
        model = build_model(config).to(where.device)
        if config.bytes is not None:
            model.use(tokens_table(tokenizer))
        steps[side] = stepper(model, where)
    seconds: dict[str, list[float]] = {side: [] for side in names}
    for round_number in range(options.rounds + 1):
        for side in names:
            for own in tokens:
                begin = time.perf_counter()
                steps[side](own)
                if round_number:  # the first is for warming up
                    seconds[side].append(time.perf_counter() - begin)
    n_tokens = batch * core.context
    n_bytes = sum(
        len(tokenizer.decode_bytes([t for t in row if t != tokenizer.eot]))
        for own in tokens
        for row in own[:, 1:].tolist()
    ) / len(tokens)
    best = {side: min(own) for side, own in seconds.items()}
    return {
        "model": core.model_dump(exclude={"vocab_size"}),
        "tokenizer": tokenizer_name,
        "batch": batch,
        "bytes_a_token": round(n_bytes / n_tokens, 3),
        "sides": {
            side: {
                "bytes": SIDES[side],
                "parameters": parameter_counts(configs[side])._asdict(),
                "seconds_a_step": round(best[side], 4),
                "median_seconds": round(sorted(seconds[side])[len(seconds[side]) // 2], 4),
                "tokens_per_second": round(n_tokens / best[side], 1),
                "bytes_per_second": round(n_bytes / best[side], 1),
                "of_tokens_speed": round(best["tokens"] / best[side], 3) if "tokens" in best else None,
            }
            for side in names
        },
    }


def stepper(model: nn.Module, where: Device) -> Callable[[torch.Tensor], None]:
    """A function that takes one training step on tokens [B, L + 1]."""
    optimizer = build_optimizer(model, TrainingConfig(), where.dtype)
    model.train()

    def step(tokens_BM: torch.Tensor) -> None:
        with where.autocast():
            loss = model.loss(tokens_BM[:, :-1], tokens_BM[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if where.device.type == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    sys.exit(main())
