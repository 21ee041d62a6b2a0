"""Comparisons at equal parameters, tokens, FLOPs and time, on curves made by hand."""

import csv
import math

import numpy as np
import pytest
from hand_made import begin_from, set_curve, set_test, set_train

from stlm.report.curves import read_variants
from stlm.report.equal_cost import equal_cost_table, equal_costs, write_equal_cost
from stlm.report.results import read_results
from stlm.report.table import markdown
from stlm.techniques.series_activation import SeriesActivation

BASE = {"tokens": [100, 200, 300, 400], "seconds": [10, 20, 30, 40], "bits": [4.0, 3.0, 2.5, 2.25]}
GELU = {"ffn": "gelu", "ffn_width": 96}  # of the size of the baseline's SwiGLU of 64


@pytest.fixture
def study(make_study):
    made = make_study(
        {"baseline": ("Baseline", {}), "fast": ("Fast", GELU), "slow": ("Slow", {"layers": 3})}, benchmarks={}
    )
    set_curve(made, "baseline", **BASE)
    set_curve(made, "fast", [100, 200, 240, 400], [6, 12, 16, 32], [3.5, 2.5, 2.0, 1.75])
    set_curve(made, "slow", [100, 320], [20, 84], [4.5, 2.5])
    return made


def costs(study):
    return equal_costs(read_variants(read_results(study)))


def rows(study) -> dict:
    return {row.variant.train.variant: row for row in costs(study).rows}


def test_a_training_of_the_same_cost_is_compared_at_its_end(study):
    pair = rows(study)["fast"].pairs["tokens"]
    assert (pair.kind, pair.share) == ("finished", 1.0)
    assert pair.difference == pytest.approx(1.75 - 2.25)


def test_a_cheaper_one_is_compared_where_it_ends_with_the_baseline_on_its_way(study):
    pair = rows(study)["fast"].pairs["seconds"]
    assert (pair.kind, pair.share) == ("ended sooner", 0.8)
    assert pair.difference == pytest.approx(1.75 - (2.5 - 0.2 * 0.25)), "the baseline after 32 of 40 seconds"


def test_a_dearer_one_is_compared_on_its_way(study):
    pair = rows(study)["slow"].pairs["seconds"]
    assert pair.kind == "on the way"
    assert pair.value == pytest.approx(4.5 - 2 * 20 / 64), "after 40 of its 84 seconds"
    assert pair.difference == pytest.approx(4.5 - 2 * 20 / 64 - 2.25)


@pytest.mark.parametrize(
    ("seconds", "kind"), [(41, "finished"), (39, "finished"), (43, "on the way"), (37, "ended sooner")]
)
def test_times_that_differ_by_noise_alone_are_equal(study, seconds, kind):
    set_curve(study, "fast", [100, 400], [10, seconds], [3.5, 1.75])
    own = rows(study)["fast"]
    assert own.pairs["seconds"].kind == kind
    assert own.pairs["tokens"].kind == "finished"
    assert any("at most 5%" in note for note in equal_cost_table(study, costs(study)).notes)


@pytest.mark.parametrize(("tokens", "kind"), [(402, "finished"), (410, "on the way"), (390, "ended sooner")])
def test_tokens_and_flops_have_no_noise(study, tokens, kind):
    set_curve(study, "fast", [100, tokens], [10, 40], [3.5, 1.75])
    own = rows(study)["fast"]
    assert own.pairs["tokens"].kind == own.pairs["flops"].kind == kind


def test_flops_are_counted_by_the_token(study):
    per_token = {name: run.flops / run.tokens for name, run in study.runs.items()}
    whole, own = 400 * per_token["baseline"], 320 * per_token["slow"]
    assert own > whole, "three layers for two"
    pair = rows(study)["slow"].pairs["flops"]
    tokens = whole / per_token["slow"]
    assert pair.kind == "on the way"
    assert pair.value == pytest.approx(4.5 - 2 * (tokens - 100) / 220)


def test_nothing_is_extrapolated(study):
    """Slow's first validation is after 20 seconds, the baseline's only one after 15."""
    set_curve(study, "baseline", [150], [15], [3.5])
    own = rows(study)
    assert own["slow"].pairs["seconds"] is None
    cells = {row[0].text: row for row in equal_cost_table(study, costs(study)).rows}
    assert cells["Slow"][6].text == "before its first\nvalidation"
    assert own["fast"].pairs["seconds"].kind == "on the way"


