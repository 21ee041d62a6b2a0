"""Blocks of a page that `stlm document` writes, between two comments of Markdown; people write the rest.

A block is called what it shows, and may name the study whose results it shows:

    <!-- cost: written by `stlm document` [from results/bytes/] -->
    ...
    <!-- /cost -->
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from stlm.errors import UserError

_OPENING = (
    r"<!-- (?P<name>[a-z0-9][a-z0-9 -]*): written by `stlm document`"
    r"(?: from results/(?P<study>[a-z0-9_-]+)/)? -->\n"
)
# A block that is not closed ends nowhere: no comment is part of another block.
_BLOCK = re.compile(_OPENING + r"(?:(?!<!-- ).)*<!-- /(?:(?P=name)|table) -->", re.DOTALL)


def block(name: str, content: str, study: str | None = None, end: str | None = None) -> str:
    """A block with its two comments; the closing one says `end` in place of `name` where that is given."""
    source = f" from results/{study}/" if study else ""
    return f"<!-- {name}: written by `stlm document`{source} -->\n{content}<!-- /{end or name} -->"


def studies_shown(text: str) -> list[str]:
    """The studies that the page's blocks name."""
    return [match["study"] for match in re.finditer(_OPENING, text) if match["study"]]


def fill(page: Path, text: str, write: Callable[[str, str | None], str], needed: Iterable[str] = ()) -> str:
    """`text` with each block replaced by what `write` gives for its name and study.

    Raises `UserError` naming `page` where a block is not closed, or one of `needed` is not there once.
    """
    opened = Counter(match["name"] for match in re.finditer(_OPENING, text))
    closed = Counter(match["name"] for match in _BLOCK.finditer(text))
    for name in dict.fromkeys([*opened, *needed]):
        if opened[name] != closed[name] or (name in needed and closed[name] != 1):
            raise UserError(
                f"{page}: the block {name!r}: found {opened[name]} opening comments (<!-- {name}: written by "
                f"`stlm document` ... -->), of which {closed[name]} are closed by <!-- /{name} -->; expected "
                + ("one, closed" if name in needed else "all to be closed")
            )
    return _BLOCK.sub(lambda match: write(match["name"], match["study"]), text)
