"""What the command lines of the benchmarks of evaluation have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from stlm.errors import UserError


def add_models(parser: argparse.ArgumentParser) -> None:
    """--model, repeatable; see `default_checkpoints`."""
    parser.add_argument(
        "--model",
        action="append",
        type=Path,
        help="a checkpoint's folder (repeatable); default: the last ones of desk's baseline and of paper's",
    )


def add_places(parser: argparse.ArgumentParser, output: Path) -> None:
    """--raw and --output."""
    parser.add_argument(
        "--raw", type=Path, default=Path("data/raw"), help="a folder a benchmark; default: data/raw"
    )
    parser.add_argument("--output", type=Path, default=output, help=f"default: {output}")


def command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]) -> int:
    """Run with the arguments given; the exit status: what `run` returns, 2 for an error of the user's."""
    try:
        return run(parser.parse_args()) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def default_checkpoints() -> list[Path]:
    """The last checkpoints of the baselines of `desk` (a trained BPE) and `paper` (GPT-2's vocabulary)."""
    runs = [Path(f"results/{study}/runs/baseline") for study in ("desk", "paper")]
    found = [max(run.glob("checkpoints/step-*"), default=None) for run in runs]
    missing = [run for run, checkpoint in zip(runs, found, strict=True) if checkpoint is None]
    if missing:
        raise UserError(
            f"{missing[0]}: no checkpoint; run: stlm train {missing[0].parts[1]} baseline (docs/log.md has "
            "models of paper's shape that take minutes), or name checkpoints with --model"
        )
    return [checkpoint for checkpoint in found if checkpoint is not None]


def label(checkpoint: Path) -> str:
    """STUDY/RUN/step-N of a checkpoint in results/STUDY/runs/RUN/checkpoints, RUN/step-N of one elsewhere."""
    run = checkpoint.absolute().parent.parent
    study = f"{run.parent.parent.name}/" if run.parent.name == "runs" else ""
    return f"{study}{run.name}/{checkpoint.name}"
