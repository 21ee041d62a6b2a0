"""Text files cut into documents, long ones in bounded memory."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import fetched, folder_entry, refused, rows, texts

from stlm.corpora import text_files
from stlm.corpora.config import CorpusEntry
from stlm.corpora.formats import iter_documents
from stlm.corpora.text_files import Cut, documents_of

PLAY = "KING:\nWho is it?\n\nMENENIUS:\nIt is I.\n\n\nKING:\nCome in.\n"


def cut(text: str, **keys: Any) -> list[str]:
    return [document for document, _ in documents_of(io.StringIO(text), Cut(**keys))]


def test_a_file_is_a_document_by_default_and_that_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a", "c"):
        (folder / f"{name}.txt").write_text(f"{name}\n{PLAY}")
    record = fetched(folder)
    assert rows(folder) == {"text": [f"{name}\n{PLAY}".strip("\n") for name in "abc"]}
    assert record["documents"]["by"] == "file" and (record["group"], record["pieces"]) == (None, False)
    assert "own: 3 text files, each is a document" in capsys.readouterr().err


def test_many_files_go_into_one_parquet_file(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number:03d}.txt").write_text(f"story {number}")
    record = fetched(folder)
    assert [(file["path"], file["rows"]) for file in record["files"]] == [("train-00000.parquet", 300)]
    assert rows(folder)["text"] == [f"story {number}" for number in range(300)]


def test_no_line_of_a_play_is_lost(folder: Path) -> None:
    (folder / "play.txt").write_text(PLAY)
    record = fetched(folder, documents="line")
    assert rows(folder)["text"] == [line for line in PLAY.splitlines() if line]
    assert rows(folder)["file"] == ["play.txt"] * 6
    assert (record["group"], record["pieces"]) == ("file", True)


def test_paragraphs_are_pieces_of_their_file(folder: Path) -> None:
    (folder / "acts").mkdir()
    (folder / "acts" / "1.txt").write_text(PLAY)
    (folder / "acts" / "2.txt").write_text("\n \nOne.\n\t\nTwo.")
    record = fetched(folder, documents="paragraph")
    assert rows(folder) == {
        "text": ["KING:\nWho is it?", "MENENIUS:\nIt is I.", "KING:\nCome in.", "One.", "Two."],
        "file": ["acts/1.txt"] * 3 + ["acts/2.txt"] * 2,
    }
    assert (record["group"], record["pieces"]) == ("file", True)


def test_a_number_of_lines_makes_pieces_and_keeps_blank_lines(folder: Path) -> None:
    (folder / "play.txt").write_text(PLAY)
    fetched(folder, lines=3)
    assert rows(folder)["text"] == ["KING:\nWho is it?\n", "MENENIUS:\nIt is I.\n", "\nKING:\nCome in."]
    assert set(rows(folder)["file"]) == {"play.txt"}


def test_a_column_named_file_makes_way_for_that_of_the_pieces(folder: Path) -> None:
    pq.write_table(pa.table({"file": ["one", "two", "three"]}), folder / "a.parquet")
    record = fetched(folder, text="file", lines=2)
    assert (record["text"], record["group"]) == ("text", "file")
    assert rows(folder) == {"text": ["one\ntwo", "three"], "file": ["a.parquet"] * 2}


def test_lines_of_end_of_text_separate_by_default_and_are_not_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "stories.txt").write_text("One.\n\nMore.\n<|endoftext|>\n\nTwo.\n <|endoftext|> \nThree.")
    record = fetched(folder)
    assert rows(folder) == {"text": ["One.\n\nMore.", "Two.", "Three."]}
    assert (record["documents"]["by"], record["pieces"]) == ("separator", False)
    assert "stories.txt has lines <|endoftext|>" in capsys.readouterr().err
    assert list(iter_documents(folder / "stories.txt")) == rows(folder)["text"]
    assert len(texts(folder, documents="file")) == 1, "what the entry says comes before what is there"


def test_a_document_starts_where_a_line_matches(folder: Path) -> None:
    (folder / "a.txt").write_text("= One =\ntext\n= Two =\n")
    record = fetched(folder, starts="= .* =$")
    assert rows(folder) == {"text": ["= One =\ntext", "= Two ="]} and not record["pieces"]


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a\n\nb\n\n\nc", r"\n{2,}", ["a", "b", "c"]),
        ("a\n---\nb --- c\n---", "^---$", ["a", "b --- c"]),
        ("a\r\n***\r\nb", r"^\*\*\*$", ["a", "b"]),
        ("Chapter 1\nx\nChapter 2\ny", "(?=^Chapter )", ["Chapter 1\nx", "Chapter 2\ny"]),
        ("a<sep>\n\n<sep>b", "<sep>", ["a", "b"]),
        ("none", "<sep>", ["none"]),
        ("x12y345z", r"\d+", ["x", "y", "z"]),
        ("ab", "(?<=a)", ["a", "b"]),
    ],
)
def test_what_separates_is_not_kept_and_may_span_lines(
    text: str, separator: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text.replace("\r\n", "\n")  # as the file is opened
    assert cut(text, separator=separator) == expected
    # The same where what is read at a time ends within separators.
    for fragment in (1, 2, 3, 5):
        monkeypatch.setattr(text_files, "_FRAGMENT", fragment)
        monkeypatch.setattr(text_files, "_LONGEST_SEPARATOR", 8)
        assert cut(text, separator=separator) == expected


@pytest.mark.parametrize("keys", [{"documents": "file"}, {"documents": "paragraph"}, {"lines": 7}])
def test_cutting_does_not_depend_on_what_is_read_at_a_time(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join("word " * (number % 9) for number in range(200))
    whole = cut(text, **keys)
    monkeypatch.setattr(text_files, "_FRAGMENT", 3)
    assert cut(text, **keys) == whole


@pytest.mark.parametrize("end", ["\n", " ", ""])
@pytest.mark.parametrize("letter", ["a", "ä", "猫", "🐈"])
def test_a_long_document_becomes_rows_that_hold_all_of_it(
    folder: Path, end: str, letter: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(text_files, "_FRAGMENT", 10)
    text = (letter * 9 + end) * 50 + "the end"
    (folder / "long.txt").write_text(text)
    (folder / "short.txt").write_text("short")
    record = fetched(folder)
    found = rows(folder)
    *parts, short = found["text"]
    assert (short, set(found["file"])) == ("short", {"long.txt", "short.txt"})
    assert len(parts) > 3 and max(len(part.encode()) for part in parts) <= 100
    assert ("\n" if end == "\n" else "").join(parts) == text
    assert record["divided"] == len(parts) and (record["group"], record["pieces"]) == ("file", True)
    assert (
        f"own: documents above 16 MB were cut at line ends, into {len(parts)} rows" in capsys.readouterr().err
    )


@pytest.mark.parametrize("group", [None, "title"])
def test_a_long_row_is_divided_too(folder: Path, group: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 100)
    long = {"text": "line\n" * 30, "title": "Long"}
    (folder / "a.jsonl").write_text(f'{{"text": "short", "title": "Short"}}\n{json.dumps(long)}')
    fetched(folder, group=group)
    found = rows(folder)
    first, *parts = found.pop("text")
    assert first == "short" and "\n".join(parts) == "line\n" * 30 and len(parts) == 2
    expected = {"title": ["Short", "Long", "Long"]} if group else {"file": [None] + ["a.jsonl, row 2"] * 2}
    assert found == expected


def test_files_without_text_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "empty.txt").write_text("\n \n")
    assert fetched(folder)["without_text"] == ["empty.txt"]
    assert "own: 1 file without text (empty.txt)" in capsys.readouterr().err


def test_ways_to_cut_need_text_files(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "one"}')
    assert "`documents` is for text files (.txt, .md), and there is none" in refused(folder, documents="line")
    assert "`separator` is for text files" in refused(folder, separator="-+x")


def test_a_text_file_has_no_group(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    assert "a.txt: no column 'title': a text file has no columns" in refused(folder, group="title")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"documents": "sentence"}, "'file', 'line' or 'paragraph'"),
        ({"documents": "file", "separator": "x"}, "`documents` and `separator` both say where documents end"),
        ({"separator": "x", "lines": 2}, "`separator` and `starts, lines` both say"),
        ({"separator": "("}, "not a regular expression"),
        ({"separator": r"\s*"}, "matches the empty text, so it would cut everywhere"),
        ({"separator": "<|endoftext|>"}, re.escape(r"for the text <|endoftext|> write <\|endoftext\|>")),
        ({"lines": 2, "group": "title"}, "`group` is a column of documents"),
        ({"starts": "x", "split": "set"}, "`split` is a column of documents"),
        (
            {"files": {"training": "*"}},
            "'training' is no split .did you mean 'train'.{2}; expected train, val",
        ),
        ({"files": {"val": "a", "dev": "b"}}, "'val' and 'dev' are both the val split"),
        ({"files": {"train": []}}, "train: names no file"),
        ({"files": {"train": ["a", ""]}}, "train: names no file"),
    ],
)
def test_a_mistaken_entry_is_refused(folder: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder_entry(folder, **keys)


# --- memory ---

PEAK = r"""
import re, sys
from pathlib import Path
from stlm.corpora.config import CorpusEntry
from stlm.corpora.fetch import fetch
def peak():  # of this program; ru_maxrss begins with that of the process that started it
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
fetch(CorpusEntry.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


def peak(entry: CorpusEntry, raw: Path) -> int:
    """Megabytes that a fetch in a process of its own needs at most, over those of its imports."""
    command = [sys.executable, "-c", PEAK, entry.model_dump_json(), str(raw)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    "kind",
    ["jsonl", "parquet", "a line"]
    + [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("json", "csv", "txt")],
)
def test_memory_does_not_grow_with_files_or_documents(folder: Path, kind: str) -> None:
    book = " ".join(f"word{number}" for number in range(50_000))  # 540 kB
    suffix = kind if kind != "a line" else "txt"
    path = folder / f"a.{suffix}"
    if kind == "parquet":  # one row group
        books = pa.array([f"{number} {book}" for number in range(250)], pa.large_string())
        pq.write_table(pa.table({"text": books}), path, use_dictionary=False)
    else:
        with path.open("w") as file:
            file.write({"json": "[", "csv": "text\n"}.get(kind, ""))
            for number in range(250):
                text = f"{number} {book}"
                row = json.dumps({"text": text}) + "\n" if "json" in kind else text
                file.write(("," if kind == "json" and number else "") + row)
                file.write("" if kind == "a line" else "\n")
            file.write("]" if kind == "json" else "")
    assert peak(folder_entry(folder), folder.parent / "raw" / "own") < 400, (
        "of 140 MB of text, a row group and its copies"
    )
