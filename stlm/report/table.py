"""A table once, written four ways: CSV (bare numbers), Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from stlm.files import content_sha256, write_record, write_text
from stlm.integrity import check_listed

CHECKSUMS = "checksum.json"  # of the tables that pages of committed results show


@dataclass(frozen=True)
class Cell:
    """What a reader sees; a newline in `text` starts a second line in the cell."""

    text: str
    bold: bool = False
    bold_line: int | None = None  # the number of a single line that is bold

    def lines(self, escape: Callable[[str], str], bold: str) -> list[str]:
        """Each line, escaped, those that are bold put into the format `bold`."""
        return [
            bold.format(escape(line)) if line and (self.bold or number == self.bold_line) else escape(line)
            for number, line in enumerate(self.text.split("\n"))
        ]


@dataclass(frozen=True)
class Section:
    """A row that names the rows below it."""

    title: str


class Column(NamedTuple):
    """A column in one row: its header, what a reader sees, and the same for programs (`record`)."""

    header: str | None  # None: only programs see it
    cell: Cell | str
    record: Mapping[str, object] = {}


Row = Sequence[Cell | str]


@dataclass
class Table:
    """Rows for people (`header`, `rows`, `notes`) and the same content for programs (`records`).

    The first `texts` columns are words, and begin at the left; the others are figures, and end at the right.
    Notes that are None are left out.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Row | Section]
    notes: Sequence[str | None] = ()
    records: Sequence[Mapping[str, object]] = ()
    texts: int = 1

    def __post_init__(self) -> None:
        self.notes = [note for note in self.notes if note]
        self.rows = [
            row
            if isinstance(row, Section)
            else [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
            for row in self.rows
        ]

    @classmethod
    def of_columns(
        cls,
        name: str,
        title: str,
        rows: Iterable[Iterable[Column | tuple] | Section],
        notes: Sequence[str | None] = (),
    ) -> Table:
        """A table whose rows are given as columns, the same in all rows; each row is one record."""
        rows = [row if isinstance(row, Section) else [Column(*column) for column in row] for row in rows]
        filled = [row for row in rows if not isinstance(row, Section)]
        headers = [[column.header for column in row if column.header is not None] for row in filled]
        header = headers[0] if headers else []
        if any(other != header for other in headers):
            raise ValueError(f"{name}: the rows have different columns")
        cells = [
            row if isinstance(row, Section) else [column.cell for column in row if column.header is not None]
            for row in rows
        ]
        records = [{key: value for column in row for key, value in column.record.items()} for row in filled]
        return cls(name, title, header, cells, notes, records)


def write_table(folder: Path, typeset: Path, table: Table) -> None:
    """Write `folder`/<name>.{csv,md}, which git keeps, and `typeset`/<name>.{tex,html}."""
    write_text(folder / f"{table.name}.csv", csv_text(table.records))
    write_text(folder / f"{table.name}.md", markdown(table))
    write_text(typeset / f"{table.name}.tex", latex(table))
    write_text(typeset / f"{table.name}.html", html_document(table.title, html_table(table)))


def write_checksums(folder: Path) -> None:
    """List the tables in `folder` with their SHA-256."""
    files = {p.name: content_sha256(p) for p in sorted(folder.iterdir()) if p.suffix in (".csv", ".md")}
    write_record(folder / CHECKSUMS, {}, files=files)


def read_table(path: Path) -> str:
    """The text of a table that `write_checksums` listed; UserError where it has changed since."""
    check_listed(path.with_name(CHECKSUMS), path.name)
    return path.read_text(encoding="utf-8")


def csv_text(records: Sequence[Mapping[str, object]]) -> str:
    """CSV with the union of the records' keys as header, in order of first appearance; None is empty."""
    return pd.DataFrame(list(records), dtype=object).to_csv(index=False, lineterminator="\n")


def markdown(table: Table) -> str:
    """GitHub-flavoured Markdown; a line break inside a cell is `<br>`."""

    def escape(text: str) -> str:
        return re.sub(r"([\\|*_`<\[\]])", r"\\\1", text)

    def line(cells: Sequence[Cell]) -> str:
        return "| " + " | ".join("<br>".join(cell.lines(escape, "**{}**")) for cell in cells) + " |"

    figures = len(table.header) - table.texts
    header = line([Cell(text) for text in table.header])
    lines = [f"**{escape(table.title)}**", "", header, "|" + " --- |" * table.texts + " ---: |" * figures]
    for row in table.rows:
        if isinstance(row, Section):
            row = [Cell(row.title, bold=True), *[Cell("")] * (len(table.header) - 1)]
        lines.append(line(row))
    for note in table.notes:
        lines += ["", escape(note)]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "[": "{[}",  # after a line break, LaTeX would take a bracket for the break's own argument
    "]": "{]}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: "\\" + character for character in "&%$#_"},
}


