"""README.md and docs/: short enough for their readers, links that lead somewhere, commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stlm.cli import parser
from stlm.docs_pages.readmes import SHOWN, headline_table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANUALS = [page for page in PAGES if page.name != "log.md"]  # the log quotes commands of its day


def verbs() -> set[str]:
    """The verbs of the command line."""
    (action,) = (action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    return set(action.choices)


def commands(page: Path) -> list[list[str]]:
    """The command lines in the page's blocks of shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", MANUALS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(page):
        if words[0] == "stlm":
            assert words[1] in verbs(), " ".join(words)
        if words[0] == "make":
            assert words[1] in targets, " ".join(words)


def test_the_readme_is_read_in_a_minute():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) < 1000
    assert text.count("![") == 1
    assert "p =" not in text and "p <" not in text
    # About 110 characters fit the width of GitHub's page.
    assert max(map(len, re.findall(r"^\| (?:Baseline|.*matched) .*\|$", text, re.MULTILINE))) < 110


def test_the_headline_table_is_small_and_of_equal_sizes():
    table = headline_table(ROOT / SHOWN)
    assert [len(row) for row in table.rows] == [4] * 5
    assert table.rows[0][0].text == "Baseline"
    # Three rows of the paper are published with another size than the baseline's.
    assert {"SinCos PE", "Learned PE", "DropoutFree"}.isdisjoint(row[0].text for row in table.rows)
