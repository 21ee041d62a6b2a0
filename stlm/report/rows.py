"""curve.csv and watch.csv of a run: read and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from stlm.errors import UserError

# The first are in every row, the others where held-out text was scored.
_EVERY_ROW = ["step", "tokens", "seconds", "learning_rate", "train_loss", "grad_norm", "tokens_per_second"]
_CURVE = [*_EVERY_ROW, "val_loss", "val_bits_per_byte", "val_char_perplexity"]


def read_curve(path: Path) -> pd.DataFrame:
    """The rows of curve.csv by step. UserError: missing, unreadable, or not as training writes it."""
    rows = _read(path, _CURVE)
    _check_numbers(path, rows, _CURVE, _EVERY_ROW)
    for column in ("step", "tokens"):
        if (rows[column].diff().dropna() <= 0).any():
            raise UserError(f"{path} has rows out of order or twice: {column} does not grow from row to row")
    return rows


def read_watch(path: Path) -> pd.DataFrame | None:
    """The rows of watch.csv; None where no layer was looked at, or by an earlier version of STLM.

    Columns: step, layer (text), and figures, which may come and go and be blank. UserError: as `read_curve`.
    """
    if not path.is_file():
        return None
    rows = _read(path, ["step", "layer"])
    _check_numbers(path, rows, [column for column in rows if column != "layer"], ["step"])
    if len(rows) and (pd.api.types.is_numeric_dtype(rows["layer"]) or rows["layer"].isna().any()):
        raise UserError(f"{path} has rows without the name of a layer")
    if (rows["step"].diff().dropna() < 0).any() or rows.duplicated(["step", "layer"]).any():
        raise UserError(f"{path} has rows out of order or twice: a layer is looked at once a step")
    return rows if len(rows) else None


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV file with at least `columns`."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        rows = pd.read_csv(path)
    except (
        ValueError,
        OSError,
        OverflowError,
    ) as error:  # pandas' parser and decoding errors are ValueErrors
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    missing = [column for column in columns if column not in rows]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)} (found: {', '.join(rows.columns)})")
    return rows


def _check_numbers(path: Path, rows: pd.DataFrame, columns: list[str], every_row: list[str]) -> None:
    """UserError where `columns` hold text or infinity, or one of `every_row` is blank or NaN."""
    if not len(rows):
        return
    text = [column for column in columns if not _numbers(rows[column])]
    if text:
        raise UserError(f"{path} has values that are not numbers in column {', '.join(text)}")
    endless = [column for column in columns if np.isinf(rows[column].to_numpy(float)).any()]
    blank = [column for column in every_row if rows[column].isna().any()]
    if endless or blank:
        named = ", ".join(dict.fromkeys([*endless, *blank]))
        raise UserError(f"{path} has values that are NaN, infinite or missing in column {named}")


def _numbers(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
