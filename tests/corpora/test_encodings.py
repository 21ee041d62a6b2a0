"""Encodings of text files: what is told, what is converted, what cannot be."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from folders import fetched, rows, texts

from stlm.corpora import encodings
from stlm.corpora.formats import detect_encoding, iter_documents

TEXT = "The cat — a tabby — said “naïve”.\nIt left.\n"


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, b""])
def test_the_mark_of_utf8_is_no_part_of_the_text(folder: Path, mark: bytes) -> None:
    (folder / "a.txt").write_bytes(mark + TEXT.encode())
    (folder / "b.jsonl").write_bytes(mark + json.dumps({"text": TEXT}).encode())
    (folder / "c.csv").write_bytes(mark + b"text,n\none,1\n")
    (folder / "d.json").write_bytes(mark + json.dumps([{"text": TEXT}]).encode())
    record = fetched(folder)
    assert rows(folder)["text"] == [TEXT.strip("\n"), TEXT, "one", TEXT]
    assert record["encodings"] == {"utf-8-sig" if mark else "utf-8": 4}


@pytest.mark.parametrize(
    ("codec", "mark", "told"),
    [
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-16"),
        ("utf-32-le", codecs.BOM_UTF32_LE, "utf-32"),
        ("utf-32-be", codecs.BOM_UTF32_BE, "utf-32"),
        ("utf-16-le", b"", "utf-16-le"),
        ("utf-16-be", b"", "utf-16-be"),
        ("utf-32-le", b"", "utf-32-le"),
        ("utf-32-be", b"", "utf-32-be"),
    ],
)
def test_utf16_and_utf32_of_both_orders(
    folder: Path, codec: str, mark: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_bytes(mark + TEXT.replace("\n", "\r\n").encode(codec))
    (folder / "b.jsonl").write_bytes(mark + json.dumps({"text": TEXT}).encode(codec))
    (folder / "c.csv").write_bytes(mark + "text,n\r\none,1\r\n".encode(codec))
    record = fetched(folder)
    assert rows(folder)["text"] == [TEXT.strip("\n"), TEXT, "one"]
    assert record["encodings"] == {told: 3}
    assert f"own: converted to UTF-8: 3 files from {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codec", "told", "text"),
    [
        ("cp1252", "cp1252", "“It’s a café,” she said — “the old one.” Größe und Maß, für Mönche.\n"),
        ("latin-1", "cp1252", "L'été dernier, nous étions allés à la forêt où les chênes étaient âgés.\n"),
        ("cp1250", "cp1250", "Zażółć gęślą jaźń. Było to w dniu świątecznym, kiedy wszyscy śpiewali.\n"),
        ("cp1251", "cp1251", "Все счастливые семьи похожи друг на друга, каждая несчастливая по-своему.\n"),
        ("koi8-r", "koi8_r", "Все счастливые семьи похожи друг на друга, каждая несчастливая по-своему.\n"),
        ("gb18030", "gb18030", "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。\n"),
        ("big5", "big5", "話說天下大勢，分久必合，合久必分。\n"),
        ("shift_jis", "cp932", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"),
        ("cp874", "cp874", "กาลครั้งหนึ่งนานมาแล้ว มีเด็กชายคนหนึ่งอาศัยอยู่ในหมู่บ้าน\n"),
    ],
)
def test_other_encodings_by_detection(folder: Path, codec: str, told: str, text: str) -> None:
    (folder / "a.txt").write_bytes((text * 20).encode(codec))
    assert texts(folder) == [(text * 20).strip("\n")]
    assert detect_encoding(folder / "a.txt") == told


def test_what_is_not_ascii_may_come_late(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"plain words\n" * 100_000 + b"caf\xe9\n")
    (folder / "b.txt").write_bytes(b"plain words\n" * 100_000 + "café\n".encode())
    assert [text.rpartition("\n")[2] for text in texts(folder)] == ["café", "café"]
    assert detect_encoding(folder / "a.txt") == "cp1252"
    assert detect_encoding(folder / "b.txt") == "utf-8", "valid throughout"


@pytest.mark.parametrize(
    "content",
    [
        "Größe, Maß, für, Mönch.\n".encode() + b"one bad byte \xff\n",
        bytes(range(256)) * 8,
        codecs.BOM_UTF16_LE + b"odd",
        b"words \xe9\n\0",
    ],
)
def test_what_cannot_be_told_keeps_its_bytes_and_is_named(
    folder: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_bytes(content)
    (folder / "b.txt").write_text("good")
    record = fetched(folder)
    assert (record["encodings"], record["not_decoded"]) == ({"unknown": 1, "utf-8": 1}, ["a.txt"])
    (found,) = iter_documents(folder / "a.txt")
    kept = content.replace(b"\r", b"\n").strip(b"\n")
    assert found.encode("utf-8", "surrogateescape") == kept
    assert "own: 1 file not UTF-8, and of no encoding that could be told (a.txt)" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_become_ours_in_text_files_alone(folder: Path, end: str) -> None:
    (folder / "a.txt").write_bytes(f"one{end}two{end}".encode())
    (folder / "b.jsonl").write_bytes(json.dumps({"text": f"one{end}two"}).encode() + b"\r\n")
    assert texts(folder) == ["one\ntwo", f"one{end}two"]
    assert texts(folder, "*.txt", documents="line") == ["one", "two"]


def test_detection_reads_a_bounded_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import charset_normalizer

    sizes = []
    read = charset_normalizer.from_bytes

    def measured(sample: bytes, **keys: object) -> object:
        sizes.append(len(sample))
        return read(sample, **keys)

    monkeypatch.setattr(charset_normalizer, "from_bytes", measured)
    (folder / "a.txt").write_bytes("Größe und Maß für alle Mönche\n".encode("cp1252") * 100_000)
    assert detect_encoding(folder / "a.txt") == "cp1252"
    assert max(sizes) <= 2 * encodings._SAMPLE
