"""Strict YAML: a mistake in it is told by file, key, what was found and the nearest valid choice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from stlm.errors import UserError, nearest

_Model = TypeVar("_Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads ``6e-4`` as the number it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The content of a YAML text; errors name ``source`` and the line."""
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; run from the project's top folder") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> Iterable[str]:
    """The keys valid beside the one at ``location``, for the hint of a misspelt key."""
    current: Any = model
    for part in location[:-1]:
        # A union says in the location which member it tried: follow any member that has the key.
        for candidate in _models(current):
            if part in candidate.model_fields:
                current = candidate.model_fields[part].annotation
                break
        else:
            if isinstance(part, int) or get_origin(current) is dict:
                current = (get_args(current) or (current,))[-1]
    return {name for candidate in _models(current) for name in candidate.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for member in get_args(annotation) for found in _models(member)]


def _problems(error: ValidationError, model: type[BaseModel], file: str, prefix: str) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        key = ".".join(part for part in (prefix, *(str(x) for x in location)) if part)
        found = problem["input"]
        shown = "" if isinstance(found, dict | list) else f", found {found!r}"
        if problem["type"] == "extra_forbidden":
            hint = nearest(str(location[-1]), _keys_at(model, location))
            lines.append(f"{file}: {key}: no such key{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{file}: {key}: this key is missing")
        elif problem["type"] == "literal_error":
            choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            lines.append(f"{file}: {key}: {problem['msg']}{shown}{nearest(str(found), choices)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "value_error":
                shown, separator = "", "." if prefix else ""
                key_only = key + separator if not location else key + ": "
                lines.append(f"{file}: {key_only}{message}")
            else:
                lines.append(f"{file}: {key}: {message}{shown}")
    return "\n".join(lines)


def validate(model: type[_Model], content: Any, file: str, prefix: str = "") -> _Model:
    """Check ``content`` strictly against ``model``; a ``UserError`` lists every problem by file and key."""
    try:
        # By way of JSON, strict mode takes lists for tuples and whole numbers for floats, but no "400" or
        # true for 400.
        return model.model_validate_json(json.dumps(content, default=_not_json), strict=True)
    except ValidationError as error:
        raise UserError(_problems(error, model, file, prefix)) from None
    except TypeError as error:  # a key of a mapping that is no text
        raise UserError(f"{file}: {prefix + ': ' if prefix else ''}{error}") from None


def _not_json(value: Any) -> str:
    """YAML's dates, which no parameter is: as text, so that the check that follows names their key."""
    return str(value)
