"""Tokens a second of generation: with the cache of keys and values, without, and in transformers.

    python benchmarks/generation.py [--tokens 128] [--rounds 3]

The shapes are the baselines' of the studies desk and paper, with random weights: the speed does not depend on
them. All sides continue the same eight tokens, one text at a time, in float32, with the same weights and as
many threads, and take turns; of several rounds the fastest counts. `stlm` and `stlm, no cache` always take
the most probable token, as `generate` of transformers does here (with its own cache); `stlm, sampled` draws
with top-k, top-p and min-p. The end of a text ends none of them. That all greedy sides say the same is
checked. Writes results/benchmarks/generation.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stlm.process import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from machine import machine  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from stlm.export.llama import llama_config, llama_weights  # noqa: E402
from stlm.files import write_json  # noqa: E402
from stlm.generation.sampling import Sampling  # noqa: E402
from stlm.generation.tokens import TokenGenerator  # noqa: E402
from stlm.model.config import ModelConfig, parameter_counts  # noqa: E402
from stlm.model.transformer import Transformer  # noqa: E402
from stlm.study import load_study  # noqa: E402
from stlm.tokens.tokenizer import ByteTokenizer  # noqa: E402

RESULT = Path("results/benchmarks/generation.json")
# With the end of text before it, eight tokens.
PROMPT = "Once up"
GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.8, top_k=200, top_p=0.95, min_p=0.01)


def say(generator: TokenGenerator, tokens: int, sampling: Sampling) -> list[int]:
    """So many tokens after the prompt."""
    numbers, said = torch.Generator().manual_seed(0), []
    logits_V = generator.start(PROMPT)
    while True:
        said.append(int(sampling.choose(logits_V, numbers)))
        if len(said) == tokens:
            return said
        logits_V = generator.next(said[-1])


def sides(config: ModelConfig, tokens: int) -> dict[str, Callable[[], list[int]]]:
    """Each way to say so many tokens, with the same random weights."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    # Bytes stand for the first 257 tokens of the vocabulary.
    tokenizer = ByteTokenizer()
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(config))).eval()
    missing, _ = llama.load_state_dict(llama_weights(model), strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    prompt_1L = torch.tensor([[tokenizer.eot, *tokenizer.encode(PROMPT)]])

    def theirs() -> list[int]:
        said = llama.generate(
            prompt_1L,
            attention_mask=torch.ones_like(prompt_1L),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return said[0, prompt_1L.shape[1] :].tolist()

    cached, plain = TokenGenerator(model, tokenizer), TokenGenerator(model, tokenizer, cached=False)
    return {
        "stlm": lambda: say(cached, tokens, GREEDY),
        "stlm, sampled": lambda: say(cached, tokens, SAMPLED),
        "stlm, no cache": lambda: say(plain, tokens, GREEDY),
        "transformers": theirs,
    }


def measure(config: ModelConfig, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each side, in turns."""
    ways = sides(config, tokens)
    said = {name: way() for name, way in ways.items()}  # warms up
    for name in ("stlm, no cache", "transformers"):
        assert said[name] == said["stlm"], f"{name} says something else than stlm"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    speed = {name: round(tokens / min(times), 1) for name, times in seconds.items()}
    return {
        "parameters": parameter_counts(config).total,
        "tokens": tokens,
        "tokens a second": speed,
        "times as fast as no cache": round(speed["stlm"] / speed["stlm, no cache"], 2),
        "times as fast as transformers": round(speed["stlm"] / speed["transformers"], 2),
        "all seconds": {name: [round(one, 3) for one in times] for name, times in seconds.items()},
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="added to the prompt; default: 128")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts; default: 3")
    options = parser.parse_args()
    shapes = {}
    for name in ("desk", "paper"):
        study = load_study(name)
        shapes[f"{name}/{study.baseline}"] = study.runs[study.baseline].model
    result = {
        "models": {name: measure(own, options.tokens, options.rounds) for name, own in shapes.items()},
        "sampling": str(SAMPLED),
        "machine": machine(),
    }
    write_json(RESULT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
