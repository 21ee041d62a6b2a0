"""Every format, plain and compressed; columns at paths; damage and mistakes, named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import fetched, refused, rows, texts

from stlm.corpora.errors import SourceError
from stlm.corpora.formats import iter_documents, known_suffix
from stlm.errors import UserError

STORIES = ["Once, a cat\nsat.", 'A "quoted", long day.', "naïve café — 猫\n\nThe end."]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def arrow(kind: type, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def content(suffix: str) -> bytes:
    """The stories in the format of ``suffix``; "Arrow" in capitals is the format for random access."""
    table = pa.table({"text": STORIES, "n": [1, 2, 3]})
    objects = table.to_pylist()
    if suffix in (".jsonl", ".NDJSON"):
        return "\n".join(map(json.dumps, objects)).encode()
    if suffix == ".json":
        return json.dumps(objects, indent=1).encode()
    if suffix == ".JSON":
        return json.dumps(objects, ensure_ascii=False).encode()
    if suffix in (".csv", ".tsv"):
        file = io.StringIO()
        writer = csv.DictWriter(file, ["n", "text"], delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(objects)
        return file.getvalue().encode()
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return sink.getvalue().to_pybytes()
    return arrow(pa.ipc.new_file if suffix == ".ARROW" else pa.ipc.new_stream, table)


@pytest.mark.parametrize("packed", list(PACK))
@pytest.mark.parametrize(
    "suffix", [".jsonl", ".NDJSON", ".json", ".JSON", ".csv", ".tsv", ".parquet", ".arrow", ".ARROW"]
)
def test_rows_of_every_format_plain_or_compressed(folder: Path, suffix: str, packed: str) -> None:
    path = folder / f"a{suffix}{packed}"
    path.write_bytes(PACK[packed](content(suffix)))
    assert texts(folder) == STORIES
    assert list(iter_documents(path)) == STORIES


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".md", ".txt.gz", ".TXT.BZ2", ".md.xz", ".txt.zst"])
def test_text_files_plain_or_compressed(folder: Path, suffix: str) -> None:
    packed = PACK["." + suffix.rpartition(".")[2].lower() if suffix.count(".") == 2 else ""]
    (folder / f"a{suffix}").write_bytes(packed("# A day\n\nSun — café.\n".encode()))
    assert texts(folder) == ["# A day\n\nSun — café."]


def test_zstd_of_several_frames(folder: Path) -> None:
    (folder / "a.txt.zst").write_bytes(zstd(b"one ") + zstd(b"two"))
    assert texts(folder) == ["one two"]


def test_an_unknown_suffix_is_called_so_and_the_known_ones_are_listed(folder: Path) -> None:
    (folder / "a.docx").write_bytes(b"PK")
    message = refused(folder)
    assert "a.docx: unknown kind of file, suffix '.docx'; expected one of .txt, .md, .jsonl" in message
    assert "corrupt" not in message
    assert known_suffix(Path("a.docx")) is None and known_suffix(Path("b/A.JSONL.ZST")) == "jsonl"


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_truncated_compressed_file_is_named(folder: Path, suffix: str, packed: str) -> None:
    whole = content(suffix) if suffix != ".txt" else bytes(range(65, 91)) * 100
    (folder / f"a{suffix}{packed}").write_bytes(PACK[packed](whole)[:-9])
    assert f"a{suffix}{packed}: truncated or corrupt" in refused(folder)


def test_what_is_no_compressed_file_is_named(folder: Path) -> None:
    for packed in PACK:
        if packed:
            path = folder / f"a.txt{packed}"
            path.write_bytes(b"not compressed at all, whatever its name")
            with pytest.raises(SourceError, match=f"a.txt{packed}: truncated or corrupt"):
                list(iter_documents(path))


# --- JSON ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', "truncated or corrupt .the file ends within element 2"),
        ('[{"text": "a"}', "truncated or corrupt .expected , or ] after element 1, the file ends"),
        ('[{"text": "a"}, {"text": "b', "truncated or corrupt .the file ends within element 2"),
        ('[{"text": "a"} {"text": "b"}]', "expected , or ] after element 1, found '{'"),
        ('[{"text": "a"}, {"text" "b"}, {"text": "a long one, to be sure"}]', "element 2 is not JSON"),
        ('[{"text": "a"}] more', "something follows the array: 'm'"),
        ('["a"]', "element 1: expected an object, found str"),
        ('{"data": []}', "element 1: no column 'text'; found data"),
        ('[{"text": 1}]', "element 1: text: expected a text, found int"),
        ("[" * 100_000, "element 1 is not JSON .nested too deeply|the file ends within"),
    ],
)
def test_a_json_file_that_is_not_what_it_should_be(folder: Path, text: str, message: str) -> None:
    (folder / "a.json").write_text(text)
    with pytest.raises(SourceError, match=f"a.json: .*({message})"):
        list(iter_documents(folder / "a.json"))


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "b"}\n', '{\n "text": "a"\n}\n{"text":\n"b"}', ""])
def test_a_json_file_of_objects_in_a_row(folder: Path, text: str) -> None:
    (folder / "a.json").write_text(text)
    assert list(iter_documents(folder / "a.json")) == (["a", "b"] if text else [])


def test_elements_longer_than_what_is_read_at_a_time(folder: Path) -> None:
    long = ["a" * 3_000_000, 'b"\\' * 500_000, "c"]
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in long]))
    assert list(iter_documents(folder / "a.json")) == long


def test_an_array_called_jsonl_is_told_its_name(folder: Path) -> None:
    (folder / "a.jsonl").write_text('[\n{"text": "a"}\n]')
    assert "line 1 is not JSON" in (message := refused(folder))
    assert "a file that is one array is called .json" in message


# --- CSV ---


def test_csv_fields_with_line_ends_books_and_blank_lines(folder: Path) -> None:
    book = "word " * 200_000
    (folder / "a.csv").write_text(f'id,text\r\n1,"one\r\ntwo ""three"""\r\n\r\n2,{book}\r\n')
    assert texts(folder) == ['one\r\ntwo "three"', book]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_of_other_separators(folder: Path, mark: str) -> None:
    (folder / "a.csv").write_text(f"id{mark}text\n1{mark}one\n")
    assert texts(folder) == ["one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,text\n1,a\n2\n", "line 3: 1 fields, but the header has 2"),
        ("id,text\n1,a,b\n", "line 2: 3 fields, but the header has 2"),
        ("id,content\n1,a\n", "no column 'text' in its header; found id, content"),
        ("text,text\na,b\n", "2 columns 'text' in its header"),
        ('id,text\n1,"a\n', "truncated or corrupt, or not CSV .line 2: unexpected end of data"),
    ],
)
def test_a_csv_that_is_not_what_it_should_be(folder: Path, text: str, message: str) -> None:
    (folder / "a.csv").write_text(text)
    with pytest.raises(SourceError, match=f"a.csv: {message}"):
        list(iter_documents(folder / "a.csv"))


