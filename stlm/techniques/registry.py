"""The available techniques: the files of this folder, imported only when a study names them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import stlm.techniques
from stlm.errors import UserError, nearest, shortened
from stlm.study.strict import validate
from stlm.techniques.base import CAPABILITIES, Technique

_NO_TECHNIQUES = {"base", "registry"}


def technique_names() -> list[str]:
    """The names of all techniques; imports none of them."""
    found = pkgutil.iter_modules(stlm.techniques.__path__)
    return sorted(module.name for module in found if module.name not in _NO_TECHNIQUES)


def technique_class(name: str) -> type[Technique]:
    """The class of a technique. Raises UserError with the nearest name if there is none."""
    known = technique_names()
    if name not in known:
        raise UserError(f"{shortened(name)!r} is no technique{nearest(name, known)}")
    module = importlib.import_module(f"stlm.techniques.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__}: expected one subclass of Technique, found {len(found)}")
    unknown = (found[0].supports - CAPABILITIES.keys()) | (found[0].combines_with - set(known))
    if unknown:
        raise TypeError(
            f"{module.__name__}: supports or combines_with: unknown: {', '.join(sorted(unknown))}"
        )
    return found[0]


def load_techniques(content: Mapping[str, Any], file: str, prefix: str) -> dict[str, Technique]:
    """The techniques of a section `techniques`, which maps names to keys: {} for defaults, null for none.

    Raises UserError, which names `file`, the key after `prefix`, and what is wrong.
    """
    techniques = {}
    for name, keys in content.items():
        if keys is None:
            continue
        try:
            kind = technique_class(name)
        except UserError as error:
            raise UserError(f"{file}: {prefix}: {error}") from None
        techniques[name] = validate(kind, keys, file, f"{prefix}.{name}")
    return techniques
