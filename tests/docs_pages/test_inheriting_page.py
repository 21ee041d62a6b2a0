"""docs/inheriting.md has the tables of what benchmarks/cuts.py measured."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from stlm.docs_pages.inheriting import MEASURED, PAGE, inheriting_page, read_measured
from stlm.errors import UserError
from stlm.files import read_json, write_json


@pytest.fixture
def copied(root, tmp_path):
    """A folder with the page and the file alone, both of which a test may change."""
    for path in (PAGE, MEASURED):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, tmp_path / path)
    return tmp_path


def test_page_is_up_to_date(root):
    changed = subprocess.run(
        ["git", "status", "--porcelain", str(PAGE), str(MEASURED)], cwd=root, capture_output=True, text=True
    )
    if changed.returncode or changed.stdout:
        pytest.skip("not a clean clone: measured here")
    page = (root / PAGE).read_text(encoding="utf-8")
    assert page == inheriting_page(root), f"{PAGE} is out of date: run `stlm document`"


def test_a_number_that_is_measured_anew_is_in_the_page(copied):
    content = read_json(copied / MEASURED)
    rows = content["tables"]["layers"]
    row, cells = next(iter(rows.items()))
    cells["`first`"] = 12.3456
    content["settings"]["test_tokens"] = 54321
    content["left_out"][0][0] = 77
    write_json(copied / MEASURED, content)
    page = inheriting_page(copied)
    (line,) = [line for line in page.splitlines() if "12.346" in line]
    assert line.startswith(f"| {row} |") and line.count("|") == 2 + len(cells)
    assert "54,321 tokens" in page and "in this order, the layers 77," in page
    # The text around the tables stays.
    text = (copied / PAGE).read_text(encoding="utf-8")
    assert page.partition("## Measured")[0] == text.partition("## Measured")[0]


@pytest.mark.parametrize("part", ["table", "cell"])
def test_what_was_not_measured_is_no_table(copied, part):
    content = read_json(copied / MEASURED)
    table = content["tables"]["layers"]
    if part == "table":
        del content["tables"]["layers"]
    else:
        next(iter(table.values())).popitem()
    write_json(copied / MEASURED, content)
    with pytest.raises(
        UserError, match=r"the table 'layers' is not complete; run: python benchmarks/cuts.py"
    ):
        inheriting_page(copied)


def test_a_missing_file_names_the_command(copied):
    (copied / MEASURED).unlink()
    with pytest.raises(UserError, match=r"cuts.json: no such file; run: python benchmarks/cuts.py"):
        read_measured(copied)