def test_a_model_of_the_baselines_size_is_compared_at_equal_parameters(study):
    own = rows(study)
    assert study.runs["fast"].parameters == study.runs["baseline"].parameters
    assert own["fast"].pairs["parameters"].kind == "matched"
    assert own["fast"].pairs["parameters"].difference == pytest.approx(-0.5)
    assert "parameters" in own["slow"].sizes and own["slow"].pairs["parameters"] is None
    assert "parameters" not in own["fast"].sizes


FAMILY = {
    "baseline": ("Baseline", {}),
    "large": ("Large", {"layers": 4, "width": 96, "ffn_width": 128}),
    "between": ("Between", {"positions": "learned", "layers": 4}),
    "huge": ("Huge", {"positions": "learned", "layers": 6, "width": 96}),
}
ENDS = {"baseline": 2.0, "large": 1.6, "between": 1.9, "huge": 1.5}


def test_sizes_of_the_baseline_say_what_parameters_are_worth(make_study):
    study = make_study(FAMILY, seeds=(0, 1), benchmarks={})
    for name, run in study.runs.items():
        end = ENDS[run.variant] + 0.1 * run.seed
        set_curve(study, name, [100, 400], [10, 40], [4.0, end])
    own = rows(study)
    size = {variant: study.runs[f"{variant}-s0"].parameters.total for variant in FAMILY}
    assert size["baseline"] < size["between"] < size["large"] < size["huge"]
    share = math.log(size["between"] / size["baseline"]) / math.log(size["large"] / size["baseline"])
    expected = [2.0 ** (1 - share) * 1.6**share, 2.1 ** (1 - share) * 1.7**share]
    pair = own["between"].pairs["parameters"]
    assert pair.kind == "between sizes"
    assert list(pair.references.values()) == pytest.approx(expected)
    assert pair.difference == pytest.approx(np.mean([1.9 - expected[0], 2.0 - expected[1]]))
    assert own["huge"].pairs["parameters"] is None, "beyond the largest size"
    assert [name for name, row in own.items() if "parameters" in row.sizes] == ["baseline", "large"]


def test_the_line_between_sizes_is_said_to_favour_the_variant(make_study):
    """A loss with a part that no size removes is convex in these logarithms: a chord is above it."""
    study = make_study(FAMILY, benchmarks={})
    true = {name: 1.5 + 50 * run.parameters.total**-0.4 for name, run in study.runs.items()}
    for name in FAMILY:
        set_curve(study, name, [100, 400], [10, 40], [4.0, true[name]])
    assert rows(study)["between"].pairs["parameters"].difference < 0, "though it is as good as its size"
    assert any("favours the variant" in note for note in equal_cost_table(study, costs(study)).notes)


def test_without_a_line_between_sizes_nothing_is_said_of_one(study):
    assert not any("favours" in note for note in equal_cost_table(study, costs(study)).notes)


def retrain(study, name: str, **keys):
    """The study with other keys of training for the run `name`, and its record to match."""
    run = study.runs[name]
    run = run.model_copy(update={"training": run.training.model_copy(update=keys)})
    training = run.training.model_dump(mode="json")
    set_train(study, name, training=training, tokens=run.tokens, flops=run.flops)
    return study.model_copy(update={"runs": study.runs | {name: run}})


@pytest.mark.parametrize("keys", [{"weight_decay": 0.2}, {"steps": 100}])
def test_another_recipe_is_no_size_of_the_baseline(study, keys):
    """Slow differs in a size alone; with another recipe the difference is not one of parameters."""
    assert "parameters" not in rows(retrain(study, "slow", **keys))["slow"].sizes


def test_a_technique_is_no_size_of_the_baseline(study):
    """Its feed-forward network makes room for the technique's parameters: it differs in more than size."""
    assert "parameters" in rows(study)["slow"].sizes
    activation = SeriesActivation(terms=3)
    run = study.runs["slow"].model_copy(update={"techniques": {"series_activation": activation}})
    set_train(study, "slow", techniques={"series_activation": activation.model_dump(mode="json")})
    study = study.model_copy(update={"runs": study.runs | {"slow": run}})
    assert "parameters" not in rows(study)["slow"].sizes


@pytest.mark.parametrize(
    "keys", [{"learning_rate": 1e-5, "min_learning_rate": 1e-6}, {"steps": 100, "batch_size": 16}]
)
def test_a_recipe_of_its_own_on_as_many_tokens_is_still_the_baseline_in_another_size(study, keys):
    assert "parameters" in rows(retrain(study, "slow", **keys))["slow"].sizes


