"""How fast is scoring, beside the reference harness? Both score the same checkpoint on the same items.

    python benchmarks/evaluation.py --model results/desk/runs/baseline-s0/checkpoints/step-0001000 --share .05

Their side is `lm_eval` with its model `hf` and its default of batches, on the checkpoint exported for
`transformers`; ours is what `stlm evaluate` runs, in the mode `harness`. The two take turns, benchmark by
benchmark, on the same CPU with as many threads and in the same arithmetic. Timed is what turns requests,
which are texts, into log-probabilities: encoding and scoring (`loglikelihood` there, `scoring.score` here,
where near ties in bfloat16 are scored again in float32). Building the tasks is left out of the ratio, on both
sides. Of several rounds the fastest counts.

    python benchmarks/evaluation.py --random paper --dtype float32 --benchmark mmlu --add

times one benchmark with a model of random weights, of the shape of a study's baseline, and adds the result to
the file, whose other results must have been made in the same way on the same machine. One that the file
already has gets further rounds.

    python benchmarks/evaluation.py --published data/raw/smollm2_135m --prefix '<|endoftext|>' --share .01

times a published model that is a plain Llama, loaded by ours and by `transformers` from the same folder.

Writes results/benchmarks/evaluation.json after each benchmark.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
from command import add_models, add_places, command
from harness_parity import prepare
from harness_tasks import HARNESS_TASKS, task_manager
from lm_eval.models.huggingface import HFLM
from machine import machine
from random_models import add_random, chosen_models

from stlm.errors import UserError
from stlm.evaluation import scoring
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.hf_folder import weights_sha256
from stlm.evaluation.hf_model import HfRequestEncoder
from stlm.evaluation.plain_llama import load_plain_llama
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json, write_json
from stlm.generation.published import is_published
from stlm.model.transformer import Transformer
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint

OUTPUT = Path("results/benchmarks/evaluation.json")
# Items in all: a sample's seconds count as many times as the benchmark is larger.
WHOLE = {
    "blimp": 67_000,
    "hellaswag": 10_042,
    "arc_easy": 2_376,
    "arc_challenge": 1_172,
    "winogrande": 1_267,
    "mmlu": 14_042,
}
SUITE = tuple(WHOLE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser)
    add_random(parser)
    parser.add_argument(
        "--published",
        action="append",
        default=[],
        type=Path,
        help="the folder of a published model, a plain Llama (repeatable)",
    )
    parser.add_argument("--prefix", help="the token that starts its texts; default: its bos or eos")
    parser.add_argument("--add", action="store_true", help="keep the other results of the file")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of both sides; default: cpu"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16"),
        help="arithmetic of both sides (repeatable); default: both",
    )
    parser.add_argument("--benchmark", action="append", choices=SUITE, help="default: all (repeatable)")
    parser.add_argument("--share", type=float, default=0.05, help="fraction of the items; default: 0.05")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: 0")
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts; default: 2")
    parser.add_argument("--batch", type=int, default=32, help="lm_eval's batch size; default: 32")
    add_places(parser, OUTPUT)
    return command(parser, run)


def run(options: argparse.Namespace) -> None:
    """Time every model in every arithmetic, writing after each benchmark."""
    datasets.disable_progress_bars()
    content = _content(options)
    with tempfile.TemporaryDirectory() as folder:
        published = {one.name: one for one in options.published}
        named = options.model or options.random or not published
        models = chosen_models(options, Path(folder)) if named else {}
        for name, checkpoint in {**models, **published}.items():
            _time_model(name, checkpoint, content, options)


def _content(options: argparse.Namespace) -> dict[str, Any]:
    """What the file says of all results; with `--add` the file itself, which must say the same."""
    content: dict[str, Any] = {
        "command": f"benchmarks/evaluation.py --share {options.share:g} --rounds {options.rounds}",
        "share": options.share,
        "seed": options.seed,
        "rounds": options.rounds,
        "lm_eval_batch": options.batch,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "machine": machine(),
        "models": {},
    }
    if not (options.add and options.output.exists()):
        return content
    found = read_json(options.output)
    for key in content.keys() - {"models"}:
        if found.get(key) != content[key]:
            raise UserError(
                f"{options.output}: {key}: found {found.get(key)}, expected {content[key]}: results of "
                "another machine or of other options; leave --add out to begin anew"
            )
    return found


def _time_model(model: str, checkpoint: Path, content: dict[str, Any], options: argparse.Namespace) -> None:
    own = content["models"].setdefault(model, {})
    for dtype in options.dtype or ("float32", "bfloat16"):
        known = own.setdefault(dtype, {})
        measured, peak = known.setdefault("benchmarks", {}), known.get("peak_gflops", 0.0)
        for name in options.benchmark or SUITE:
            measured[name] = _with_rounds_of(measured.get(name), _time(checkpoint, dtype, name, options))
            in_order = {one: measured[one] for one in SUITE if one in measured}
            peak = max(peak, peak_gflops(dtype, options.device))
            own[dtype] = {
                "peak_gflops": peak,
                "benchmarks": in_order,
                "suite": suite(in_order, own.get("float32")),
            }
            write_json(options.output, content)
            print(line(model, dtype, name, measured[name]), flush=True)
        print(f"{model} {dtype}: {own[dtype]['suite']}", flush=True)


def _with_rounds_of(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """The result `found` with the rounds of an earlier one, of the same weights and items."""
    if before is None or before["weights_sha256"] != found["weights_sha256"]:
        return found
    rounds = {side: before["all_seconds"][side] + times for side, times in found["all_seconds"].items()}
    best = {side: min(times) for side, times in rounds.items()}
    ratio = round(best["lm_eval"] / best["stlm"], 2)
    return {**found, "seconds": best, "all_seconds": rounds, "ratio": ratio}


def _load(
    checkpoint: Path, temporary: Path, prefix: str | None
) -> tuple[Transformer, Callable[[], RequestEncoder], str, Path]:
    """Our model, what makes new encoders, the digest of the weights, and the folder for `transformers`."""
    if is_published(checkpoint):
        loaded = load_plain_llama(checkpoint, prefix=prefix)
        if loaded is None:
            raise UserError(f"{checkpoint}: no plain Llama; ours would be a model of transformers, too")
        transformer, words = loaded
        return transformer, partial(HfRequestEncoder, words), weights_sha256(checkpoint), checkpoint
    transformer, description = load_checkpoint(checkpoint)
    tokenizer = load_tokenizer(checkpoint.parent / "tokenizer")
    export_llama(checkpoint, temporary / "model")
    digest = description["weights_sha256"]
    return transformer, partial(RequestEncoder, tokenizer), digest, temporary / "model"


def _time(checkpoint: Path, dtype: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One benchmark on both sides, in turns. The sides keep nothing from round to round."""
    with tempfile.TemporaryDirectory() as temporary:
        transformer, make_encoder, digest, exported = _load(checkpoint, Path(temporary), options.prefix)
        sample = prepare(
            name,
            options.raw / (HARNESS_TASKS[name].data or name),
            Path(temporary) / name,
            make_encoder(),
            transformer.config.context,
            options.share,
            options.seed,
        )
        theirs = HFLM(
            pretrained=str(exported),
            device=options.device,
            dtype=dtype,
            batch_size=options.batch,
            prefix_token_id=make_encoder().eot,
        )
        manager = task_manager(sample.folder)
        model = TokenModel(transformer, make_encoder(), options.device, dtype)
        watch = Stopwatch(theirs.loglikelihood)
        theirs.loglikelihood = watch
        seconds: dict[str, list[float]] = {"stlm": [], "lm_eval": [], "lm_eval_whole": []}
        for _ in range(options.rounds):
            watch.seconds = 0.0
            begin = time.perf_counter()
            found = lm_eval.simple_evaluate(
                model=theirs, tasks=[HARNESS_TASKS[name].name], task_manager=manager, log_samples=False
            )
            seconds["lm_eval_whole"].append(time.perf_counter() - begin)
            seconds["lm_eval"].append(watch.seconds)
            # Encoders remember texts.
            model.encoder = model.precise.encoder = make_encoder()
            begin = time.perf_counter()
            scores = scoring.score(model, sample.items, ["harness"])["harness"]
            summary = scoring.summarize(sample.benchmark, "harness", sample.items, scores)
            seconds["stlm"].append(time.perf_counter() - begin)
    best = {side: min(times) for side, times in seconds.items()}
    reported = found["results"][HARNESS_TASKS[name].name]
    return {
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "weights_sha256": digest,
        "items": len(sample.items),
        "options": sum(len(item.options) for item in sample.items),
        "seconds": {side: round(value, 3) for side, value in best.items()},
        "all_seconds": {side: [round(value, 3) for value in times] for side, times in seconds.items()},
        "ratio": round(best["lm_eval"] / best["stlm"], 2),
        "accuracy": {
            metric: {"stlm": summary[metric]["value"], "lm_eval": reported[f"{metric},none"]}
            for metric in ("acc", "acc_norm")
            if metric in summary
        },
    }


