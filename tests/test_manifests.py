"""Manifests: what the engines read of local files, written when it changes and not before."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from gguf import GGMLQuantizationType
from tiny_llama import ENTRY, write_gguf

from stlm import engines, recording
from stlm.cli import main
from stlm.manifests import Manifests
from stlm.study.load import load_study

CORPORA = """
books:
  description: text files of a mirror
  licence: mine
  sources: [{kind: mirror, path: books, files: {train: "part/*.txt"}}]
own:
  description: text files of a folder
  licence: mine
  sources: [{kind: folder, path: texts, files: {train: "*.txt"}}]
both:
  description: the two
  licence: mine
  mix: {books: 1, own: 1}
"""


@pytest.fixture
def mirror(project: Path) -> Path:
    """A mirror beside a project whose catalogue has corpora of it, and of a folder in the project."""
    with (project / "params/corpora.yaml").open("a") as file:
        file.write(CORPORA)
    mirror = project / "mirror"
    for path in ("mirror/books/part/a.txt", "texts/b.txt"):
        (project / path).parent.mkdir(parents=True)
        (project / path).write_text(f"the text of {path}\n")
    return mirror


def manifest(name: str) -> dict:
    return json.loads(Path(f"data/sources/{name}.json").read_text())


def test_a_manifest_is_written_when_the_content_changes(mirror):
    manifests = Manifests(mirror=mirror)
    assert manifests.refresh("books") is True
    before = manifest("books")
    assert before["books"]["files"] == 1
    os.utime(mirror / "books/part/a.txt")
    assert manifests.refresh("books") is False
    (mirror / "books/part/b.txt").write_text("more\n")
    assert manifests.refresh("books") is True
    assert manifest("books")["books"]["files"] == 2
    assert manifests.refresh("synthetic") is False
    assert not Path("data/sources/synthetic.json").exists(), "no source of it is a local file"


def test_a_published_model_has_the_manifest_of_its_local_file(mirror, project):
    entry = {**ENTRY, "sources": [{"kind": "folder", "path": "giant", "files": {"model.gguf": "model.gguf"}}]}
    del entry["name"]
    (project / "params/models.yaml").write_text(yaml.safe_dump({"giant": entry}))
    write_gguf(project / "giant/model.gguf")
    assert main(["fetch", "giant"]) == 0
    assert manifest("giant")["giant"]["files"] == 1 and not Manifests().changed("giant")
    assert Manifests().watched("giant") == ["data/sources/giant/giant/model.gguf"]
    write_gguf(project / "giant/model.gguf", GGMLQuantizationType.F16)
    assert Manifests().changed("giant")


def test_a_mix_has_the_files_of_its_components(mirror):
    Manifests(mirror=mirror).refresh("both")
    assert {name: of["files"] for name, of in manifest("both").items()} == {"books": 1, "own": 1}
    assert Manifests().watched("both") == ["data/sources/both/books/part", "data/sources/both/own"]


def test_without_the_files_a_manifest_stays(mirror):
    Manifests(mirror=mirror).refresh("books")
    before = manifest("books")
    assert Manifests().refresh("books") is False
    assert manifest("books") == before


def test_what_fetch_has_read_is_written_and_a_later_change_is_told(mirror, monkeypatch, capsys):
    assert main(["fetch", "books", "--mirror", str(mirror)]) == 0
    before = manifest("books")
    assert not Manifests(mirror=mirror).changed("books")
    (mirror / "books/part/a.txt").write_text("another text\n")
    assert Manifests(mirror=mirror).changed("books")
    assert Manifests().changed("books"), "looked at where the mirror last was"
    assert main(["fingerprint", "books"]) == 2
    assert "set STLM_MIRROR" in capsys.readouterr().err
    assert manifest("books") == before
    monkeypatch.setenv("STLM_MIRROR", str(mirror))
    assert main(["fingerprint", "books"]) == 0
    assert "books: the files have changed" in capsys.readouterr().out
    assert manifest("books") != before
    assert Manifests(mirror=mirror).changed("books"), "not fetched yet"
    assert main(["fingerprint", "books"]) == 0, "the manifest is new already, and fetch can follow"
    assert main(["fetch", "books"]) == 0
    assert not Manifests(mirror=mirror).changed("books")


def test_dvc_watches_folders_behind_links_too(mirror, project):
    (project / "elsewhere").mkdir()
    (project / "elsewhere/c.txt").write_text("three\n")
    (mirror / "books/part/linked").symlink_to(project / "elsewhere")
    manifests = Manifests(mirror=mirror)
    manifests.refresh("books")
    part = "data/sources/books/books/part"
    assert manifests.watched("books") == [part, f"{part}/linked"]


def use_books(project: Path) -> None:
    path = project / "params/smoke.yaml"
    path.write_text(path.read_text().replace("\ncorpus: synthetic", "\ncorpus: books"))


def test_dvc_yaml_watches_what_is_here_and_is_current_on_any_machine(mirror, project, monkeypatch, capsys):
    use_books(project)
    engines.use("smoke")
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    assert stages["fetch-books"]["deps"] == ["data/sources/books.json"]
    assert "fingerprint-books" not in stages
    assert main(["fetch", "books", "--mirror", str(mirror)]) == 0
    assert "DVC does not watch its files yet; `stlm use smoke` lets it" in capsys.readouterr().err
    monkeypatch.setenv("STLM_MIRROR", str(mirror))
    engines.use("smoke")
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    assert stages["fingerprint-books"] == {
        "cmd": "stlm fingerprint books",
        "deps": ["data/sources/books/books/part"],
        "outs": [{"data/sources/books.json": {"cache": False, "persist": True}}],
    }
    assert str(project) not in Path("dvc.yaml").read_text()
    monkeypatch.delenv("STLM_MIRROR")
    mirror.rename(project / "gone")
    engines.check_active(load_study("smoke"))


def test_what_is_edited_while_dvc_records_is_not_recorded(mirror, project, monkeypatch):
    use_books(project)
    monkeypatch.setenv("STLM_MIRROR", str(mirror))
    assert main(["fetch", "books"]) == 0
    engines.use("smoke")
    for folder in (".dvc", ".git"):
        (project / folder).mkdir()
    lock = project / "dvc.lock"
    lock.write_text("before\n")
    text = mirror / "books/part/a.txt"

    def commit(*command: str, root: Path) -> subprocess.CompletedProcess[str]:
        lock.write_text("after\n")
        if edited:
            text.write_text(edited)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(recording, "_engine", commit)
    monkeypatch.setattr(recording, "_check_made", lambda study, root: None)  # no results are here
    edited = "edited meanwhile\n"
    refused = "DVC: nothing recorded, the files of books are not those"
    assert recording.record_in_dvc().startswith(refused)
    assert lock.read_text() == "before\n"
    edited = ""
    assert recording.record_in_dvc().startswith(refused), "not fetched again"
    assert lock.read_text() == "before\n"
    assert main(["fetch", "books"]) == 0
    assert recording.record_in_dvc().startswith("DVC: results recorded")
    assert lock.read_text() == "after\n"


def test_a_published_model_that_is_not_there_is_named(mirror, capsys):
    assert main(["fingerprint", "smoke", "gpt"]) == 2
    assert "study 'smoke' has no published model 'gpt'" in capsys.readouterr().err
    assert main(["fingerprint", "book"]) == 2
    error = capsys.readouterr().err
    assert "'book' is in none of params/" in error and "did you mean 'books'" in error
