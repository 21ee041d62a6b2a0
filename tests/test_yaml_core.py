"""YAML as its version 1.2 reads it, and what no file of parameters may do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stlm.yaml_core import YamlError, load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("NULL", None),
        ("010", 10),
        ("+08", 8),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("12:30:00", "12:30:00"),
        ("2026-02-31", "2026-02-31"),
        ("2026-02-01 10:00:00", "2026-02-01 10:00:00"),
        ("6e-4", 6e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("'12'", "12"),
        ('"true"', "true"),
        ("!!str 12", "12"),
        ("!!float 3", 3.0),
        ("! 12", "12"),
        ("999999999999999999", 10**18 - 1),
    ],
)
def test_scalars_of_the_core_schema(text, value):
    found = load(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("a: 1\n? [b]\n: 2", "a key is a text, found a list", 2),
        ("a: 1\n010: 2", "put it in quotes: '010'", 2),
        ("~: 2", "not null; put it in quotes: '~'", 1),
        ("true: 2", "put it in quotes: 'true'", 1),
        ("a: 1\n'a': 2", "'a' is given twice", 2),
        ("a: !!int abc", "!!int abc: 'abc' is none", 1),
        ("a: !!timestamp 2026-01-01", "none of YAML's core types", 1),
        ("a: !!python/object/apply:os.getcwd []", "none of YAML's core types", 1),
        ("a: " + "9" * 5000, "too large a number .5,000 digits", 1),
        ("a: &x [*x]", "the anchor &x contains itself", 1),
        ("a: &x {b: [{c: *x}]}", "the anchor &x contains itself", 1),
        ("a: *x", "no anchor|undefined alias", 1),
        ("[" * 100_000, "nested more than 64 deep", 1),
        ("a: 1\n---\na: 2", "found a second", None),
        ("a: 1\nb: [", "node content|expected", None),
        ('a: "\\0"', "NUL", 1),
        ("a: \0", "not allowed", None),
        ("a: 1\nb: \ud800", "not valid Unicode", 2),
    ],
)
def test_what_cannot_be_read_is_told(text, said, line):
    with pytest.raises(YamlError, match=said) as error:
        load(text)
    assert "\n" not in str(error.value)
    if line is not None:
        assert error.value.line == line


def test_aliases_of_aliases_do_not_fill_the_memory():
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    with pytest.raises(YamlError, match="aliases written out"):
        load(text)


def test_aliases_that_fit_are_read():
    assert load("a: &x {b: [1, 2]}\nc: *x\nd: [*x, *x]")["d"] == [{"b": [1, 2]}] * 2


def test_our_own_files_read_as_before(root):
    """Where 1.1 and 1.2 read differently, a value would have changed without a word."""
    files = [*Path(root, "params").glob("*.yaml"), *Path(root).glob("dvc.yaml")]
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert load(text) == yaml.safe_load(text), path
