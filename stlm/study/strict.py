"""Strict validation: errors name the file, the key, what was found and the nearest valid choice."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from stlm import yaml_core
from stlm.errors import UserError, nearest
from stlm.files import unreadable
from stlm.former_keys import former_key
from stlm.project import folder_hint

_PROBLEMS = 10
"""The number of a file's problems that are shown, one per line."""
_Model = TypeVar("_Model", bound=BaseModel)


def parse_yaml(text: str, source: str) -> Any:
    """The content of a YAML text; errors name ``source`` and the line."""
    try:
        return yaml_core.load(text)
    except yaml_core.YamlError as error:
        position = f", line {error.line}" if error.line and not source.startswith("--set") else ""
        raise UserError(f"{source}{position}: not valid YAML: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{folder_hint()}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected keys and values, found {found}")
    return content


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> Iterable[str]:
    """The valid keys next to the one at ``location``, for hints about misspelt keys."""
    current: Any = model
    for part in location[:-1]:
        # A union's location says which member was tried: follow any member that has the key.
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
        shown = "" if isinstance(found, dict | list) else f", found {reprlib.repr(found)}"
        if problem["type"] == "extra_forbidden":
            instead = former_key(key, found)
            close = nearest(str(location[-1]), _keys_at(model, location))
            hint = f" any more: {instead}" if instead else close
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
    if len(lines) > _PROBLEMS:
        lines[_PROBLEMS - 1 :] = [f"{file}: and {len(lines) - _PROBLEMS + 1} problems more"]
    return "\n".join(lines)


def validate(model: type[_Model], content: Any, file: str, prefix: str = "") -> _Model:
    """Validate ``content`` strictly against ``model``; ``UserError`` lists every problem by file and key."""
    try:
        # Through JSON, strict mode accepts lists as tuples and integers as floats, but neither "400" nor true
        # as 400.
        return model.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise UserError(_problems(error, model, file, prefix)) from None
