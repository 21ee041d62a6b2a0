"""Speculative decoding: speed, acceptance and memory of a model alone, with its exits, with a smaller model.

    python benchmarks/decoding.py [--steps 400] [--tokens 128] [--rounds 3] [--quick]
    python benchmarks/decoding.py --run STUDY/RUN [--draft STUDY/SMALL ...]

Without --run it trains a model with early exits and a smaller one for `--steps` steps on generated stories,
with one tokenizer. Drafts are all exits of the model and the smaller model, or those named, each at several
lengths. All ways continue the same beginnings of stories, one text at a time, in float32, in turns; of
several rounds the fastest counts. Greedy text is the same in all ways, which is checked; sampled text has the
same distribution. Memory is what weights and caches take, of the draft, too.

Writes results/benchmarks/decoding.json, but not with --quick, which only tries everything out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stlm.cpu_runtime import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from command import command  # noqa: E402
from machine import machine  # noqa: E402

from stlm.corpora.synthetic import corpus  # noqa: E402
from stlm.errors import UserError  # noqa: E402
from stlm.evaluation.readouts import readouts_of  # noqa: E402
from stlm.files import write_json  # noqa: E402
from stlm.generation.drafts import Way, measure  # noqa: E402
from stlm.generation.find import choose_device, find_generator, find_speculator  # noqa: E402
from stlm.generation.sampling import Sampling  # noqa: E402
from stlm.generation.speculation import Drafting, Statistics  # noqa: E402
from stlm.generation.speculators import ExitSpeculator, SiblingSpeculator  # noqa: E402
from stlm.generation.tokens import TokenGenerator  # noqa: E402
from stlm.model.build import build_model  # noqa: E402
from stlm.model.config import ModelConfig  # noqa: E402
from stlm.model.transformer import Transformer  # noqa: E402
from stlm.techniques.early_exit import EarlyExit  # noqa: E402
from stlm.tokens.bpe import train_bpe  # noqa: E402
from stlm.tokens.tokenizer import Tokenizer  # noqa: E402
from stlm.training.objective import Forward  # noqa: E402

RESULT = Path("results/benchmarks/decoding.json")
SAMPLINGS = {"greedy": Sampling(temperature=0), "sampled": Sampling(temperature=0.8)}
LENGTHS = (1, 2, 4, 8)
VOCABULARY = 1024
LARGE = {"layers": 8, "width": 256, "heads": 8, "kv_heads": 2, "ffn_width": 704, "context": 256}
SMALL = {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "ffn_width": 352, "context": 256}


def trained(
    size: dict[str, int], stream: torch.Tensor, steps: int, early_exit: EarlyExit | None
) -> Transformer:
    """A model of stories; with the technique, its exits are trained, too."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, dropout=0.0, **size)
    model = build_model(config, (early_exit,) if early_exit else ()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(2, steps), pct_start=0.1)
    for step in range(1, steps + 1):
        begins = torch.randint(len(stream) - config.context, (8, 1))
        rows_BM = stream[begins + torch.arange(config.context + 1)]
        tokens_BL, targets_BL = rows_BM[:, :-1], rows_BM[:, 1:]
        if early_exit:
            early_exit.before_step(model, step, steps)
            parts = early_exit.objective(Forward(model, tokens_BL, targets_BL, None, step, steps))
            loss = torch.stack(list(parts.values())).sum()
        else:
            loss = model.loss(tokens_BL, targets_BL)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def own_speculators(steps: int) -> dict[str, TokenGenerator | SiblingSpeculator]:
    """A model trained here, alone and with each of its drafts."""
    stories = corpus(0, 2000)["text"]
    tokenizer = train_bpe(f"bpe-{VOCABULARY}", stories)
    stream = torch.tensor([token for text in stories for token in (tokenizer.eot, *tokenizer.encode(text))])
    large = trained(LARGE, stream, steps, EarlyExit(p_max=0.1, scale=0.2))
    small = trained(SMALL, stream, steps, None)
    return {
        "alone": TokenGenerator(large, tokenizer),
        **_exits(large, tokenizer),
        "smaller model": SiblingSpeculator(
            TokenGenerator(large, tokenizer), TokenGenerator(small, tokenizer)
        ),
    }


