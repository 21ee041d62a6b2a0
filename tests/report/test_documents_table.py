"""How much text bits per byte are of, and how far other documents would move them and their differences."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hand_made import set_documents, set_test, set_train

from stlm.docs_pages.findings import findings_table
from stlm.errors import UserError
from stlm.evaluation.statistics import ratio_bootstrap
from stlm.report.accuracies import accuracy_tables
from stlm.report.bits_table import bits_table, component_table
from stlm.report.card import write_cards
from stlm.report.comparison import compare_all
from stlm.report.contamination import read_contamination
from stlm.report.curves import read_variants
from stlm.report.documents import amount, compare
from stlm.report.notes import curve_notes
from stlm.report.pairwise import as_json, as_text, find_predictions
from stlm.report.pairwise import compare as compare_models
from stlm.report.pareto import write_pareto
from stlm.report.records import write_records
from stlm.report.results import read_results
from stlm.report.schema import TextRecord
from stlm.report.statistics import statistics_records
from stlm.report.table import csv_text

THREE = {
    "baseline": ("Baseline", {}),
    "better": ("Better", {"ffn": "gelu"}),
    "else": ("Elsewhere", {"width": 96}),
}
SIZES = [900, 1500, 300, 2400, 700, 1100, 1300, 500, 1900, 800, 1000, 1200]
# What makes documents hard is the same for all models, and much more than what tells these apart.
RATES = np.linspace(1.4, 2.6, len(SIZES))
ONE = pa.scalar(1, pa.uint64())
CLOSER = RATES - 0.02 + 0.004 * np.cos(np.arange(len(SIZES)))


@pytest.fixture
def study(make_study):
    """Better is better on every document; Elsewhere was measured on other ones."""
    study = make_study(THREE, benchmarks={"blimp": 40}, steps=(50, 200))
    set_documents(study, "baseline", RATES * SIZES, SIZES)
    set_documents(study, "better", CLOSER * SIZES, SIZES)
    set_documents(study, "else", RATES * SIZES, SIZES, texts=range(100, 112))
    return study


def cells(table) -> dict[str, list[str]]:
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows if isinstance(row, list)}


def shown(interval, sign="") -> str:
    low, high = (f"{bound:{sign}.3f}".replace("-", "−") for bound in interval)
    return f"[{low}, {high}]"


def test_differences_are_paired_by_document(study):
    results = read_results(study)
    base, better, elsewhere = (run.documents() for run in results.values())
    found = compare(better, base)
    assert found.value == pytest.approx(better.bits_per_byte - base.bits_per_byte)
    assert found.interval == pytest.approx(ratio_bootstrap((CLOSER - RATES) * SIZES, SIZES))
    assert found.interval.half_width < base.interval.half_width / 50 and not found.few
    assert compare(elsewhere, base) is None

    table = bits_table(results)
    rows = cells(table)
    assert rows["Baseline"][:3] == ["12", f"{base.bits_per_byte:.3f}", shown(base.interval)]
    assert rows["Better"][3:] == ["−0.020", shown(found.interval, "+"), "–"]
    assert rows["Elsewhere"][3:] == ["other text", "–", "–"]
    assert "of 12 of 40 documents, 13.6 kB of 136 kB." in table.notes[0]
    assert "Of other text than Baseline, and not comparable with it: Elsewhere." in table.notes[0]
    assert [row[4].bold for row in table.rows] == [False, True, False]
    record = table.records[1]
    assert (record["documents"], record["bytes_total"], record["few_documents"]) == (12, 136_000, False)
    assert record["difference_high"] == pytest.approx(found.interval.high, abs=1e-6)


def test_over_seeds_the_mean_differences_of_documents_are_resampled(make_study):
    study = make_study(THREE, seeds=(0, 1), benchmarks={})
    moved = {("baseline", 0): 0.0, ("baseline", 1): 0.03, ("better", 0): 0.01, ("better", 1): 0.02}
    for (variant, seed), shift in moved.items():
        rates = (RATES if variant == "baseline" else CLOSER) + shift
        set_documents(study, f"{variant}-s{seed}", rates * SIZES, SIZES)
    set_documents(study, "else-s0", RATES * SIZES, SIZES)
    table = bits_table(read_results(study))
    rows = cells(table)
    assert rows["Better, mean of 2 seeds"][4] == shown(ratio_bootstrap((CLOSER - RATES) * SIZES, SIZES), "+")
    assert re.fullmatch(r"\[−[\d.]+, \+[\d.]+\]", rows["Better, mean of 2 seeds"][5]), "seeds differ more"
    assert not table.rows[1][4].bold, "zero is within the interval over seeds"
    assert rows["Elsewhere, mean of 2 seeds"][2] == "–", "a seed of an earlier version"


def test_few_documents_are_marked_and_one_has_no_interval(study):
    for run, few in (("baseline", RATES[:9]), ("better", CLOSER[:9]), ("else", RATES[:1])):
        set_documents(study, run, few * SIZES[: len(few)], SIZES[: len(few)])
    table = bits_table(read_results(study))
    rows = cells(table)
    assert rows["Baseline"][2].endswith("]‡") and rows["Better"][4].endswith("]‡")
    assert rows["Elsewhere"][:1] == ["1"] and rows["Elsewhere"][2] == "–"
    assert any(note.startswith("‡: of fewer than ten documents") for note in table.notes)


def test_results_of_earlier_versions_have_no_intervals_and_say_so(make_study):
    study = make_study(THREE, benchmarks={})
    for run in study.runs:
        set_test(study, run, documents=22, bytes=365_331, tokens=102_178)
    table = bits_table(read_results(study))
    assert "of 22 documents, 365.3 kB." in table.notes[0] and "earlier version" in table.notes[1]
    assert {row[3].text for row in table.rows} == {"–"}
    set_test(study, "better", bytes=90_000)
    assert cells(bits_table(read_results(study)))["Better"][3] == "other text"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "documents.parquet is missing: run `stlm evaluate toy better`"),
        (lambda path: path.write_bytes(b"PAR1"), "documents.parquet cannot be read"),
        (lambda path: change(path, "nats", lambda c: pc.multiply(c, 1.01)), "evaluation.json beside it"),
        (lambda path: change(path, "nats", lambda c: pc.multiply(c, float("nan"))), "are no numbers"),
        (lambda path: change(path, "text", lambda c: pc.add(c, ONE)), "or other text: run `stlm evaluate"),
        (lambda path: change(path, "step", lambda c: pc.add(c, 1)), "has no text of step 200"),
        (lambda path: change(path, "component", lambda c: None), "cannot be read"),
    ],
)
def test_what_is_not_as_evaluation_json_says_is_refused(study, spoil, expected):
    spoil(study.runs["better"].folder / "documents.parquet")
    with pytest.raises(UserError) as error:
        bits_table(read_results(study))
    assert expected in str(error.value)


def change(path, column, how) -> None:
    table = pq.read_table(path)
    values, place = how(table[column]), table.column_names.index(column)
    table = table.remove_column(place)
    pq.write_table(table if values is None else table.append_column(column, values), path)


def test_every_table_says_how_much_text_it_is_of(study, tmp_path):
    results = read_results(study)
    amounts = "12 of 40 documents, 13.6 kB of 136 kB"
    comparisons = compare_all(results)
    main = accuracy_tables(results, comparisons)[0]
    base = results["baseline"].documents()
    assert main.rows[1][2].text == f"{base.bits_per_byte:.3f}\n{shown(base.interval)}"
    assert any(amounts in note and "Elsewhere" in note for note in main.notes)
    write_cards(tmp_path, results, comparisons, read_contamination(study))
    assert (
        f"{amounts}: **{base.bits_per_byte:.4f} bits per byte** (95% interval"
        in (tmp_path / "baseline.md").read_text()
    )
    (tmp_path / "data").mkdir()
    write_pareto(tmp_path, results)
    assert "else," not in (tmp_path / "data" / "pareto.csv").read_text(), "of other text"
    set_documents(study, "else", RATES * SIZES, SIZES)
    write_pareto(tmp_path, read_results(study))
    assert "else," in (tmp_path / "data" / "pareto.csv").read_text()
    assert amounts in (tmp_path / "pareto.svg").read_text()


def test_tables_of_validation_say_how_much_text_they_are_of(study):
    for run, text in (("baseline", "a"), ("better", "a"), ("else", "b")):
        validation = {"documents": 11, "documents_total": 178, "bytes": 182_983, "bytes_total": 2_843_373}
        set_train(study, run, validation=validation | {"text_sha256": text})
    variants = read_variants(read_results(study))
    assert [own.aligned is not None for own in variants] == [True, True, False]
    notes = curve_notes(variants)
    assert notes[0].startswith("Validation bits per byte: of 11 of 178 documents, 183 kB of 2.843 MB.")
    assert "not comparable with it: Elsewhere" in notes[0]


def test_committed_results_are_compared_over_documents(study):
    results = read_results(study)
    records = statistics_records(results, compare_all(results))
    (study.folder / "tables").mkdir()
    write_records(study.folder / "records", {run: study.runs[run].folder for run in results})
    for run in study.runs.values():
        (run.folder / "documents.parquet").unlink()  # DVC's; git keeps the study's records
    (study.folder / "tables/statistics.csv").write_text(csv_text(records))
    (study.folder / "metrics.json").write_text(json.dumps(dict.fromkeys(results)))
    table = findings_table("toy", study.folder)
    assert table.header[7] == "over documents"
    assert cells(table)["Better"][6] == shown(ratio_bootstrap((CLOSER - RATES) * SIZES, SIZES), "+")
    assert cells(table)["Elsewhere"][6] == "–"
    assert any("12 of 40 documents" in note for note in table.notes)
    kept = study.folder / "records/documents.parquet"
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"records/documents\.parquet: damaged.*run: stlm report toy"):
        findings_table("toy", study.folder)


def test_each_component_has_its_own_interval(study):
    components = ["books"] * 10 + ["speech"] * 2
    set_documents(study, "baseline", RATES * SIZES, SIZES, components)
    set_documents(study, "better", CLOSER * SIZES, SIZES, components)
    table = component_table(read_results(study))
    assert table.header == ["", "all\n12 documents", "books\n10 documents", "speech\n2 documents"]
    own = ratio_bootstrap(((CLOSER - RATES) * SIZES)[:10], SIZES[:10])
    books, speech = cells(table)["Better"][1:]
    assert books.split("\n")[2] == shown(own, "+")
    assert speech.endswith("]‡")
    assert table.records[1]["books_difference_high"] == round(own.high, 5)


def test_two_models_are_compared_on_the_same_documents(study):
    base, better, elsewhere = (find_predictions(f"toy/{name}") for name in study.runs)
    found = compare_models(base, better)
    interval = ratio_bootstrap((CLOSER - RATES) * SIZES, SIZES)
    text = as_text(found)
    assert "bits per byte of test text (12 documents, 13.6 kB)" in text
    assert f"B - A {found.text.difference.value:.4f}".replace("B - A -", "B - A −") in text
    assert shown(interval, "+") in text and max(map(len, text.splitlines())) <= 100
    read = json.loads(as_json(found))["bits_per_byte"]
    assert read["documents"] == 12 and (read["low"], read["high"]) == pytest.approx(interval)
    other = compare_models(base, elsewhere)
    assert other.text is None and "measured on other documents" in other.warnings[-1]
    (better.path.with_name("documents.parquet")).unlink()
    assert "earlier version" in compare_models(base, better).warnings[-1]


def test_amounts_read_well():
    one = TextRecord(documents=1, documents_total=1, bytes=999, bytes_total=999)
    assert amount(one) == "1 of 1 document, 999 bytes of 999 bytes"
    assert amount(TextRecord(documents=22, bytes=365_331)) == "22 documents, 365.3 kB"
    assert amount(TextRecord()) == "an amount of text that was not recorded"
