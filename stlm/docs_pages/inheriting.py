"""The tables of docs/inheriting.md: bits per byte right after cuts, as benchmarks/cuts.py measured them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from stlm.docs_pages.blocks import block, fill
from stlm.errors import UserError
from stlm.files import read_record, write_text

PAGE = Path("docs/inheriting.md")
MEASURED = Path("results/benchmarks/cuts.json")
_COMMAND = "run: python benchmarks/cuts.py"


# The first cell of each table's header.
_ROWS = {
    "layers": "layers left of {0.layers}",
    "units": "hidden units left of {0.ffn_width:,}",
    "heads": "heads left of {0.heads}, by `wanda`",
    "width": "width left of {0.width}, all refitted",
    "both": "layers by `loss` x hidden units by `wanda`",
}


class _Settings(BaseModel):
    context: int
    measured_on_tokens: int
    loss_on_tokens: int
    test_tokens: int
    test_bytes: int


class _Whole(BaseModel):
    layers: int
    width: int
    heads: int
    ffn_width: int
    bits_per_byte: float


class Measured(BaseModel):
    """What the file has. `tables`: name -> row -> column -> bits per byte; `left_out`: layers and losses."""

    settings: _Settings
    whole: _Whole
    tables: dict[str, dict[str, dict[str, float]]]
    left_out: list[tuple[int, float]]


def read_measured(root: Path = Path()) -> Measured:
    """Raises UserError where the file is missing, damaged or lacks a part."""
    if not (root / MEASURED).is_file():
        raise UserError(f"{MEASURED}: no such file; {_COMMAND}")
    measured = read_record(root / MEASURED, Measured)
    for name in _ROWS:
        found = measured.tables.get(name, {})
        columns = {column for cells in found.values() for column in cells}
        if not found or any(columns != set(cells) for cells in found.values()):
            raise UserError(f"{MEASURED}: the table {name!r} is not complete; {_COMMAND}")
    return measured


def _table(measured: Measured, name: str) -> str:
    rows = measured.tables[name]
    columns = list(next(iter(rows.values())))
    lines = [
        [_ROWS[name].format(measured.whole), *columns],
        ["---", *["---:"] * len(columns)],
        *([row, *(f"{cells[column]:.3f}" for column in columns)] for row, cells in rows.items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _amounts(measured: Measured) -> str:
    text = measured.settings
    return (
        f"Bits per byte are of {text.test_tokens:,} tokens ({text.test_bytes:,} bytes) of validation text. "
        f"Importance is measured on {text.measured_on_tokens:,} tokens of the training text, by `loss` on "
        f"{text.loss_on_tokens:,}; rows have {text.context:,}. The whole model has "
        f"{measured.whole.bits_per_byte:.3f}.\n"
    )


def _left_out(measured: Measured) -> str:
    order = ", ".join(str(layer) for layer, _ in measured.left_out)
    last = sorted(set(range(measured.whole.layers)) - {layer for layer, _ in measured.left_out})
    return f"`loss` left out, in this order, the layers {order}; {', '.join(map(str, last))} remained.\n"


def inheriting_page(root: Path = Path()) -> str:
    """The text of docs/inheriting.md with its tables written anew."""
    measured = read_measured(root)
    parts: dict[str, Callable[[Measured], str]] = {
        "amounts": _amounts,
        **{name: partial(_table, name=name) for name in _ROWS},
        "left out": _left_out,
    }
    text = (root / PAGE).read_text(encoding="utf-8")
    return fill(PAGE, text, lambda name, _: block(name, f"\n{parts[name](measured)}\n"), needed=parts)


def write_inheriting_page(root: Path = Path()) -> Path:
    """Write the tables into docs/inheriting.md; its path."""
    write_text(root / PAGE, inheriting_page(root))
    return PAGE
