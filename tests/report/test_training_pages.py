"""A page a run: what it says, that it stands alone, and runs that were not watched."""

import json
import re
from base64 import b64decode
from xml.etree import ElementTree

import pandas as pd
import pytest

from stlm.errors import UserError
from stlm.report.results import read_results
from stlm.report.training import write_training_pages

TWO = {"baseline": ("Baseline", {}), "odd": ("A <b> & label_$", {"layers": 3})}
SPIKES = [
    {"step": 90, "loss": 4.25, "level": 3.5, "rise": 1.25, "grad_norm": 7.5, "recovered_after": 12},
    {"step": 150, "loss": 3.9, "level": 3.4, "rise": 0.5, "grad_norm": 2.5, "recovered_after": None},
]


def change(path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def pages(study, folder) -> dict[str, str]:
    folder.mkdir()
    write_training_pages(folder, read_results(study))
    return {path.stem: path.read_text().replace(' class="text"', "") for path in folder.glob("*.html")}


def images(page: str) -> list[bytes]:
    """The plots of a page: of its curve and, where layers were watched, of these."""
    return [b64decode(data) for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


def words(image: bytes) -> str:
    return "\n".join(ElementTree.fromstring(image).itertext())


def test_a_page_has_the_facts_the_figures_and_the_spikes(make_study, tmp_path):
    study = make_study(TWO, benchmarks={})
    change(study.runs["baseline"].folder / "train.json", loss_spikes=SPIKES, seconds=200.0, threads=1)
    found = pages(study, tmp_path / "training")
    assert set(found) == {"baseline", "odd"}
    page = found["baseline"]
    for text in ("200 steps, 204.8k tokens, 200 s", "1,024 tokens/s", "cpu, float32, 1 thread<"):
        assert text in page
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    assert "loss spikes</td><td>2" in rows
    assert "90</td><td>4.250</td><td>3.500</td><td>+1.250</td><td>7.5</td><td>12" in rows
    assert rows[-1].endswith("<td>2.5</td><td>never")
    assert "Loss spikes" in page and "<caption>Loss spikes" not in found["odd"]
    curve, layers = images(page)
    assert "loss spike" in words(curve) and "clipped above" in words(curve)
    assert "residual stream" in words(layers)
    assert "loss spike" not in words(images(found["odd"])[0])
    assert {path.suffix for path in (tmp_path / "training").iterdir()} == {".html"}
    assert "A &lt;b&gt; &amp; label_$" in found["odd"] and "<b>" not in found["odd"]
    assert "http" not in re.sub(r"base64,[^\"]+", "", page), "nothing is fetched from elsewhere"


def test_the_layers_have_a_panel_a_figure_and_a_colour_a_block(make_study, tmp_path):
    study = make_study(TWO, benchmarks={})
    text = words(images(pages(study, tmp_path / "training")["odd"])[1])
    for panel in ("residual stream", "weights", "attention's output", "feed-forward", "logit", "entropy"):
        assert panel in text
    assert text.index("block, from the embedding up") > 0
    assert {"1", "2", "3"} <= set(text.split("\n")) and "embedding" in text and "head" in text


def test_a_figure_that_no_row_has_gets_no_panel(make_study, tmp_path):
    study = make_study({"baseline": TWO["baseline"]}, benchmarks={})
    path = study.runs["baseline"].folder / "watch.csv"
    pd.read_csv(path).assign(attention_entropy=None).drop(columns="ffn_rms").to_csv(path, index=False)
    text = words(images(pages(study, tmp_path / "training")["baseline"])[1])
    assert "attention's output" in text and "entropy" not in text and "feed-forward" not in text


def test_figures_that_a_technique_adds_get_panels_under_their_names(make_study, tmp_path):
    study = make_study({"baseline": TWO["baseline"]}, benchmarks={})
    folder = study.runs["baseline"].folder
    for name, column in (("curve", "router_loss"), ("curve", "val_variance"), ("watch", "tokens_kept")):
        path = folder / f"{name}.csv"
        pd.read_csv(path).assign(**{column: 0.5}).to_csv(path, index=False)
    curve, layers = images(pages(study, tmp_path / "training")["baseline"])
    titles = words(curve).split("\n")
    assert "router loss" in titles and "variance" in titles and "tokens kept" in words(layers)
    assert not any("perplexity" in title or "bits" in title for title in titles)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_run_that_was_not_watched_has_a_page_without_layers(make_study, tmp_path, how):
    study = make_study(TWO, benchmarks={})
    folder = study.runs["odd"].folder
    if how == "missing":
        (folder / "watch.csv").unlink()
    else:
        (folder / "watch.csv").write_text("step,layer,residual_rms\n")
    train = json.loads((folder / "train.json").read_text())
    del train["loss_spikes"], train["threads"]
    (folder / "train.json").write_text(json.dumps(train))
    page = pages(study, tmp_path / "training")["odd"]
    assert "No layer was watched" in page and "not looked for" in page
    assert len(images(page)) == 1


def test_a_broken_watch_file_is_named_with_the_command_that_makes_it(make_study):
    study = make_study(TWO, benchmarks={})
    (study.runs["odd"].folder / "watch.csv").write_text("step,what\n1,2\n")
    with pytest.raises(UserError, match=r"watch.csv has no column layer.*stlm train toy odd"):
        read_results(study)


def test_a_long_run_is_drawn_with_few_points_and_its_end(make_study, tmp_path):
    study = make_study({"baseline": TWO["baseline"]}, benchmarks={})
    path = study.runs["baseline"].folder / "curve.csv"
    curve = pd.read_csv(path)
    steps = range(1, 300 * len(curve) + 1)
    long = curve.loc[curve.index.repeat(300)].assign(step=steps, tokens=[1000 * step for step in steps])
    long.to_csv(path, index=False)
    assert len(images(pages(study, tmp_path / "training")["baseline"])[0]) < 120_000


def test_a_run_too_short_to_be_validated_has_a_page(make_study, tmp_path):
    study = make_study({"baseline": TWO["baseline"]}, benchmarks={})
    path = study.runs["baseline"].folder / "curve.csv"
    curve = pd.read_csv(path).head(1)
    curve[["val_loss", "val_bits_per_byte", "val_char_perplexity"]] = float("nan")
    curve.to_csv(path, index=False)
    assert "last validation loss</td><td>–" in pages(study, tmp_path / "training")["baseline"]
