"""The scored options of an items.parquet: read, checked, and made into an outcome for each item."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stlm.errors import UserError

KEYS = ["benchmark", "mode", "item"]


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value)


# Of each column that outcomes are made of: what its values are, and whether they are.
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
    """The checkpoints of an items.parquet: step -> name, by step. UserError: as `read_outcomes`."""
    _check_columns(path)
    try:
        found = pq.read_table(path, columns=["checkpoint", "step"])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if any(found[column].null_count for column in found.column_names):
        raise UserError(f"{path} has rows without a checkpoint or a step")
    pairs = found.group_by(["checkpoint", "step"]).aggregate([]).to_pylist()
    steps = dict(sorted((row["step"], row["checkpoint"]) for row in pairs))
    if len({row["checkpoint"] for row in pairs}) != len(pairs) or len(steps) != len(pairs):
        listed = ", ".join(sorted(f"{row['checkpoint']} of step {row['step']}" for row in pairs))
        raise UserError(f"{path} has checkpoints of one name or one step twice: {listed}")
    return steps


def read_outcomes(path: Path, checkpoint: str) -> pd.DataFrame:
    """The outcome of each item of an items.parquet at `checkpoint`, indexed by (benchmark, mode, item).

    Columns: those of `score_items`, and group (the item's finest, "" where it has none). Raises UserError
    where the file is missing or unreadable, and where a row is none that `stlm evaluate` writes.
    """
    held = _check_columns(path)
    try:
        columns = [name for name in _COLUMNS if name in held and name not in ("checkpoint", "step")]
        table = pq.read_table(path, columns=columns, filters=[("checkpoint", "==", checkpoint)])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    _check_values(table, f"{path}, {checkpoint}")
    options = table.to_pandas()
    _check_items(options, f"{path}, {checkpoint}")
    groups = options.drop_duplicates(KEYS).set_index(KEYS)["group"]
    return score_items(options).join(groups)


def _check_columns(path: Path) -> list[str]:
    """The names of the file's columns; UserError where one is missing or holds something else."""
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    for name, (expected, fits) in _COLUMNS.items():
        if name not in schema.names:
            if name != _OPTIONAL:
                raise UserError(f"{path} has no column {name} (found: {', '.join(schema.names)})")
        elif schema.names.count(name) > 1 or not fits(schema.field(name).type):
            kinds = ", ".join(str(field.type) for field in schema if field.name == name)
            raise UserError(f"{path} has a column {name} of {kinds}; expected one of {expected}")
    return schema.names


def _check_values(table: pa.Table, where: str) -> None:
    for name in table.column_names:
        missing = table[name].null_count
        if missing and name != _OPTIONAL:
            raise UserError(f"{where}: {missing:,} rows have no {name}")
    wrong = pc.sum(pc.invert(pc.is_finite(table["logprob"]))).as_py()
    if wrong:
        raise UserError(f"{where}: {wrong:,} rows have a logprob that is NaN or infinite")
    least = pc.min(table["n_chars"]).as_py()
    if least is not None and least < 0:
        raise UserError(f"{where}: n_chars: {least}: expected 0 or more")


def _check_items(options: pd.DataFrame, where: str) -> None:
    doubled = options.duplicated([*KEYS, "option"])
    if doubled.any():
        raise UserError(
            f"{where}: {int(doubled.sum()):,} options stand twice, first {_name(options[doubled])}"
        )
    right = options.groupby(KEYS, sort=False, observed=True)["gold"].transform("any").astype(bool)
    if not right.all():
        without = options[~right].drop_duplicates(KEYS)
        raise UserError(
            f"{where}: {len(without):,} items have no right option (gold), first {_name(without)}"
        )


def _name(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['benchmark']} {first['item']} ({first['mode']} mode)"


def score_items(options: pd.DataFrame) -> pd.DataFrame:
    """Outcomes by item, indexed by (benchmark, mode, item), from one row an option.

    Columns: acc and acc_norm (1 right, 0 wrong, 1/k where the right option ties with k-1 others for the
    best; of an item of one option, whether it is what the model itself would say), chance (the expected score
    of a blind choice, 0 where there is one option).
    """
    scored = options[KEYS].copy()
    gold = options["gold"].to_numpy(bool)
    scores = {"acc": options["logprob"], "acc_norm": options["logprob"] / options["n_chars"].clip(lower=1)}
    by_item = scored.groupby(KEYS, sort=False, observed=True)
    item = by_item.ngroup().to_numpy()
    best = {name: score.groupby(item).transform("max") == score for name, score in scores.items()}
    columns = {"chance": gold.astype(float)}
    columns |= {f"{name}_best": is_best.astype(float) for name, is_best in best.items()}
    columns |= {f"{name}_right": (is_best & gold).astype(float) for name, is_best in best.items()}
    columns["greedy"] = options["greedy"].eq(True).astype(float) if "greedy" in options else 0.0
    sums = scored.assign(**columns, options=1.0).groupby(KEYS, sort=False, observed=True).sum()
    outcomes = pd.DataFrame(
        {
            "acc": sums["acc_right"] / sums["acc_best"],
            "acc_norm": sums["acc_norm_right"] / sums["acc_norm_best"],
            "chance": sums["chance"] / sums["options"],
        }
    )
    # There is nothing to choose from where there is one option: the model says it unasked or does not.
    alone = sums["options"] == 1
    outcomes.loc[alone, ["acc", "acc_norm"]] = sums.loc[alone, ["greedy", "greedy"]].to_numpy()
    outcomes.loc[alone, "chance"] = 0.0
    return outcomes