def _exits(model: Transformer, tokenizer: Tokenizer) -> dict[str, ExitSpeculator]:
    return {name: ExitSpeculator(model, tokenizer, first) for name, first in readouts_of(model).items()}


def named_speculators(run: str, drafts: Sequence[str]) -> dict[str, TokenGenerator | SiblingSpeculator]:
    """A run by name, alone and with each of its drafts."""
    device = choose_device(None)
    alone = find_generator(run, device)
    if not isinstance(alone, TokenGenerator):
        raise UserError(f"--run {run}: expected a run whose model is one of tokens")
    exits = {} if drafts else _exits(alone.transformer, alone.tokenizer)
    return {"alone": alone, **exits, **{name: find_speculator(run, name, device) for name in drafts}}


def memory(generator: TokenGenerator | SiblingSpeculator) -> dict[str, int]:
    """Bytes of weights and caches, of all models that take part; weights that two share count once."""
    sides = (
        [generator._model, generator._sibling] if isinstance(generator, SiblingSpeculator) else [generator]
    )
    weights = {id(p): p.nbytes for side in sides for p in side.transformer.parameters()}
    return {"weights": sum(weights.values()), "caches": sum(side._cache.kv.nbytes for side in sides)}


def row(seconds: list[float], statistics: Statistics, alone: float, tokens: int) -> dict[str, Any]:
    """What is written of one way."""
    return {
        "tokens a second": round(tokens / min(seconds), 1),
        "times as fast as alone": round(alone / min(seconds), 3),
        "acceptance": round(statistics.acceptance, 4) if statistics.drafted else None,
        "tokens a pass of the model": round(statistics.tokens_per_pass, 3) if statistics.passes else None,
        "all seconds": [round(one, 3) for one in seconds],
    }


def said(way: Way, prompt: str, tokens: int) -> list[int]:
    """The greedy text."""
    return list(itertools.islice(way.symbols(prompt, tokens, SAMPLINGS["greedy"], 0, Statistics()), tokens))


def run(options: argparse.Namespace) -> None:
    """Measure, write, print."""
    lengths, tokens, rounds, steps = LENGTHS, options.tokens, options.rounds, options.steps
    if options.quick:
        lengths, tokens, rounds, steps = (2,), 8, 1, 2
    speculators = named_speculators(options.run, options.draft) if options.run else own_speculators(steps)
    prompts = [text[:24] for text in corpus(1, 1 if options.quick else 4)["text"]]
    ways = {"alone": Way(speculators["alone"])}
    for name, speculator in speculators.items():
        if name != "alone":
            ways |= {f"{name}, {length} tokens": Way(speculator, Drafting(length)) for length in lengths}
    for prompt in prompts:
        expected = said(ways["alone"], prompt, tokens)
        for name, way in ways.items():
            assert said(way, prompt, tokens) == expected, f"{name} says something else after {prompt!r}"
    result: dict[str, Any] = {
        "model": options.run or {"steps": steps, "model": LARGE, "smaller model": SMALL},
        "memory in bytes": {name: memory(one) for name, one in speculators.items()},
        "texts": len(prompts),
        "tokens of each": tokens,
    }
    for kind, sampling in SAMPLINGS.items():
        measured = measure(ways, prompts, tokens, sampling, rounds)
        alone = min(measured["alone"][0])
        drawn = tokens * len(prompts)
        result[kind] = {name: row(*found, alone, drawn) for name, found in measured.items()}
    result["machine"] = machine()
    if not options.quick:
        write_json(RESULT, result)
    print(json.dumps(result, indent=2))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="a run; default: a model trained here")
    parser.add_argument(
        "--draft", action="append", default=[], help="of --run, repeatable; default: its exits"
    )
    parser.add_argument("--steps", type=int, default=400, help="of training; default: 400")
    parser.add_argument("--tokens", type=int, default=128, help="of each text; default: 128")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts; default: 3")
    parser.add_argument("--quick", action="store_true", help="try everything out, and write nothing")
    return command(parser, run)


if __name__ == "__main__":
    raise SystemExit(main())