def escape_latex(text: str) -> str:
    """`text` with every character that LaTeX would interpret written out."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex(table: Table) -> str:
    """A `table` environment; it needs the packages booktabs and graphicx (wide tables shrink to the line)."""
    width = len(table.header)

    def line(cells: Row) -> str:
        texts = []
        for column, cell in enumerate(cells):
            lines = cell.lines(escape_latex, r"\textbf{{{}}}")
            stack = rf"\shortstack[{'l' if column < table.texts else 'r'}]{{"
            texts.append(stack + r" \\ ".join(lines) + "}" if len(lines) > 1 else lines[0])
        return " & ".join(texts) + r" \\"

    body = []
    for row in table.rows:
        if isinstance(row, Section):
            title = rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape_latex(row.title)}}}}} \\"
            body += [r"\midrule", title] if body else [title]
        else:
            body.append(line(row))
    caption = re.sub(r"^Table \d+[^.]*\. ", "", table.title)  # LaTeX numbers its tables itself
    notes = r" \\ ".join(map(escape_latex, table.notes))
    below = rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * table.texts + 'r' * (width - table.texts)}}}",
        r"\toprule",
        line([Cell(text) for text in table.header]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        below if notes else "",
        r"\end{table}",
    ]
    return "\n".join(filter(None, lines)) + "\n"


# Headers and the first column stay in sight where a table is larger than the window. Their lines are shadows:
# the borders of a table that joins borders do not move along.
_CSS = (
    "body{font:14px/1.4 sans-serif;margin:1.5em;color:#111;background:#fff}"
    "table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}"
    "caption{text-align:left;font-weight:bold;padding-bottom:.6em}"
    "th,td{padding:.25em .7em;text-align:right;vertical-align:top;white-space:nowrap}"
    + "".join(f".texts-{n} tr>:nth-child(-n+{n}){{text-align:left}}" for n in (1, 2, 3))
    + "th{vertical-align:bottom;white-space:normal;min-width:5em}"
    "th{position:sticky;top:0;z-index:1;background:#fff;box-shadow:inset 0 -1px #111}"
    "tr>:first-child:not([colspan]){position:sticky;left:0;background:#fff}th:first-child{z-index:2}"
    "td[colspan]{font-style:italic;border-top:1px solid #999}tr:first-child>td[colspan]{border-top:0}"
    "p{max-width:60em;font-size:13px}"
)


def html_document(title: str, body: Sequence[str], style: str = "") -> str:
    """A page that stands alone, for Snakemake's report; `style` is CSS in addition to that of tables."""
    head = f"<title>{html.escape(title)}</title><style>{_CSS}{style}</style>"
    lines = ["<!doctype html>", f'<html lang="en"><meta charset="utf-8">{head}', *body, "</html>"]
    return "\n".join(lines) + "\n"


def html_table(table: Table) -> list[str]:
    """The lines of a table and of the notes below it, for a page."""

    def line(cells: Iterable[Cell], tag: str, end: str) -> str:
        texts = ("<br>".join(cell.lines(html.escape, "<strong>{}</strong>")) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{end}>" for text in texts) + "</tr>"

    head = line([Cell(text) for text in table.header], 'th scope="col"', "th") if any(table.header) else ""
    body = [
        line([Cell(row.title)], f'td colspan="{len(table.header)}"', "td")
        if isinstance(row, Section)
        else line(row, "td", "td")
        for row in table.rows
    ]
    caption = html.escape(table.title)
    return [
        f'<table class="texts-{table.texts}"><caption>{caption}</caption><thead>',
        f"{head}</thead><tbody>",
        *body,
        "</tbody></table>",
        *(f"<p>{html.escape(note)}</p>" for note in table.notes),
    ]
