"""Files of a run that are damaged: each is named, and what was reported before stays as it was."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.errors import UserError
from stlm.report import build
from stlm.report.build import report
from stlm.report.pairwise import compare, find_predictions
from stlm.report.results import read_results
from stlm.report.run_files import read_checkpoints, read_curve, read_outcomes, read_watch

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}
LAST = "step-000200"
ACC = ["checkpoints", LAST, "benchmarks", "blimp", "modes", "harness", "acc"]


@pytest.fixture
def study(make_study):
    return make_study(TWO, benchmarks={"blimp": 20})


def spoil(study, **columns) -> Path:
    """Other values in the last row of the baseline's items.parquet, or columns of another type; its path."""
    path = study.runs["baseline"].folder / "items.parquet"
    table = pq.read_table(path)
    rows = table.to_pandas()
    for name, value in columns.items():
        if isinstance(value, type):
            rows[name] = rows[name].astype(value)
        else:
            values = rows[name].astype(object).to_numpy(copy=True)
            values[-1] = value
            rows[name] = pd.Series(values).infer_objects()
    written = pa.Table.from_pandas(rows, preserve_index=False)
    pq.write_table(written.replace_schema_metadata(table.schema.metadata), path)
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"logprob": float("nan")}, r"1 rows have (a logprob that is NaN|no logprob)"),
        ({"logprob": -float("inf")}, r"1 rows have a logprob that is NaN or infinite"),
        ({"logprob": str}, r"a column logprob of .*; expected one of numbers"),
        ({"gold": None}, r"1 rows have no gold"),
        ({"gold": float}, r"a column gold of .*; expected one of true or false"),
        ({"item": None}, r"1 rows have no item"),
        ({"n_chars": -2}, r"n_chars: -2: expected 0 or more"),
        ({"n_chars": float}, r"a column n_chars of double; expected one of whole numbers"),
        ({"option": 0}, r"1 options stand twice, first blimp blimp-19 \(paper mode\)"),
    ],
)
def test_rows_that_no_evaluation_writes_are_refused(study, columns, message):
    path = spoil(study, **columns)
    with pytest.raises(UserError, match=message):
        read_outcomes(path, LAST)
    with pytest.raises(UserError, match=message):
        compare(find_predictions("toy/baseline"), find_predictions("toy/sincos"))
    with pytest.raises(UserError, match=rf"({message}).*: run `stlm evaluate toy baseline`"):
        read_results(study)["baseline"].outcomes()


def test_nan_as_a_number_and_as_a_missing_value(study):
    path = study.runs["baseline"].folder / "items.parquet"
    table = pq.read_table(path)
    values = table["logprob"].to_numpy().copy()
    values[-1] = float("nan")
    for from_pandas, message in ((False, "a logprob that is NaN or infinite"), (True, "no logprob")):
        column = pa.array(values, from_pandas=from_pandas)
        pq.write_table(table.set_column(table.schema.get_field_index("logprob"), "logprob", column), path)
        with pytest.raises(UserError, match=f"1 rows have {message}"):
            read_outcomes(path, LAST)


def test_an_item_without_a_right_option_is_refused(study):
    path = study.runs["baseline"].folder / "items.parquet"
    rows = pq.read_table(path).to_pandas()
    rows.loc[rows["item"] == "blimp-3", "gold"] = False
    rows.to_parquet(path, index=False)
    with pytest.raises(UserError, match=r"2 items have no right option \(gold\), first blimp blimp-3"):
        read_outcomes(path, LAST)


@pytest.mark.parametrize("column", ["checkpoint", "step", "item", "group", "gold", "logprob", "n_chars"])
def test_a_missing_column_is_named(study, column):
    path = study.runs["baseline"].folder / "items.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(column), path)
    for read in (read_checkpoints, lambda path: read_outcomes(path, LAST)):
        with pytest.raises(UserError, match=rf"items\.parquet has no column {column} \(found: "):
            read(path)


def test_checkpoints_of_one_step_or_one_name_are_refused(study):
    for columns in ({"step": 50}, {"checkpoint": LAST}):
        path = spoil(study)
        table = pq.read_table(path)
        rows = table.to_pandas().assign(**columns)
        rows.to_parquet(path, index=False)
        with pytest.raises(UserError, match="has checkpoints of one name or one step twice: step-000"):
            read_checkpoints(path)
        pq.write_table(table, path)


def test_rows_that_the_metadata_does_not_name_are_refused(study, change_facts):
    path = study.runs["baseline"].folder / "items.parquet"
    change_facts(path, benchmarks={})
    with pytest.raises(UserError, match="has rows of blimp in harness mode, which its metadata"):
        find_predictions("toy/baseline").outcomes()
    change_facts(path, checkpoints={})
    with pytest.raises(UserError, match=r"its rows are of step-000050, .* metadata speaks of no checkpoint"):
        find_predictions("toy/baseline")


