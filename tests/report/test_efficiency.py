"""Tokens, FLOPs and time to the baseline's loss, on curves made by hand."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from hand_made import set_curve, set_train

from stlm.report.build import report
from stlm.report.curves import read_variants
from stlm.report.efficiency import crossing, efficiency_table, needed
from stlm.report.results import read_results
from stlm.techniques.distillation import Distillation
from stlm.tokens.config import DataConfig

VARIANTS = {"baseline": ("Baseline", {}), "fast": ("Fast", {}), "slow": ("Slow", {"layers": 3})}
BASE = {"tokens": [100, 200, 300, 400], "seconds": [10, 20, 30, 40], "bits": [4.0, 3.0, 2.5, 2.25]}


@pytest.fixture
def study(make_study):
    made = make_study(VARIANTS, benchmarks={})
    set_curve(made, "baseline", **BASE)
    # Half way between 200 and 240 tokens, and between 12 and 16 seconds, it is at 2.25.
    set_curve(made, "fast", [100, 200, 240, 400], [6, 12, 16, 32], [3.5, 2.5, 2.0, 1.75])
    set_curve(made, "slow", [100, 320], [20, 84], [4.5, 2.5])
    return made


def compared(study) -> list:
    return read_variants(read_results(study))


def found(study) -> dict:
    variants = compared(study)
    return {
        one.train.variant: SimpleNamespace(variant=one, needed=needed(one, variants[0])) for one in variants
    }


def test_where_a_curve_is_at_a_value():
    x, values = np.array([10.0, 20.0, 40.0, 50.0]), np.array([5.0, 4.0, 2.0, 3.0])
    assert crossing(x, values, 4.5) == 15
    assert crossing(x, values, 3.0) == 30, "the first time, not the last"
    assert crossing(x, values, 4.0) == 20
    assert crossing(x, values, 2.0) == 40
    assert crossing(x, values, 1.9) is None
    assert crossing(x, values, 5.0) == crossing(x, values, 9.0) == 10


def test_what_leads_to_the_baselines_loss(study):
    own = found(study)
    assert list(own) == ["baseline", "fast", "slow"]
    base, fast, slow = own.values()
    assert (base.needed["tokens"], base.needed["seconds"]) == (400, 40)
    assert (fast.needed["tokens"], fast.needed["seconds"]) == (220, 14)
    assert set(slow.needed.values()) == {None}
    per_token = study.runs["fast"].flops / study.runs["fast"].tokens
    assert fast.needed["flops"] == pytest.approx(220 * per_token)


def test_the_baselines_own_is_its_whole_training_though_it_was_there_before(study):
    set_curve(study, "baseline", [100, 200, 300, 400], [10, 20, 30, 40], [4.0, 2.0, 2.5, 2.25])
    assert found(study)["baseline"].needed["tokens"] == 400


def test_the_table_says_what_was_reached(study):
    set_train(study, "fast", loss_spikes=[])
    table = efficiency_table(study, compared(study))
    rows = {row[0].text: [cell.text for cell in row] for row in table.rows}
    per_token = study.runs["fast"].flops / study.runs["fast"].tokens
    fast = ["220 tokens\n0.55 ×", f"{220 * per_token:.2e} FLOPs\n0.55 ×", "14 s\n0.35 ×", "0"]
    assert rows["Fast"][4:] == fast
    assert rows["Slow"][4:7] == ["not reached"] * 3
    assert rows["Baseline"][2].split("\n")[::2] == ["400 tokens", "40 s"]
    assert rows["Baseline"][4].endswith("\n1.00 ×")
    records = {record["variant"]: record for record in table.records}
    assert [records["fast"][f"{cost}_ratio"] for cost in ("tokens", "flops", "seconds")] == [0.55, 0.55, 0.35]
    assert records["slow"]["tokens_ratio"] is None


def test_the_parameters_of_a_token_are_shown_where_they_are_fewer(study):
    counts = {"total": 9_400_000, "embedding": 1, "non_embedding": 9_399_999}
    set_train(study, "fast", parameters={**counts, "active": 3_100_000})
    set_train(study, "slow", parameters=counts)
    sizes = {row[0].text: row[1].text for row in efficiency_table(study, compared(study)).rows}
    assert sizes["Fast"] == "9.4M\n3.1M for a token" and sizes["Slow"] == "9.4M"


@pytest.mark.parametrize("keys", [{"device": "NVIDIA"}, {"threads": 1}, {"processes": 2}, {"kernels": True}])
def test_times_of_another_machine_are_not_compared(study, keys):
    set_train(study, "fast", **keys)
    own = found(study)["fast"]
    assert own.needed["tokens"] == 220 and own.needed["flops"] is not None
    assert own.needed["seconds"] is None
    table = efficiency_table(study, compared(study))
    assert next(row for row in table.rows if row[0].text == "Fast")[6].text == "–"
    note = next(note for note in table.notes if note.startswith("Times do not compare"))
    assert "Fast (" in note and "Slow" not in note


def test_other_text_is_not_compared(study):
    """The run's own study says so too: the report refuses records that differ from what is asked."""
    other = study.runs["fast"].model_copy(update={"corpus": "other"})
    changed = study.model_copy(update={"runs": study.runs | {"fast": other}})
    set_train(study, "fast", corpus="other")
    own = found(changed)["fast"]
    assert own.variant.aligned is None
    assert set(own.needed.values()) == {None}
    table = efficiency_table(changed, compared(changed))
    assert any("On other text" in note and note.endswith("Fast.") for note in table.notes)


