"""Bits per byte by component of a mix."""

import json

from stlm.report.bits_table import component_table
from stlm.report.results import read_results

THREE = {"baseline": ("Mix", {}), "books": ("Books alone", {}), "other": ("Another tokenizer", {})}


def set_components(study, run: str, whole: float, **parts: float) -> None:
    path = study.runs[run].folder / "evaluation.json"
    record = json.loads(path.read_text())
    for checkpoint in record["checkpoints"].values():
        components = {name: {"bits_per_byte": value, "char_perplexity": 3.0} for name, value in parts.items()}
        checkpoint["perplexity"] |= {"bits_per_byte": whole, "components": components}
    path.write_text(json.dumps(record))


def test_each_component_with_the_difference_from_the_baseline(make_study):
    study = make_study(THREE, benchmarks={})
    set_components(study, "baseline", 2.0, childrens_books=1.9, speech=2.1)
    set_components(study, "books", 2.2, childrens_books=1.8, speech=2.75)
    table = component_table(read_results(study))
    assert table.header == ["", "all", "childrens books", "speech"]
    rows = {row[0].text: row[1:] for row in table.rows}
    assert [cell.text for cell in rows["Mix"]] == ["2.000", "1.900", "2.100"]
    assert [cell.text for cell in rows["Books alone"]] == ["2.200\n+0.200", "1.800\n−0.100", "2.750\n+0.650"]
    assert [cell.text for cell in rows["Another tokenizer"]] == ["–", "–", "–"]
    assert [cell.bold_line for cell in rows["Mix"]] == [0, None, 0]
    assert [cell.bold_line for cell in rows["Books alone"]] == [None, 0, None]
    assert table.records[1] == {
        "run": "books",
        "label": "Books alone",
        "all": 2.2,
        "childrens_books": 1.8,
        "speech": 2.75,
    }


def test_a_corpus_of_one_component_has_no_such_table(make_study):
    study = make_study(THREE, benchmarks={})
    assert component_table(read_results(study)) is None
