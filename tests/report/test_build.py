"""The whole report: what is written, that it is the same each time, and all of it or nothing."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jinja2
import pandas as pd
import pytest
from docutils.core import publish_parts
from hand_made import take_no_steps

from stlm.errors import UserError
from stlm.model.byte_config import ByteConfig
from stlm.model.reduction import LoraConfig, SharingConfig
from stlm.report.build import report

ONE = {"baseline": ("Baseline", {})}
TWO = ONE | {"sincos": ("SinCos PE", {"positions": "sinusoidal"})}
REDUCED = ONE | {
    "shared": ("Shared", {"sharing": SharingConfig(what="ffn"), "lora": LoraConfig(rank=4)}),
    "bytes": ("Bytes", {"bytes": ByteConfig(width=16, heads=2), "vocab_size": 258}),
}
CAPTIONS = Path(__file__).parents[2] / "workflow" / "report"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(study) -> dict[str, bytes]:
    """Everything in the study's folder but the runs."""
    return {name: data for name, data in contents(study.folder).items() if not name.startswith("runs/")}


def test_writes_every_table_and_plot(make_study):
    study = make_study(benchmarks={"blimp": 60, "hellaswag": 40})
    report(study)
    found = set(results(study))
    tables = (
        "table1",
        "table2",
        "table2-acc-norm",
        "table2-paper-mode",
        "blimp-phenomena",
        "contamination",
        "leaks",
    )
    tables += ("bits-per-byte", "variants", "efficiency", "equal-cost", "headline")
    plots = (
        "figure1",
        "accuracy-blimp",
        "accuracy-hellaswag",
        "blimp-phenomena",
        "differences",
        "efficiency",
        "equal-cost",
        "parameters",
        "pareto",
    )
    # Dropout is no part of an architecture.
    diagrams = [f"architecture-{run}" for run in study.runs if run != "dropout-free"]
    assert found == (
        {f"tables/{name}.{kind}" for name in tables for kind in ("csv", "md")}
        | {f"typeset/{name}.{kind}" for name in tables for kind in ("tex", "html")}
        | {f"plots/{name}.svg" for name in (*plots, *diagrams)}
        | {f"plots/data/{name}.csv" for name in plots}
        | {"typeset/headline.rst"}
        | {f"training/{run}.html" for run in study.runs}
        | {f"cards/{run}.md" for run in study.runs}
        | {"records/runs.json", "records/documents.parquet"}
        | {f"tables/{name}" for name in ("groups.csv", "statistics.csv", "made.json", "checksum.json")}
        | {"metrics.json", "contamination.json"}
    )
    for name in plots:
        text = "".join(ElementTree.parse(study.folder / f"plots/{name}.svg").getroot().itertext())
        assert "Baseline" in text
        for label in ("SinCos PE", "Learned PE", "Simple FFN", "DropoutFree"):
            # Three have the same parameters in the same parts, and one bar.
            assert label in text or name == "parameters", (name, label)
    check_differences(study)


@pytest.mark.usefixtures("quick_figures")
def test_same_results_give_the_same_bytes_and_the_terminal_a_line_a_run(make_study, capsys):
    study = make_study(TWO, benchmarks={"blimp": 40})
    report(study)
    printed = capsys.readouterr().out.splitlines()
    first = results(study)
    report(study)
    assert results(study) == first
    numbers = json.loads((study.folder / "metrics.json").read_text())
    assert printed[0].split("  ")[-1].strip() == "blimp"
    for line, run, label in zip(printed[1:], numbers, ("Baseline", "SinCos PE"), strict=False):
        assert line.startswith(label)
        assert line.endswith(f"{100 * numbers[run]['blimp']:.1f}")
    check_plot_data(study)


def check_plot_data(study) -> None:
    """The plots' data are the curves, with the value last."""
    curve = pd.read_csv(study.runs["sincos"].folder / "curve.csv").dropna(subset="val_char_perplexity")
    data = pd.read_csv(study.folder / "plots/data/figure1.csv")
    own = data[data.run == "sincos"]
    assert own.tokens.tolist() == curve.tokens.tolist()
    assert own.value.tolist() == pytest.approx(curve.val_char_perplexity.tolist(), abs=1e-5)
    for file in (study.folder / "plots/data").glob("*.csv"):
        assert next(csv.reader(file.open()))[-1] == "value"
    assert len(pd.read_csv(study.folder / "plots/data/accuracy-blimp.csv")) == 2 * 3