def test_runs_validated_on_what_they_never_saw_are_named(study):
    before = efficiency_table(study, compared(study))
    within = DataConfig(attention="within")
    runs = {**study.runs, "fast": study.runs["fast"].model_copy(update={"data": within})}
    set_train(study, "fast", data=within.model_dump(mode="json"))
    changed = study.model_copy(update={"runs": runs})
    table = efficiency_table(changed, compared(changed))
    (note,) = set(table.notes) - set(before.notes)
    assert note.startswith("Trained with attention within documents") and note.endswith("text: Fast.")
    assert table.records == before.records, "the figures stay"


def test_seeds_are_averaged(make_study):
    study = make_study({"baseline": ("Baseline", {}), "fast": ("Fast", {})}, seeds=(0, 1), benchmarks={})
    for seed, lower in ((0, 0.0), (1, 0.5)):
        set_curve(study, f"baseline-s{seed}", **BASE | {"bits": [bits - lower for bits in BASE["bits"]]})
        # The same lines with a point more or less.
        tokens = [100, 200, 300] if seed else [100, 150, 200, 300]
        bits = [np.interp(t, [100, 200, 300], [4.0, 2.0, 1.0]) - lower for t in tokens]
        set_curve(study, f"fast-s{seed}", tokens, [t / 10 + seed for t in tokens], bits)
    base, fast = found(study).values()
    assert (base.variant.seeds, fast.variant.seeds) == (2, 2)
    assert base.variant.curve.bits[-1] == 2.0
    # The mean of the seeds is 1.75 at 200 tokens and 3.75 at 100: 2.0 is an eighth of the way back.
    assert fast.needed["tokens"] == pytest.approx(187.5)
    assert fast.needed["seconds"] == pytest.approx(18.75 + 0.5)


def test_nothing_to_compare(make_study):
    alone = make_study({"baseline": ("Baseline", {})}, benchmarks={})
    assert read_variants(read_results(alone)) == []


def test_a_variant_never_validated_is_left_out(study):
    set_curve(study, "slow", [100], [10], [float("nan")])
    assert list(found(study)) == ["baseline", "fast"]


@pytest.mark.usefixtures("quick_figures")
def test_the_report_has_the_table_and_the_plot(study):
    report(study)
    rows = list(csv.DictReader((study.folder / "tables/efficiency.csv").open()))
    assert [row["variant"] for row in rows] == ["baseline", "fast", "slow"]
    data = list(csv.DictReader((study.folder / "plots/data/efficiency.csv").open()))
    assert [(row["variant"], row["value"]) for row in data] == [("fast", "0.55"), ("slow", "")]
    svg = (study.folder / "plots/efficiency.svg").read_text()
    for text in ("Fast", "Slow", "tokens", "FLOPs", "time", "not reached by its end"):
        assert text in svg


def test_the_cost_of_a_teacher_is_counted(study):
    before, teacher = found(study)["fast"].needed, read_results(study)["slow"].train
    technique = Distillation(teacher="slow")
    depends = {"teacher": {"run": "slow", "tokens": teacher.tokens, "flops": teacher.flops}}
    set_train(study, "fast", depends=depends, techniques={"distillation": technique.model_dump(mode="json")})
    student = study.runs["fast"].model_copy(update={"techniques": {"distillation": technique}})
    taught = study.model_copy(update={"runs": study.runs | {"fast": student}})
    after = found(taught)["fast"].needed
    assert after["flops"] == pytest.approx(before["flops"] + teacher.flops)
    assert after["seconds"] == pytest.approx(before["seconds"] + teacher.seconds)
    assert after["tokens"] == before["tokens"], "those that its own weights have read"
    notes = efficiency_table(taught, compared(taught)).notes
    assert "Costs include the training of other runs that it depends on: Fast." in notes
