"""Bars of parameters by group."""

import csv

from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.architecture import write_parameters
from stlm.report.results import read_results

SIZES = {
    "baseline": ("Baseline", {}),
    "wide": ("Wide", {"width": 96}),
    "copy": ("Copy", {"dropout": 0.0}),
}


def test_bars_sum_to_the_models(make_study, tmp_path):
    study = make_study(SIZES, benchmarks={})
    (tmp_path / "data").mkdir()
    write_parameters(tmp_path, read_results(study))
    found = list(csv.DictReader((tmp_path / "data" / "parameters.csv").open()))
    for run in study.runs.values():
        own = {row["group"]: int(row["value"]) for row in found if row["variant"] == run.variant}
        assert own == parameter_groups(build_on_meta(run.model))
        assert sum(own.values()) == run.parameters.total
    svg = (tmp_path / "parameters.svg").read_text()
    assert "Baseline and Copy" in svg, "one bar for what is divided alike"
