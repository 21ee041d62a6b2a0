"""docs/findings.md: the tables are the committed results', the words are left alone."""

import csv
import json
import subprocess
from pathlib import Path
from statistics import mean, stdev

import pytest
from hand_made import set_test

from stlm.docs_pages.findings import FINDINGS, findings_page, findings_table, write_findings
from stlm.errors import UserError
from stlm.files import write_json, write_text
from stlm.report.build import metrics
from stlm.report.comparison import compare_all
from stlm.report.records import write_records
from stlm.report.results import read_results
from stlm.report.statistics import statistics_records
from stlm.report.table import csv_text

TWO = {"baseline": ("Baseline", {}), "other": ("Other", {"ffn": "gelu", "ffn_width": 96})}
PAGE = """# Findings

## Toy

Words of people.

<!-- in short: written by `stlm document` from results/toy/ -->
old figures
<!-- /table -->

More words.
"""


@pytest.fixture
def page(tmp_path):
    """Where the page is, in the project that `make_study` is in."""
    path = tmp_path / FINDINGS
    path.parent.mkdir()
    path.write_text(PAGE)
    return path


def report(study) -> None:
    """What the page reads of a report."""
    results = read_results(study)
    records = statistics_records(results, compare_all(results))
    (study.folder / "tables").mkdir()
    write_records(study.folder / "records", {run: study.runs[run].folder for run in results})
    write_text(study.folder / "tables" / "statistics.csv", csv_text(records))
    write_json(study.folder / "metrics.json", metrics(results))


def cells(study) -> dict[str, list[str]]:
    return {row[0].text: [cell.text for cell in row[1:]] for row in findings_table("toy", study.folder).rows}


def bits(study, run: str) -> float:
    record = json.loads((study.runs[run].folder / "evaluation.json").read_text())
    return list(record["checkpoints"].values())[-1]["perplexity"]["bits_per_byte"]


def test_tables_are_replaced_and_words_stay(make_study, page):
    study = make_study(TWO, benchmarks={"blimp": 60})
    report(study)
    write_findings()
    text = page.read_text()
    assert "Words of people." in text and text.endswith("More words.\n")
    assert "old figures" not in text and "| Other |" in text
    write_findings()
    assert page.read_text() == text


def test_a_study_without_results_is_not_in_the_findings(page, tmp_path):
    with pytest.raises(UserError, match=r"findings\.md: has a table of toy, but results/toy/metrics\.json"):
        findings_page(tmp_path)


def test_a_study_that_the_page_lacks_is_begun(make_study, page):
    page.write_text("# Findings\n")
    report(make_study(TWO, benchmarks={"blimp": 60}))
    text = findings_page()
    assert text.startswith("# Findings\n\n## `toy`\n\n<!-- in short")
    page.write_text(text)
    assert findings_page() == text


def test_a_table_of_the_report_can_be_shown(make_study, page):
    study = make_study(TWO, benchmarks={})
    report(study)
    page.write_text(PAGE.replace("in short", "equal-cost"))
    (study.folder / "tables/equal-cost.md").write_text("| at equal cost |\n")
    assert "\n| at equal cost |\n<!-- /table -->" in findings_page()
    page.write_text(PAGE.replace("in short", "nothing"))
    with pytest.raises(UserError, match=r"tables/nothing\.md, which is missing: run `stlm report toy`"):
        findings_page()


def test_one_seed_has_intervals_over_items_alone(make_study):
    study = make_study(TWO, benchmarks={"blimp": 200})
    report(study)
    own = cells(study)["Other"]
    difference = bits(study, "other") - bits(study, "baseline")
    assert own[3:6] == ["1", f"{bits(study, 'other'):.3f}", f"{difference:+.3f}".replace("-", "−")]
    statistics = csv.DictReader((study.folder / "tables/statistics.csv").open())
    tested = [
        row for row in statistics if row["run"] == "other" and row["p_holm"] and row["mode"] == "harness"
    ]
    (row,) = tested
    assert own[7].lstrip("+−").startswith(f"{abs(float(row['difference'])):.1f}")
    assert len(own[7].split("[")[1].split(",")) == 2


def test_seeds_are_averaged_and_paired(make_study):
    study = make_study(TWO, seeds=(0, 1), benchmarks={"blimp": 60})
    level = {"baseline-s0": 2.0, "baseline-s1": 2.5, "other-s0": 1.9, "other-s1": 2.4004}
    for run, value in level.items():
        set_test(study, run, bits_per_byte=value)
    report(study)
    own = cells(study)["Other"]
    both = [1.9, 2.4004]
    assert own[3:5] == ["2", f"{mean(both):.3f} ± {stdev(both):.3f}"]
    # A residual of 0.0001 in each cell, one degree of freedom: 12.7 x 0.0002.
    assert own[5] == "−0.100 [−0.102, −0.097]"


def test_the_committed_page_is_of_the_committed_results(root: Path):
    changed = subprocess.run(
        ["git", "status", "--porcelain", str(FINDINGS), "results"], cwd=root, capture_output=True, text=True
    )
    if changed.returncode or changed.stdout:
        pytest.skip("not a clean clone: results of a study run here are not the committed ones")
    page = (root / FINDINGS).read_text(encoding="utf-8")
    assert page == findings_page(root), "docs/findings.md is out of date: run `stlm document`"


def test_tokens_are_those_of_the_whole_chain_of_starts():
    folder = Path(__file__).parents[2] / "results" / "inherit_ways"
    table = findings_table("inherit_ways", folder)
    tokens = {row[0].text: row[table.header.index("tokens")].text for row in table.rows}
    # 16, 24 and 40 steps of 1,024 tokens, as many as the baseline's 80.
    assert tokens["Cut in three rounds"] == tokens["Cut, healed"] == "81.92k"
