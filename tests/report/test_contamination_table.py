"""The table of contamination and the note below Table 2."""

from __future__ import annotations

import csv
import json

import pytest

from stlm.errors import UserError
from stlm.report.build import report
from stlm.report.contamination import contamination_note, read_contamination

pytestmark = pytest.mark.usefixtures("quick_figures")

ONE = {"baseline": ("Baseline", {})}
BENCHMARKS = {"blimp": 200, "hellaswag": 40}


@pytest.fixture
def study(make_study):
    return make_study(ONE, benchmarks=BENCHMARKS)


def notes(study, table: str) -> str:
    """What stands below a table."""
    return (study.folder / f"tables/{table}.md").read_text().rpartition(" |\n")[2]


def test_the_table_has_the_numbers_of_the_stage_and_others_a_note(study, write_contamination):
    write_contamination(study, BENCHMARKS, found=6)
    report(study)
    rows = list(csv.DictReader((study.folder / "tables/contamination.csv").open()))
    assert rows == [
        {
            "corpus": "synthetic",
            "benchmark": name,
            "version": "1.0",
            "items": str(n),
            "at_least_8_words": str(n),
            "share_8": "12",
            "at_least_13_words": str(n - 10),
            "share_13": "6",
            "whole": "3",
            "contaminated": "6",
        }
        for name, n in BENCHMARKS.items()
    ]
    shown = (study.folder / "tables/contamination.md").read_text()
    assert "| BLiMP (version 1.0) | 200 | 200 | 12 (6.0%) | 190 | 6 (3.0%) | 3 (1.5%) |" in shown
    assert "synthetic, train split: 5,000 documents, 12.3 MB" in shown
    assert "for example toy-1: “the hen ran the" in shown and "document 1,234" in shown
    assert shown.count("the hen ran") < 10 * len(BENCHMARKS), "long examples are shortened"
    # Every table of accuracies says it.
    for table in ("table2", "table2-acc-norm", "table2-paper-mode"):
        assert "BLiMP 6 of 200; HellaSwag 6 of 40 (table contamination)" in notes(study, table)
    assert "contamination" not in notes(study, "table1")


def test_a_study_without_benchmarks_has_no_such_table(make_study, write_contamination):
    study = make_study(ONE, benchmarks={})
    write_contamination(study, {}, found=0)
    report(study)
    assert (study.folder / "tables/leaks.md").exists()
    assert not (study.folder / "tables/contamination.md").exists()


def test_no_note_where_nothing_is(study):
    report(study)
    assert contamination_note(read_contamination(study)) is None
    assert "contamination" not in notes(study, "table2")
    shown = (study.folder / "tables/contamination.md").read_text()
    assert "| HellaSwag (version 1.0) | 40 | 40 | 0 | 30 | 0 | 0 |" in shown


def test_the_note_names_the_corpus_where_there_are_several(study, write_contamination):
    both = study.model_copy(update={"corpora": ["synthetic", "childes"]})
    write_contamination(both, BENCHMARKS, found=1)
    note = contamination_note(read_contamination(both))
    for part in ("BLiMP 1 of 200 (synthetic)", "HellaSwag 1 of 40 (synthetic)", "BLiMP 1 of 200 (childes)"):
        assert part in note


def test_what_is_missing_or_of_another_corpus_names_the_command(study):
    path = study.folder / "contamination.json"
    record = json.loads(path.read_text())
    record["corpora"]["childes"] = record["corpora"].pop("synthetic")
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"about childes, but .* synthetic; run: stlm contamination toy"):
        report(study)
    record["corpora"]["synthetic"] = record["corpora"].pop("childes")
    record["corpora"]["synthetic"]["benchmarks"]["blimp"]["version"] = "0.9"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"about blimp 0\.9, .* scores blimp 1\.0, .* stlm contamination toy"):
        report(study)
    path.unlink()
    with pytest.raises(UserError, match=r"contamination\.json: is missing; run: stlm contamination toy"):
        report(study)
    assert not (study.folder / "tables").exists()


def test_the_table_of_leaks(study, write_contamination):
    write_contamination(study, BENCHMARKS)
    report(study)
    rows = list(csv.DictReader((study.folder / "tables/leaks.csv").open()))
    assert [(row["split"], row["documents"], row["share"], row["above_half"]) for row in rows] == [
        ("val", "40", "0.0004", "0"),
        ("test", "50", "", "1"),
    ]
    shown = (study.folder / "tables/leaks.md").read_text()
    assert "| val | 40 | 9,000 | 0.04% | 0 | 0 | 6% |" in shown
    assert "| test | 50 | 0 | – | 1 | 2 | – |" in shown


def test_no_table_of_leaks_for_text_tokenized_before_they_were_measured(study, write_contamination):
    write_contamination(study, BENCHMARKS)
    path = study.folder / "contamination.json"
    record = json.loads(path.read_text())
    for own in record["corpora"].values():
        del own["held_out"]
    path.write_text(json.dumps(record))
    report(study)
    assert not (study.folder / "tables/leaks.md").exists()
