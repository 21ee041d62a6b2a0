"""`stlm compare`: what it finds, what it refuses, and what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from stlm.cli import main
from stlm.errors import UserError
from stlm.report.comparison import compare_all
from stlm.report.pairwise import as_json, as_text, compare, find_predictions
from stlm.report.results import read_results

TWO = {"baseline": ("Baseline", {}), "sincos": ("SinCos PE", {"positions": "sinusoidal"})}


@pytest.fixture
def study(make_study):
    return make_study(TWO, benchmarks={"blimp": 60, "hellaswag": 40}, total=60)


def items(study, run: str) -> Path:
    return study.runs[run].folder / "items.parquet"


def test_finds_what_the_report_finds(study):
    found = compare(find_predictions("toy/baseline"), find_predictions("toy/sincos"))
    reported = compare_all(read_results(study)).points["sincos"]["step-000200"]
    assert {(row.benchmark, row.mode, row.metric) for row in found.rows} == set(reported)
    for row in found.rows:
        own = reported[row.benchmark, row.mode, row.metric]
        assert row.b == own.accuracy
        assert row.version == "1.0"
        for field in ("n", "difference", "interval", "clustered", "better", "worse", "p"):
            assert getattr(row.paired, field) == getattr(own.paired, field)
        assert row.paired.p == pytest.approx(
            binomtest(row.paired.better, row.paired.better + row.paired.worse).pvalue
            if row.paired.better + row.paired.worse
            else 1.0
        )
    expected = multipletests([row.paired.p for row in found.rows], method="holm")[1]
    assert [row.paired.adjusted for row in found.rows] == pytest.approx(expected)
    assert found.warnings == []


def test_the_other_way_round_turns_the_sign(study):
    a, b = find_predictions("toy/baseline"), find_predictions("toy/sincos")
    for one, other in zip(compare(a, b).rows, compare(b, a).rows, strict=True):
        assert one.paired.difference == pytest.approx(-other.paired.difference)
        assert (one.paired.better, one.paired.worse) == (other.paired.worse, other.paired.better)
        assert one.paired.p == other.paired.p


def test_every_way_to_name_a_run_means_the_same(study):
    folder = study.runs["sincos"].folder
    named = [find_predictions(name) for name in ("toy/sincos", str(folder), str(items(study, "sincos")))]
    assert {(p.path, p.checkpoint, p.step) for p in named} == {(folder / "items.parquet", "step-000200", 200)}
    for name in ("toy/sincos@100", "toy/sincos@step-000100", f"{folder}@100", f"{folder}/items.parquet@100"):
        assert find_predictions(name).checkpoint == "step-000100"


def test_published_models_are_found_by_their_names_too(study):
    source = study.runs["sincos"].folder
    target = Path("results/toy/published/tiny")
    target.parent.mkdir()
    source.rename(target)
    assert find_predictions("toy/tiny").path == target / "items.parquet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy/sinco", r"'toy/sinco' is no run's folder.*did you mean 'toy/sincos'\?"),
        ("toy/sincos@150", r"no checkpoint of step 150 \(found: 50, 100, 200\)"),
        ("results/toy", r"results/toy: has no items\.parquet"),
        ("results/toy/runs/sincos/train.json", r"train\.json cannot be read"),
    ],
)
def test_what_is_not_there_is_named(study, name, message):
    with pytest.raises(UserError, match=message):
        find_predictions(name)


def test_checkpoints_of_one_run_can_be_compared(study):
    found = compare(find_predictions("toy/sincos@50"), find_predictions("toy/sincos"))
    assert {row.paired.n for row in found.rows} == {60, 40}
    assert not found.warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_version": 1}, "scoring version 2 against 1"),
        ({"version": "0.9"}, "blimp: version 1.0 against 0.9"),
        ({"split": "validation"}, "blimp: split test against validation"),
        ({"sha256": ["other-file"]}, "blimp: files of SHA-256 blimp-file against other-file"),
    ],
)
def test_other_rules_and_files_are_refused_by_both_values_unless_forced(
    study, change_facts, capsys, change, message
):
    path = items(study, "sincos")
    if "scoring_version" not in change:
        facts = find_predictions("toy/sincos").facts.model_dump()["benchmarks"]
        change = {"benchmarks": facts | {"blimp": facts["blimp"] | change}}
    change_facts(path, **change)
    assert main(["compare", "toy/baseline", "toy/sincos"]) == 2
    said = capsys.readouterr().err
    assert message in said and "--force" in said
    assert main(["compare", "toy/baseline", "toy/sincos", "--force"]) == 0
    assert f"warning: {message} (--force)" in capsys.readouterr().out


def test_benchmarks_that_only_one_has_do_not_matter(study, change_facts):
    facts = find_predictions("toy/sincos").facts.model_dump()["benchmarks"]
    change_facts(items(study, "sincos"), benchmarks=facts | {"mmlu": facts["blimp"] | {"version": "7"}})
    assert compare(find_predictions("toy/baseline"), find_predictions("toy/sincos")).warnings == []


def test_another_device_or_precision_is_a_warning(study, change_facts):
    change_facts(items(study, "sincos"), device="A GPU", precision="bfloat16")
    found = compare(find_predictions("toy/baseline"), find_predictions("toy/sincos"))
    assert found.warnings == [
        "scored on device cpu against A GPU",
        "scored in precision float32 against bfloat16",
    ]


def test_other_limits_are_a_warning_and_common_items_are_compared(make_study):
    make_study(TWO, benchmarks={"blimp": 60})
    Path("results/toy").rename("results/first")
    make_study(TWO, benchmarks={"blimp": 40, "hellaswag": 10})
    found = compare(find_predictions("first/baseline"), find_predictions("toy/baseline"))
    assert found.warnings == ["blimp: 60 against 40 items were scored; the 40 that both have are compared"]
    assert {(row.benchmark, row.paired.n, row.a.n, row.b.n) for row in found.rows} == {("blimp", 40, 40, 40)}


def test_nothing_in_common_is_refused(make_study):
    make_study(TWO, benchmarks={"blimp": 60})
    Path("results/toy").rename("results/first")
    make_study(TWO, benchmarks={"hellaswag": 10})
    with pytest.raises(UserError, match="no item in common: scored were blimp against hellaswag"):
        compare(find_predictions("first/baseline"), find_predictions("toy/baseline"))


def test_files_of_earlier_versions_are_told_without_a_traceback(study, change_facts, capsys):
    change_facts(items(study, "sincos"))
    assert main(["compare", "toy/baseline", "toy/sincos"]) == 2
    said = capsys.readouterr().err
    assert "runs/sincos/items.parquet: does not say how it was scored (written by an earlier" in said
    assert main(["compare", "toy/baseline", "toy/sincos", "--force"]) == 0
    assert "harness mode, acc\n" in capsys.readouterr().out


def test_metadata_that_is_not_ours_is_named(study):
    path = items(study, "sincos")
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"stlm": b'{"study": 3}'}), path)
    with pytest.raises(UserError, match=r"items\.parquet: its metadata `stlm` is not what .*\(study: "):
        find_predictions("toy/sincos")


def test_text_fits_100_columns_and_is_aligned(make_study):
    make_study(TWO, benchmarks={"synthetic_choice": 300, "arc_challenge": 12_000}, steps=(50,), total=12_000)
    text = as_text(compare(find_predictions("toy/baseline"), find_predictions("toy/sincos")))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "versions: synthetic_choice 1.0, arc_challenge 1.0" in lines
    block = lines[lines.index("harness mode, acc") + 1 :]
    assert len({len(line) for line in block[: block.index("")] if "groups" not in line}) == 1


def test_text_marks_what_is_significant(make_study):
    make_study(TWO, benchmarks={"blimp": 200}, skills={"baseline": 0.55, "sincos": 0.95})
    text = as_text(compare(find_predictions("toy/baseline"), find_predictions("toy/sincos")))
    (row,) = [line for line in text.split("paper mode")[1].splitlines() if line.startswith("blimp")]
    assert "* [" in row and row.endswith("<.001")
    unchanged = as_text(compare(find_predictions("toy/sincos"), find_predictions("toy/sincos")))
    assert "* [" not in unchanged and " 0.0  [0.0,0.0]" in unchanged


def test_json_has_the_numbers_and_the_facts(study, capsys):
    assert main(["compare", "toy/baseline", "toy/sincos@100", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = compare(find_predictions("toy/baseline"), find_predictions("toy/sincos@100"))
    assert printed == json.loads(as_json(found))
    assert printed["b"]["checkpoint"] == "step-000100"
    assert printed["a"]["facts"]["benchmarks"]["blimp"]["sha256"] == ["blimp-file"]
    for row, own in zip(printed["comparisons"], found.rows, strict=True):
        assert (row["n"], row["better"], row["p_holm"]) == (
            own.paired.n,
            own.paired.better,
            own.paired.adjusted,
        )
        assert row["a"]["accuracy"] == own.a.value


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:strict"])
def test_minus_and_names_on_a_terminal_that_lacks_them(study, encoding):
    where = Path("grün – 水")
    where.mkdir()
    named = (where / "a.parquet", where / "b.parquet")
    for name, run in zip(named, ("baseline", "sincos"), strict=True):
        name.write_bytes(items(study, run).read_bytes())
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = {}
    for form in ([], ["--json"]):
        command = [sys.executable, "-m", "stlm", "compare", *map(str, named), *form]
        done = subprocess.run(command, capture_output=True, env=env)
        assert done.returncode == 0, done.stderr
        shown[len(form)] = done.stdout.decode("latin-1")
    found = compare(*map(find_predictions, map(str, named)))
    assert "−" in as_text(found)
    utf8 = as_text(found).replace("−", "-").replace("–", "-").replace("†", "+").replace("水", "\\u6c34")
    assert shown[0].rstrip("\n") == (utf8 if encoding == "latin-1" else utf8.replace("ü", "\\xfc"))
    assert json.loads(shown[1]) == json.loads(as_json(found))


def test_torch_is_not_imported(study):
    code = (
        "import sys; from stlm.cli import main\n"
        "assert main(['compare', 'toy/baseline', 'toy/sincos']) == 0\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