# --- columns ---


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_all_kinds_of_strings_are_text(folder: Path, suffix: str, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["one", "two", "one"]).cast(kind)})
    if suffix == ".parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        (folder / "a.arrow").write_bytes(arrow(pa.ipc.new_stream, table))
    found = texts(folder)
    assert [text.decode() if isinstance(text, bytes) else text for text in found] == ["one", "two", "one"]
    assert list(iter_documents(folder / f"a{suffix}")) == ["one", "two", "one"]


def nested(folder: Path, suffix: str) -> None:
    page = [{"body": {"en": "one", "n": 1}, "tags": ["x"]}, {"body": {"en": "two", "n": 2}, "tags": []}]
    table = pa.table({"page": page, "meta": [{"book": 7, "part": "train"}, {"book": 8, "part": "dev"}]})
    if suffix == ".parquet":
        pq.write_table(table, folder / "a.parquet")
    elif suffix == ".arrow":
        (folder / "a.arrow").write_bytes(arrow(pa.ipc.new_stream, table))
    else:
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_a_text_a_group_and_a_split_within_objects(folder: Path, suffix: str) -> None:
    nested(folder, suffix)
    record = fetched(folder, text="page.body.en", group="meta.book", split="meta.part")
    assert [record[key] for key in ("text", "group", "split_column")] == ["text", "group", "split"]
    assert rows(folder) == {"text": ["one", "two"], "group": ["7", "8"], "split": ["train", "dev"]}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text": "page.body.fr"}, "no column 'page.body.fr'.*fr.*; found en|'fr', found en"),
        ({"text": "page.tags.en"}, "'page.tags' is list<.*expected a struct|'en', found list"),
        ({"text": "page.tags"}, "column 'page.tags' is list<.*expected strings|expected a text, found list"),
        ({"text": "page.body.n"}, "column 'page.body.n' is int64|expected a text, found int"),
        ({"text": "pages.body"}, "no column 'pages.body'"),
        (
            {"text": "page.body.en", "group": "page.tags"},
            "expected (single values|a single value, found list)",
        ),
        (
            {"text": "page.body.en", "split": "page.body"},
            "expected (single values|a single value, found dict)",
        ),
    ],
)
def test_a_path_that_leads_to_no_text_is_an_error_that_names_file_and_column(
    folder: Path, suffix: str, keys: dict[str, str], message: str
) -> None:
    nested(folder, suffix)
    assert re.search(f"a{suffix}: .*({message})", refused(folder, **keys))