def peak_gflops(dtype: str, device: str, size: int = 2048, rounds: int = 10) -> float:
    """The speed of a large product of matrices, of which the fastest of several counts."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return round(2 * size**3 / min(seconds) / 1e9, 1)


class Stopwatch:
    """A function that adds up how long its calls take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        found = self.function(*arguments, **named)
        self.seconds += time.perf_counter() - begin
        return found


def suite(benchmarks: dict[str, Any], exact: dict[str, Any] | None) -> dict[str, Any]:
    """All benchmarks together, each with the weight of its whole size, and how far accuracies moved.

    `points_from_float32`: percentage points between the accuracies here and in float32, of each side.
    """
    whole = {name: WHOLE[name] / result["items"] for name, result in benchmarks.items()}
    seconds = {
        side: sum(result["seconds"][side] * whole[name] for name, result in benchmarks.items())
        for side in ("stlm", "lm_eval")
    }
    exactly = exact["benchmarks"] if exact else {}
    points = {
        side: {
            f"{name} {metric}": round(100 * (found[side] - exactly[name]["accuracy"][metric][side]), 3)
            for name, result in benchmarks.items()
            if name in exactly
            for metric, found in result["accuracy"].items()
        }
        for side in ("stlm", "lm_eval")
    }
    return {
        "seconds_of_all_items": {side: round(value, 1) for side, value in seconds.items()},
        "ratio": round(seconds["lm_eval"] / seconds["stlm"], 2),
        "points_from_float32": points,
    }


def line(model: str, dtype: str, benchmark: str, result: dict[str, Any]) -> str:
    """A result in a line."""
    seconds, acc = result["seconds"], result["accuracy"]["acc"]
    return (
        f"{model} {dtype} {benchmark}: {result['items']} items, {seconds['stlm']:.2f} s, lm_eval "
        f"{seconds['lm_eval']:.2f} s ({seconds['lm_eval_whole']:.2f} s in all): {result['ratio']:.2f} times; "
        f"acc {100 * acc['stlm']:.2f} and {100 * acc['lm_eval']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
