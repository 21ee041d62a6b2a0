"""YAML 1.2 (its core schema), limited to what parameters need.

`off`, `yes`, `1:30` and `2026-02-31` are texts, `010` is ten, `0o10` eight. Rejected are keys that are not
texts or occur twice, tags of other types, whole numbers of more than 18 digits, and content that would not
fit into memory when expanded: deep nesting, anchors inside themselves, aliases of aliases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml
from yaml import events

from stlm.errors import shortened

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEPTH = 64
_NODES = 1_000_000
_DIGITS = 18
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"(?P<ten>[-+]?[0-9]+)|0o(?P<eight>[0-7]+)|0x(?P<sixteen>[0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}
_NAMES = {int: "a number", float: "a number", bool: "true or false", type(None): "null", list: "a list"}


class YamlError(ValueError):
    """A text that cannot be read. `line` counts from 1; None if it is not known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class _Open:
    """A list or mapping whose end has not been read yet. `nodes`: its number of nodes, aliases expanded."""

    content: list | dict
    anchor: str | None
    nodes: int = 1
    key: str | None = None


def load(text: str) -> Any:
    """The content of a YAML text of one document. Raises `YamlError`."""
    if found := re.search(r"[\ud800-\udfff]", text):
        raise YamlError("a character that is not valid Unicode", text.count("\n", 0, found.start()) + 1)
    try:
        return _Reader().read(text)
    except yaml.YAMLError as error:
        position = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise YamlError(" ".join(str(problem).split()), position.line + 1 if position else None) from None


class _Reader:
    """Builds the content of a document from the parser's events, without recursion."""

    def __init__(self) -> None:
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.documents: list[Any] = []

    def read(self, text: str) -> Any:
        for event in yaml.parse(text, _Parser):
            try:
                self._take(event)
            except YamlError as error:
                error.line = event.start_mark.line + 1
                raise
        return self.documents[0] if self.documents else None

    def _take(self, event: events.Event) -> None:
        if isinstance(event, events.CollectionStartEvent):
            mapping = isinstance(event, events.MappingStartEvent)
            if event.tag not in (None, "!", _TAG + ("map" if mapping else "seq")):
                raise YamlError(f"the tag {shortened(event.tag)} is none of YAML's core types")
            if len(self.open) == _DEPTH:
                raise YamlError(f"nested more than {_DEPTH} deep")
            if event.anchor is not None:
                self.anchors[event.anchor] = None
            self.open.append(_Open({} if mapping else [], event.anchor))
        elif isinstance(event, events.CollectionEndEvent):
            done = self.open.pop()
            self._put(done.content, done.nodes, done.anchor)
        elif isinstance(event, events.ScalarEvent):
            self._put(_scalar(event), 1, event.anchor, event.value)
        elif isinstance(event, events.AliasEvent):
            if event.anchor not in self.anchors:
                raise YamlError(f"no anchor &{event.anchor} stands before the alias *{event.anchor}")
            found = self.anchors[event.anchor]
            if found is None:
                raise YamlError(f"the anchor &{event.anchor} contains itself")
            self._put(*found)

    def _put(self, value: Any, nodes: int, anchor: str | None = None, source: str = "") -> None:
        """Add a complete value to the collection that contains it."""
        if anchor is not None:
            self.anchors[anchor] = (value, nodes)
        if not self.open:
            if self.documents:
                raise YamlError("expected one document, found a second")
            self.documents.append(value)
            return
        within = self.open[-1]
        within.nodes += nodes
        if within.nodes > _NODES:
            raise YamlError(f"more than {_NODES:,} values, aliases written out")
        if isinstance(within.content, list):
            within.content.append(value)
        elif within.key is None:
            within.key = self._key(value, source, within.content)
        else:
            within.content[within.key] = value
            within.key = None

    @staticmethod
    def _key(value: Any, source: str, others: dict) -> str:
        if not isinstance(value, str):
            kind = _NAMES.get(type(value), "keys and values")
            quoted = f", not {kind}; put it in quotes: '{source}'" if source else f", found {kind}"
            raise YamlError(f"the key {source or '?'}: a key is a text{quoted}")
        if value in others:
            raise YamlError(f"the key {shortened(value)!r} is given twice")
        return value


def _scalar(event: events.ScalarEvent) -> Any:
    """The value of a scalar, by its tag, otherwise by its text if it is plain."""
    text = event.value
    if "\0" in text:
        raise YamlError("a character NUL, which no parameter may have")
    tag = event.tag
    if tag is None:
        return _plain(text) if event.implicit[0] else text
    if tag == "!":
        return text
    kind = _TYPES.get(tag.removeprefix(_TAG)) if tag.startswith(_TAG) else None
    if kind is None:
        raise YamlError(f"the tag {shortened(tag)} is none of YAML's core types")
    if kind is str:
        return text
    value = _plain(text)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise YamlError(f"!!{tag.removeprefix(_TAG)} {shortened(text)}: {shortened(text)!r} is none")
    return value


def _plain(text: str) -> Any:
    """The value of an unquoted text in the core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if match := _INTEGER.fullmatch(text):
        digits = len(text.lstrip("+-"))
        if digits > _DIGITS:
            raise YamlError(f"too large a number ({digits:,} digits, at most {_DIGITS})")
        base = {"ten": 10, "eight": 8, "sixteen": 16}[match.lastgroup or ""]
        return int(match[match.lastgroup or ""], base)
    if _NOT_FINITE.fullmatch(text):  # rejected by the models of parameters, which know the key
        return float(text.replace(".", ""))
    return float(text) if _FLOAT.fullmatch(text) else text
