"""Pages of committed results show what the report wrote, to the bit; those of earlier versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stlm.errors import UserError
from stlm.files import write_json
from stlm.report.build import report
from stlm.report.committed import read_committed, read_table
from stlm.report.findings import findings_table

TWO = {"baseline": ("Baseline", {}), "sincos": ("Sinusoidal", {"positions": "sinusoidal"})}


@pytest.fixture
def folder(make_study) -> Path:
    study = make_study(TWO)
    report(study)
    return study.folder


def test_tables_are_what_the_report_wrote(folder):
    path = folder / "tables" / "statistics.csv"
    assert read_table(path) == path.read_text()
    assert findings_table("toy", folder)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    assert findings_table("toy", folder), "git may change line ends"
    path.write_bytes(whole.replace(b",0,", b",1,", 1))
    with pytest.raises(
        UserError, match=r"statistics\.csv: damaged, or changed by hand.*run: stlm report toy"
    ):
        findings_table("toy", folder)


def test_no_run_is_lost_from_metrics(folder):
    path = folder / "metrics.json"
    assert [name for name, *_ in read_committed(folder)] == ["baseline", "sincos"]
    path.write_text(path.read_text().replace('"sincos"', '"baseline"'))
    with pytest.raises(UserError, match=r"metrics\.json: damaged.* the runs baseline, expected baseline, s"):
        list(read_committed(folder))


def test_reports_of_earlier_versions_have_no_list(folder):
    (folder / "tables" / "checksum.json").unlink()
    write_json(folder / "metrics.json", {"baseline": {}})
    assert [name for name, *_ in read_committed(folder)] == ["baseline"]


def test_metrics_hold_numbers_alone(folder):
    """`dvc metrics` compares them."""
    for own in json.loads((folder / "metrics.json").read_text()).values():
        assert all(isinstance(value, int | float) for value in own.values())


def test_all_committed_results_can_be_read(root):
    for folder in sorted(path.parent for path in (root / "results").glob("*/metrics.json")):
        assert list(read_committed(folder))
        assert read_table(folder / "tables" / "statistics.csv")