def test_a_size_with_more_steps_is_beside_the_family_and_no_part_of_it(make_study):
    study = make_study(FAMILY | {"longer": ("Longer", FAMILY["large"][1])}, benchmarks={})
    for name in FAMILY:
        set_curve(study, name, [100, 400], [10, 40], [4.0, ENDS[name]])
    study = retrain(study, "longer", steps=400)
    set_curve(study, "longer", [100, 800], [10, 80], [4.0, 1.0])
    own = rows(study)
    assert [name for name, row in own.items() if "parameters" in row.sizes] == ["baseline", "large"]
    pair = own["longer"].pairs["parameters"]
    assert (pair.kind, pair.flops, pair.same_budget) == ("matched", 2.0, False)
    assert pair.references == {0: 1.6}


def test_at_equal_parameters_and_flops_sizes_are_those_that_cost_as_much(make_study):
    """Large costs more on as many tokens, short as much on fewer; equal is of their size."""
    size = FAMILY["large"][1]
    variants = {"baseline": FAMILY["baseline"], "large": ("Large", size), "short": ("Short", size)}
    study = make_study(variants | {"equal": ("Equal", size | {"positions": "learned"})}, benchmarks={})
    per_token = {name: run.flops / run.tokens for name, run in study.runs.items()}
    set_curve(study, "baseline", **BASE)
    set_curve(study, "large", [100, 400], [10, 40], [4.0, 1.6])
    study = retrain(study, "short", steps=100)
    set_train(study, "short", flops=study.runs["baseline"].flops)
    for name, end in (("short", 1.9), ("equal", 1.8)):
        set_curve(study, name, [10, 400 * per_token["baseline"] / per_token[name]], [10, 40], [4.0, end])
    own = rows(study)
    assert [name for name, row in own.items() if "parameters" in row.sizes] == ["baseline", "large"]
    assert [name for name, row in own.items() if "both" in row.sizes] == ["baseline", "short"]
    pair = own["equal"].pairs["both"]
    assert (pair.kind, pair.references, pair.same_budget) == ("matched", {0: 1.9}, True)
    assert pair.difference == pytest.approx(-0.1)
    assert own["equal"].pairs["parameters"].flops == pytest.approx(
        per_token["baseline"] / per_token["large"], rel=0.02
    )
    assert own["large"].pairs["both"] is None, "its training cost more"
    table = equal_cost_table(study, costs(study))
    assert "parameters and FLOPs" in table.header[4]
    cells = {row[0].text: row[4].text for row in table.rows}
    assert cells["Equal"] == "1.800\n−0.100" and cells["Large"] == "–"
    assert cells["Short"] == "a size of\nthe baseline"


def test_without_such_sizes_there_is_no_such_column(study):
    assert not any("parameters and FLOPs" in text for text in equal_cost_table(study, costs(study)).header)


def two_seeds(make_study, tokens: int):
    """Better by 0.3 with next to no noise, after `tokens` for the baseline's 400."""
    variants = {"baseline": ("Baseline", {}), "better": ("Better", GELU)}
    study = make_study(variants, seeds=(0, 1), benchmarks={})
    for seed in (0, 1):
        set_curve(study, f"baseline-s{seed}", [100, 400], [10, 40], [4.0, 2.0 + seed])
        set_curve(study, f"better-s{seed}", [100, tokens], [10, 40], [4.0, 1.7 + 0.998 * seed])
    return study


@pytest.mark.parametrize(("tokens", "bold"), [(400, True), (402, True), (440, False), (200, False)])
def test_equal_parameters_with_another_training_budget_are_never_bold(make_study, tokens, bold):
    study = two_seeds(make_study, tokens)
    found = costs(study)
    pair = found.rows[1].pairs["parameters"]
    table = equal_cost_table(study, found)
    (cell,) = [row[3] for row in table.rows if row[0].text == "Better"]
    assert abs(pair.difference) > found.half_width(pair)
    assert pair.kind == "matched" and cell.bold_line == (1 if bold else None)
    assert any("Other budget" in note for note in table.notes) != bold
    share = tokens / 400
    assert ("other budget" in cell.text) != bold
    if not bold:
        assert pair.flops == pytest.approx(share)
        assert cell.text.endswith(f"\nother budget:\n{share:.2f} × the FLOPs")
    (record,) = [own for own in table.records if own["variant"] == "better"]
    assert record["parameters_flops"] == pytest.approx(share, abs=1e-4)


