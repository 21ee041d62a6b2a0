"""Moves a finished run's outputs from its working folder to the paths that the engines expect."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from stlm.files import atomic_directory, remove_leftovers, write_record
from stlm.outputs import TRAINING, names
from stlm.study.runs import Run
from stlm.tokens.tokenizer import check_tokenizer
from stlm.training.checkpoints import check_checkpoints
from stlm.training.records import CURVE_COLUMNS, columns_of, write_rows
from stlm.training.watch import WATCH_COLUMNS


def publish(
    run: Run,
    output: Path,
    state: Path,
    curve: list[dict[str, Any]],
    watch: list[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    """Put the finished outputs in place, then delete the rolling state.

    `output` holds checkpoints/; `curve`, `watch` and `summary` are the contents of curve.csv, watch.csv and
    train.json. Files are linked, not moved, so the state stays complete until all outputs are in place: if
    the process is killed in between and an engine deletes the outputs, nothing is lost. train.json lists the
    SHA-256 of the CSV files. Raises ``UserError`` if a tokenizer or checkpoint was damaged meanwhile.
    """
    folder = run.folder
    for name in names(TRAINING):
        remove_leftovers(folder, name)
    tokenizer = output / "checkpoints" / "tokenizer"
    shutil.rmtree(tokenizer, ignore_errors=True)
    check_tokenizer(run.tokens_folder / "tokenizer")
    shutil.copytree(run.tokens_folder / "tokenizer", tokenizer)
    check_checkpoints(output / "checkpoints", summary["checkpoints"])
    with atomic_directory(folder / "checkpoints") as temporary:
        shutil.copytree(output / "checkpoints", temporary, copy_function=_link, dirs_exist_ok=True)
    write_rows(folder / "curve.csv", columns_of(curve, CURVE_COLUMNS), curve)
    write_rows(folder / "watch.csv", columns_of(watch, WATCH_COLUMNS), watch)
    write_record(folder / "train.json", summary, lists=["curve.csv", "watch.csv"])
    state.unlink()
    shutil.rmtree(run.state_folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it if the file system supports no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
