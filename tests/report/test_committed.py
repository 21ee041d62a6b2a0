"""Pages of committed results show what the report wrote, to the bit; those of earlier versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stlm.docs_pages.committed import read_committed
from stlm.docs_pages.findings import findings_table
from stlm.errors import UserError
from stlm.files import read_json, write_json
from stlm.report.build import report
from stlm.report.records import write_records
from stlm.report.table import read_table, write_checksums

TWO = {"baseline": ("Baseline", {}), "sincos": ("Sinusoidal", {"positions": "sinusoidal"})}


@pytest.mark.usefixtures("quick_figures")
def test_the_report_lists_the_tables_that_pages_show(make_study):
    study = make_study(TWO)
    report(study)
    assert findings_table("toy", study.folder)
    path = study.folder / "tables" / "statistics.csv"
    path.write_bytes(path.read_bytes().replace(b",0,", b",1,", 1))
    with pytest.raises(UserError, match=r"statistics\.csv: damaged.*run: stlm report toy"):
        findings_table("toy", study.folder)
    # `dvc metrics` compares numbers.
    for own in json.loads((study.folder / "metrics.json").read_text()).values():
        assert all(isinstance(value, int | float) for value in own.values())


@pytest.fixture
def folder(make_study) -> Path:
    """A study's results with a table as the report writes it."""
    study = make_study(TWO)
    folder = study.folder
    (folder / "tables").mkdir()
    (folder / "tables" / "a.csv").write_text("run,value\nbaseline,1\n")
    write_checksums(folder / "tables")
    write_records(folder / "records", {name: run.folder for name, run in study.runs.items()})
    write_json(folder / "metrics.json", {"baseline": {}, "sincos": {}})
    return folder


def test_tables_are_read_as_they_were_written(folder):
    path = folder / "tables" / "a.csv"
    whole = path.read_bytes()
    assert read_table(path) == whole.decode()
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    assert read_table(path) == whole.decode(), "git may change line ends"
    path.write_bytes(whole.replace(b"1", b"3"))
    with pytest.raises(UserError, match=r"a\.csv: damaged.*run: stlm report toy"):
        read_table(path)


def test_no_run_is_lost_from_metrics(folder):
    path = folder / "metrics.json"
    assert [train.run for train, *_ in read_committed(folder)] == ["baseline", "sincos"]
    path.write_text(path.read_text().replace('"sincos"', '"baseline"'))
    with pytest.raises(UserError, match=r"metrics\.json: damaged.* the runs baseline, expected baseline, s"):
        list(read_committed(folder))


def test_a_clone_has_records_of_runs_without_their_files(folder):
    before = list(read_committed(folder))
    for kept in ("train.json", "evaluation.json"):
        for run in ("baseline", "sincos"):
            (folder / "runs" / run / kept).unlink()
    assert list(read_committed(folder)) == before
    path = folder / "records" / "runs.json"
    path.write_text(path.read_text().replace('"label": "Sinusoidal"', '"label": "Cosine"'))
    with pytest.raises(UserError, match=r"records/runs\.json: damaged.*run: stlm report toy"):
        list(read_committed(folder))
    path.unlink()
    with pytest.raises(UserError, match=r"records/runs\.json: no such file; run: stlm report toy"):
        list(read_committed(folder))


def test_records_are_what_the_runs_say_but_groups(make_study):
    study = make_study(TWO, benchmarks={"blimp": 40})
    run = study.runs["sincos"]
    write_records(study.folder / "records", {"sincos": run.folder})
    record = read_json(study.folder / "records" / "runs.json")["runs"]["sincos"]
    assert record["train"] == read_json(run.folder / "train.json")
    evaluation = read_json(run.folder / "evaluation.json")
    assert record["evaluation"]["settings"] == evaluation["settings"]
    for name, checkpoint in evaluation["checkpoints"].items():
        modes = checkpoint["benchmarks"]["blimp"]["modes"]
        found = record["evaluation"]["checkpoints"][name]["benchmarks"]["blimp"]["modes"]
        assert found == {mode: {k: v for k, v in own.items() if k != "groups"} for mode, own in modes.items()}
        assert all(own["groups"] for own in modes.values())


def test_all_committed_results_can_be_read(root):
    for folder in sorted(path.parent for path in (root / "results").glob("*/metrics.json")):
        assert list(read_committed(folder))
        assert read_table(folder / "tables" / "statistics.csv")