def test_equal_flops_are_an_equal_budget_at_equal_parameters(make_study):
    """Half of the tokens, at twice the FLOPs each."""
    study = two_seeds(make_study, 200)
    assert not costs(study).rows[1].pairs["parameters"].same_budget
    for seed in (0, 1):
        set_train(study, f"better-s{seed}", flops=2 * study.runs[f"better-s{seed}"].flops)
    assert costs(study).rows[1].pairs["parameters"].same_budget


def test_between_sizes_another_training_budget_is_marked(make_study):
    study = make_study(FAMILY, benchmarks={})
    for name in FAMILY:
        set_curve(study, name, [100, 800 if name == "between" else 400], [10, 40], [4.0, ENDS[name]])
    pair = rows(study)["between"].pairs["parameters"]
    per_token = {name: study.runs[name].flops / study.runs[name].tokens for name in FAMILY}
    low, high = (2 * per_token["between"] / per_token[name] for name in ("large", "baseline"))
    assert pair.kind == "between sizes" and low < pair.flops < high
    cells = {row[0].text: row[3].text for row in equal_cost_table(study, costs(study)).rows}
    assert f"between sizes\nother budget:\n{pair.flops:.2f} × the FLOPs" in cells["Between"]


def test_differences_are_paired_by_seed(make_study):
    """Seeds move both alike: the difference has little noise, though the values differ much."""
    study = make_study(
        {"baseline": ("Baseline", {}), "better": ("Better", GELU)}, seeds=(0, 1), benchmarks={}
    )
    for seed, level in ((0, 2.0), (1, 3.0)):
        set_curve(study, f"baseline-s{seed}", [100, 400], [10, 40], [4.0, level])
        set_curve(study, f"better-s{seed}", [100, 400], [10, 40], [4.0, level - 0.3 - 0.002 * seed])
    found = costs(study)
    pair = found.rows[1].pairs["tokens"]
    assert pair.differences == pytest.approx([-0.3, -0.302])
    # Two models and seeds: a residual of a quarter of 0.002 in each cell, one degree of freedom.
    assert (found.noise.sd, found.noise.dof) == pytest.approx((0.001, 1))
    assert found.half_width(pair) == pytest.approx(12.7062 * 0.001, rel=1e-4)
    cells = {row[0].text: row for row in equal_cost_table(study, found).rows}
    assert cells["Better"][4].text == "2.199\n−0.301 ±0.013" and cells["Better"][4].bold_line == 1
    assert cells["Better"][2].text.endswith("sd 0.706, 2 seeds")


def test_a_run_that_starts_from_anothers_weights_has_cost_what_they_have(study):
    whole = study.runs["baseline"]
    set_train(study, "baseline", tokens=400, seconds=40, flops=400 * whole.flops / whole.tokens)
    study = begin_from(study, "fast", "baseline", 400, 1e9)
    pair = rows(study)["fast"].pairs["tokens"]
    assert pair is None, "its first validation is after 500 tokens"
    set_curve(study, "baseline", [100, 600], [10, 60], [4.0, 2.0])
    own = rows(study)["fast"]
    assert own.pairs["tokens"].kind == own.pairs["flops"].kind == "on the way"
    assert own.pairs["tokens"].value == own.pairs["flops"].value == pytest.approx(2.5), "200 tokens"
    assert own.pairs["seconds"].value == pytest.approx(1.75 + 0.25 * 12 / 16), "20 of its own 32 seconds"
    assert own.pairs["parameters"].flops == pytest.approx(800 / 600), "all of the start counts"


def test_another_tokenizer_is_compared_by_the_test_text(study):
    """Its validation text is another; both were measured on 1,000 bytes of test text."""
    other = study.runs["fast"].model_copy(update={"tokenizer": "bytes"})
    changed = study.model_copy(update={"runs": study.runs | {"fast": other}})
    set_train(study, "fast", tokenizer="bytes")
    set_curve(study, "fast", [100, 200], [20, 50], [3.0, 2.0])
    for run, bits, tokens in (("baseline", 2.5, 400), ("fast", 2.4, 200)):
        set_test(study, run, bits_per_byte=bits, tokens=tokens, bytes=1000)
    row = rows(changed)["fast"]
    pair = row.pairs["tokens"]
    assert pair.kind == "finished", "200 tokens, each of which holds as much as two"
    assert pair.difference == pytest.approx(2.4 - 2.5)
    assert row.pairs["seconds"].difference == pytest.approx(2.4 + (10 / 30) * 1.0 - 2.5), (
        "after 40 of 50 seconds"
    )
    assert row.pairs["parameters"].difference == pytest.approx(2.4 - 2.5)
    table = equal_cost_table(changed, costs(changed))
    assert any("compared by test text" in note and note.endswith("Fast.") for note in table.notes)


