"""What runs left behind, damaged by hand: read by report and compare, which must change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bad.case import Case, edit, put
from bad.checkpoints import change

RUN = "results/tiny/runs/learned"
ITEMS, RECORD = f"{RUN}/items.parquet", f"{RUN}/evaluation.json"
CURVE, WATCH, TRAIN = f"{RUN}/curve.csv", f"{RUN}/watch.csv", f"{RUN}/train.json"
REPORT = ("report", "tiny")
COMPARE = ("compare", "tiny/baseline", "tiny/learned")
Spoil = Callable[[Path], None]


def items(change_rows: Callable[[pd.DataFrame], pd.DataFrame | None], path: str = ITEMS) -> Spoil:
    """Other rows in an items.parquet, which keeps what it says of itself."""

    def spoil(project: Path) -> None:
        table = pq.read_table(project / path)
        rows = table.to_pandas()
        rows = rows if (found := change_rows(rows)) is None else found
        changed = pa.Table.from_pandas(rows, preserve_index=False)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), project / path)

    return spoil


def _set(column: str, value: Any, places: Sequence[int] | slice = slice(-1, None)) -> Spoil:
    """A value in a column of the last row, or of others."""

    def change_rows(rows: pd.DataFrame) -> None:
        values = rows[column].astype(object).to_numpy(copy=True)
        values[places] = value
        rows[column] = (
            values if value is None or isinstance(value, bool) else pd.Series(values).infer_objects()
        )

    return items(change_rows)


def _cast(column: str, kind: str) -> Spoil:
    return items(lambda rows: rows.assign(**{column: rows[column].astype(kind)}))


def _true_nan(project: Path) -> None:
    """NaN as a number: pandas writes a missing value for it."""
    table = pq.read_table(project / ITEMS)
    values = table["logprob"].to_numpy().copy()
    values[-1] = float("nan")
    place = table.schema.get_field_index("logprob")
    pq.write_table(table.set_column(place, "logprob", pa.array(values)), project / ITEMS)


def _facts(**keys: Any) -> Spoil:
    """Other values in what the file says of itself."""

    def spoil(project: Path) -> None:
        table = pq.read_table(project / ITEMS)
        said = json.loads(table.schema.metadata[b"stlm"]) | keys
        pq.write_table(table.replace_schema_metadata({b"stlm": json.dumps(said).encode()}), project / ITEMS)

    return spoil


def _no_facts(project: Path) -> None:
    pq.write_table(pq.read_table(project / ITEMS).replace_schema_metadata(None), project / ITEMS)


def _rows() -> list[Case]:
    every = slice(None)
    wrong: list[tuple[str, Spoil, str]] = [
        ("NaN", _set("logprob", float("nan")), r"1 rows have no logprob"),
        (
            "NaN everywhere",
            _set("logprob", float("nan"), every),
            r"rows have (no logprob|a logprob that is NaN)",
        ),
        ("a NaN that is a number", _true_nan, r"1 rows have a logprob that is NaN or infinite"),
        ("minus infinity", _set("logprob", -float("inf")), r"a logprob that is NaN or infinite"),
        ("a number that is missing", _set("logprob", None), r"rows have (no|a) logprob"),
        ("text for numbers", _cast("logprob", "str"), r"a column logprob of .*expected one of numbers"),
        ("whole numbers for numbers", _cast("logprob", "int64"), r"a column logprob of int64"),
        ("text for gold", _cast("gold", "str"), r"a column gold of .*true or false"),
        ("numbers for gold", _cast("gold", "int8"), r"a column gold of int8"),
        (
            "numbers for items",
            items(lambda rows: rows.assign(item=range(len(rows)))),
            r"a column item of int",
        ),
        ("fractions for options", _cast("option", "float32"), r"a column option of float"),
        ("fractions for characters", _cast("n_chars", "float64"), r"a column n_chars of double"),
        ("a number of characters below zero", _set("n_chars", -3), r"n_chars: -3: expected 0 or more"),
        ("an item without a name", _set("item", None), r"1 rows have no item"),
        ("a group without a name", _set("group", None), r"1 rows have no group"),
        ("no right option", _set("gold", False, every), r"items have no right option \(gold\)"),
        ("a gold that is missing", _set("gold", None), r"1 rows have no gold"),
        ("doubled rows", items(lambda rows: pd.concat([rows, rows])), r"options stand twice, first"),
        ("a doubled row", items(lambda rows: pd.concat([rows, rows[-1:]])), r"1 options stand twice"),
        ("no rows", items(lambda rows: rows[:0]), r"items\.parquet.* (holds no item|no rows|column)"),
        ("empty", put(ITEMS, b""), r"items\.parquet"),
        ("text", put(ITEMS, "items"), r"items\.parquet"),
    ]
    columns = (
        "checkpoint",
        "step",
        "benchmark",
        "mode",
        "item",
        "group",
        "option",
        "gold",
        "logprob",
        "n_chars",
    )
    for column in columns:
        without = items(lambda rows, column=column: rows.drop(columns=column))
        wrong.append((f"no column {column}", without, rf"has no column {column} \(found: "))
    found = []
    for name, spoil, expects in wrong:
        for verb, arguments in (("report", REPORT), ("compare", COMPARE)):
            found.append(Case(f"{verb}: items.parquet: {name}", arguments, spoil, expects))
    return found


def _comparisons() -> list[Case]:
    def one_name(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(checkpoint="step-0000006")

    def one_step(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(step=6)

    both = r"checkpoints of one name or one step twice"
    few = r"no item in common|its metadata"
    return [
        Case("compare: two checkpoints of one name", COMPARE, items(one_name), both),
        Case("compare: two checkpoints of one step", COMPARE, items(one_step), both),
        Case(
            "compare: a step that is missing",
            COMPARE,
            _set("step", None),
            r"without a checkpoint or a step|step",
        ),
        Case(
            "compare: another benchmark than it says",
            COMPARE,
            items(lambda rows: rows.assign(benchmark="blimp")),
            r"has rows of blimp in \w+ mode, which its metadata does not name",
        ),
        Case(
            "compare: another checkpoint than it says",
            COMPARE,
            items(lambda rows: rows.assign(checkpoint=[name.replace("6", "7") for name in rows.checkpoint])),
            r"its rows are of .*its metadata speaks of",
        ),
        Case(
            "compare: other items",
            COMPARE,
            items(lambda rows: rows.assign(item=[f"own {item}" for item in rows["item"]])),
            few,
        ),
        Case("compare: nothing said of itself", COMPARE, _no_facts, r"does not say how it was scored"),
        Case("compare: metadata that is a list", COMPARE, _facts(benchmarks=[]), r"its metadata `stlm`"),
        Case(
            "compare: metadata of no checkpoint",
            COMPARE,
            _facts(checkpoints={}),
            r"its metadata speaks of no",
        ),
        Case(
            "compare: metadata without benchmarks",
            COMPARE,
            _facts(benchmarks={}),
            r"which its metadata does not",
        ),
        Case("compare: another scoring version", COMPARE, _facts(scoring_version=1), r"scoring version"),
        Case(
            "compare: a run that is not there", ("compare", "tiny/baseline", "tiny/lerned"), None, r"learned"
        ),
        Case(
            "compare: a step that is not there",
            (*COMPARE[:2], "tiny/learned@4"),
            None,
            r"no checkpoint of step 4",
        ),
        Case(
            "compare: a step of 5,000 digits", (*COMPARE[:2], f"tiny/learned@{'9' * 5000}"), None, r"error: "
        ),
        Case("compare: a name of 300 letters", (*COMPARE[:2], f"tiny/{'a' * 300}"), None, r"error: "),
        Case("compare: a null byte", (*COMPARE[:2], "tiny/a\0b"), None, r"error: "),
        Case("compare: an empty name", (*COMPARE[:2], ""), None, r"error: "),
        Case("compare: a folder of no run", (*COMPARE[:2], "params"), None, r"has no items\.parquet"),
        Case(
            "compare: a file of another kind", (*COMPARE[:2], "dvc.yaml"), None, r"dvc\.yaml cannot be read"
        ),
        Case("compare: a model with itself", (*COMPARE[:2], "tiny/baseline"), status=0),
    ]


def _checkpoint(key: str, value: Any, run: str = RUN, name: str = "step-0000006") -> Spoil:
    return change(f"{run}/evaluation.json", **{f"checkpoints__{name}__{key}": value})


def _acc(key: str, value: Any) -> Spoil:
    return _checkpoint(f"benchmarks__synthetic_pairs__modes__harness__acc__{key}", value)


def _records() -> list[Case]:
    nan, endless = float("nan"), float("inf")
    refused = r"evaluation\.json: not (what its stage writes \(checkpoints\.step-0000006|valid JSON \(NaN)"
    wrong: list[tuple[str, Spoil, str]] = [
        ("evaluation.json: NaN bits per byte", _checkpoint("perplexity__bits_per_byte", nan), refused),
        ("evaluation.json: text bits per byte", _checkpoint("perplexity__bits_per_byte", "2.1"), refused),
        (
            "evaluation.json: bits per byte below zero",
            _checkpoint("perplexity__bits_per_byte", -1.0),
            refused,
        ),
        ("evaluation.json: a perplexity of 0", _checkpoint("perplexity__char_perplexity", 0.0), refused),
        (
            "evaluation.json: an endless perplexity",
            _checkpoint("perplexity__char_perplexity", endless),
            r"Infinity",
        ),
        ("evaluation.json: a perplexity of 1e999", _endless_perplexity, refused),
        ("evaluation.json: no perplexity", _checkpoint("perplexity", None), refused),
        ("evaluation.json: NaN accuracy", _acc("value", nan), refused),
        ("evaluation.json: text accuracy", _acc("value", "0.5"), refused),
        ("evaluation.json: an accuracy of 2", _acc("value", 2.0), refused),
        (
            "evaluation.json: another accuracy",
            _acc("value", 0.123),
            r"gives synthetic_pairs .*evaluation\.json",
        ),
        ("evaluation.json: n is text", _acc("n", "60"), refused),
        ("evaluation.json: n below zero", _acc("n", -60), refused),
        ("evaluation.json: a step that is text", _checkpoint("step", "six"), refused),
        ("evaluation.json: a step that is true", _checkpoint("step", True), refused),
        ("evaluation.json: other weights", _checkpoint("weights_sha256", "0" * 64), r"scored other weights"),
        ("evaluation.json: no checkpoints", change(RECORD, checkpoints={}), r"holds no checkpoint"),
        ("evaluation.json: a list", put(RECORD, "[]"), r"not what its stage writes \(the whole file"),
        ("evaluation.json: cut", put(RECORD, '{"checkpoints": '), r"evaluation\.json: not valid JSON"),
        ("evaluation.json: no UTF-8", put(RECORD, b"\xff\xfe{}"), r"evaluation\.json: not valid JSON"),
        ("train.json: NaN seconds", change(TRAIN, seconds=nan), r"train\.json: not valid JSON \(NaN"),
        ("train.json: text seconds", change(TRAIN, seconds="10"), r"train\.json: .*seconds"),
        ("train.json: steps below zero", change(TRAIN, steps=-6), r"train\.json: .*steps"),
        (
            "train.json: parameters that are text",
            change(TRAIN, parameters__total="many"),
            r"parameters\.total",
        ),
        ("train.json: FLOPs of 0", change(TRAIN, flops=0), r"train\.json: .*flops"),
        ("train.json: no checkpoints", change(TRAIN, checkpoints=[]), r"scored other weights"),
        ("train.json: model is a list", change(TRAIN, model=[]), r"train\.json: .*model"),
        (
            "contamination.json: NaN",
            edit("results/tiny/contamination.json", '"items": ', '"items": NaN, "x": '),
            r"contamination\.json: not valid JSON \(NaN",
        ),
        (
            "contamination.json: text",
            edit("results/tiny/contamination.json", '"items": ', '"items": "many", "x": '),
            r"contamination\.json: not what its stage writes",
        ),
        ("source.json of the corpus: a list", put("data/raw/synthetic/source.json", "[]"), r"source\.json"),
        (
            "source.json of the corpus: no seed",
            edit("data/raw/synthetic/source.json", '"seed"', '"sede"'),
            r"source\.json: damaged.*run: stlm fetch synthetic",
        ),
        ("source.json of the corpus: cut", put("data/raw/synthetic/source.json", "{"), r"source\.json"),
    ]
    return [Case(f"report: {name}", REPORT, spoil, expects) for name, spoil, expects in wrong]


def _endless_perplexity(project: Path) -> None:
    """1e999 is a number in JSON, and none in float64."""
    _checkpoint("perplexity__char_perplexity", 12345.5)(project)
    edit(RECORD, "12345.5", "1e999")(project)


def _line(path: str, change_lines: Callable[[list[list[str]]], Any]) -> Spoil:
    """Other cells in a CSV file; the first row is its header."""

    def spoil(project: Path) -> None:
        lines = [line.split(",") for line in (project / path).read_text().splitlines()]
        lines = change_lines(lines) or lines
        (project / path).write_text("".join(",".join(cells) + "\n" for cells in lines))

    return spoil


def _cell(path: str, column: str, value: str, row: int = -1) -> Spoil:
    def change_lines(lines: list[list[str]]) -> None:
        lines[row][lines[0].index(column)] = value

    return _line(path, change_lines)


def _without(path: str, column: str) -> Spoil:
    def change_lines(lines: list[list[str]]) -> list[list[str]]:
        place = lines[0].index(column)
        return [cells[:place] + cells[place + 1 :] for cells in lines]

    return _line(path, change_lines)


def _curves() -> list[Case]:
    text, nan, order = r"values that are not numbers", r"values that are NaN", r"rows out of order or twice"
    wrong: list[tuple[str, Spoil, str]] = [
        ("curve.csv: text for a loss", _cell(CURVE, "train_loss", "low"), rf"{text} in column train_loss"),
        ("curve.csv: NaN for a loss", _cell(CURVE, "train_loss", "nan"), rf"{nan}.* in column train_loss"),
        ("curve.csv: no loss", _cell(CURVE, "train_loss", ""), rf"{nan}.* in column train_loss"),
        (
            "curve.csv: an endless loss",
            _cell(CURVE, "val_bits_per_byte", "inf"),
            rf"{nan}.* val_bits_per_byte",
        ),
        ("curve.csv: text for bits per byte", _cell(CURVE, "val_bits_per_byte", "few"), text),
        ("curve.csv: NaN for tokens", _cell(CURVE, "tokens", "nan"), rf"{nan}.* in column tokens"),
        ("curve.csv: a number of 5,000 digits", _cell(CURVE, "tokens", "9" * 5000), r"curve\.csv"),
        ("curve.csv: true for tokens", _cell(CURVE, "tokens", "True"), r"curve\.csv"),
        ("curve.csv: doubled rows", _line(CURVE, lambda lines: [*lines, lines[-1]]), order),
        ("curve.csv: rows backwards", _line(CURVE, lambda lines: [lines[0], *lines[:0:-1]]), order),
        ("curve.csv: a short row", _line(CURVE, lambda lines: [*lines, ["99"]]), nan),
        ("curve.csv: a long row", _line(CURVE, lambda lines: [*lines, lines[-1] * 3]), r"cannot be read"),
        ("curve.csv: no header", _line(CURVE, lambda lines: lines[1:]), r"has no column step"),
        ("curve.csv: no column tokens", _without(CURVE, "tokens"), r"has no column tokens"),
        ("curve.csv: empty", put(CURVE, b""), r"curve\.csv cannot be read"),
        ("curve.csv: null bytes", put(CURVE, bytes(100)), r"curve\.csv"),
        ("curve.csv: no UTF-8", put(CURVE, b"\xff\xfe\xfa,step\n1,2\n"), r"curve\.csv cannot be read"),
        (
            "watch.csv: text for a figure",
            _cell(WATCH, "residual_rms", "some"),
            rf"{text} in column residual_rms",
        ),
        ("watch.csv: an endless figure", _cell(WATCH, "residual_rms", "inf"), rf"{nan}.* residual_rms"),
        ("watch.csv: NaN for a step", _cell(WATCH, "step", "nan"), rf"{nan}.* in column step"),
        ("watch.csv: no layer", _cell(WATCH, "layer", ""), r"rows without the name of a layer"),
        ("watch.csv: doubled rows", _line(WATCH, lambda lines: [*lines, lines[-1]]), order),
        ("watch.csv: no column layer", _without(WATCH, "layer"), r"has no column layer"),
    ]
    return [Case(f"report: {name}", REPORT, spoil, expects) for name, spoil, expects in wrong]


def _published() -> list[Case]:
    folder = "results/tiny/published/other"
    record = f"{folder}/evaluation.json"
    again = r"stlm evaluate tiny other"
    wrong: list[tuple[str, Spoil, str]] = [
        ("no parameters", change(record, parameters=...), again),
        ("text parameters", change(record, parameters="many"), again),
        ("another model's name", change(record, checkpoints={}), r"is not of a published model"),
        ("NaN", edit(record, '"bits_per_byte": ', '"bits_per_byte": NaN, "x": '), r"not valid JSON \(NaN"),
        ("items are text", put(f"{folder}/items.parquet", "items"), r"items\.parquet"),
        ("no items", lambda project: (project / folder / "items.parquet").unlink(), again),
    ]
    return [Case(f"report: published: {name}", REPORT, spoil, expects) for name, spoil, expects in wrong]


def _forgotten(case: Case) -> Case:
    """The case where records have no checksums, by which any change is told as damage."""

    def spoil(project: Path) -> None:
        for path in (project / "results/tiny").rglob("*.json"):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and content.pop("checksum", None):
                path.write_text(json.dumps(content))
        if case.spoil is not None:
            case.spoil(project)

    return replace(case, spoil=spoil)


def cases() -> list[Case]:
    """About items.parquet, evaluation.json, train.json, curve.csv, watch.csv and contamination.json."""
    return [_forgotten(case) for case in (*_rows(), *_comparisons(), *_records(), *_curves(), *_published())]
