"""docs/bytes.md has the tables that the schema and the results give."""

from __future__ import annotations

import math
import shutil
import subprocess

import numpy as np
import pytest
from scipy import stats

from stlm.docs_pages import committed
from stlm.docs_pages.bytes import PAGE, bytes_page, cost_table, parameters_table
from stlm.errors import UserError
from stlm.files import write_json
from stlm.report.documents import Documents
from stlm.report.records import write_records
from stlm.study.load import load_study


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


def test_bytes_have_an_output_of_their_own_as_in_the_study(root):
    """The page and the study count the same model: 0.27M parameters, and 0.25M were it tied."""
    (row,) = [line for line in parameters_table(root).splitlines() if "`bytes`" in line and "| 64 |" in line]
    assert f"| {load_study('bytes', root=root).runs['bytes-s0'].parameters.embedding / 1e6:.2f}M |" in row


def write_results(project, seeds=(0, 1), slow: str = "") -> None:
    """Of every run of the study, as the report leaves them in git; those of `slow` on another machine."""
    runs = [run for run in load_study("bytes").runs.values() if run.seed in seeds]
    for run in runs:
        bits = 2.0 + 0.1 * run.seed + 0.01 * len(run.variant) + 0.02 * (run.name == "bytes-s1")
        record = run.model_dump(mode="json") | {"run": run.name, "parameters": run.parameters.record()}
        record |= {"steps": run.training.steps, "tokens": run.tokens, "flops": run.flops, "checkpoints": []}
        record |= {
            "seconds": 100 if run.variant == "baseline" else 160 + 20 * run.seed,
            "precision": "bfloat16",
        }
        record |= {"device": "cpu", "threads": 8 if run.variant == slow else 2}
        write_json(project / run.folder / "train.json", record)
        tokens = 800 if run.tokenizer == "words" else 1000
        perplexity = {"bits_per_byte": bits, "char_perplexity": 4.0, "tokens": tokens, "bytes": 4000}
        last = {"step": 1000, "tokens": run.tokens, "weights_sha256": "", "perplexity": perplexity}
        early = last | {"step": 500, "perplexity": perplexity | {"bits_per_byte": 9.0}}
        checkpoints = {"step-1000": last | {"benchmarks": {}}, "step-0500": early | {"benchmarks": {}}}
        write_json(project / run.folder / "evaluation.json", {"checkpoints": checkpoints})
    folder = project / "results" / "bytes"
    write_json(folder / "metrics.json", {run.name: {} for run in runs})
    write_records(folder / "records", {run.name: project / run.folder for run in runs})


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_cost_is_what_was_read_computed_and_waited_for_beside_the_difference(project):
    write_results(project)
    table, study = cost_table(), load_study("bytes")
    found = cells(table)
    assert len(found["variant"]) == 8, "nine columns with the names"
    labels = {run.variant: run.label for run in study.runs.values()}
    assert list(found)[2:] == list(labels.values())
    tokens = study.runs["baseline-s0"].tokens
    base, own = found[labels["baseline"]], found[labels["bytes"]]
    assert base[2:] == [
        f"{4 * tokens / 1e6:.2f}",
        f"{study.runs['baseline-s0'].flops:.2e}",
        "1.00 ×",
        "2.130",
        "",
        "",
    ]
    # Two seeds of V variants; one cell is 0.02 from the pattern, so that its variant's interval is wide.
    count = len(labels)
    half = float(stats.t.ppf(0.975, count - 1)) * 0.02 / math.sqrt(2 * count)
    own_half = float(stats.t.ppf(0.975, 1)) * 0.02 / 2
    assert own[3:] == [
        f"{study.runs['bytes-s0'].flops:.2e}",
        "1.70 ×",
        "2.110",
        f"−0.020 ±{own_half:.3f}",
        "−0.030, −0.010",
    ]
    words = found[labels["words"]]
    assert words[2] == f"{5 * tokens / 1e6:.2f}", "chunks of five bytes for four"
    assert words[6].endswith(f"±{half:.3f}")
    assert f"{count - 1} degrees of freedom" in table
    assert f"Differences with {labels['bytes']} have the wider" in table
    assert "different amounts of text" in table


def test_one_seed_has_no_interval(project):
    write_results(project, seeds=(0,))
    assert "±" not in cost_table()


def test_times_of_another_machine_are_not_compared(project):
    write_results(project, slow="words")
    found = cells(cost_table())
    labels = {run.variant: run.label for run in load_study("bytes").runs.values()}
    assert (found[labels["words"]][4], found[labels["bytes"]][4]) == ("–", "1.70 ×")


def test_a_run_without_its_records_is_an_error(project):
    write_results(project)
    (project / "results/bytes/records/runs.json").unlink()
    with pytest.raises(UserError, match=r"records/runs\.json: no such file; run: stlm report bytes"):
        cost_table()


def test_a_study_that_has_not_run_has_no_cost(project):
    assert cost_table().startswith("The study has not run yet")


def test_a_page_without_its_marks_is_an_error(root, project):
    (project / "docs").mkdir()
    shutil.copy(root / PAGE, project / PAGE)
    text = (project / PAGE).read_text(encoding="utf-8")
    (project / PAGE).write_text(text.replace("<!-- /cost -->\n", ""), encoding="utf-8")
    with pytest.raises(UserError, match="/cost"):
        bytes_page()


def test_differences_are_paired_by_document_where_their_scores_are_kept(project, monkeypatch):
    write_results(project)
    sizes = np.arange(100, 160)

    def documents(record, path, last, command, run) -> Documents:
        rates = np.linspace(1.5, 2.5, 60) + (0.2 if run.startswith("words") else 0.0)
        return Documents(np.array(["toy"] * 60), np.arange(60, dtype=np.uint64), rates * sizes, sizes)

    monkeypatch.setattr(committed, "documents_of", documents)
    table = cost_table()
    assert cells(table)["variant"][-1] == "over documents"
    assert cells(table)["Bytes, words"][-1] == "[+0.200, +0.200]"
    assert "Over documents" in table
