"""Tokens a second of generation: with the cache of keys and values, without, and in transformers.

    python benchmarks/generation.py [--tokens 128] [--rounds 3] [--parts P...] [--studies S...]

The shapes are the baselines' of the studies desk and paper, with random weights: the speed does not depend on
them, but for one thing. The head is screened (`stlm.model.inference`), and how many of its rows are then read
in float32 depends on how close the largest logits are; of random weights they are closer than of trained
ones. All sides continue the same eight tokens, one text at a time, in float32, with the same weights and as
many threads, and take turns; of several rounds the fastest counts. `stlm`, `stlm, torch's operations` and
`stlm, no cache` always take the most probable token, as `generate` of transformers does here (with its own
cache); `stlm, top-k` draws with top-k, top-p and min-p, `stlm, sampled` from the whole distribution. The end
of a text ends none of them. That all greedy sides say the same is checked.

Then many prompts at once: tokens a second of 32 texts with prompts of 8 to 64 tokens, and how many times that
is of one text at a time; and the seconds until all prompts are read, packed in one pass and one by one.

Then bytes a second of byte-level models with the cores of the studies bytes and desk, with and without the
cache, beside models of tokens with the same core, a token counted as the bytes that it has on average in that
corpus. Chunks end every four bytes, so that how many there are does not depend on the weights.

Writes results/benchmarks/generation.json; of some parts (models, batches, byte-level) or studies, what is
measured, and the rest stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stlm.cpu_runtime import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from machine import machine  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from stlm.export.llama import llama_config, llama_weights  # noqa: E402
from stlm.files import write_json  # noqa: E402
from stlm.generation.batch import Batch  # noqa: E402
from stlm.generation.bytes import ByteGenerator  # noqa: E402
from stlm.generation.sampling import Sampling, one_by_one  # noqa: E402
from stlm.generation.tokens import TokenGenerator  # noqa: E402
from stlm.model.build import build_model  # noqa: E402
from stlm.model.config import ModelConfig  # noqa: E402
from stlm.model.counts import parameter_counts  # noqa: E402
from stlm.model.transformer import Transformer  # noqa: E402
from stlm.study.load import load_study  # noqa: E402
from stlm.tokens.chunks import SYMBOLS  # noqa: E402
from stlm.tokens.tokenizer import ByteTokenizer, ChunkTokenizer  # noqa: E402

RESULT = Path("results/benchmarks/generation.json")
# With the end of text before it, eight tokens.
PROMPT = "Once up"
GREEDY = Sampling(temperature=0)
TOP_K = Sampling(temperature=0.8, top_k=200, top_p=0.95, min_p=0.01)
SAMPLED = Sampling(temperature=0.8)
# Texts at once, the default of `stlm generate --prompts`, with prompts of these numbers of bytes in turn.
TEXTS = 32
LENGTHS = (7, 15, 31, 63)
# Of bpe-4096 on gutenberg_children, the tokenizer and corpus of both studies.
BYTES_A_TOKEN = 3.47


class Generator(TokenGenerator):
    """A generator whose texts do not end; with `fast` off, all passes are of torch's operations."""

    fast = True

    def restart(self, tokens: Sequence[int]) -> None:
        """As that of the class above."""
        super().restart(tokens)
        if not self.fast:
            self._inference = None


def say(generator: TokenGenerator, tokens: int, sampling: Sampling, prompt: str = PROMPT) -> list[int]:
    """So many tokens after the prompt, as `stlm generate` draws them."""
    numbers = torch.Generator().manual_seed(0)
    logits_V = generator.start(prompt)
    generator.eot = -1
    said = list(itertools.islice(one_by_one(generator, logits_V, sampling, numbers), tokens))
    generator.eot = generator.tokenizer.eot
    return said


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

    cached, plain = Generator(model, tokenizer), Generator(model, tokenizer, cached=False)
    slow = Generator(model, tokenizer)
    slow.fast = False
    return {
        "stlm": lambda: say(cached, tokens, GREEDY),
        "stlm, top-k": lambda: say(cached, tokens, TOP_K),
        "stlm, sampled": lambda: say(cached, tokens, SAMPLED),
        "stlm, torch's operations": lambda: say(slow, tokens, GREEDY),
        "stlm, no cache": lambda: say(plain, tokens, GREEDY),
        "transformers": theirs,
    }


def baseline(study: str) -> ModelConfig:
    """The model of a study's row `baseline`."""
    return load_study(study, ["seeds=[0]"]).runs["baseline"].model