def change(path: Path, keys: list, value: object) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("evaluation.json", ["checkpoints", LAST, "perplexity", "bits_per_byte"], "2.0"),
        ("evaluation.json", ["checkpoints", LAST, "perplexity", "bits_per_byte"], float("nan")),
        ("evaluation.json", ["checkpoints", LAST, "perplexity", "char_perplexity"], 0.0),
        ("evaluation.json", ["checkpoints", LAST, "step"], True),
        (
            "evaluation.json",
            [*ACC, "value"],
            1.5,
        ),
        ("evaluation.json", [*ACC, "n"], -1),
        ("evaluation.json", ["checkpoints", LAST, "benchmarks", "blimp", "items"], "20"),
        ("train.json", ["seconds"], "60"),
        ("train.json", ["flops"], float("inf")),
        ("train.json", ["parameters", "total"], "many"),
        ("train.json", ["steps"], -1),
    ],
)
def test_values_that_are_no_numbers_are_named(study, file, keys, value):
    change(study.runs["baseline"].folder / file, keys, value)
    verb = "train" if file == "train.json" else "evaluate"
    with pytest.raises(UserError, match=rf"{file}: not [\s\S]*run: stlm {verb} toy baseline"):
        read_results(study)


def test_a_number_beyond_float64_is_no_number(study):
    path = study.runs["baseline"].folder / "evaluation.json"
    path.write_text(path.read_text().replace('"char_perplexity": 3.7', '"char_perplexity": 1e999', 1))
    with pytest.raises(UserError, match=r"char_perplexity: Input should be a finite number"):
        read_results(study)


def rewrite(path: Path, change_rows) -> None:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("".join(",".join(row) + "\n" for row in change_rows(rows)))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("train_loss", "low", "not numbers in column train_loss"),
        ("train_loss", "nan", "NaN, infinite or missing in column train_loss"),
        ("seconds", "", "NaN, infinite or missing in column seconds"),
        ("val_bits_per_byte", "inf", "NaN, infinite or missing in column val_bits_per_byte"),
        ("step", "40", "rows out of order or twice: step does not grow"),
        ("tokens", "1", "rows out of order or twice: tokens does not grow"),
    ],
)
def test_rows_of_a_curve(study, column, value, message):
    path = study.runs["baseline"].folder / "curve.csv"

    def change_rows(rows):
        rows[-1][rows[0].index(column)] = value
        return rows

    rewrite(path, change_rows)
    with pytest.raises(UserError, match=message):
        read_curve(path)
    with pytest.raises(UserError, match=rf"curve\.csv.*{message}.*: run `stlm train toy baseline`"):
        read_results(study)


def test_rows_of_watched_layers(study):
    path = study.runs["baseline"].folder / "watch.csv"
    whole = path.read_text()
    assert len(read_watch(path)) == whole.count("\n") - 1
    for change_rows, message in (
        (lambda rows: [*rows, rows[-1]], "a layer is looked at once a step"),
        (lambda rows: [rows[0], *rows[:0:-1]], "a layer is looked at once a step"),
        (lambda rows: [*rows[:-1], [rows[-1][0], "", *rows[-1][2:]]], "without the name of a layer"),
        (lambda rows: [*rows[:-1], [*rows[-1][:2], "some", *rows[-1][3:]]], "not numbers in column"),
        (lambda rows: [*rows[:-1], [*rows[-1][:2], "-inf", *rows[-1][3:]]], "NaN, infinite or missing"),
    ):
        rewrite(path, change_rows)
        with pytest.raises(UserError, match=message):
            read_watch(path)
        path.write_text(whole)


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize(
    "fails",
    ["write_plots", "write_cards"]
    + [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("write_pareto", "write_training_pages")],
)
def test_a_report_that_fails_leaves_the_one_before(study, monkeypatch, fails):
    """Whatever it is that fails, and however late."""
    report(study)
    # Tables would be others now.
    change(study.runs["sincos"].folder / "train.json", ["label"], "Another")
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}

    def fail(*arguments, **options):
        raise UserError("the last page cannot be made")

    monkeypatch.setattr(build, fails, fail)
    with pytest.raises(UserError, match="the last page"):
        report(study)
    assert {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("quick_figures")
def test_a_damaged_origin_of_the_text(study):
    """Cards are written last, and say where the text is from."""
    report(study)
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    path = Path("data/raw/synthetic/source.json")
    path.parent.mkdir(parents=True)
    for content, message in (
        ("[]", r"source\.json: not what its stage writes"),
        ('{"source": {"kind": "hub"}}', "source: not what `stlm fetch` writes"),
        ('{"source": {"kind": "folder", "files": ["a"]}}', "source: not what `stlm fetch` writes"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            report(study)
    assert {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()} == before
