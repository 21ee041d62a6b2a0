"""Records and sealed files: every flipped bit and every cut is noticed, or changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from stlm import integrity
from stlm.errors import UserError
from stlm.files import read_json, record_sha256, sha256, write_json, write_record
from stlm.integrity import Listed, check_files, check_listed, check_seal, seal
from stlm.remedy import remedy

CONTENT = {
    "name": "né",
    "weights": {"a": 0.25, "b": 1e-05},
    "eot": 256,
    "none": None,
    "list": [1, [True, "x"]],
}
OLD = time.time() - 100


def flips(content: bytes, bits: int = 1):
    """The content with each bit flipped; with `bits` above one, every so many."""
    for place in range(0, 8 * len(content), bits):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def cuts(content: bytes):
    return (content[:length] for length in range(len(content)))


@pytest.fixture
def record(tmp_path) -> Path:
    (tmp_path / "curve.csv").write_text("step,loss\n1,2.5\n2,2.25\n")
    write_record(tmp_path / "record.json", CONTENT, lists=["curve.csv"])
    return tmp_path / "record.json"


def test_a_record_reads_as_it_was_written(record):
    assert read_json(record) == CONTENT
    assert json.loads(record.read_text())["checksum"]["files"] == {
        "curve.csv": sha256(record.with_name("curve.csv"))
    }
    write_json(record, CONTENT)
    assert read_json(record) == CONTENT, "earlier versions wrote no checksum"
    assert len(record_sha256(record)) == 64


def test_the_same_content_is_the_same_record(record, tmp_path):
    other = tmp_path / "other.json"
    write_record(other, CONTENT)
    write_json(tmp_path / "earlier.json", CONTENT)
    assert record_sha256(record) == record_sha256(other) == record_sha256(tmp_path / "earlier.json")
    first = other.read_bytes()
    write_record(other, CONTENT)
    assert other.read_bytes() == first, "nothing of the time or the machine is in it"


def test_every_flipped_bit_of_a_record_is_noticed_or_changes_nothing(record):
    harmless = 0
    for damaged in flips(record.read_bytes()):
        record.write_bytes(damaged)
        try:
            assert read_json(record) == CONTENT, damaged
            assert check_listed(record, "curve.csv") is None
            harmless += 1
        except UserError as error:
            assert str(error).startswith(f"{record}: ")
            assert str(error).endswith("delete it and run its stage again, or restore it from a copy")
    # White space that becomes other white space.
    assert 0 < harmless < 30


def test_every_cut_of_a_record_is_noticed(record):
    for damaged in cuts(record.read_bytes()[:-1]):  # the last byte is a line end
        record.write_bytes(damaged)
        with pytest.raises(UserError):
            read_json(record)


def test_line_ends_of_git_are_no_damage(record):
    for path in (record, record.with_name("curve.csv")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_json(record) == CONTENT
    check_listed(record, "curve.csv")


def test_a_file_beside_a_record(record):
    path = record.with_name("curve.csv")
    whole = path.read_bytes()
    for damaged in [*flips(whole), *cuts(whole)]:
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"curve\.csv: damaged, or changed by hand: its SHA-256 is \w{12}, expected"
        ):
            check_listed(record, "curve.csv")
    path.unlink()
    with pytest.raises(UserError, match=r"curve\.csv: no such file"):
        check_listed(record, "curve.csv")
    check_listed(record, "not-listed.csv")
    check_listed(record.with_name("none.json"), "curve.csv")


def test_a_sealed_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"some content" * 5)
    with pytest.raises(UserError, match=r"state: damaged: no SHA-256 at its end"):
        check_seal(path)
    seal(path)
    check_seal(path)
    whole = path.read_bytes()
    for damaged in [*flips(whole), *cuts(whole), whole + b"x"]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="state: damaged"):
            check_seal(path)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, with the number of times that files were hashed, and a checker of it."""
    monkeypatch.setattr(integrity, "LARGE", 0)
    monkeypatch.setattr(integrity, "_SETTLED", -1.0)
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    monkeypatch.setattr(integrity, "sha256", counted)
    path = tmp_path / "shard.arrow"
    path.write_bytes(b"tokens" * 100)
    os.utime(path, (OLD, OLD))
    expected = sha256(path)

    def check() -> None:
        check_files([Listed(path, expected, 600)], tmp_path / "checked.json")

    return path, hashed, check


