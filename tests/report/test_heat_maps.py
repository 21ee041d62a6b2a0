"""Figures that a layer has several of, and what else a page and a card say of a run with experts."""

from __future__ import annotations

import re

import pandas as pd
from test_training_pages import TWO, change, images, pages, words

from stlm.report.heat_maps import numbered_columns
from stlm.report.results import read_results

ONE = {"baseline": TWO["baseline"]}
REMARK = "block 2: expert 1 of 3 is dead"


def with_loads(study, watched=True):
    """Loads of three experts in blocks 1 and 2, at steps 50 and 200 of watch.csv."""
    path = study.runs["baseline"].folder / "watch.csv"
    rows = pd.read_csv(path)
    chosen = rows["layer"].isin(["block 1", "block 2"]) & rows["step"].isin([50, 200])
    for number, share in enumerate((0.01, 0.34, 0.65), start=1):
        rows.loc[chosen, f"load_{number}"] = share
    rows.loc[chosen & (rows["step"] == 50), "load_2"] = 0.77
    if not watched:
        rows = rows.loc[chosen, ["step", "layer", "load_1", "load_2", "load_3"]]
    rows.to_csv(path, index=False)


def test_numbered_columns_belong_together_in_the_order_of_their_numbers():
    watch = pd.DataFrame({"step": [1], "layer": ["block 1"], "load_10": [1.0], "load_2": [2.0], "rms": [0.0]})
    watch = watch.assign(empty_1=None, residual_rms=1.0)
    assert numbered_columns(watch) == {"load": ["load_2", "load_10"]}


def test_the_page_draws_them_as_last_measured_and_not_among_the_lines(make_study, tmp_path):
    study = make_study(ONE, benchmarks={})
    with_loads(study)
    _, lines, heat = map(words, images(pages(study, tmp_path / "training")["baseline"]))
    assert "load" not in lines and "residual stream" in lines
    assert "load, step 200" in heat and "block 1" in heat and "block 3" not in heat
    assert {"0.01", "0.34", "0.65"} <= set(heat.split("\n")) and "0.77" not in heat


def test_rows_of_many_values_have_no_labels(make_study, tmp_path):
    study = make_study(ONE, benchmarks={})
    for count in (16, 17):
        path = study.runs["baseline"].folder / "watch.csv"
        rows = pd.read_csv(path)
        for number in range(1, count + 1):
            rows[f"load_{number}"] = 0.123
        rows.to_csv(path, index=False)
        _, _, heat = map(words, images(pages(study, tmp_path / str(count))["baseline"]))
        assert ("0.12" in heat.split("\n")) == (count == 16)


def test_a_run_whose_layers_were_not_watched_has_the_heat_map_alone(make_study, tmp_path):
    study = make_study(ONE, benchmarks={})
    with_loads(study, watched=False)
    found = images(pages(study, tmp_path / "training")["baseline"])
    assert len(found) == 2 and "load, step 200" in words(found[1])


def test_remarks_and_the_parameters_that_a_token_uses_are_shown(make_study, tmp_path):
    study = make_study(ONE, benchmarks={})
    plain = pages(study, tmp_path / "plain")["baseline"]
    assert "a token uses" not in plain and "dead" not in plain
    path = study.runs["baseline"].folder / "train.json"
    counts = read_results(study)["baseline"].train.parameters.model_dump(exclude_none=True)
    change(path, parameters={**counts, "active": 4321}, remarks=[REMARK])
    page = pages(study, tmp_path / "training")["baseline"]
    assert re.search(r"parameters</td><td>[\d,]+, of which a token uses 4,321<", page)
    assert f"<p>{REMARK}.</p>" in page
    record = read_results(study)["baseline"].train
    assert record.remarks == [REMARK] and not record.further
