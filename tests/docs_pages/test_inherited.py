"""README.md's table of a model that inherits: the figures of the records, and nothing else in the page."""

import csv
import shutil
from pathlib import Path

import pytest

from stlm.docs_pages.blocks import block
from stlm.docs_pages.inherited import inherited_table
from stlm.docs_pages.readmes import readme_with_results
from stlm.errors import UserError

ROOT = Path(__file__).parents[2]
INHERIT = ROOT / "results" / "inherit"


def test_a_row_a_run_and_the_parent_last():
    table = inherited_table(INHERIT)
    with (INHERIT / "tables" / "table2-acc-norm.csv").open() as file:
        normalized = {row["label"]: row for row in csv.DictReader(file)}
    rows = {row[0].text: row for row in table.rows}
    parent, healed = table.rows[-1], rows["50M, cut, healed"]
    assert parent[0].text == "SmolLM2 135M"
    assert [cell.text for cell in parent[1:3]] == ["–", "0.943"]
    assert [cell.text for cell in healed[1:4]] == ["12", "1.544", "66.4"]
    assert table.header[3:] == ["BLiMP", "HellaSwag", "ARC-easy"]
    # HellaSwag is normalized by length, as the paper has it.
    assert healed[4].text == f"{float(normalized['50M, cut, healed']['hellaswag_percent']):.1f}"


def test_a_table_changed_by_hand_is_refused(tmp_path):
    shutil.copytree(INHERIT, tmp_path / "inherit")
    path = tmp_path / "inherit" / "tables" / "table2.csv"
    path.write_text(path.read_text().replace("66.418", "76.418"))
    with pytest.raises(UserError, match=r"table2\.csv"):
        inherited_table(tmp_path / "inherit")


def test_a_block_of_the_readme_that_nothing_writes_is_refused(tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text + block("taught", "", "inherit"), encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md: a block 'taught': expected 'results', or 'inherited'"):
        readme_with_results(tmp_path)
