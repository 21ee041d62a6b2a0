"""Which files are meant, which splits they declare, which column holds the text."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from own_texts import english, write_stories

from stlm.errors import UserError
from stlm.new.sources import find_sources, split_of, text_column


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(english(3))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.txt", "train"),
        ("wiki.valid.txt", "val"),
        ("dev-00001-of-00002.jsonl.gz", "val"),
        ("a_validation.CSV", "val"),
        ("test/a.txt", "test"),
        ("x/Training/a.md", "train"),
        ("the test of courage.txt", None),
        ("a_test_of_courage.txt", None),
        ("contest.txt", None),
    ],
)
def test_a_split_is_declared_at_an_end_of_the_name_or_by_the_folder(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_declared_splits_are_kept_and_files_without_one_go_to_train(tmp_path: Path) -> None:
    touch(tmp_path, "train.txt", "valid.txt", "dev/b.txt", "test.md", "more.txt")
    found = find_sources([str(tmp_path)])
    assert {split: sorted(p.name for p in paths) for split, paths in found.files.items()} == {
        "train": ["more.txt", "train.txt"],
        "val": ["b.txt", "valid.txt"],
        "test": ["test.md"],
    }
    assert found.unmarked == 1 and found.patterns["val"] == ("dev/b.txt", "valid.txt")


def test_a_train_file_alone_declares_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "train.txt", "more.txt")
    assert find_sources([str(tmp_path)]).patterns == {"train": ("**/*.txt",)}


def test_folders_globs_and_files_in_several_places(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a/x.txt",
        "a/deep/y.MD",
        "b/one.txt",
        "b/two.txt",
        "b/.hidden.txt",
        "c/z.txt",
        "c/other.txt",
    )
    found = find_sources([f"{tmp_path}/a", f"{tmp_path}/b/*.txt", f"{tmp_path}/c/z.txt"])
    assert found.root == tmp_path and found.hidden == 0
    assert found.patterns == {"train": ("a/**/*.MD", "a/**/*.txt", "b/*.txt", "c/z.txt")}
    assert [p.name for p in found.all_files] == ["y.MD", "x.txt", "one.txt", "two.txt", "z.txt"]


def test_a_name_with_marks_of_globs_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "[1] a*.txt", "1.txt")
    assert [p.name for p in find_sources([f"{tmp_path}/[1] a*.txt"]).all_files] == ["[1] a*.txt"]


def test_unknown_suffixes_are_named_and_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.pdf", "c.docx", "noend")
    assert set(find_sources([str(tmp_path)]).unknown) == {".pdf", ".docx", "none"}
    assert find_sources([f"{tmp_path}/*"]).patterns == {"train": ("a.txt",)}
    with pytest.raises(UserError, match=r"b\.pdf: unknown kind of file, suffix '\.pdf'"):
        find_sources([f"{tmp_path}/b.pdf"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"no file of a known format .* found 1 with suffix \.pdf"):
        find_sources([str(tmp_path)])


def test_what_is_not_there_has_a_hint(tmp_path: Path) -> None:
    touch(tmp_path, "stories.txt")
    with pytest.raises(UserError, match=r"no such file or folder \(did you mean 'stories.txt'\?\)"):
        find_sources([f"{tmp_path}/storys.txt"])
    with pytest.raises(UserError, match="is no folder"):
        find_sources([f"{tmp_path}/none/*.txt"])
    with pytest.raises(UserError, match="lie far apart"):
        find_sources(["/usr", str(tmp_path)])


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write_stories(tmp_path / "texts", 3)
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "texts")
    assert len(find_sources([str(tmp_path / "texts")]).all_files) == 3


ROWS = [{"id": f"number {n}", "body": english(3, n), "n": n} for n in range(30)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pq.write_table(table.set_column(1, "body", table["body"].dictionary_encode()), path)
    elif kind == "arrow":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "tsv", "json", "jsonl.gz"])
def test_the_longest_column_holds_the_text_and_it_is_said(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    column, said = text_column([path], None)
    assert column == "body" and "the column 'body', the longest" in said and "id (" in said
    assert text_column([path], "id")[0] == "id"
    with pytest.raises(UserError, match=r"--column bode: no column .* \(did you mean 'body'\?\)"):
        text_column([path], "bode")


def test_a_column_called_text_comes_first(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 3, "longer": ["abc"] * 3}), tmp_path / "a.parquet")
    assert text_column([tmp_path / "a.parquet"], None)[0] == "text"
    pq.write_table(pa.table({"n": [1], "m": [2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column holds text; found n, m"):
        text_column([tmp_path / "a.parquet"], None)
    (tmp_path / "a.txt").write_text("x")
    assert text_column([tmp_path / "a.txt"], None) == ("text", "")
