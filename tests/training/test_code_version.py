"""The commit that a record names is that of STLM's code, whatever repository the working folder is in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import stlm
from stlm.provenance import code_version, commit_of


def git(folder: Path, *arguments: str) -> str:
    about = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *about, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def make_package(folder: Path) -> Path:
    package = folder / "stlm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return package


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """Another project's repository, with a commit."""
    folder = tmp_path / "outer"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "notes.txt").write_text("their own")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "theirs")
    return folder


def test_code_unpacked_in_another_repository_has_no_commit(outer: Path) -> None:
    assert commit_of(make_package(outer / "inner")) is None


def test_the_working_folder_does_not_matter(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = commit_of(Path(stlm.__file__).parent)
    monkeypatch.chdir(outer)
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    assert code_version.__wrapped__() == {**code_version(), "git": own}
    assert own is None or not own.startswith(git(outer, "rev-parse", "--short=12", "HEAD"))


def test_the_commit_of_a_clone_and_what_makes_it_dirty(tmp_path: Path) -> None:
    package = make_package(tmp_path)
    assert commit_of(package) is None  # no repository
    git(tmp_path, "init", "-q")
    (tmp_path / "workflow").mkdir()
    (tmp_path / "workflow" / "rules.smk").write_text("")
    git(tmp_path, "add", ".")
    assert commit_of(package) is None  # no commit
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit_of(package) == commit

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("figures")
    assert commit_of(package) == commit
    for path in (package / "__init__.py", package / "new.py", tmp_path / "workflow" / "rules.smk"):
        before = path.read_text() if path.exists() else None
        path.write_text("changed = True")
        assert commit_of(package) == f"{commit}-dirty"
        path.unlink() if before is None else path.write_text(before)
        assert commit_of(package) == commit


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit_of(Path(stlm.__file__).parent) is None
