"""Atomic writes: whole or not at all, whatever fails."""

from __future__ import annotations

import errno
import resource
import shutil
import signal

import pytest

from stlm.errors import UserError, nearest
from stlm.files import atomic_directory, atomic_path, disk_errors, read_json, sha256, write_json, write_text


@pytest.fixture
def full_disk():
    """Every file of this process may grow to 64 KiB, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_arrives_whole_and_an_error_leaves_the_old(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    write_text(target, "old\n")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("new, but ")
        raise RuntimeError("killed")
    assert target.read_text() == "old\n"
    assert names(target.parent) == ["file.txt"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, full_disk):
    target = tmp_path / "big.txt"
    with pytest.raises(UserError, match=r"big.txt: cannot write: .*Nothing was half-written"):
        write_text(target, "x" * 100_000)
    assert names(tmp_path) == []
    with (
        pytest.raises(UserError, match="folder: cannot write"),
        atomic_directory(tmp_path / "folder") as inside,
    ):
        (inside / "big").write_bytes(b"x" * 100_000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_other_failures_of_the_disk_are_told(tmp_path, number):
    with pytest.raises(UserError, match="cannot write"), atomic_path(tmp_path / "file"):
        raise OSError(number, "from the kernel")
    assert names(tmp_path) == []


def test_paths_that_cannot_be_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "file" / "a", "a file stands where a folder should be"),
        (tmp_path / "file" / "deep" / "a", "a part of the path is a file"),
        (tmp_path / "folder", "a folder stands where the file should be"),
        (tmp_path / ("x" * 300), "the name is too long"),
    ):
        with pytest.raises(UserError, match=f"{path.name}: cannot write: {reason}"):
            write_text(path, "text")
    with (
        pytest.raises(UserError, match="a: cannot write: a part of the path is a file"),
        atomic_directory(tmp_path / "file" / "deep" / "a"),
    ):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_the_first_failure_of_a_copied_tree_is_told(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "gone").symlink_to("nowhere")
    with (
        pytest.raises(UserError, match=r"target: cannot write: .*gone could not be copied \(.*No such file"),
        disk_errors(tmp_path / "target"),
    ):
        shutil.copytree(source, tmp_path / "target")
    with pytest.raises(UserError, match=r"target: cannot write: .*are the same file"), disk_errors("target"):
        shutil.copyfile(__file__, __file__)


def test_what_is_there_and_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}: cannot be read: a folder stands"):
        sha256(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path.name}: cannot be read: a folder stands"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "none")


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_directory(target) as inside:
            (inside / content).write_text(content)
    assert names(target) == ["two"]
    with pytest.raises(KeyError), atomic_directory(target) as inside:
        (inside / "three").write_text("three")
        raise KeyError
    assert names(target) == ["two"]
    assert names(tmp_path) == ["folder"]


def test_json_goes_round_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert read_json(path) == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"é": [1, 2.5, None]}


def test_missing_and_damaged_json_is_told(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"a": [1, 2')
    with pytest.raises(UserError, match=r"cut.json: not valid JSON"):
        read_json(tmp_path / "cut.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.json: not valid JSON"):
        read_json(tmp_path / "binary.json")


def test_sha256_is_the_standards(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-4, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == digest


def test_nearest():
    assert nearest("layrs", ["layers", "heads"]) == " (did you mean 'layers'?)"
    assert nearest("zzz", ["layers", "heads"]) == " (choices: heads, layers)"
    assert nearest("zzz", []) == ""
