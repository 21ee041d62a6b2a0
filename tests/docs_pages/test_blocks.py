"""Blocks that `stlm document` writes: their text is replaced, and nothing else of the page."""

from pathlib import Path

import pytest

from stlm.docs_pages.blocks import block, fill, studies_shown
from stlm.errors import UserError

PAGE = Path("docs/page.md")
TEXT = "\n\n".join(
    ["Before.", block("cost", "old\n"), "Between <!-- a comment -->.", block("in short", "old\n", "desk"), ""]
)


def test_each_block_is_written_anew_and_the_rest_is_left():
    found = fill(PAGE, TEXT, lambda name, study: block(name, f"{name} of {study}\n", study), needed=["cost"])
    assert found == TEXT.replace("old", "cost of None", 1).replace("old", "in short of desk", 1)
    assert studies_shown(found) == ["desk"]


def test_what_is_written_may_hold_backslashes():
    content = r"a \1 b \g<name>" + "\n"
    assert content in fill(PAGE, TEXT, lambda name, study: block(name, content, study))


def test_a_block_that_is_missing_or_there_twice_is_refused():
    for text in (TEXT.replace("cost", "price"), TEXT + TEXT):
        with pytest.raises(UserError, match=r"docs/page\.md: the block 'cost'"):
            fill(PAGE, text, block, needed=["cost"])


def test_an_unclosed_block_is_refused_and_swallows_nothing():
    with pytest.raises(UserError, match=r"'cost'.* of which 0 are closed by <!-- /cost -->"):
        fill(PAGE, TEXT.replace("<!-- /cost -->", ""), block)
