"""Are our scores those of the reference harness? Both score the same checkpoint on the same items.

    python benchmarks/parity.py --model results/desk/runs/baseline-s0/checkpoints/step-0001000 --share 0.01

Their side is `lm_eval`: its tasks, prompts, its model `hf` and its accuracies, on the checkpoint exported
for `transformers`; ours is what `stlm evaluate` runs, both in float32 on the CPU. Compared are, request by
request, the text, the token ids and the log-probability, and the accuracies with their standard errors. Two
rules differ, and their effect is counted: k tied options count 1/k here, lm_eval takes the first; and lm_eval
refuses an option longer than the context, which is left out on both sides.

Writes results/benchmarks/parity.json after each benchmark; a second call with the same settings goes on from
there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from command import add_models, add_places, command, default_checkpoints, label
from harness_parity import RecordingHFLM, agrees, compare, prepare
from harness_tasks import HARNESS_TASKS
from machine import CODE, machine

from stlm.errors import UserError, nearest
from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import SCORING_VERSION
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json, sha256, write_json
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint

OUTPUT = Path("results/benchmarks/parity.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser)
    parser.add_argument("--benchmark", action="append", help="default: every one in data/raw (repeatable)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="fraction of the items, drawn at random; default: 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: 0")
    add_places(parser, OUTPUT)
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Compare every model on every benchmark, writing after each; 1 where something does not agree."""
    datasets.disable_progress_bars()
    present = [name for name, task in HARNESS_TASKS.items() if (options.raw / (task.data or name)).is_dir()]
    present = [name for name in present if name in BENCHMARKS]
    if not present:
        raise UserError(
            f"--raw {options.raw}: none of {', '.join(HARNESS_TASKS)}; run: stlm fetch blimp, ..."
        )
    for name in options.benchmark or []:
        if name not in present:
            raise UserError(f"--benchmark {name}: not in {options.raw}{nearest(name, present)}")
    settings = {"share": options.share, "seed": options.seed}
    content: dict[str, Any] = {
        "command": f"benchmarks/parity.py --share {options.share:g}",
        **settings,
        "models": {},
    }
    if options.output.exists():
        earlier = read_json(options.output)
        if all(earlier.get(key) == value for key, value in settings.items()):
            content = earlier
    for checkpoint in options.model or default_checkpoints():
        _, description = load_checkpoint(checkpoint)
        known = content["models"].get(label(checkpoint))
        if known is None or known["weights_sha256"] != description["weights_sha256"]:
            known = {"weights_sha256": description["weights_sha256"], "benchmarks": {}}
            content["models"][label(checkpoint)] = known
        _compare_model(checkpoint, known, options.benchmark or present, options, content)
    return 0 if summary(content["models"])["agrees"] else 1


def _compare_model(
    checkpoint: Path,
    known: dict[str, Any],
    names: Sequence[str],
    options: argparse.Namespace,
    content: dict[str, Any],
) -> None:
    transformer, _ = load_checkpoint(checkpoint)
    tokenizer = load_tokenizer(checkpoint.parent / "tokenizer")
    encoder = RequestEncoder(tokenizer)
    model = TokenModel(transformer, encoder)
    known |= {"tokenizer": tokenizer.name, "context": model.context, "machine": machine()}
    known["machine"].pop("code")  # each benchmark has its own
    with tempfile.TemporaryDirectory() as temporary:
        export_llama(checkpoint, Path(temporary) / "model")
        lm = RecordingHFLM(Path(temporary) / "model")
        for name in names:
            raw = options.raw / (HARNESS_TASKS[name].data or name)
            digests = [sha256(file) for file in BENCHMARKS[name].files(raw)[1]]
            made = {"data_sha256": digests, "scoring_version": SCORING_VERSION}
            earlier = known["benchmarks"].get(name, {})
            if made == {key: earlier.get(key) for key in made}:
                continue
            lm.tokens.clear()
            folder = Path(temporary) / name
            sample = prepare(name, raw, folder, encoder, model.context, options.share, options.seed)
            result = compare(model, lm, sample)
            result = {**result, "agrees": agrees(result), **made, "code": CODE}
            known["benchmarks"][name] = result
            content["summary"] = summary(content["models"])
            write_json(options.output, content)
            print(line(label(checkpoint), name, result), flush=True)


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """All models and benchmarks in a few numbers."""
    results = [result for known in models.values() for result in known["benchmarks"].values()]
    metrics = [metric for result in results for metric in result["metrics"].values()]
    return {
        **{
            key: sum(result[key] for result in results)
            for key in ("items", "requests", "requests_text_differs", "requests_tokens_differ")
        },
        "logprob_max_difference": max(result["logprob_max_difference"] for result in results),
        "accuracy_max_difference": max(abs(metric["difference"]) for metric in metrics),
        "accuracy_max_difference_first_of_ties": max(
            abs(metric["stlm_first_of_ties"]["value"] - metric["lm_eval"]["value"]) for metric in metrics
        ),
        "agrees": all(result["agrees"] for result in results),
    }


def line(model: str, benchmark: str, result: dict[str, Any]) -> str:
    """A result in a line."""
    acc = result["metrics"]["acc"]
    return (
        f"{model} {benchmark}: {result['items']} items, {result['requests']} requests, "
        f"{result['requests_text_differs']} of other text, {result['requests_tokens_differ']} of other "
        f"tokens, log-probabilities within {result['logprob_max_difference']:.1e}; "
        f"acc {100 * acc['stlm']['value']:.2f} and {100 * acc['lm_eval']['value']:.2f}, "
        f"{acc['items_tied']} tied: "
        f"{'agrees' if result['agrees'] else 'DOES NOT AGREE'} "
        f"({result['seconds']['stlm']} s, lm_eval {result['seconds']['lm_eval']} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
