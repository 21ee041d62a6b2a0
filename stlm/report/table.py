"""A table once, written four ways: CSV (bare numbers), Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stlm.files import write_text


@dataclass(frozen=True)
class Cell:
    """What a reader sees; a newline in `text` starts a second line in the cell.

    `bold`: the whole cell; `bold_line`: the number of a single line that is (None: no line).
    """

    text: str
    bold: bool = False
    bold_line: int | None = None

    @property
    def lines(self) -> list[tuple[str, bool]]:
        """Each line, and whether it is bold."""
        return [
            (line, bool(line) and (self.bold or number == self.bold_line))
            for number, line in enumerate(self.text.split("\n"))
        ]


@dataclass(frozen=True)
class Section:
    """A row that names the rows below it."""

    title: str


@dataclass(frozen=True)
class Table:
    """Rows for people (`header`, `rows`, `notes`) and the same content for programs (`records`).

    The first `texts` columns are words, and begin at the left; the others are figures, and end at the right.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell] | Section]
    notes: Sequence[str] = ()
    records: Sequence[Mapping[str, object]] = field(default_factory=list)
    texts: int = 1


def write_table(folder: Path, typeset: Path, table: Table) -> None:
    """Write `folder`/<name>.{csv,md}, which git keeps, and `typeset`/<name>.{tex,html}."""
    write_text(folder / f"{table.name}.csv", csv_text(table.records))
    write_text(folder / f"{table.name}.md", markdown(table))
    write_text(typeset / f"{table.name}.tex", latex(table))
    write_text(typeset / f"{table.name}.html", html_page(table))


def csv_text(records: Sequence[Mapping[str, object]]) -> str:
    """CSV with the union of the records' keys as header, in order of first appearance; None is empty."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def markdown(table: Table) -> str:
    """GitHub-flavoured Markdown; a line break inside a cell is `<br>`."""

    def escape(text: str) -> str:
        return re.sub(r"([\\|*_`<\[\]])", r"\\\1", text)

    def cell(content: Cell) -> str:
        return "<br>".join(f"**{escape(line)}**" if bold else escape(line) for line, bold in content.lines)

    width = len(table.header)
    lines = [f"**{escape(table.title)}**", ""]
    lines.append("| " + " | ".join(cell(Cell(text)) for text in table.header) + " |")
    lines.append("|" + " --- |" * table.texts + " ---: |" * (width - table.texts))
    for row in table.rows:
        cells = [Cell(row.title, bold=True)] + [Cell("")] * (width - 1) if isinstance(row, Section) else row
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
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

    def cell(content: Cell, place: int) -> str:
        lines = [
            rf"\textbf{{{escape_latex(line)}}}" if bold else escape_latex(line)
            for line, bold in content.lines
        ]
        stacked = r" \\ ".join(lines)
        side = "l" if place < table.texts else "r"
        return stacked if len(lines) == 1 else rf"\shortstack[{side}]{{{stacked}}}"

    width = len(table.header)
    body = []
    for row in table.rows:
        if isinstance(row, Section):
            if body:
                body.append(r"\midrule")
            body.append(rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape_latex(row.title)}}}}} \\")
        else:
            body.append(" & ".join(map(cell, row, range(width))) + r" \\")
    notes = r" \\ ".join(escape_latex(note) for note in table.notes)
    caption = re.sub(r"^Table \d+[^.]*\. ", "", table.title)  # LaTeX numbers its tables itself
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * table.texts}{'r' * (width - table.texts)}}}",
        r"\toprule",
        " & ".join(cell(Cell(text), place) for place, text in enumerate(table.header)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *(
            [rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"]
            if notes
            else []
        ),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


_CSS = (
    "body{font:14px/1.4 sans-serif;margin:1.5em;color:#111;background:#fff}"
    "table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}"
    "caption{text-align:left;font-weight:bold;padding-bottom:.6em}"
    "th,td{padding:.25em .7em;text-align:right;vertical-align:top;white-space:nowrap}"
    ".text{text-align:left}thead{border-bottom:1px solid}"
    ".section td{font-style:italic;border-top:1px solid #999}p{max-width:60em;font-size:13px}"
)


def html_page(table: Table) -> str:
    """A page that stands alone, for Snakemake's report."""
    return html_document(table.title, html_table(table))


def html_document(title: str, body: Sequence[str], style: str = "") -> str:
    """A page around the lines of `body`, in the style of the tables and `style`'s besides."""
    head = f"<title>{html.escape(title)}</title><style>{_CSS}{style}</style>"
    lines = ["<!doctype html>", f'<html lang="en"><meta charset="utf-8">{head}', *body, "</html>"]
    return "\n".join(lines) + "\n"


def html_table(table: Table) -> list[str]:
    """The lines of a table and of the notes below it, for a page."""

    def cell(content: Cell) -> str:
        lines = [(html.escape(line), bold) for line, bold in content.lines]
        return "<br>".join(f"<strong>{line}</strong>" if bold else line for line, bold in lines)

    sides = [' class="text"' if place < table.texts else "" for place in range(len(table.header))]
    rows = []
    for row in table.rows:
        if isinstance(row, Section):
            rows.append(
                f'<tr class="section"><td class="text" colspan="{len(table.header)}">'
                f"{html.escape(row.title)}</td></tr>"
            )
        else:
            cells = (f"<td{side}>{cell(c)}</td>" for c, side in zip(row, sides, strict=True))
            rows.append("<tr>" + "".join(cells) + "</tr>")
    return [
        f"<table><caption>{html.escape(table.title)}</caption>",
        "<thead><tr>"
        + "".join(
            f'<th scope="col"{side}>{cell(Cell(text))}</th>'
            for text, side in zip(table.header, sides, strict=True)
        )
        + "</tr></thead>",
        "<tbody>",
        *rows,
        "</tbody></table>",
        *(f"<p>{html.escape(note)}</p>" for note in table.notes),
    ]
