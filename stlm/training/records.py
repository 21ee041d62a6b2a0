"""The progress of a run while it trains: a progress bar, DVCLive and, if asked, Weights & Biases."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import atomic_path
from stlm.study.runs import Run
from stlm.training.state import Progress
from stlm.training.tracking import start_tracking

CURVE_COLUMNS = [
    "step",
    "tokens",
    "seconds",
    "learning_rate",
    "train_loss",
    "grad_norm",
    "tokens_per_second",
    "val_loss",
    "val_bits_per_byte",
    "val_char_perplexity",
    "val_token_perplexity",
]


def progress_bar(run: Run, done: int) -> tqdm:
    """A progress bar over the steps; without a terminal (a log file), a line from time to time."""
    return tqdm(
        total=run.training.steps,
        initial=done,
        desc=run.name,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        maxinterval=10.0 if sys.stderr.isatty() else 30.0,
        file=sys.stderr,
        dynamic_ncols=True,
    )


def write_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Write rows of figures as CSV; a figure that a row lacks is left blank (such as a validation's)."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def columns_of(rows: Iterable[dict[str, Any]], first: Iterable[str]) -> list[str]:
    """The columns of a CSV file: those that all runs have, `first`, then any others of its rows."""
    return list(dict.fromkeys([*first, *(name for row in rows for name in row)]))


class Records:
    """Shows steps on a progress bar; sends rows of the curve to DVCLive and, if asked, Weights & Biases.

    DVCLive's folder is in the run's state folder, for watching a run while it trains; it is deleted with the
    state, when curve.csv has the same figures. A resumed run rewrites it from the rows so far, so it always
    agrees with the curve.
    """

    def __init__(self, run: Run, folder: Path, progress: Progress, fingerprint: str) -> None:
        from dvclive import Live
        from scmrepo.exceptions import SCMError

        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._live = Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)
        except SCMError as error:
            raise UserError(
                f"DVCLive cannot read the git repository ({error}): make a first commit"
            ) from None
        self._wandb: Any = start_tracking(run, fingerprint) if run.training.wandb else None
        for row in progress.rows:
            self._log_live(row)
        self._bar = progress_bar(run, progress.step)

    def advance(self) -> None:
        """Count one more finished step."""
        with suppress(BrokenPipeError):  # nobody reads the output any more
            self._bar.update()

    def _log_live(self, row: dict[str, float]) -> None:
        self._live.step = int(row["step"])
        for name, value in row.items():
            if name not in ("step", "tokens", "seconds", "tokens_per_second"):
                self._live.log_metric(name.replace("_", "/", 1) if name.startswith("val_") else name, value)
        self._live.make_summary()

    def log(self, row: dict[str, float]) -> None:
        """Record one row of the curve."""
        self._log_live(row)
        if "train_loss" in row:  # not of a run of no steps
            self._bar.set_postfix_str(
                f"loss {row['train_loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False
            )
        if self._wandb is not None:
            self._wandb.log(row, step=int(row["step"]))

    def close(self) -> None:
        """Finish all records."""
        with suppress(BrokenPipeError):
            self._bar.close()
        self._live.end()
        if self._wandb is not None:
            self._wandb.finish()


class NoRecords:
    """The records of a process that leaves reporting to the leader."""

    def advance(self) -> None:
        """Do nothing: see `Records.advance`."""

    def log(self, row: dict[str, float]) -> None:
        """Do nothing: see `Records.log`."""

    def close(self) -> None:
        """Do nothing: see `Records.close`."""