def timed(ways: dict[str, Callable[[], list[int]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Every time, in milliseconds' steps."""
    return {name: [round(one, 3) for one in times] for name, times in seconds.items()}


def measure(config: ModelConfig, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each side."""
    ways = sides(config, tokens)
    said = {name: way() for name, way in ways.items()}  # warms up
    for name in ("stlm, torch's operations", "stlm, no cache", "transformers"):
        assert said[name] == said["stlm"], f"{name} says something else than stlm"
    seconds = timed(ways, rounds)
    speed = {name: round(tokens / min(times), 1) for name, times in seconds.items()}
    return {
        "parameters": parameter_counts(config).total,
        "tokens": tokens,
        "tokens a second": speed,
        "times as fast as no cache": round(speed["stlm"] / speed["stlm, no cache"], 2),
        "times as fast as transformers": round(speed["stlm"] / speed["transformers"], 2),
        "all seconds": rounded(seconds),
    }


def measure_batch(config: ModelConfig, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of many texts at once and of one at a time, and seconds to read their prompts."""
    torch.manual_seed(0)
    model, tokenizer = Transformer(config).eval(), ByteTokenizer()
    generator = Generator(model, tokenizer)
    letters = "the quick brown fox jumps over the lazy dog, and again; " * 2
    prompts = [letters[: LENGTHS[place % len(LENGTHS)]] for place in range(TEXTS)]
    some = prompts[: len(LENGTHS)]
    seeds = [0] * TEXTS

    def at_once(many: Sequence[str], length: int) -> list[list[int]]:
        return [row.drawn for row in Batch(generator, GREEDY).write(many, seeds[: len(many)], length)]

    ways: dict[str, Callable[[], object]] = {
        "at once": lambda: at_once(prompts, tokens),
        # A few stand for all: a text takes the same time alone, whatever the others are.
        "one by one": lambda: [say(generator, tokens, GREEDY, prompt) for prompt in some],
        "prompts at once": lambda: at_once(prompts, 1),
        "prompts one by one": lambda: [say(generator, 1, GREEDY, prompt) for prompt in prompts],
    }
    said = {name: way() for name, way in ways.items()}  # warms up
    # Alone, an end of text does not end it: what comes before must be the same.
    for together, alone in zip(said["at once"], said["one by one"], strict=False):
        assert together == alone[: len(together)], "texts at once say something else"
    drawn = sum(map(len, said["at once"]))
    seconds = timed(ways, rounds)
    best = {name: min(times) for name, times in seconds.items()}
    speed = {
        "at once": round(drawn / best["at once"], 1),
        "one by one": round(len(some) * tokens / best["one by one"], 1),
    }
    return {
        "texts": TEXTS,
        "tokens of the prompts": sum(len(tokenizer.encode(prompt)) + 1 for prompt in prompts),
        "tokens drawn at once": drawn,
        "tokens a second": speed,
        "times as fast as one by one": round(speed["at once"] / speed["one by one"], 2),
        "times as fast, reading prompts": round(best["prompts one by one"] / best["prompts at once"], 2),
        "all seconds": rounded(seconds),
    }


def say_bytes(generator: ByteGenerator, length: int) -> list[int]:
    """So many bytes after the prompt, the most probable ones; the end of a text, the last symbol, is none."""
    said: list[int] = []
    logits_S = generator.start(PROMPT)
    while True:
        said.append(int(GREEDY.choose(logits_S[: generator.eot])))
        if len(said) == length:
            return said
        logits_S = generator.next(said[-1])


def measure_bytes(core: ModelConfig, tokens: int, rounds: int) -> dict[str, Any]:
    """Bytes a second of a byte-level model and of a model of tokens with the same core."""
    config = ModelConfig.model_validate(
        {**core.model_dump(), "vocab_size": SYMBOLS, "tied": False, "bytes": {}}
    )
    torch.manual_seed(0)
    plain, model = build_model(core), build_model(config)
    length = round(tokens * BYTES_A_TOKEN)
    ways: dict[str, Callable[[], list[int]]] = {}
    for end, cached in (("", True), (", no cache", False)):
        of_tokens = TokenGenerator(plain, ByteTokenizer(), cached)
        of_bytes = ByteGenerator(model, ChunkTokenizer("stride-4", []), cached)
        ways[f"tokens{end}"] = partial(say, of_tokens, tokens, GREEDY)
        ways[f"bytes{end}"] = partial(say_bytes, of_bytes, length)
    said = {name: way() for name, way in ways.items()}  # warms up
    for name in ("tokens", "bytes"):
        assert said[name] == said[f"{name}, no cache"], f"{name} without the cache are others"
    seconds = timed(ways, rounds)
    speed = {name: round(tokens * BYTES_A_TOKEN / min(times), 1) for name, times in seconds.items()}
    return {
        "parameters": {"tokens": parameter_counts(core).total, "bytes": parameter_counts(config).total},
        "bytes": length,
        "bytes a token": BYTES_A_TOKEN,
        "bytes a second": speed,
        "times as fast as no cache": round(speed["bytes"] / speed["bytes, no cache"], 2),
        "times as fast as tokens": round(speed["bytes"] / speed["tokens"], 2),
        "all seconds": rounded(seconds),
    }


# What is measured, and the studies whose baselines it is measured of.
PARTS = {
    "models": (measure, ("desk", "paper")),
    "batches": (measure_batch, ("desk", "paper")),
    "byte-level": (measure_bytes, ("bytes", "desk")),
}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="added to the prompt; default: 128")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts; default: 3")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--studies", nargs="+", choices=("bytes", "desk", "paper"), help="default: all")
    options = parser.parse_args()
    chosen = [
        (part, name)
        for part in options.parts
        for name in PARTS[part][1]
        if options.studies is None or name in options.studies
    ]
    everything = sum(len(studies) for _, studies in PARTS.values())
    before = json.loads(RESULT.read_text()) if len(chosen) < everything else {}
    result = {part: before.get(part, {}) for part in PARTS}
    for part, name in chosen:
        measured = PARTS[part][0](baseline(name), options.tokens, options.rounds)
        result[part] = {**result[part], f"{name}/baseline": measured, "machine": machine()}
    write_json(RESULT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
