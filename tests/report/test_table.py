"""One table in four formats: nothing in a cell may be taken for markup."""

import csv
import io
import re
from html.parser import HTMLParser

import pytest

from stlm.report.table import Cell, Section, Table, csv_text, escape_latex, html_table, latex, markdown

NASTY = r"a|b & 50% of $x_1$ #2 {c} ~d^e\f <g>"
TABLE = Table(
    name="t",
    title="Table 2, by x. A title & more",
    header=["", "one\nn = 5", "two"],
    rows=[Section("First"), [Cell(NASTY), Cell("71.6\n[68.5, 74.7]\n−1.1"), Cell("x", bold=True)]],
    notes=["A note_1."],
    records=[{"label": NASTY, "value": 1.5}, {"label": "b", "other": None}],
)


def test_csv_gives_back_what_went_in():
    rows = list(csv.DictReader(io.StringIO(csv_text(TABLE.records))))
    assert rows == [
        {"label": NASTY, "value": "1.5", "other": ""},
        {"label": "b", "value": "", "other": ""},
    ]


def test_markdown_rows_have_as_many_cells_as_the_header():
    rows = [line for line in markdown(TABLE).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert r"71.6<br>\[68.5, 74.7\]<br>−1.1" in rows[-1]
    assert "**x**" in rows[-1]


def test_one_line_of_a_cell_may_be_bold():
    table = Table("t", "T", ["", "a"], [[Cell("x"), Cell("1\n+2*\np", bold_line=1)]])
    assert r"| 1<br>**+2\***<br>p |" in markdown(table)
    assert r"1 \\ \textbf{+2*} \\ p" in latex(table)
    assert "1<br><strong>+2*</strong><br>p" in "".join(html_table(table))


def test_latex_is_balanced_and_escaped():
    text = latex(TABLE)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    # Without the escaped ones, only column separators are left of LaTeX's special characters.
    bare = re.sub(r"\\([&%$#_{}])", "", body)
    assert len(re.findall("&", bare)) == 2 * 2
    assert not re.search(r"[%#_~^]", bare)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    for environment in ("table", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 1


def test_latex_numbers_the_table_itself():
    assert r"\caption{A title \& more}" in latex(TABLE)


def test_latex_line_break_does_not_swallow_an_interval():
    assert not re.search(r"\\\\\s*\[", latex(TABLE))


def test_latex_has_no_character_that_pdflatex_lacks():
    assert escape_latex("± − – × ·").isascii()


def test_html_shows_the_text_itself():
    class Reader(HTMLParser):
        cells: list[str]

        def handle_starttag(self, tag, attributes):
            if tag == "td":
                self.cells.append("")

        def handle_data(self, data):
            if self.cells:
                self.cells[-1] += data

    reader = Reader()
    reader.cells = []
    assert html_table(TABLE)[0].startswith(f'<table class="texts-{TABLE.texts}">')
    reader.feed("".join(html_table(TABLE)))
    assert NASTY in reader.cells


def test_columns_of_words_begin_at_the_left():
    table = Table("t", "T", ["a", "b", "c"], [[Cell("x"), Cell("y\nz"), Cell("1\n2")]], texts=2)
    assert "| --- | --- | ---: |" in markdown(table)
    assert r"\begin{tabular}{llr}" in latex(table)
    assert r"\shortstack[l]{y \\ z} & \shortstack[r]{1 \\ 2}" in latex(table)
    assert "<td>x</td><td>y<br>z</td><td>1<br>2</td>" in "".join(html_table(table))


def test_rows_of_columns_have_the_same_columns():
    rows = [[("", "a", {"x": 1}), ("b", "c", {"y": 2})], Section("more"), [("", "d"), ("b", "e")]]
    table = Table.of_columns("name", "title", rows)
    assert (table.header, len(table.rows), table.records) == (["", "b"], 3, [{"x": 1, "y": 2}, {}])
    with pytest.raises(ValueError, match="different columns"):
        Table.of_columns("name", "title", [*rows, [("", "f"), ("other", "g")]])
    assert Table.of_columns("name", "title", []).rows == []


def test_a_table_without_headers_has_no_row_for_them_in_html():
    assert "<th" in "".join(html_table(TABLE)).replace("<thead>", "")
    text = "".join(html_table(Table("t", "T", ["", ""], [["run", "baseline"]])))
    assert "<th" not in text.replace("<thead>", "") and "<td>run</td>" in text
