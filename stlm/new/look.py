"""Describes a text: files, documents, sizes, language and oddities, in bounded time and memory.

Up to `READ_BYTES` everything is read. Of larger texts, files spread over all of them are read, each from its
beginning; counts are then extrapolated by bytes, and `Look.sampled` is true.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stlm.corpora.formats import DataFile, Tally, iter_documents, known_suffix
from stlm.corpora.language import Language, guess
from stlm.corpora.text_files import Cut

READ_BYTES = 64 << 20  # the most bytes of files that are read
SAMPLE_BYTES = 2 << 20  # of text that is kept for the vocabulary and the language
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_EXPANSION = 3  # assumed text bytes for each compressed byte
_LONG_LINE, _LONG_WORD = 100_000, 1_000  # characters
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0e-\x1f\x7f]")
_TAG = re.compile(
    r"</?(?:p|div|br|a|span|html|body|table|t[dr]|li|ul|h[1-6]|img|script)\b[^<>]*>", re.IGNORECASE
)
_MARKER = re.compile(r"<\|[a-z_]+\|>|^</?s>$", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass
class Look:
    """The findings. Sizes of documents are UTF-8 bytes, in the order read."""

    files: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    file_bytes: int = 0
    read_files: int = 0
    read_bytes: float = 0
    sampled: bool = False
    assumed: bool = False  # whether the extrapolation had to assume a compression ratio
    text_bytes: int = 0
    characters: int = 0
    empty: int = 0
    sizes: array[int] = field(default_factory=lambda: array("q"))
    words: int = 0
    sample: list[str] = field(default_factory=list)
    language: Language = field(default_factory=lambda: Language(None, "no text", True))
    oddities: list[str] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """The factor from counts of the part that was read to the whole text."""
        return self.file_bytes / self.read_bytes if self.sampled and self.read_bytes else 1.0

    @property
    def documents(self) -> int:
        """Estimated number of documents that hold text."""
        return round(len(self.sizes) * self.scale)

    @property
    def all_bytes(self) -> int:
        """Estimated UTF-8 bytes of their text."""
        return round(self.text_bytes * self.scale)

    def quantile(self, share: float) -> int:
        """The length in UTF-8 bytes that `share` of the documents do not exceed."""
        return int(np.quantile(np.frombuffer(self.sizes, np.int64), share)) if self.sizes else 0


def look(
    files: Sequence[Path],
    *,
    column: str = "text",
    cut: Cut | None = None,
) -> Look:
    """Examine `files` of known formats: text files are `cut`, others give a `column`.

    Raises UserError for a file that cannot be read in the format of its suffix.
    """
    sizes = {path: path.stat().st_size for path in files}
    found = Look(files=len(files), file_bytes=sum(sizes.values()))
    found.formats.update(_format(path) for path in files)
    read_bytes = READ_BYTES
    found.sampled = found.file_bytes > read_bytes
    odd = _Oddities(found)
    rate = min(1.0, SAMPLE_BYTES / max(min(found.file_bytes, read_bytes), 1))
    for path in _chosen(files, sizes, read_bytes) if found.sampled else files:
        if not sizes[path]:
            odd.files["empty files"].append(path.name)
        left = read_bytes - found.read_bytes
        if found.sampled and left <= 0:
            break
        odd.of_file(path)
        before = found.text_bytes
        whole = True
        for document in _documents(path, column, cut or Cut("file"), odd.tally):
            _take(found, odd, document, rate)
            if found.sampled and found.text_bytes - before > left:
                whole = False
                break
        found.read_files += 1
        found.read_bytes += (
            sizes[path] if whole else _so_far(found, path, found.text_bytes - before, sizes[path])
        )
    found.language = guess(found.sample)
    found.words = len({word for document in found.sample for word in _WORD.findall(document.lower())})
    found.oddities = odd.lines()
    return found


def _documents(path: Path, column: str, cut: Cut, tally: Tally) -> Iterator[str]:
    """The documents of a file as `stlm fetch` will read them."""
    file = DataFile.of(path)
    if file.kind == "text":
        return (document for document, _ in file.documents(cut, tally))
    return iter_documents(path, text=column)


def _format(path: Path) -> str:
    """Format and compression of a file, for people: "jsonl, gz"."""
    name = known_suffix(path) or path.suffix or "no suffix"
    return f"{name}, {path.suffix[1:].lower()}" if path.suffix.lower() in _COMPRESSED else name


def _chosen(files: Sequence[Path], sizes: dict[Path, int], read_bytes: int) -> Iterator[Path]:
    """Files spread evenly over all of them, each once: at a stride, then those in between."""
    stride = max(1, round(sum(sizes.values()) / read_bytes))
    for first in range(stride):
        yield from files[first::stride]


def _so_far(found: Look, path: Path, text_bytes: int, size: int) -> float:
    """Estimated bytes of a file that were read to get `text_bytes` of text."""
    if known_suffix(path) == "text" and path.suffix.lower() not in _COMPRESSED:
        return min(text_bytes, size)
    found.assumed = True
    packed = path.suffix.lower() in _COMPRESSED or known_suffix(path) == "parquet"
    return min(text_bytes / (_EXPANSION if packed else 1), size)


def _take(found: Look, odd: _Oddities, document: str, rate: float) -> None:
    """Count a document, and keep it for the sample with probability `rate`."""
    if not document or document.isspace():
        found.empty += 1
        return
    content = document.encode(errors="replace")
    key = hashlib.blake2b(content, digest_size=16).digest()
    found.text_bytes += len(content)
    found.characters += len(document)
    found.sizes.append(len(content))
    if rate >= 1 or int.from_bytes(key[:8], "little") < rate * 2**64 or not found.sample:
        found.sample.append(content.decode()[:SAMPLE_BYTES])
    odd.of_document(document, key)


class _Oddities:
    """Counts what the user should know before training."""

    def __init__(self, found: Look) -> None:
        self.found = found
        self.files: dict[str, list[str]] = {"empty files": [], "byte-order marks": []}
        self.tally = Tally()
        self.documents: Counter[str] = Counter()
        self.markers: Counter[str] = Counter()
        self.seen: set[bytes] = set()

    def of_file(self, path: Path) -> None:
        """Examine the first bytes of a file."""
        if path.suffix.lower() in _COMPRESSED or not path.stat().st_size:
            return
        with path.open("rb") as file:
            first = file.read(4)
        if first.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            self.files["byte-order marks"].append(path.name)

    def of_document(self, text: str, key: bytes) -> None:
        """Count unusual characters, lines and markers of a document."""
        self.documents["exact duplicates of an earlier document, kept once"] += key in self.seen
        self.seen.add(key)
        self.documents["NUL characters"] += "\0" in text
        self.documents["control characters"] += bool(_CONTROL.search(text))
        self.documents["tags of HTML"] += bool(_TAG.search(text))
        self.documents["bytes that could not be read as text"] += _lost(text)
        if len(text) > _LONG_WORD:
            longest = max(map(len, text.split()), default=0)
            self.documents[f"words of more than {_LONG_WORD:,} characters"] += longest > _LONG_WORD
        if len(text) > _LONG_LINE:
            longest = max(map(len, text.splitlines()), default=0)
            self.documents[f"lines of more than {_LONG_LINE:,} characters"] += longest > _LONG_LINE
        if "<" in text:
            self.markers.update(_MARKER.findall(text))

    def lines(self) -> list[str]:
        """A line for each oddity."""
        found, lines = self.found, []
        for what, names in self.files.items():
            if names:
                lines.append(f"{what}: {len(names):,} ({_some(names)})")
        for name, count in self.tally.converted.items():
            lines.append(f"encoding {name}: {count:,} files, converted to UTF-8")
        if self.tally.undecoded:
            lines.append(f"files whose encoding could not be told: {_some(self.tally.undecoded)}")
        if found.empty:
            lines.append(f"empty documents, left out: {found.empty:,}")
        total = len(found.sizes)
        unspaced = not found.language.spaced
        for what, count in self.documents.items():
            if count and not (unspaced and what.startswith("words")):
                subject = "" if what.startswith("exact") else "documents with "
                lines.append(f"{subject}{what}: {count:,} of {total:,} ({count / total:.1%})")
        for marker, count in self.markers.most_common(3):
            if count >= 3:
                lines.append(
                    f"the marker {marker} stands in the text {count:,} times; if it parts documents, give "
                    f"--separator '{re.escape(marker)}'"
                )
        return lines


def _lost(text: str) -> bool:
    """Whether a text has replacement characters, or lone surrogates in place of undecoded bytes."""
    return "\ufffd" in text or any("\udc80" <= character <= "\udcff" for character in set(text))


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
