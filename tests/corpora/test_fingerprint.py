"""Fingerprints of local files: by content, with as few readings as are safe."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from stlm import integrity
from stlm.corpora.config import CorpusEntry, VocabularyEntry
from stlm.corpora.fetch import fetch
from stlm.corpora.fingerprint import Digests, look, of_contents, of_folder, of_record
from stlm.files import sha256

OLD = time.time() - 100


@pytest.fixture
def settled(monkeypatch):
    """Files just written count as settled: tests do not wait for a file system's clock."""
    monkeypatch.setattr(integrity, "_SETTLED", -1.0)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that were read, one entry a reading."""
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(integrity, "sha256", counted)
    return read


def corpus(**source) -> CorpusEntry:
    given = {"kind": "folder", "files": {"train": "**/*.txt"}, **source}
    return CorpusEntry(name="books", description="books", licence="mine", sources=[given])


@pytest.fixture
def books(tmp_path) -> Path:
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n")
    (folder / "deep/b.txt").write_text("two\n")
    (folder / "notes.md").write_text("notes\n")
    return folder


def digest_of(entry, tmp_path, mirror=None, record=None, last=None):
    found = look(entry, record, mirror, tmp_path, Digests(tmp_path / "kept.json"), last)
    return found and found.fingerprint


def test_unchanged_files_are_read_once(tmp_path, books, settled, reads):
    kept = tmp_path / "kept.json"
    for _ in range(2):
        digests = Digests(kept)
        assert digests.sha256(books / "a.txt") == sha256(books / "a.txt")
        digests.save()
    assert reads == [books / "a.txt"]


def test_a_file_changed_a_moment_ago_is_read_again(tmp_path, books, reads):
    digests = Digests(tmp_path / "kept.json")
    digests.sha256(books / "a.txt")
    digests.sha256(books / "a.txt")
    assert len(reads) == 2, "it may change again within one tick of the clock"
    digests.save()
    assert not (tmp_path / "kept.json").exists()


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path, books, settled):
    file = books / "a.txt"
    os.utime(file, (OLD, OLD))
    entry = corpus(path="books")

    def taken():
        digests = Digests(tmp_path / "kept.json")
        found = look(entry, None, None, tmp_path, digests)
        digests.save()
        return found.fingerprint

    before = taken()
    inode = file.stat().st_ino
    with file.open("r+") as opened:
        opened.write("ONE\n")
    os.utime(file, (OLD, OLD))
    assert (file.stat().st_ino, file.stat().st_size, file.stat().st_mtime) == (inode, 4, pytest.approx(OLD))
    assert taken() != before


def test_touching_changes_nothing_and_every_name_and_content_counts(tmp_path, books):
    entry = corpus(path="books")
    before = digest_of(entry, tmp_path)
    assert before.files == 2
    os.utime(books / "a.txt")
    (books / "notes.md").write_text("others\n")
    assert digest_of(entry, tmp_path) == before
    (books / "a.txt").rename(books / "c.txt")
    assert digest_of(entry, tmp_path) != before
    (books / "c.txt").rename(books / "a.txt")
    assert digest_of(entry, tmp_path) == before
    (books / "deep/b.txt").unlink()
    assert digest_of(entry, tmp_path).files == 1


def test_what_is_behind_links_counts(tmp_path, books):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.txt").write_text("three\n")
    (books / "linked").symlink_to(elsewhere)
    (books / "circle").symlink_to(books)
    entry = corpus(path="books")
    before = digest_of(entry, tmp_path)
    assert before.files == 3
    (elsewhere / "c.txt").write_text("3\n")
    assert digest_of(entry, tmp_path) != before


def test_what_was_fetched_has_the_fingerprint_of_its_files(tmp_path, books):
    entry = corpus(path=str(books))
    record = fetch(entry, tmp_path / "raw/books")
    assert of_record(record) == digest_of(entry, tmp_path)
    (books / "a.txt").write_text("others\n")
    assert of_record(record) != digest_of(entry, tmp_path, record=record)


def test_a_damaged_cache_is_made_anew(tmp_path, books, settled):
    kept = tmp_path / "kept.json"
    for damaged in ("{", "[]", json.dumps({str(books / "a.txt"): 3})):
        kept.write_text(damaged)
        digests = Digests(kept)
        assert digests.sha256(books / "a.txt") == sha256(books / "a.txt")
        digests.save()
        assert str(books / "a.txt") in json.loads(kept.read_text())


def test_what_came_from_elsewhere_has_no_local_files(tmp_path, books):
    record = {"source": {"kind": "hub", "files": {"train.parquet": "a" * 64}}}
    assert of_record(record) is None
    assert digest_of(corpus(path="books"), tmp_path, record=record) is None


def test_a_mirror_counts_where_it_is_named_and_has_the_files(tmp_path, books):
    entry = corpus(kind="mirror", path="books", files={"train": "*.txt"})
    assert digest_of(entry, tmp_path) is None, "none is named"
    assert digest_of(entry, tmp_path, mirror=books) is None, "it has no such folder"
    here = digest_of(entry, tmp_path, mirror=tmp_path)
    assert here.files == 2
    record = {"source": {"kind": "mirror", "files": {}}}
    assert digest_of(entry, tmp_path, record=record, last=books) == here, "where it was last"


def test_a_used_source_without_its_files_is_seen_as_changed(tmp_path, books):
    entry = corpus(path="books")
    record = {"source": {"kind": "folder", "files": {"a.txt": "a" * 64}}}
    for file in books.rglob("*.txt"):
        file.unlink()
    assert digest_of(entry, tmp_path) is None
    assert digest_of(entry, tmp_path, record=record) == of_contents({})


def test_a_source_that_fetch_passes_over_is_passed_over(tmp_path, books):
    pinned = {"kind": "folder", "path": "books", "files": {"train": "a.txt"}, "sha256": {"a.txt": "0" * 64}}
    second = {"kind": "folder", "path": "books/deep", "files": {"train": "b.txt"}}
    entry = CorpusEntry(name="books", description="books", licence="mine", sources=[pinned, second])
    assert digest_of(entry, tmp_path) == of_contents({"b.txt": sha256(books / "deep/b.txt")})
    vocabulary = VocabularyEntry(
        name="words",
        description="words",
        licence="mine",
        sha256={"words.txt": "0" * 64},
        sources=[{"kind": "folder", "path": "books", "files": {"words.txt": "a.txt"}}],
    )
    assert digest_of(vocabulary, tmp_path) is None


def test_of_a_published_model_only_what_is_loaded_counts(tmp_path, books):
    digests = Digests(tmp_path / "kept.json")
    before = of_folder(books, ("*.txt",), digests)
    assert before.files == 1
    (books / "notes.md").write_text("others\n")
    assert of_folder(books, ("*.txt",), digests) == before
    assert of_folder(tmp_path / "nowhere", ("*.txt",), digests) is None