def test_a_large_file_is_hashed_once_a_change(large):
    path, hashed, check = large
    for _ in range(3):
        check()
    assert hashed == [path]
    os.utime(path, (OLD + 1, OLD + 1))
    check()
    assert len(hashed) == 2
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    os.utime(path, (OLD + 1, OLD + 1))  # size and time as before
    for _ in range(2):
        with pytest.raises(UserError, match=r"shard\.arrow: damaged"):
            check()


def test_what_was_hashed_is_believed_for_a_week(large, monkeypatch):
    path, hashed, check = large
    check()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + integrity.TRUSTED - 10)
    check()
    assert hashed == [path]
    monkeypatch.setattr(time, "time", lambda: now + integrity.TRUSTED + 10)
    check()
    assert len(hashed) == 2, "a disk that loses a bit changes no time stamp"
    monkeypatch.setattr(time, "time", lambda: now)
    check()
    assert len(hashed) == 3, "a clock that was put back"


def test_a_damaged_cache_costs_time_alone(large, tmp_path):
    path, _, check = large
    check()
    cache = tmp_path / "checked.json"
    whole = cache.read_bytes()
    for damaged in [*list(flips(whole, 41)), b"", whole[:100]]:
        cache.write_bytes(damaged)
        check()
    *state, _ = json.loads(whole)[str(path)]
    write_record(cache, {str(path): [*state, hashlib.sha256().hexdigest()]})
    check()


def test_a_truncated_file_is_not_even_hashed(large):
    path, hashed, check = large
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard\.arrow: truncated: 599 bytes, expected 600"):
        check()
    path.write_bytes(b"x" * 601)
    with pytest.raises(UserError, match=r"shard\.arrow: changed: 601 bytes, expected 600"):
        check()
    assert not hashed


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/raw/blimp/train.parquet", "run: stlm fetch blimp"),
        ("data/raw/mix/simple_wiki/source.json", "run: stlm fetch mix"),
        ("data/tokens/books/bpe-4096/meta.json", "run: stlm tokenize books bpe-4096"),
        ("/home/x/data/tokens/books/gpt2/tokenizer/vocab.bpe", "run: stlm tokenize books gpt2"),
        ("results/desk/runs/wide-s0/checkpoints/step-0000010/config.json", "run: stlm train desk wide-s0 ("),
        (
            "results/desk/runs/wide-s0/curve.csv",
            "run: stlm train desk wide-s0 (or git restore results/desk/runs/wide-s0/curve.csv",
        ),
        (
            "results/desk/runs/wide-s0/train.json",
            "run: stlm train desk wide-s0 (or dvc pull --force, where DVC has it)",
        ),
        ("results/desk/runs/wide-s0/evaluation.json", "run: stlm evaluate desk wide-s0"),
        ("results/desk/runs/wide-s0/items.parquet", "run: stlm evaluate desk wide-s0"),
        ("results/desk/published/smol/items.parquet", "run: stlm evaluate desk smol"),
        ("results/desk/contamination.json", "run: stlm contamination desk"),
        ("results/desk/contaminated-items.parquet", "run: stlm contamination desk"),
        ("results/desk/metrics.json", "run: stlm report desk"),
        ("results/desk/tables/statistics.csv", "run: stlm report desk"),
        ("results/desk/plots/data/figure1.csv", "run: stlm report desk"),
        ("results/desk/records/runs.json", "run: stlm report desk"),
        (".state/desk/wide-s0/state.pt", "delete .state/desk/wide-s0 and run the same command again"),
        (".state/desk/wide-s0/output/checkpoints/step-1/config.json", "delete .state/desk/wide-s0 and"),
        ("somewhere/else.json", "delete it and run its stage again"),
    ],
)
def test_what_to_run_follows_from_the_place(path, command):
    assert remedy(Path(path)).startswith(command)
