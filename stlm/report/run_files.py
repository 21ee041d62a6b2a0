"""The tables that a run leaves (curve.csv, watch.csv, items.parquet), read and checked.

Every reader raises `UserError` where a file is missing, unreadable, or not as the stage writes it. Columns
that are not needed here may be there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stlm.errors import UserError

# The first are in every row, the second in those of steps (the only row of a run of no steps is of step 0),
# the others where held-out text was scored.
_EVERY_ROW = ["step", "tokens", "seconds"]
_OF_STEPS = ["learning_rate", "train_loss", "grad_norm", "tokens_per_second"]
_CURVE = [*_EVERY_ROW, *_OF_STEPS, "val_loss", "val_bits_per_byte", "val_char_perplexity"]
KEYS = ["benchmark", "mode", "item"]


def read_curve(path: Path) -> pd.DataFrame:
    """The rows of curve.csv by step, with all columns that the file has."""
    rows = _read_csv(path, _CURVE)
    _check_numbers(path, rows, _CURVE, _EVERY_ROW)
    _check_numbers(path, rows[rows["step"] > 0], _CURVE, [*_EVERY_ROW, *_OF_STEPS])
    for column in ("step", "tokens"):
        if (rows[column].diff().dropna() <= 0).any():
            raise UserError(f"{path} has rows out of order or twice: {column} does not grow from row to row")
    return rows


def read_watch(path: Path) -> pd.DataFrame | None:
    """The rows of watch.csv; None where no layer was watched, or by an earlier version of STLM.

    Columns: step, layer (text), and figures, which may come and go and be blank.
    """
    if not path.is_file():
        return None
    rows = _read_csv(path, ["step", "layer"])
    _check_numbers(path, rows, [column for column in rows if column != "layer"], ["step"])
    if len(rows) and (pd.api.types.is_numeric_dtype(rows["layer"]) or rows["layer"].isna().any()):
        raise UserError(f"{path} has rows without the name of a layer")
    if (rows["step"].diff().dropna() < 0).any() or rows.duplicated(["step", "layer"]).any():
        raise UserError(f"{path} has rows out of order or twice: a layer is looked at once a step")
    return rows if len(rows) else None


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV file with at least `columns`."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        rows = pd.read_csv(path)
    except (ValueError, OSError, OverflowError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    if missing := [column for column in columns if column not in rows]:
        raise UserError(f"{path} has no column {', '.join(missing)} (found: {', '.join(rows.columns)})")
    return rows


def _check_numbers(path: Path, rows: pd.DataFrame, columns: list[str], every_row: list[str]) -> None:
    """Refuse `columns` that hold text or infinity, and a blank or NaN in one of `every_row`."""
    if not len(rows):
        return
    numeric, boolean = pd.api.types.is_numeric_dtype, pd.api.types.is_bool_dtype
    if text := [name for name in columns if not numeric(rows[name]) or boolean(rows[name])]:
        raise UserError(f"{path} has values that are not numbers in column {', '.join(text)}")
    wrong = [column for column in columns if np.isinf(rows[column].to_numpy(float)).any()]
    wrong += [column for column in every_row if rows[column].isna().any()]
    if wrong:
        named = ", ".join(dict.fromkeys(wrong))
        raise UserError(f"{path} has values that are NaN, infinite or missing in column {named}")


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value)


# The columns of items.parquet that outcomes are computed from: the values expected, and how to tell them.
_COLUMNS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    **dict.fromkeys(("checkpoint", "benchmark", "mode", "item", "group"), ("text", _is_text)),
    **dict.fromkeys(("step", "option", "n_chars"), ("whole numbers", pa.types.is_integer)),
    "gold": ("true or false", pa.types.is_boolean),
    "logprob": ("numbers", pa.types.is_floating),
    # Missing in files from before there were items of one option, which alone have it.
    "greedy": ("true or false", lambda kind: pa.types.is_boolean(kind) or pa.types.is_null(kind)),
}
_OPTIONAL = "greedy"


def read_checkpoints(path: Path) -> dict[int, str]:
    """The checkpoints of an items.parquet, sorted by step: step -> name."""
    _check_columns(path)
    rows = _read_parquet(path, ["checkpoint", "step"])
    if any(rows[column].null_count for column in rows.column_names):
        raise UserError(f"{path} has rows without a checkpoint or a step")
    pairs = rows.group_by(["checkpoint", "step"]).aggregate([]).to_pylist()
    steps = dict(sorted((row["step"], row["checkpoint"]) for row in pairs))
    if len({row["checkpoint"] for row in pairs}) != len(pairs) or len(steps) != len(pairs):
        listed = ", ".join(sorted(f"{row['checkpoint']} of step {row['step']}" for row in pairs))
        raise UserError(f"{path} has checkpoints of one name or one step twice: {listed}")
    return steps


def read_outcomes(path: Path, checkpoint: str) -> pd.DataFrame:
    """The outcome of each item of an items.parquet at `checkpoint`, indexed by (benchmark, mode, item).

    Columns: those of `score_items`, and group (the item's finest, "" where it has none).
    """
    present = _check_columns(path)
    columns = [name for name in _COLUMNS if name in present and name not in ("checkpoint", "step")]
    table = _read_parquet(path, columns, [("checkpoint", "==", checkpoint)])
    _check_values(table, f"{path}, {checkpoint}")
    options = table.to_pandas()
    _check_items(options, f"{path}, {checkpoint}")
    groups = options.drop_duplicates(KEYS).set_index(KEYS)["group"]
    return score_items(options).join(groups)


def _read_parquet(path: Path, columns: list[str], filters: list[tuple] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, filters=filters)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _check_columns(path: Path) -> list[str]:
    """The names of the file's columns; refused where one is missing or holds another type."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    for name, (expected, fits) in _COLUMNS.items():
        kinds = [field.type for field in schema if field.name == name]
        if not kinds and name != _OPTIONAL:
            raise UserError(f"{path} has no column {name} (found: {', '.join(schema.names)})")
        if len(kinds) > 1 or not all(map(fits, kinds)):
            listed = ", ".join(map(str, kinds))
            raise UserError(f"{path} has a column {name} of {listed}; expected one of {expected}")
    return schema.names


def _check_values(table: pa.Table, source: str) -> None:
    for name in table.column_names:
        if (missing := table[name].null_count) and name != _OPTIONAL:
            raise UserError(f"{source}: {missing:,} rows have no {name}")
    if wrong := pc.sum(pc.invert(pc.is_finite(table["logprob"]))).as_py():
        raise UserError(f"{source}: {wrong:,} rows have a logprob that is NaN or infinite")
    least = pc.min(table["n_chars"]).as_py()
    if least is not None and least < 0:
        raise UserError(f"{source}: n_chars: {least}: expected 0 or more")


def _check_items(options: pd.DataFrame, source: str) -> None:
    def first(rows: pd.DataFrame) -> str:
        return "first {benchmark} {item} ({mode} mode)".format(**rows.iloc[0])

    doubled = options[options.duplicated([*KEYS, "option"])]
    if len(doubled):
        raise UserError(f"{source}: {len(doubled):,} options stand twice, {first(doubled)}")
    right = options.groupby(KEYS, sort=False, observed=True)["gold"].transform("any").astype(bool)
    if not right.all():
        without = options[~right].drop_duplicates(KEYS)
        raise UserError(f"{source}: {len(without):,} items have no right option (gold), {first(without)}")


def score_items(options: pd.DataFrame) -> pd.DataFrame:
    """Outcomes by item, indexed by (benchmark, mode, item), from one row an option.

    Columns: acc and acc_norm (1 right, 0 wrong, 1/k where the right option ties with k-1 others for the best;
    for an item of one option, whether greedy decoding gives it), and chance (the expected score of a random
    choice, 0 where there is one option).
    """
    scored = options[KEYS].copy()
    gold = options["gold"].to_numpy(bool)
    scores = {"acc": options["logprob"], "acc_norm": options["logprob"] / options["n_chars"].clip(lower=1)}
    item = scored.groupby(KEYS, sort=False, observed=True).ngroup().to_numpy()
    best = {name: score.groupby(item).transform("max") == score for name, score in scores.items()}
    columns = {"chance": gold.astype(float)}
    columns |= {f"{name}_best": is_best.astype(float) for name, is_best in best.items()}
    columns |= {f"{name}_right": (is_best & gold).astype(float) for name, is_best in best.items()}
    columns["greedy"] = options["greedy"].eq(True).astype(float) if "greedy" in options else 0.0
    sums = scored.assign(**columns, options=1.0).groupby(KEYS, sort=False, observed=True).sum()
    outcomes = pd.DataFrame({name: sums[f"{name}_right"] / sums[f"{name}_best"] for name in scores})
    outcomes["chance"] = sums["chance"] / sums["options"]
    # With one option there is no choice: it counts if the model's greedy continuation is that option.
    alone = sums["options"] == 1
    outcomes.loc[alone, ["acc", "acc_norm"]] = sums.loc[alone, ["greedy", "greedy"]].to_numpy()
    outcomes.loc[alone, "chance"] = 0.0
    return outcomes
