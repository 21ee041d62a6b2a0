"""A table once, written four ways: CSV (bare numbers), Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from stlm.files import content_sha256, write_record, write_text
from stlm.integrity import check_listed

CHECKSUMS = "checksum.json"  # of the tables that pages of committed results show


@dataclass(frozen=True)
class Cell:
    """What a reader sees; a newline in `text` starts a second line in the cell.

    `bold`: the whole cell; `bold_line`: the number of a single line that is (None: no line).
    """

    text: str
    bold: bool = False
    bold_line: int | None = None

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

    width = len(table.header)
    ruler = "|" + " --- |" * table.texts + " ---: |" * (width - table.texts)
    lines = [f"**{escape(table.title)}**", "", line([Cell(text) for text in table.header]), ruler]
    for row in table.rows:
        blank = [Cell("")] * (width - 1)
        lines.append(line([Cell(row.title, bold=True), *blank] if isinstance(row, Section) else row))
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


def _styled(table: Table, cell: Callable[[Cell, int], str], section: Callable[[str, bool], str]) -> Styler:
    """The table's texts, already escaped, for pandas to write; `section` is told whether it is the first row.

    Columns are numbered, as pandas wants their names to differ.
    """
    blank = [""] * (len(table.header) - 1)
    body = [
        [section(row.title, place == 0), *blank]
        if isinstance(row, Section)
        else [cell(content, column) for column, content in enumerate(row)]
        for place, row in enumerate(table.rows)
    ]
    names = [cell(Cell(text), column) for column, text in enumerate(table.header)]
    frame = pd.DataFrame(body, columns=range(len(names)))
    return frame.style.hide(axis="index").format_index(names.__getitem__, axis="columns")


def latex(table: Table) -> str:
    """A `table` environment; it needs the packages booktabs and graphicx (wide tables shrink to the line)."""
    width = len(table.header)

    def cell(content: Cell, column: int) -> str:
        lines = content.lines(escape_latex, r"\textbf{{{}}}")
        stacked = r" \\ ".join(lines)
        side = "l" if column < table.texts else "r"
        return stacked if len(lines) == 1 else rf"\shortstack[{side}]{{{stacked}}}"

    def section(title: str, first: bool) -> str:
        rule = "" if first else "\\midrule\n"
        return rf"{rule}\multicolumn{{{width}}}{{l}}{{\textit{{{escape_latex(title)}}}}}"

    caption = re.sub(r"^Table \d+[^.]*\. ", "", table.title)  # LaTeX numbers its tables itself
    text = _styled(table, cell, section).to_latex(
        column_format="l" * table.texts + "r" * (width - table.texts),
        caption=escape_latex(caption),
        label=f"tab:{table.name}",
        position_float="centering",
        hrules=True,
    )
    # The cells that a section's title spans, which pandas writes all the same.
    text = re.sub(r"(?m)^(\\multicolumn.*?)(?: & )+ \\\\$", r"\1 \\\\", text)
    notes = r" \\ ".join(escape_latex(note) for note in table.notes)
    below = rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"
    resize = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    text = text.replace(r"\begin{tabular}", f"{resize}\n\\begin{{tabular}}")
    text = text.replace(r"\end{tabular}", r"\end{tabular}}" + (f"\n{below}" if notes else ""))
    return "% needs \\usepackage{booktabs,graphicx}\n" + text


_CSS = (
    "body{font:14px/1.4 sans-serif;margin:1.5em;color:#111;background:#fff}"
    "table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}"
    "caption{text-align:left;font-weight:bold;padding-bottom:.6em}"
    "th,td{padding:.25em .7em;text-align:right;vertical-align:top;white-space:nowrap}"
    + "".join(f".texts-{n} tr>:nth-child(-n+{n}){{text-align:left}}" for n in (1, 2, 3))
    + "thead{border-bottom:1px solid}td[colspan]{font-style:italic;border-top:1px solid #999}"
    "p{max-width:60em;font-size:13px}"
)


def html_document(title: str, body: Sequence[str], style: str = "") -> str:
    """A page that stands alone, for Snakemake's report; `style` is CSS in addition to that of tables."""
    head = f"<title>{html.escape(title)}</title><style>{_CSS}{style}</style>"
    lines = ["<!doctype html>", f'<html lang="en"><meta charset="utf-8">{head}', *body, "</html>"]
    return "\n".join(lines) + "\n"


def html_table(table: Table) -> list[str]:
    """The lines of a table and of the notes below it, for a page."""

    def cell(content: Cell, _: int) -> str:
        return "<br>".join(content.lines(html.escape, "<strong>{}</strong>"))

    styled = _styled(table, cell, lambda title, _: f"<i>{html.escape(title)}</i>")
    styled = styled.set_caption(html.escape(table.title)).set_table_attributes(f'class="texts-{table.texts}"')
    # One row per line; a section's title takes the place of the empty cells after it.
    text = re.sub(r" ?>\n\s*(?=<)", ">", styled.to_html(exclude_styles=True)).replace("<tr>", "\n<tr>")
    text = re.sub(
        r"<td ?><i>(.*?)</i></td>(<td ?></td>)*", rf'<td colspan="{len(table.header)}">\1</td>', text
    )
    text = text.replace("<td >", "<td>").replace("<th >", '<th scope="col">')
    return [*text.strip().splitlines(), *(f"<p>{html.escape(note)}</p>" for note in table.notes)]