def test_a_column_with_a_dot_in_its_name(folder: Path) -> None:
    pq.write_table(pa.table({"a.b": ["one"], "a": [{"b": "two"}]}), folder / "a.parquet")
    assert texts(folder, text="a.b") == ["one"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_columns_of_one_name(folder: Path, suffix: str) -> None:
    table = pa.table([["one"], ["two"]], names=["text", "text"])
    if suffix == ".parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        (folder / "a.arrow").write_bytes(arrow(pa.ipc.new_stream, table))
    assert f"a{suffix}: 2 columns are named 'text'" in refused(folder)


def test_a_group_column_of_lists(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["one"], "book": [[1]]}), folder / "train.parquet")
    message = refused(folder, group="book")
    assert "train.parquet: group column 'book' is list<" in message
    assert "expected single values" in message


def test_parquet_with_the_columns_as_they_are_is_copied(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), folder / "a.PARQUET")
    fetched(folder)
    raw = folder.parent / "raw" / "own" / "train-00000.parquet"
    assert raw.read_bytes() == (folder / "a.PARQUET").read_bytes()


# --- splits ---


def test_splits_by_file_are_recorded_and_held_out_files_are_no_part_of_train(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "test/c", "dev/d"):
        (folder / f"{name}.txt").parent.mkdir(exist_ok=True)
        (folder / f"{name}.txt").write_text(f"text {name}")
    record = fetched(folder, {"train": "**/*.txt", "dev": "dev/*", "test": ["test/*.txt"]})
    splits = {file["path"]: (file["split"], file["rows"]) for file in record["files"]}
    assert splits == {
        "dev-00000.parquet": ("val", 1),
        "test-00000.parquet": ("test", 1),
        "train-00000.parquet": ("train", 2),
    }
    assert rows(folder)["text"] == ["text a", "text b"] and rows(folder, "dev")["text"] == ["text dev/d"]
    assert "own: 2 files of val or test are left out of train" in capsys.readouterr().err


def test_a_file_in_val_and_test(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    files = {"train": "*.txt", "val": "a.txt", "test": "a*"}
    assert "a.txt is in both val and test" in refused(folder, files)


def test_a_split_without_rows(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text(" \n")
    assert "own has no rows in test" in refused(folder, {"train": "a.txt", "test": "b.txt"})


def test_a_column_of_splits_is_kept_and_checked(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "set": ["train", "validation"]}), folder / "a.parquet")
    record = fetched(folder, split="set")
    assert (record["split_column"], rows(folder)["set"]) == ("set", ["train", "validation"])
    (folder / "b.csv").write_text("text,set\nc,tset\n")
    with pytest.raises(UserError, match="split column 'set' has 'tset'"):
        fetched(folder, split="set")
