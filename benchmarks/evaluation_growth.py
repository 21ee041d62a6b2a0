"""How the cost of scoring grows with items, options and context.

    python benchmarks/evaluation_growth.py --model results/desk/runs/baseline-s0/checkpoints/step-0001000

Items of random tokens: a context, and options after it. One of the three numbers varies at a time. Beside the
seconds stand the tokens that went through the model and the positions that got logits, of which the cost is
made (docs/evaluation.md). For the benchmarks in `--raw`, too, beside the tokens of each option by itself.

Writes results/benchmarks/evaluation_growth.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import add_places, command, label
from machine import machine
from torch import Tensor, nn

from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.hf_model import Shape
from stlm.evaluation.token_model import TokenModel
from stlm.files import write_json
from stlm.model.segments import Segments
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint

OUTPUT = Path("results/benchmarks/evaluation_growth.json")
BASE = {"items": 200, "options": 4, "context": 64}
GROWTH = {"items": (100, 200, 400, 800), "options": (1, 2, 4, 8), "context": (16, 32, 64, 128)}
OPTION_TOKENS = 16
ROUNDS = 3
SUITE = ("blimp", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    add_places(parser, OUTPUT)
    return command(parser, run)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    transformer, _ = load_checkpoint(options.model)
    model = TokenModel(transformer, RequestEncoder(load_tokenizer(options.model.parent / "tokenizer")))
    content: dict[str, Any] = {
        "model": label(options.model),
        "machine": machine(),
        "base": {**BASE, "option_tokens": OPTION_TOKENS},
        "growth": {},
        "benchmarks": {},
    }
    for varied, values in GROWTH.items():
        content["growth"][varied] = [measure(model, {**BASE, varied: value}) for value in values]
        for result in content["growth"][varied]:
            print(varied, result, flush=True)
    for name in SUITE:
        chosen = BENCHMARKS[name]
        if (options.raw / chosen.data_name).is_dir():
            _, items = chosen.load(options.raw / chosen.data_name)
            requests = [option.request("harness") for item in items for option in item.options]
            content["benchmarks"][name] = {"items": len(items), **work(model, model.encoder(requests))}
            print(name, content["benchmarks"][name], flush=True)
    write_json(options.output, content)


def measure(model: TokenModel, shape: dict[str, int]) -> dict[str, Any]:
    """Seconds, of several rounds the fewest, and the work for items of that shape."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(shape["items"]):
        context = rng.integers(model.encoder.tokenizer.vocab_size, size=shape["context"], dtype=np.int32)
        for _ in range(shape["options"]):
            option = rng.integers(model.encoder.tokenizer.vocab_size, size=OPTION_TOKENS, dtype=np.int32)
            encoded.append(Encoded(np.concatenate([context, option]), shape["context"], False))
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        model.score_tokens(encoded)
        seconds.append(time.perf_counter() - begin)
    return {**shape, "seconds": round(min(seconds), 3), **work(model, encoded)}


class Counter(nn.Module):
    """Stands for a model, and counts what it is asked for."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.config = Shape(context, vocab_size=1)
        self.tokens = self.logits = 0

    def hidden(self, tokens_BL: Tensor, segments: Segments | None, rows_N: Tensor) -> Tensor:
        self.tokens += tokens_BL.numel()
        self.logits += len(rows_N)
        return torch.zeros(len(rows_N), 1)

    def head(self, x_ND: Tensor, vocabulary: slice) -> Tensor:
        return torch.zeros_like(x_ND)

    def logit(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        return torch.zeros(len(tokens_N))


def work(model: TokenModel, encoded: Sequence[Encoded]) -> dict[str, int]:
    """Tokens through the model, positions that get logits, and the tokens of each sequence by itself."""
    counter = Counter(model.context)
    TokenModel(counter, model.encoder, batch_tokens=model.batch_tokens).score_tokens(encoded)
    alone = {e.tokens[-(model.context + 1) : -1].tobytes(): len(e.tokens) - 1 for e in encoded}
    return {
        "tokens": counter.tokens,
        "logits": counter.logits,
        "tokens_alone": sum(min(length, model.context) for length in alone.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
