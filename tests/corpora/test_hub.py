"""The real hub client against a stand-in hub on loopback."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_sources import COMMIT, REPO, Hub, parquet

from stlm.corpora.config import CorpusEntry
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.files import read_json


def entry(**source) -> CorpusEntry:
    source = {"kind": "hub", "repo": REPO, "revision": COMMIT, "files": {"train": "data/*.parquet"}, **source}
    return CorpusEntry.model_validate(
        {"name": "stories", "description": "", "licence": "CC0", "sources": [source]}
    )


def stories(folder: Path, rows: int = 2000) -> bytes:
    rng = random.Random(rows)
    text = [rng.randbytes(64).hex() for _ in range(rows)]
    return parquet(folder / "upstream.parquet", {"text": text}).read_bytes()


def test_a_file_behind_a_redirect_arrives_with_its_record(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"data/train-0.parquet": stories(tmp_path), "README.md": b"#"}
    fetch(entry(), tmp_path / "raw" / "stories")
    record = read_json(tmp_path / "raw" / "stories" / "source.json")
    digest = hashlib.sha256(hub.files["data/train-0.parquet"]).hexdigest()
    assert record["source"] == {
        "kind": "hub",
        "repo": REPO,
        "revision": COMMIT,
        "pinned": True,
        "files": {"data/train-0.parquet": digest},
    }
    assert (record["rows"], record["licence"], record["tried"]) == (2000, "CC0", [])
    (file,) = record["files"]
    assert file["sha256"] == digest
    path = tmp_path / "raw" / "stories" / file["path"]
    assert path.read_bytes() == hub.files["data/train-0.parquet"]
    assert any(asked.startswith("/cdn/") for _, asked, _ in hub.requests)
    assert {left.name for left in (tmp_path / "raw").iterdir()} == {".hub", ".locks", "stories"}


def test_a_broken_connection_is_resumed(hub: Hub, tmp_path: Path) -> None:
    content = stories(tmp_path)
    hub.files = {"data/train-0.parquet": content}
    hub.break_at = [100_000, 2000]
    fetch(entry(), tmp_path / "raw" / "stories")
    assert (tmp_path / "raw" / "stories" / "train-00000.parquet").read_bytes() == content
    starts = [asked for method, path, asked in hub.requests if method == "GET" and path.startswith("/cdn/")]
    assert len(starts) == 3, "two breaks, three requests"
    assert starts[1:] == ["bytes=100000-", "bytes=102000-"], "each goes on where the one before broke"


def test_a_connection_that_always_breaks_is_an_error_and_the_next_run_keeps_what_came(
    hub: Hub, tmp_path: Path
) -> None:
    content = stories(tmp_path)
    hub.files = {"data/train-0.parquet": content, "data/train-1.parquet": content[:-8] + b"--------"}
    hub.break_at = [len(content)] + [0] * 100  # the first file comes whole
    with pytest.raises(UserError, match=r"hub: someone/stories@0123456789ab: .* or it broke") as raised:
        fetch(entry(), tmp_path / "raw" / "stories")
    assert "--mirror" in str(raised.value)
    assert not (tmp_path / "raw" / "stories").exists()
    hub.break_at, hub.requests, hub.files["data/train-1.parquet"] = [], [], content
    fetch(entry(), tmp_path / "raw" / "stories")
    asked = [path for method, path, _ in hub.requests if method == "GET" and path.startswith("/cdn/")]
    assert asked == ["/cdn/data/train-1.parquet"]
    assert not (tmp_path / "raw" / ".hub" / "stories").exists(), "downloads go once they have arrived"


def test_a_file_with_another_checksum_than_the_pinned_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"data/train-0.parquet": stories(tmp_path)}
    with pytest.raises(UserError, match=r"data/train-0.parquet: SHA-256 is \w{64}, pinned is 0{64}"):
        fetch(entry(sha256={"data/train-0.parquet": "0" * 64}), tmp_path / "raw" / "stories")
    assert not (tmp_path / "raw" / "stories").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"revision": "f" * 40}, "no such revision: f{40}"),
        ({"repo": "someone/else"}, "no such dataset at http://127.0.0.1"),
        (
            {"files": {"train": "data/valid.parquet"}},
            "no file data/valid.parquet .did you mean 'data/train-0.pa",
        ),
    ],
)
def test_what_the_hub_lacks_is_named(hub: Hub, tmp_path: Path, source: dict, message: str) -> None:
    hub.files = {"data/train-0.parquet": stories(tmp_path)}
    with pytest.raises(UserError, match=message):
        fetch(entry(**source), tmp_path / "raw" / "stories")


def test_a_gated_repository_says_how_to_get_in(hub: Hub, tmp_path: Path) -> None:
    hub.files, hub.gated = {"data/train-0.parquet": stories(tmp_path)}, True
    with pytest.raises(UserError, match="the repository is gated: accept its terms"):
        fetch(entry(), tmp_path / "raw" / "stories")


def test_a_hub_that_fails_is_asked_again_and_then_named(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+ answered 500"):
        fetch(entry(), tmp_path / "raw" / "stories")
    assert len(hub.requests) > 1


def test_a_branch_is_resolved_to_a_commit_and_recorded(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"data/train-0.parquet": stories(tmp_path)}
    fetch(entry(revision="main"), tmp_path / "raw" / "stories")
    source = read_json(tmp_path / "raw" / "stories" / "source.json")["source"]
    assert (source["revision"], source["pinned"]) == (COMMIT, False)


def test_several_files_are_kept_apart_and_in_order(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"data/train-{i}.parquet": stories(tmp_path, 10 + i) for i in range(3)}
    record = fetch(entry(), tmp_path / "raw" / "stories")
    assert [(file["path"], file["rows"]) for file in record["files"]] == [
        ("train-00000.parquet", 10),
        ("train-00001.parquet", 11),
        ("train-00002.parquet", 12),
    ]


def test_lines_of_text_become_documents(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"talk.train.txt": b"one\ntwo\nthree\nfour\nfive\n"}
    fetch(entry(files={"train": "*.train.txt"}, lines=2), tmp_path / "raw" / "stories")
    table = pq.read_table(tmp_path / "raw" / "stories" / "train-00000.parquet")
    assert table["text"].to_pylist() == ["one\ntwo", "three\nfour", "five"]
