"""The tests of real data run wherever a mirror lies, and a wrong name for it is told."""

from __future__ import annotations

import pytest
from real_data import find_mirror


def make_mirror(folder):
    (folder / "corpora").mkdir(parents=True)
    return folder


def test_the_nearest_mirror_beside_or_above_the_repository_is_found(tmp_path):
    root = tmp_path / "a" / "b" / "repository"
    root.mkdir(parents=True)
    assert find_mirror(root, None) == find_mirror(root, "") is None
    above = make_mirror(tmp_path / "shared" / "data")
    assert find_mirror(root, None) == above
    beside = make_mirror(tmp_path / "a" / "b" / "shared" / "data")
    assert find_mirror(root, None) == beside
    assert find_mirror(root, str(above)) == above, "what is named goes first"


def test_a_named_folder_is_found_from_any_working_directory(tmp_path, monkeypatch):
    mirror = make_mirror(tmp_path / "mirror")
    monkeypatch.chdir(tmp_path)
    assert find_mirror(tmp_path, "mirror") == mirror
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_mirror(tmp_path, "~/mirror") == mirror


def test_a_named_folder_that_is_no_mirror_is_an_error(tmp_path):
    make_mirror(tmp_path / "shared" / "data")
    with pytest.raises(pytest.UsageError, match=r"STLM_MIRROR: .*nowhere has no folder corpora/"):
        find_mirror(tmp_path / "repository", str(tmp_path / "nowhere"))