@pytest.mark.usefixtures("quick_figures")
def test_metrics_are_flat_numbers_and_every_table_and_plot_has_a_caption(make_study):
    study = make_study(TWO)
    report(study)
    check_captions(study)
    metrics = json.loads((study.folder / "metrics.json").read_text())
    assert list(metrics) == ["baseline", "sincos"]
    for run, own in metrics.items():
        assert set(own) == {
            *("parameters", "tokens", "test_bits_per_byte", "test_char_perplexity", "blimp", "hellaswag")
        }
        assert own["parameters"] == study.runs[run].parameters.total
        last = json.loads((study.runs[run].folder / "evaluation.json").read_text())["checkpoints"][
            "step-000200"
        ]
        expected = last["benchmarks"]["blimp"]["modes"]["harness"]["acc"]["value"]
        assert own["blimp"] == pytest.approx(expected, abs=5e-5)


@pytest.mark.usefixtures("blank_training_pages")
@pytest.mark.parametrize(
    "shape",
    [
        {"variants": ONE},
        {"variants": ONE, "steps": (20,), "benchmarks": {"synthetic_choice": 20}},
        {"variants": TWO, "seeds": (0, 1)},
        {"variants": TWO, "benchmarks": {}},
        {"variants": {f"v{i}": (f"Variant {i}", {}) for i in range(12)}, "benchmarks": {"blimp": 30}},
        {"variants": REDUCED, "seeds": (0, 1), "benchmarks": {"blimp": 20}},
        {"variants": {"baseline": ("A label as long as a sentence, and_$odd & <b>", {})}},
    ],
    ids=["one run", "one checkpoint", "seeds", "no benchmark", "many runs", "reduced", "long label"],
)
def test_studies_of_any_shape(make_study, shape):
    study = make_study(**shape)
    report(study)
    for file in (study.folder / "plots").glob("*.svg"):
        ElementTree.parse(file)
    rows = list(csv.DictReader((study.folder / "tables/table2.csv").open()))
    assert [row["run"] for row in rows if row["kind"] == "run"] == list(study.runs)
    # Where nothing is compared, no differences are drawn.
    drawn = (study.folder / "plots/differences.svg").exists()
    assert drawn == (len(study.runs) > 1 and bool(study.evaluation.benchmarks))


@pytest.mark.parametrize("whose", ["of the study", "published", "baseline"])
def test_a_run_of_no_steps_is_in_the_report_without_a_curve(make_study, whose):
    study = make_study(TWO, benchmarks={"blimp": 20})
    base = study.runs["baseline"]
    given = {"source": "made"} if whose != "of the study" else {"run": "baseline", "tokens": base.tokens}
    given |= {"flops": base.flops} if "run" in given else {}
    run = "baseline" if whose == "baseline" else "sincos"
    study = take_no_steps(study, run, **given)
    report(study)
    page = (study.folder / f"training/{run}.html").read_text()
    assert "It took no step" in page and "<img" not in page and "nan" not in page
    card = (study.folder / f"cards/{run}.md").read_text()
    start = given.get("run") or "made"
    assert f"with the weights that it starts from, those of {start}" in card and "step 0 of 0" not in card
    numbers = json.loads((study.folder / "metrics.json").read_text())[run]
    assert numbers["tokens"] == 0 and numbers["blimp"] > 0
    drawn = pd.read_csv(study.folder / "plots/data/figure1.csv")
    assert set(drawn["run"]) == {"baseline", "sincos"} - {run}
    table = study.folder / "tables/equal-cost.csv"
    if whose == "of the study":
        # It has cost what its parent has, and is compared with it at that cost.
        rows = {row["variant"]: row for row in csv.DictReader(table.open())}
        assert rows["sincos"]["tokens_kind"] == "finished" and rows["sincos"]["tokens_share"] == "1.0"
    else:  # nothing was spent on it here
        assert not table.exists()


