"""Which files a path or glob means: hidden ones, links, odd names; folders of one's own; names of entries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from folders import fetched, folder_entry, refused, rows, texts

from stlm.corpora.config import CorpusEntry
from stlm.corpora.fetch import fetch
from stlm.corpora.formats import find_files
from stlm.errors import UserError
from stlm.study.catalogues import load_corpora


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")


def found(folder: Path, *patterns: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder, patterns)]


def test_stars_cross_folders_and_two_also_mean_the_folder_itself(folder: Path) -> None:
    write(folder, "a.txt", "b/c.txt", "b/d/e.txt", "b/f.md")
    every = ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert found(folder, "*.txt") == every == found(folder, "**/*.txt")
    assert found(folder, "b/**/*.txt") == ["b/c.txt", "b/d/e.txt"]
    assert found(folder, "b/*.md", "a.txt", "none") == ["a.txt", "b/f.md"]
    assert found(folder, "[ab].txt") == ["a.txt"]
    assert find_files(folder / "a.txt", []) == [folder / "a.txt"]


def test_hidden_files_and_checkpoints_are_left_out_of_globs(folder: Path) -> None:
    write(folder, "a.txt", ".b.txt", ".git/c.txt", "d/.ipynb_checkpoints/e.txt", "__pycache__/f.txt")
    assert texts(folder) == ["text of a.txt"]
    assert texts(folder, [".b.txt", ".git/c.txt"]) == ["text of .b.txt", "text of .git/c.txt"]


def test_where_only_hidden_files_match_the_error_says_so(folder: Path) -> None:
    write(folder, ".a.txt", "b.md")
    message = refused(folder, "*.txt")
    assert "no file *.txt but hidden ones, which a glob leaves out (.a.txt)" in message
    assert "no file *.csv (choices: b.md)" in refused(folder, "*.csv")


def test_exact_names_come_before_globs(folder: Path) -> None:
    write(folder, "a[1].txt", "a1.txt", "b*.txt", "bc.txt")
    assert texts(folder, "a[1].txt") == ["text of a[1].txt"]
    assert texts(folder, "b*.txt") == ["text of b*.txt"]


def test_linked_folders_are_entered(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "books", "one.txt", "more/two.txt")
    (folder / "linked").symlink_to(tmp_path / "books")
    (folder / "three.txt").symlink_to(tmp_path / "books" / "one.txt")
    expected = ["text of more/two.txt", "text of one.txt", "text of one.txt"]
    assert texts(folder, "*.txt") == expected


def test_links_in_a_circle_end_and_a_folder_is_read_once_by_its_own_name(folder: Path) -> None:
    write(folder, "b/one.txt")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "a").symlink_to(folder / "b")
    (folder / "gone").symlink_to(folder / "nowhere")
    assert found(folder, "*") == ["b/one.txt"]
    assert found(folder, "a/one.txt") == ["a/one.txt"], "named exactly, it may go over the link"


def test_a_name_that_is_no_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
            file.write("one")
    except OSError:
        pytest.skip("the file system takes UTF-8 names alone")
    record = fetched(folder, documents="line")
    assert list(record["source"]["files"]) == ["caf\\xe9.txt"]
    assert rows(folder) == {"text": ["one"], "file": ["caf\\xe9.txt"]}
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text(" ")
    with pytest.raises(UserError, match="own has no rows"):
        fetched(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/d\xe9.docx")).write_text("x")
    with pytest.raises(UserError, match=r"d\\xe9.docx: unknown kind of file"):
        fetched(folder)
    capsys.readouterr().err.encode("utf-8")


# --- folders of one's own ---


def test_a_folder_needs_no_mirror_and_is_recorded(folder: Path) -> None:
    write(folder, "a.txt")
    record = fetched(folder, note="mine")
    assert (record["source"]["kind"], record["source"]["path"], record["source"]["note"]) == (
        "folder",
        str(folder),
        "mine",
    )


def test_a_path_from_home_or_from_the_project(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/mine", "mine"):
        entry = CorpusEntry.model_validate(
            {
                "name": "own",
                "description": "",
                "licence": "",
                "sources": [{"kind": "folder", "path": path, "files": {"train": "*"}}],
            }
        )
        assert fetch(entry, tmp_path / "raw" / "own")["rows"] == 1


def test_no_such_folder_and_a_file_in_its_place(folder: Path) -> None:
    message = refused(folder / "none")
    assert f"folder: {folder / 'none'}: no such folder" in message
    assert "--mirror" not in message, "no mirror would help"
    write(folder, "a.txt")
    assert f"{folder / 'a.txt'} is a file; name its folder there" in refused(folder / "a.txt")
    assert "no file *.csv" in refused(folder, "*.csv")


# --- names of entries ---

ENTRY = "{description: d, licence: l, sources: [{kind: folder, path: x, files: {train: a.txt}}]}"


def catalogue(tmp_path: Path, *names: str) -> Path:
    (tmp_path / "params").mkdir()
    lines = "".join(f"{name}: {ENTRY}\n" for name in names)
    (tmp_path / "params" / "corpora.yaml").write_text(lines, encoding="utf-8")
    return tmp_path


def test_capital_letters_and_hyphens_name_a_corpus(tmp_path: Path) -> None:
    assert list(load_corpora(catalogue(tmp_path, "My-Corpus", "a_2"))) == ["My-Corpus", "a_2"]


@pytest.mark.parametrize("name", ["my corpus", "-a", "größe", "a.b", "a/b", "''"])
def test_other_names_are_refused_in_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a name, as it names folders and stages: use the letters"):
        load_corpora(catalogue(tmp_path, name))


def test_names_that_differ_only_in_capital_letters(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="My-Corpus and my-corpus differ only in capital letters"):
        load_corpora(catalogue(tmp_path, "My-Corpus", "my-corpus"))


def test_an_entry_is_a_valid_parameter_of_both_engines() -> None:
    entry = folder_entry(Path("x"), ["a.txt", "b/*.txt"], documents="line")
    assert entry.model_dump(mode="json")["sources"][0]["files"] == {"train": ["a.txt", "b/*.txt"]}
