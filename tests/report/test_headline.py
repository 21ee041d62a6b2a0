"""The front page: three sentences and a table, computed from the results."""

from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from docutils.core import publish_parts
from hand_made import set_documents

from stlm.report.bits_table import bits_table
from stlm.report.headline import Finding, findings, front_page, headline_table, sentences
from stlm.report.results import read_results

WORKFLOW = Path(__file__).parents[2] / "workflow" / "report" / "workflow.rst"
THREE = {name: (name.capitalize(), {}) for name in ("baseline", "better", "equal")}
THREE["worse"] = ("Worse & <b>", {})


def finding(label: str, bits: float, low: float | None = None, high: float | None = None, **keys) -> Finding:
    base = 2.0
    interval = None if low is None else (low, high)
    certain = interval is not None and not low <= 0 <= high
    keys = {"difference": bits - base, "over": "seeds", "certain": certain} | keys
    return Finding(label, 1000, bits, interval=interval, **keys)


BASE = Finding("Baseline", 1000, 2.0, None, None, "", False)


def test_the_best_the_worst_and_the_undecided_are_named():
    found = [
        BASE,
        finding("Good", 1.8, -0.25, -0.15),
        finding("Same", 1.99, -0.05, 0.03),
        finding("Bad", 2.3, 0.2, 0.4),
    ]
    assert sentences(found) == [
        "Good has the fewest bits per byte of test text of the 4 models compared: 1.800, against 2.000 for "
        "the baseline (difference −0.200, 95% interval over seeds −0.250 to −0.150).",
        "Bad has the most: 2.300 (difference +0.300, 95% interval over seeds +0.200 to +0.400).",
        "Same cannot be distinguished from the baseline.",
    ]


def test_a_baseline_that_is_best_says_so():
    found = [BASE, finding("Bad", 2.3, 0.2, 0.4, over="documents")]
    first, last = sentences(found)
    assert first.startswith("The baseline has the fewest bits") and "Bad follows with 2.300" in first
    assert last.startswith("Every other model can be distinguished from the baseline. With one seed each")


def test_a_baseline_that_is_worst_says_so():
    found = [BASE, finding("Good", 1.8, -0.25, -0.15), finding("Better", 1.9, -0.2, -0.05)]
    assert sentences(found)[1] == "The baseline has the most."
    tied = sentences([BASE, finding("Equal", 2.0, -0.1, 0.1)])
    assert tied[0] == "No model has fewer bits per byte of test text than the baseline: 2.000."


def test_what_is_not_known_is_not_claimed():
    alone = sentences([BASE])
    assert alone == ["Baseline has 2.000 bits per byte of test text."]
    assert sentences([BASE, finding("Bad", 2.3)])[-1].startswith("No intervals are known")
    elsewhere = sentences([BASE, finding("Other", 1.0, difference=None)])
    assert elsewhere == [*alone, "Measured on other text, and not compared: Other."]


def test_a_long_study_shows_the_best_and_the_worst(make_study):
    study = make_study({"baseline": ("Baseline", {})}, benchmarks={})
    others = [finding(f"v{number:02}", 1.0 + number / 10, -1.0, 1.0) for number in range(20)]
    table = headline_table(study, [BASE, *others])
    assert [row[0].text for row in table.rows] == ["Baseline", "v00", "v01", "v02", "v03", "v19"]
    assert "has all 20" in table.notes[-1]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_findings_are_those_of_the_table_of_bits_per_byte(make_study, seeds):
    study = make_study(THREE, seeds=seeds, benchmarks={})
    n_bytes = [1000] * 40
    for name, run in study.runs.items():
        shift = {"better": -0.1, "equal": 0.0, "worse": 0.2}.get(run.variant, 0.0)
        bits = [2000 + 1000 * shift + (-1) ** place * (run.variant == "equal") for place in range(40)]
        set_documents(study, name, [value + run.seed for value in bits], n_bytes)
    results = read_results(study)
    records = bits_table(results).records
    front = front_page(headline_table(study, findings(results, records)))
    assert "Better has the fewest bits per byte of test text of the 4 models compared: 1.9" in front
    assert "Worse &amp; &lt;b&gt; has the most: 2.2" in front and "<b>" not in front
    assert "Equal cannot be distinguished from the baseline." in front
    assert ("interval over seeds" in front) == (len(seeds) > 1)
    assert ("With one seed each" in front) == (len(seeds) == 1)


@pytest.mark.parametrize("file", ["typeset/table1.html", "plots/pareto.svg", "training/baseline.html"])
def test_the_front_page_has_the_sentences_the_table_and_the_figure(make_study, file):
    """Rendered as Snakemake does, whichever of the study's files it lists first."""
    study = make_study({"baseline": ("Baseline", {})}, benchmarks={})
    for name in ("typeset", "plots"):
        (study.folder / name).mkdir()
    front = front_page(headline_table(study, [BASE, finding("Good", 1.8, -0.25, -0.15)]))
    (study.folder / "typeset" / "headline.rst").write_text(front)
    (study.folder / "plots" / "figure1.svg").write_text('<?xml version="1.0"?>\n<svg id="figure"></svg>\n')
    template = jinja2.Template(WORKFLOW.read_text(), trim_blocks=True, lstrip_blocks=True)
    body = publish_parts(template.render(files=[SimpleNamespace(path=study.folder / file)]), writer="html")
    body = body["html_body"]
    assert "system-message" not in body
    sentence, table, figure = (body.index(x) for x in ("Good has the fewest", "<table", '<svg id="figure">'))
    assert sentence < table < figure < body.index("<strong>Tables</strong>")


def test_published_models_are_not_among_the_findings(make_study):
    study = make_study({"baseline": ("Baseline", {})}, benchmarks={})
    records = [{"bits_per_byte": 1.7}, {"bits_per_byte": 1.0, "difference": -0.7}]
    assert [one.label for one in findings(read_results(study), records)] == ["Baseline"]
