"""How fast could scoring be? The seconds of the products of matrices that the suite cannot do without.

    python benchmarks/evaluation_bound.py --model results/desk/runs/baseline-s0/checkpoints/step-0001000

Counted, for all items of the six benchmarks in the mode `harness`, are the tokens that go through the model
once what options and pairs share is computed once, and the positions that get logits. Two operations for each
weight that they are multiplied with, at the peak that results/benchmarks/evaluation.json names, are the least
that these take: attention, norms, the softmax and Python come on top. Beside it stand that file's seconds
of the same model; `--random STUDY` names its model of random weights.

Writes results/benchmarks/evaluation_bound.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from command import add_models, add_places, command
from evaluation_growth import SUITE, work
from machine import CODE
from random_models import add_random, chosen_models

from stlm.errors import UserError
from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.token_model import TokenModel
from stlm.files import read_json, write_json
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint

OUTPUT = Path("results/benchmarks/evaluation_bound.json")
MEASURED = Path("results/benchmarks/evaluation.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser)
    add_random(parser)
    add_places(parser, OUTPUT)
    return command(parser, run)


def run(options: argparse.Namespace) -> None:
    """Count, compare, print and write."""
    measured = read_json(MEASURED)["models"]
    content: dict[str, Any] = {"code": CODE, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        _count(chosen_models(options, Path(folder)), measured, content, options)
    write_json(options.output, content)


def _count(
    models: dict[str, Path], measured: dict[str, Any], content: dict[str, Any], options: argparse.Namespace
) -> None:
    for name_of_model, checkpoint in models.items():
        transformer, description = load_checkpoint(checkpoint)
        digest = description["weights_sha256"]
        model = TokenModel(transformer, RequestEncoder(load_tokenizer(checkpoint.parent / "tokenizer")))
        own: dict[str, Any] = {"benchmarks": {}}
        for name in SUITE:
            _, items = BENCHMARKS[name].load(options.raw / BENCHMARKS[name].data_name)
            requests = [option.request("harness") for item in items for option in item.options]
            own["benchmarks"][name] = work(model, model.encoder(requests))
        blocks = sum(p.numel() for name, p in transformer.named_parameters() if _is_block_matrix(name, p))
        head = transformer.output.weight.numel()
        own["flops"] = sum(
            2 * (w["tokens"] * blocks + w["logits"] * head) for w in own["benchmarks"].values()
        )
        for dtype, result in _of(measured, digest, checkpoint).items():
            peak = result["peak_gflops"]
            seconds, found = own["flops"] / peak / 1e9, result["suite"]["seconds_of_all_items"]
            own[dtype] = {
                "peak_gflops": peak,
                "seconds_at_peak": round(seconds, 1),
                "seconds": found,
                "largest_ratio": round(found["lm_eval"] / seconds, 2),
                "ratio": result["suite"]["ratio"],
            }
            print(name_of_model, dtype, own[dtype], flush=True)
        content["models"][name_of_model] = own


def _is_block_matrix(name: str, parameter: Any) -> bool:
    return name.startswith("blocks.") and parameter.dim() == 2


def _of(measured: dict[str, Any], digest: str, checkpoint: Path) -> dict[str, Any]:
    """The measurements of the model with these weights, by arithmetic."""
    for model in measured.values():
        if all(b["weights_sha256"] == digest for own in model.values() for b in own["benchmarks"].values()):
            return model
    raise UserError(f"{MEASURED}: no model with the weights of {checkpoint}; run benchmarks/evaluation.py")


if __name__ == "__main__":
    sys.exit(main())
