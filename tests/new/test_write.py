"""params/corpora.yaml with an entry more: all else stays to the letter."""

from __future__ import annotations

import pytest
import yaml

from stlm.corpora.language import Language
from stlm.corpora.text_files import Cut
from stlm.new.write import Corpus, corpus_entry, scalar
from stlm.study.catalogues import append_entry

ENGLISH = Language("en", "English", True)


def corpus(**keys) -> Corpus:
    given = {"name": "own", "path": "texts", "files": {"train": ("**/*.txt",)}, "column": "text"}
    return Corpus(**{**given, "cut": Cut("file"), "language": ENGLISH, "about": "1 MB", **keys})


BEFORE = """\
# Sources are tried in order: comments stay.
a:
  description: one # here too

  mix: {b: 1}
# of b
b: {description: "two"}
"""


def test_an_entry_goes_to_the_end_or_takes_the_place_of_its_old_self() -> None:
    one = append_entry(BEFORE, "own", "own:\n  x: 1\n")
    assert one == BEFORE + "own:\n  x: 1\n"
    assert append_entry(one + "# end\n", "own", "own:\n  x: 2\n") == BEFORE + "own:\n  x: 2\n# end\n"
    first, rest = BEFORE.splitlines(True)[:1], BEFORE.splitlines(True)[5:]
    assert append_entry(BEFORE, "a", "a: 3\n") == "".join([*first, "a: 3\n", *rest])
    assert append_entry("a: 1", "own", "own: 2\n") == "a: 1\nown: 2\n"
    assert append_entry("'own': 1\nown2: 1\n", "own", "own: 2\n") == "own: 2\nown2: 1\n"


@pytest.mark.parametrize(
    "path",
    ["texts", "/data/my texts", "/a/b: c", "/a #b", "~/x", "on", "123", "/é/ü", '/"q"', "a\\b", "/x ", "."],
)
def test_any_path_comes_back_from_yaml(path: str) -> None:
    entry = yaml.safe_load(corpus_entry(corpus(path=path)))["own"]
    assert entry["sources"][0]["path"] == path
    assert yaml.safe_load(scalar(path)) == path


def test_patterns_and_cuts_come_back_from_yaml() -> None:
    files = {"train": ("[[]1] a*.txt", "**/*.txt"), "val": ("é: #.txt",)}
    text = corpus_entry(corpus(files=files, cut=Cut(separator=r"^---\n\"$"), column="a.b"))
    entry = yaml.safe_load(text)["own"]
    assert entry["sources"][0]["files"] == {"train": ["[[]1] a*.txt", "**/*.txt"], "val": "é: #.txt"}
    assert entry["sources"][0]["separator"] == r"^---\n\"$" and entry["text"] == "a.b"
    unknown = corpus(language=Language(None, "not recognized", True), cut=Cut())
    entry = yaml.safe_load(corpus_entry(unknown))["own"]
    assert "language" not in entry and "documents" not in entry["sources"][0]