@pytest.mark.parametrize("former", [False, True])
def test_bytes_in_chunks_are_compared_on_the_same_validation_text(study, former):
    """Documents are chosen whatever the tokenizer; tokens count for the text that they hold."""
    runs = dict(study.runs)
    for name, tokenizer in (("baseline", "bpe-512"), ("fast", "words")):
        runs[name] = runs[name].model_copy(update={"tokenizer": tokenizer})
        recipe = runs[name].training.model_dump(mode="json")
        if former:  # a record of an earlier version
            del recipe["validation_bytes"]
            recipe |= {"validation_documents": 3, "validation_tokens": 200_000}
        validation = None if former else {"documents": 3, "bytes": 900, "text_sha256": "three"}
        set_train(study, name, training=recipe, tokenizer=tokenizer, validation=validation)
    set_test(study, "baseline", tokens=400, bytes=1000)
    set_test(study, "fast", tokens=200, bytes=1000, bits_per_byte=9.0)
    set_curve(study, "fast", [100, 300], [20, 50], [3.0, 2.0])
    changed = study.model_copy(update={"runs": runs})
    pair = rows(changed)["fast"].pairs["tokens"]
    assert (pair.kind, pair.value) == ("on the way", 2.5), "200 tokens of it, on validation text"
    table = equal_cost_table(changed, costs(changed))
    assert any("tokenizer that hold as much text" in note and note.endswith("Fast.") for note in table.notes)
    assert not any("by test text" in note for note in table.notes)


def test_the_table_says_how_each_figure_was_read(study):
    table = equal_cost_table(study, costs(study))
    cells = {row[0].text: [cell.text for cell in row] for row in table.rows}
    assert cells["Fast"][3:5] == ["1.750\n−0.500", "1.750\n−0.500"]
    assert cells["Fast"][6] == "not reached\n−0.700\nat its end, 0.80 ×"
    assert cells["Slow"][6] == "3.875\n+1.625\non the way"
    assert cells["Slow"][3] == "a size of\nthe baseline"
    assert cells["Baseline"][2:] == ["2.250"] * 5
    assert table.header[4].endswith("(400 tokens)") and table.header[6].endswith("(40 s)")
    text = markdown(table)
    assert "On the way: a point" in text and "Not reached: its training" in text and "One seed:" in text
    fast = next(record for record in table.records if record["variant"] == "fast")
    assert (fast["seconds_kind"], fast["seconds_share"]) == ("ended sooner", 0.8)
    assert (fast["tokens_difference"], fast["tokens_half_width"]) == (-0.5, None)


def test_the_plot_marks_another_training_budget(make_study, tmp_path):
    study = two_seeds(make_study, 800)
    (tmp_path / "data").mkdir()
    write_equal_cost(tmp_path, study, costs(study))
    data = list(csv.DictReader((tmp_path / "data/equal-cost.csv").open()))
    assert {row["cost"]: row["flops"] for row in data if row["flops"] != "1.0"} == {"parameters": "2.0"}
    assert list(data[0])[-1] == "value"
    assert "another training budget" in (tmp_path / "equal-cost.svg").read_text()


def test_the_plot_draws_what_the_table_has(study, tmp_path):
    (tmp_path / "data").mkdir()
    write_equal_cost(tmp_path, study, costs(study))
    data = list(csv.DictReader((tmp_path / "data/equal-cost.csv").open()))
    assert [(row["variant"], row["cost"]) for row in data] == [
        *(("fast", cost) for cost in ("parameters", "tokens", "flops", "seconds")),
        *(("slow", cost) for cost in ("tokens", "flops", "seconds")),
    ]
    assert data[1]["value"] == "-0.5"
    assert "another training budget" not in (tmp_path / "equal-cost.svg").read_text()
    svg = (tmp_path / "equal-cost.svg").read_text()
    for text in ("equal training FLOPs", "equal parameters", "on the way of a longer training", "Fast"):
        assert text in svg
