"""The Pareto plot; names that hide nothing."""

import csv
import json

import numpy as np
from hand_made import begin_from, set_test, set_train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stlm.report.pareto import front, label_points, write_pareto
from stlm.report.results import read_results

SIZES = {
    "baseline": ("Baseline", {}),
    "wide": ("Wide", {"width": 96}),
    "poor": ("Poor", {"width": 96, "layers": 3}),
    "copy": ("Copy", {"dropout": 0.0}),
}


def rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_front_is_what_nothing_smaller_is_as_good_as():
    rng = np.random.default_rng(0)
    points = [
        (int(size), float(bits)) for size, bits in zip(rng.integers(1, 20, 60), rng.random(60), strict=True)
    ]
    best = [
        place
        for place, (size, bits) in enumerate(points)
        if not any((other[0] <= size and other[1] <= bits) and other != (size, bits) for other in points)
    ]
    assert sorted(front(points)) == best
    assert [points[place][0] for place in front(points)] == sorted(points[place][0] for place in best)


def test_the_pareto_plot_has_a_point_a_variant(make_study, tmp_path):
    study = make_study(SIZES, seeds=(0, 1), benchmarks={})
    (tmp_path / "data").mkdir()
    write_pareto(tmp_path, read_results(study))
    found = {row["variant"]: row for row in rows(tmp_path / "data" / "pareto.csv")}
    assert list(found) == list(SIZES)
    assert int(found["poor"]["parameters"]) == study.runs["poor-s0"].parameters.total
    records = [
        json.loads((study.runs[f"wide-s{seed}"].folder / "evaluation.json").read_text()) for seed in (0, 1)
    ]
    bits = [list(record["checkpoints"].values())[-1]["perplexity"]["bits_per_byte"] for record in records]
    assert float(found["wide"]["value"]) == round(sum(bits) / 2, 5)
    svg = (tmp_path / "pareto.svg").read_text()
    assert svg.count(">Poor<") == 2, "in both panels"


def front_of(study, folder) -> dict[str, dict[str, str]]:
    (folder / "data").mkdir(exist_ok=True)
    write_pareto(folder, read_results(study))
    return {row["variant"]: row for row in rows(folder / "data" / "pareto.csv")}


OTHER = "trained on more or fewer tokens"


def test_a_variant_on_other_tokens_neither_is_on_the_front_nor_bends_it(make_study, tmp_path):
    """Continued is the baseline and more steps, long a smaller model with as many again: both are better."""
    variants = SIZES | {"continued": ("Continued", {}), "long": ("Long", {"width": 32})}
    study = make_study(variants, benchmarks={}, skills={"continued": 0.9, "long": 0.95})
    base, long = study.runs["baseline"], study.runs["long"]
    own = {"tokens": base.tokens // 4, "flops": base.flops / 4}
    study = begin_from(study, "continued", "baseline", base.tokens, base.flops)
    set_train(study, "continued", **own)
    set_train(study, "long", tokens=2 * long.tokens, flops=2 * long.flops)
    found = front_of(study, tmp_path)
    assert min(float(row["value"]) for row in found.values()) == float(found["long"]["value"])
    on_front = {name: row["front"] for name, row in found.items()}
    assert on_front["baseline"] == "True" and on_front["continued"] == on_front["long"] == "False"
    whole = {"tokens": 1.25 * base.tokens, "flops": 1.25 * base.flops}
    assert {key: float(found["continued"][key]) for key in whole} == whole, "with what its start cost"
    assert [name for name, row in found.items() if row["same_tokens"] == "False"] == ["continued", "long"]
    svg = (tmp_path / "pareto.svg").read_text()
    assert OTHER in svg and "on as many training tokens" in svg


def test_tokens_are_equal_within_one_percent(make_study, tmp_path):
    study = make_study(SIZES, benchmarks={})
    for name, share in (("wide", 1.009), ("poor", 1.02)):
        set_train(study, name, tokens=round(share * study.runs[name].tokens))
    found = front_of(study, tmp_path)
    assert [found[name]["same_tokens"] for name in ("wide", "poor")] == ["True", "False"]


def test_chunks_of_bytes_count_for_the_text_that_they_hold(make_study, tmp_path):
    study = make_study(SIZES, benchmarks={})
    wide = study.runs["wide"].model_copy(update={"tokenizer": "words"})
    study = study.model_copy(update={"runs": study.runs | {"wide": wide}})
    set_train(study, "wide", tokenizer="words")
    assert front_of(study, tmp_path)["wide"]["same_tokens"] == "False", "no one counted its bytes"
    set_test(study, "baseline", tokens=400, bytes=1000)
    set_test(study, "wide", tokens=200, bytes=1000)
    assert front_of(study, tmp_path)["wide"]["same_tokens"] == "False", "as many, of twice the length"
    set_train(study, "wide", tokens=wide.tokens // 2)
    assert front_of(study, tmp_path)["wide"]["same_tokens"] == "True"
    assert OTHER not in (tmp_path / "pareto.svg").read_text()


def test_variants_of_one_size_have_no_pareto_plot(make_study, tmp_path):
    study = make_study({"baseline": ("Baseline", {}), "copy": ("Copy", {"dropout": 0.0})}, benchmarks={})
    write_pareto(tmp_path, read_results(study))
    assert not list(tmp_path.glob("pareto*"))


def test_names_are_clear_of_each_other_and_of_the_points():
    """Twelve points close together, as variants of one size are, with room for their names."""
    drawing = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    rng = np.random.default_rng(1)
    points = [(1 + 0.02 * x, y) for x, y in rng.random((12, 2))]
    axes.plot(*zip(*points, strict=True), "o", markersize=7)
    axes.set_xlim(0.8, 1.2)
    names = [f"variant {number}" for number in range(12)]
    label_points(axes, points, names, ["#000000"] * 12)
    drawing.draw_without_rendering()
    assert {text.get_text() for text in axes.texts} == set(names)
    boxes = [text.get_window_extent() for text in axes.texts]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)
