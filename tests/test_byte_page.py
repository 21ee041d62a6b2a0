"""docs/bytes.md has the tables that the schema and the results give."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from stlm.byte_page import PAGE, bytes_page, cost_table, parameters_table
from stlm.errors import UserError
from stlm.files import write_json
from stlm.study import load_study


def test_page_is_up_to_date(root):
    changed = subprocess.run(
        ["git", "status", "--porcelain", str(PAGE), "results/bytes"], cwd=root, capture_output=True, text=True
    )
    if changed.returncode or changed.stdout:
        pytest.skip("not a clean clone: results of a study run here are not the committed ones")
    page = (root / PAGE).read_text(encoding="utf-8")
    assert page == bytes_page(root), f"{PAGE} is out of date: run `stlm document`"


def test_parameters_are_those_of_the_papers_embedding(root):
    (row,) = [line for line in parameters_table(root).splitlines() if "gpt2" in line and "| 64 |" in line]
    # 50,257 x 512, twice where the head is no part of the embedding.
    assert "| 51.46M | 25.73M |" in row


def test_cost_is_the_mean_of_the_seeds_differences(root, project):
    study = load_study("bytes")
    bits = {run.name: 2.0 + 0.1 * run.seed + 0.01 * len(run.variant) for run in study.runs.values()}
    bits = {name: {"test_bits_per_byte": value} for name, value in bits.items()}
    write_json(project / "results" / "bytes" / "metrics.json", bits)
    first, *others = cost_table().splitlines()[2:]
    assert "| 2.130 | +0.000 | +0.000, +0.000 |" in first
    assert any("| 2.100 | -0.030 | -0.030, -0.030 |" in line for line in others)  # `bytes`
    assert len(others) + 1 == len({run.variant for run in study.runs.values()})


def test_a_page_without_its_marks_is_an_error(root, project):
    (project / "docs").mkdir()
    shutil.copy(root / PAGE, project / PAGE)
    text = (project / PAGE).read_text(encoding="utf-8")
    (project / PAGE).write_text(text.replace("<!-- /cost -->\n", ""), encoding="utf-8")
    with pytest.raises(UserError, match="/cost"):
        bytes_page()
