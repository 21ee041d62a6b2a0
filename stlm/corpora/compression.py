"""Read files as decompressed bytes; a damaged file raises an error that names it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from stlm.corpora.errors import SourceError, shown

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def split_compression(name: str) -> tuple[str, str]:
    """A file's name without its compression suffix, and that suffix in lower case ("" if there is none)."""
    stem, suffix = os.path.splitext(name)
    return (stem, suffix.lower()) if suffix.lower() in COMPRESSIONS else (name, "")


@contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn the errors of decompressors and readers on a damaged file into a `SourceError` that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise SourceError(f"{shown(name)}: truncated or corrupt ({_first_line(error)})") from None
    except OSError as error:
        # A failing disk sets errno; bz2 and Arrow report damage by an OSError without it.
        if error.errno is not None and error.filename is not None:
            raise SourceError(f"{shown(name)}: cannot be read: {error.strerror}") from None
        raise SourceError(f"{shown(name)}: truncated or corrupt ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The content of ``path`` as bytes, decompressed according to its suffix."""
    compression = split_compression(path.name)[1]
    with path.open("rb") as file:
        opened: BinaryIO
        if compression == ".gz":
            opened = cast(BinaryIO, gzip.open(file))  # noqa: SIM115, closed below
        elif compression == ".bz2":
            opened = cast(BinaryIO, bz2.open(file))  # noqa: SIM115, closed below
        elif compression == ".xz":
            opened = cast(BinaryIO, lzma.open(file))  # noqa: SIM115, closed below
        elif compression == ".zst":
            stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
            opened = io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
        else:
            opened = file
        with opened:
            yield opened


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """``path`` itself, or a temporary file with its content decompressed, for random access."""
    if not split_compression(path.name)[1]:
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="stlm-") as file:
        with open_bytes(path) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        file.flush()
        yield Path(file.name)