@pytest.mark.usefixtures("quick_figures")
def test_run_never_validated_still_has_a_report(make_study):
    study = make_study(ONE, benchmarks={"blimp": 20})
    path = study.runs["baseline"].folder / "curve.csv"
    curve = pd.read_csv(path)
    curve["val_char_perplexity"] = float("nan")
    curve.to_csv(path, index=False)
    report(study)
    ElementTree.parse(study.folder / "plots/figure1.svg")


@pytest.mark.usefixtures("quick_figures")
def test_broken_run_leaves_the_old_report_whole(make_study):
    study = make_study(TWO, benchmarks={"blimp": 20})
    report(study)
    before = results(study)
    (study.runs["sincos"].folder / "items.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"items\.parquet.*stlm evaluate toy sincos"):
        report(study)
    assert results(study) == before


@pytest.mark.usefixtures("quick_figures")
def test_plots_of_a_benchmark_no_longer_scored_go(make_study):
    study = make_study(ONE, benchmarks={"blimp": 20, "hellaswag": 20})
    report(study)
    path = study.runs["baseline"].folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for checkpoint in evaluation["checkpoints"].values():
        del checkpoint["benchmarks"]["hellaswag"]
    path.write_text(json.dumps(evaluation))
    report(study)
    assert not [name for name in results(study) if "hellaswag" in name]


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_statistics_are_of_every_run_checkpoint_and_score(make_study, seeds):
    study = make_study(TWO, seeds=seeds, benchmarks={"blimp": 40, "hellaswag": 20})
    report(study)
    rows = pd.read_csv(study.folder / "tables/statistics.csv")
    runs = rows[rows["kind"] == "run"]
    # 3 checkpoints; acc of two benchmarks in two modes, and acc_norm of one in one.
    assert len(runs) == len(study.runs) * 3 * 5
    assert not runs.duplicated(["run", "checkpoint", "benchmark", "mode", "metric"]).any()
    assert set(runs["version"].astype(str)) == {"1.0"}
    own = runs[runs["run"].str.startswith("sincos")]
    assert own[["difference", "difference_low", "difference_clustered_high", "p"]].notna().all(axis=None)
    assert (own["percent"] - own["difference"]).tolist() == pytest.approx(
        runs[runs["run"].str.startswith("baseline")]["percent"].tolist(), abs=0.002
    )
    tested = rows[rows["p_holm"].notna()]
    assert set(tested["step"]) == {200}
    assert len(tested) == 5
    assert set(tested["test"]) == ({"mcnemar"} if len(seeds) == 1 else {"t over seeds"})
    means = rows[rows["kind"] == "variant"]
    assert set(means["variant"]) == (set() if len(seeds) == 1 else {"baseline", "sincos"})


def check_differences(study) -> None:
    """Differences are drawn as the tables give them."""
    drawn = pd.read_csv(study.folder / "plots/data/differences.csv")
    rows = pd.read_csv(study.folder / "tables/statistics.csv")
    quoted = rows[(rows["mode"] == "harness") & (rows["metric"] == "acc") & rows["p_holm"].notna()]
    both = drawn.merge(quoted, on=["run", "benchmark"], suffixes=("", "_quoted"))
    assert len(both) == len(drawn) == 8
    for column, other in (
        ("value", "difference"),
        ("low", "difference_low"),
        ("clustered_high", "difference_clustered_high"),
    ):
        assert (100 * both[column]).tolist() == pytest.approx(both[other].tolist(), abs=0.002)
    assert both["p_holm"].tolist() == both["p_holm_quoted"].tolist()


def check_captions(study) -> None:
    for folder, caption, suffix in (
        ("typeset", "tables", "html"),
        ("plots", "plots", "svg"),
        ("training", "training", "html"),
    ):
        template = jinja2.Template((CAPTIONS / f"{caption}.rst").read_text())
        for file in (study.folder / folder).glob(f"*.{suffix}"):
            text = template.render(snakemake=SimpleNamespace(wildcards=SimpleNamespace(name=file.stem)))
            assert text.strip() != file.stem, f"{file.name} has no caption"
            assert not re.search("system-message", publish_parts(text, writer="html")["body"])
