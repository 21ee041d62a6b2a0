"""DVC's command line, `python -m stlm.dvc_command ARGUMENTS`, faster for many runs and safe from kills.

DVC parses a parameter file up to three times a stage: with 500 runs in it, `dvc commit` takes most of an
hour. Its parser is in Python, and slow. It also writes ``dvc.lock`` in place: a kill leaves a partial file.
Here a file is parsed once, by the parser of `stlm.yaml_core`, and written completely or not at all. Results
are the same. If another version of DVC has these functions elsewhere, DVC is not changed.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from stlm import yaml_core
from stlm.files import write_text


def read_parameters_once() -> None:
    """Let DVC, in this process, cache a parsed parameter file until the file changes."""
    from dvc.dependency import param

    load, read = getattr(param, "load_path", None), getattr(param, "read_param_file", None)
    if load is None or read is None:
        return
    parsed: dict[str, tuple[tuple[int, int], Any]] = {}

    def load_path(path: str, fs: Any, **options: Any) -> Any:
        try:
            found = os.stat(path)
        except OSError:  # a file of another commit, or none
            return load(path, fs, **options)
        if options or getattr(fs, "protocol", None) != "local":
            return load(path, fs, **options)
        state = (found.st_mtime_ns, found.st_size)
        if parsed.get(path, (None,))[0] != state:
            parsed[path] = (state, load(path, fs))
        return parsed[path][1]

    def read_param_file(*arguments: Any, **options: Any) -> Any:
        # Stages must not share a value: YAML would be written with references between them.
        return deepcopy(read(*arguments, **options))

    param.load_path, param.read_param_file = load_path, read_param_file


def parse_fast() -> None:
    """Let DVC, in this process, parse YAML with `stlm.yaml_core`, and on errors with its own parser."""
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    parse = getattr(_yaml, "parse_yaml", None)
    if parse is None or getattr(strictyaml, "parse_yaml", None) is not parse:
        return

    def parse_yaml(text: Any, path: Any, typ: str = "safe") -> Any:
        if typ == "safe" and isinstance(text, str):
            with suppress(yaml_core.YamlError):
                return yaml_core.load(text) or {}
        return parse(text, path, typ)

    _yaml.parse_yaml = strictyaml.parse_yaml = parse_yaml


def write_whole() -> None:
    """Let DVC, in this process, write its YAML files atomically: to a temporary file that is renamed."""
    from dvc.utils.serialize import _common

    dump = getattr(_common, "_dump_data", None)
    if dump is None:
        return

    def dump_whole(path: Any, data: Any, dumper: Any, fs: Any = None, **options: Any) -> None:
        if fs is not None and getattr(fs, "protocol", None) != "local":
            dump(path, data, dumper, fs, **options)
            return
        text = io.StringIO()
        dumper(data, text, **options)
        write_text(Path(path), text.getvalue())

    _common._dump_data = dump_whole


def main() -> int:
    """Run DVC with the arguments of this process; returns its exit status."""
    from dvc.cli import main as dvc

    read_parameters_once()
    parse_fast()
    write_whole()
    return dvc(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
