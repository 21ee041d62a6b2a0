"""The table of bytes on disk beside what is kept of the original."""

from __future__ import annotations

import json

import pytest
from hand_made import begin_from

from stlm.report.build import report
from stlm.report.compression import compression_table
from stlm.report.results import read_results

VARIANTS = {"baseline": ("Baseline", {}), "small": ("4 bits", {}), "other": ("Other", {})}


def quantized_study(make_study):
    """A study in which `small` started from the baseline and was compared with it."""
    study = make_study(VARIANTS, benchmarks={"blimp": 40})
    study = begin_from(study, "small", "baseline", 1000, 1e9)
    for name, size in (("baseline", 400_000), ("small", 61_234)):
        path = study.runs[name].folder / "train.json"
        record = json.loads(path.read_text())
        record["checkpoints"][-1]["bytes"] = size
        path.write_text(json.dumps(record))
    path = study.runs["small"].folder / "evaluation.json"
    record = json.loads(path.read_text())
    list(record["checkpoints"].values())[-1]["perplexity"]["bits_per_byte"] = 1.8
    near = {"of": "baseline", "weights_sha256": "w", "kl_divergence": 0.0123, "agreement": 0.9, "tokens": 500}
    path.write_text(json.dumps(record | {"fidelity": near}))
    return study


def test_each_run_that_was_compared_stands_below_its_original(make_study):
    results = read_results(quantized_study(make_study))
    table = compression_table(results)
    base, small = table.records
    assert (base["run"], base["bytes_on_disk"]) == ("baseline", 400_000)
    assert base["kl_divergence"] is base["difference"] is None
    assert (small["run"], small["bytes_on_disk"]) == ("small", 61_234)
    assert small["difference"] == pytest.approx(1.8 - results.base.perplexity.bits_per_byte, abs=1e-6)
    assert (small["kl_divergence"], small["agreement"]) == (0.0123, 0.9)
    assert any("500 tokens" in note for note in table.notes)


def test_the_report_has_it_and_cards_tell_the_size(make_study):
    study = quantized_study(make_study)
    report(study)
    assert "61,234 bytes on disk" in (study.folder / "cards" / "small.md").read_text()
    assert "bytes on disk" not in (study.folder / "cards" / "other.md").read_text()
    assert (study.folder / "tables" / "compression.csv").exists()


def test_a_study_without_such_runs_has_no_table(make_study):
    assert compression_table(read_results(make_study(VARIANTS, benchmarks={"blimp": 40}))) is None
