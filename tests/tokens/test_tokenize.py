"""From raw text to shards: splits, cleaning, resuming after a kill, bounded memory, bad input."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_samples import stories, write_raw

from stlm.errors import UserError
from stlm.files import read_json, sha256, write_json
from stlm.tokens import tokenize as module
from stlm.tokens.raw import raw_components
from stlm.tokens.shards import SPLITS, read_split
from stlm.tokens.survey import mark_duplicates
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer

Texts = dict[str, list[str]]


def tokenize(raw: Path, out: Path, name: str = "bytes", **options: int) -> dict:
    return tokenize_corpus(raw, out, name, out, progress=False, **options)


def texts_of(folder: Path) -> Texts:
    """Split -> its texts, as decoded."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    return {
        split: [tokenizer.decode(document.tokens) for part in read_split(folder, split) for document in part]
        for split in SPLITS
    }


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and its digest."""
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def script(*arguments: object) -> list[str]:
    """A command that tokenizes: raw folder, out folder, tokenizer, shard bytes."""
    code = (
        "import sys, resource; from pathlib import Path; from stlm.tokens.tokenize import tokenize_corpus\n"
        "raw, out, name, size = sys.argv[1:5]\n"
        "if len(sys.argv) > 5: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)\n"
        "tokenize_corpus(Path(raw), Path(out), name, Path(), shard_bytes=int(size), progress=False)\n"
        # Not ru_maxrss, which starts from the parent's.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_splits_are_stable_when_documents_are_added(tmp_path: Path) -> None:
    old = stories(1500, words=5)
    tokenize(write_raw(tmp_path / "raw" / "tales", old), tmp_path / "old")
    more = stories(1500, seed=1, words=5)
    both = [text for pair in zip(more, old, strict=True) for text in pair]
    tokenize(write_raw(tmp_path / "raw" / "tales", both, files=3), tmp_path / "new")
    before, after = texts_of(tmp_path / "old"), texts_of(tmp_path / "new")
    for split in SPLITS:
        assert [text for text in after[split] if text in set(old)] == before[split]
    assert 5 <= len(before["val"]) <= 30 and 5 <= len(before["test"]) <= 30


def test_groups_stay_together(tmp_path: Path) -> None:
    texts = stories(1000, words=5)
    titles = [f"Book {i % 200}" for i in range(1000)]
    tokenize(write_raw(tmp_path / "raw" / "books", texts, groups=titles), tmp_path / "books")
    title_of = dict(zip(texts, titles, strict=True))
    found = {split: {title_of[text] for text in here} for split, here in texts_of(tmp_path / "books").items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 200
    assert 2 <= len(found["val"]) <= 25 and 2 <= len(found["test"]) <= 25


def test_what_is_dropped_and_what_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = stories(1000, words=5)
    nul = "NUL \0 is kept\0."
    bad = ["", None, " \n\t", b"\xff\xfe not UTF-8", "\ud800 lone".encode(errors="surrogatepass"), nul]
    texts = [*good[:500], *bad, *good[500:], good[3], good[3], *good[990:]]
    folder = tmp_path / "tokens"
    meta = tokenize(write_raw(tmp_path / "raw" / "dirty", texts, files=2), folder)
    assert meta["documents"] == {
        "read": 1018,
        "duplicates": 12,
        "empty": 3,
        "invalid_utf8": 2,
        "nul": 1,
        "kept": 1001,
    }
    assert meta == read_json(folder / "meta.json")
    found = texts_of(folder)
    assert sorted(text for here in found.values() for text in here) == sorted([*good, nul])
    assert (
        "1,001 kept; dropped: 12 exact duplicates, 3 empty, 2 not UTF-8; 1 have NUL" in capfd.readouterr().err
    )
    totals = meta["components"]["dirty"]["splits"]
    for split, here in found.items():
        assert totals[split]["documents"] == len(here)
        assert totals[split]["chars"] == sum(map(len, here))
        assert totals[split]["bytes"] == sum(len(text.encode()) for text in here)
        assert totals[split]["tokens"] == totals[split]["bytes"] + len(here)


def test_duplicates_are_found_across_partitions() -> None:
    draw = np.random.default_rng(0)
    digests = draw.integers(0, 50, (1000, 2), dtype=np.uint64)
    splits = draw.choice(np.array([0, 1, 2, 255], np.uint8), 1000)
    seen, expected = set(), splits.copy()
    keys = list(map(tuple, digests.tolist()))
    for row in sorted(range(1000), key=lambda row: -int(splits[row])):  # what is held out stays first
        if splits[row] != 255 and keys[row] in seen:
            expected[row] = 255
        elif splits[row] != 255:
            seen.add(keys[row])
    kept = np.count_nonzero(splits != 255)
    assert mark_duplicates(digests, splits, partition=64) == kept - len(seen) > 0
    np.testing.assert_array_equal(splits, expected)


def test_the_same_bits_whatever_the_workers(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw" / "tales", stories(800), files=4)
    for workers in (1, 5):
        tokenize(raw, tmp_path / str(workers), "bpe-300", shard_bytes=20_000, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "5")


def test_shards_are_bounded_and_a_longer_document_has_its_own(tmp_path: Path) -> None:
    texts = stories(500, words=10)
    texts.insert(250, "long " * 20_000)
    folder = tmp_path / "tokens"
    tokenize(write_raw(tmp_path / "raw" / "tales", texts), folder, shard_bytes=5000)
    sizes = [shard.values.nbytes for part in read_split(folder, "train") for shard in part.shards]
    assert sizes.count(200_002) == 1
    assert all(size <= 5000 for size in sizes if size != 200_002)
    assert sorted(text for here in texts_of(folder).values() for text in here) == sorted(texts)


def test_a_mix(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "mix"
    one, two = stories(400, seed=1, words=5), stories(600, seed=2, words=5)
    write_raw(raw / "one", one)
    write_raw(raw / "two", [*two, one[7]], groups=[f"Book {i % 150}" for i in range(601)])
    write_json(raw / "source.json", {"name": "mix", "kind": "mix", "mix": {"one": 0.25, "two": 0.75}})
    meta = tokenize(raw, tmp_path / "tokens", "bpe-300")
    assert meta["documents"]["duplicates"] == 1
    parts = read_split(tmp_path / "tokens", "train")
    assert [(part.name, part.weight) for part in parts] == [("one", 0.25), ("two", 0.75)]
    assert all(part.n_tokens for split in SPLITS for part in read_split(tmp_path / "tokens", split))
    assert sorted(t for here in texts_of(tmp_path / "tokens").values() for t in here) == sorted([*one, *two])


def test_tokenizing_again_replaces_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    tokenize(write_raw(tmp_path / "raw" / "tales", stories(400, words=5)), folder, shard_bytes=2000)
    tokenize(write_raw(tmp_path / "raw" / "tales", stories(500, seed=1, words=5)), folder)
    assert len([text for here in texts_of(folder).values() for text in here]) == 500
    assert len(list(folder.glob("train-*.arrow"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "tokens"]


def kill(raw: Path, out: Path, name: str, shards: int) -> Path:
    """Tokenize in 8 kB shards in another process and kill it once it has `shards`; the unfinished folder."""
    partial = out.parent / f".{out.name}.partial"
    journal = partial / "journal.jsonl"
    process = subprocess.Popen(script(raw, out, name, 8000), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= shards):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    return partial


def test_resuming_after_kill_ends_with_the_same_bits(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw" / "tales", stories(4000), files=3)
    tokenize(raw, tmp_path / "whole", "bpe-300", shard_bytes=8000)
    out = tmp_path / "killed"
    for shards in (5, 15):  # killed twice
        partial = kill(raw, out, "bpe-300", shards)
    finished = {path.name: path.stat().st_ino for path in (partial / "tokens").glob("*.arrow")}
    journal = (partial / "journal.jsonl").read_text().splitlines()
    # As if killed in the middle of a line, and of a shard.
    (partial / "journal.jsonl").write_text("\n".join(journal) + '\n{"path": "train-ta')
    (partial / "tokens" / ".train-tales-00099.arrow.x.partial").write_bytes(b"half")

    tokenize(raw, out, "bpe-300", shard_bytes=8000)
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial.exists()
    kept = sum(finished.get(path.name) == path.stat().st_ino for path in out.glob("*.arrow"))
    assert kept >= len(journal) - 1 >= 14  # not made anew


def test_what_cannot_be_gone_on_from_is_made_anew(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw" / "tales", stories(4000))
    tokenize(raw, tmp_path / "whole", shard_bytes=8000)
    out = tmp_path / "out"
    partial = kill(raw, out, "bytes", 3)
    (partial / "tokens").rename(out)  # as if killed between the last rename and the clean-up
    tokenize(raw, out, shard_bytes=8000)
    assert contents(out) == contents(tmp_path / "whole")

    shutil.rmtree(out)
    kill(raw, out, "bytes", 3)
    write_raw(tmp_path / "raw" / "tales", stories(500, seed=5))  # another corpus
    tokenize(raw, out, shard_bytes=8000)
    assert sorted(text for here in texts_of(out).values() for text in here) == sorted(stories(500, seed=5))
    assert not partial.exists()


@pytest.mark.parametrize("kind", ["long beside short", "one long text, many times"])
def test_batches_are_bounded_by_their_bytes(tmp_path: Path, kind: str) -> None:
    """Where neither the rows' average nor the size in the file tells how long the next documents are."""
    if kind == "long beside short":
        texts = ["short"] * 30_000 + [f"{i} " + "long " * 40_000 for i in range(200)]
    else:
        texts = ["book " * 80_000] * 300
    (component,) = raw_components(write_raw(tmp_path / "raw" / "books", texts))
    found = [batch.texts for batch in component.batches()]
    sizes = [sum(map(len, batch)) for batch in found]
    assert max(sizes) < 32 << 20
    assert max(map(len, found)) <= 4096 + 64
    assert [text for batch in found for text in batch] == [text.encode() for text in texts]


def test_a_mix_holds_the_shards_of_one_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, events = tmp_path / "raw" / "mix", []
    names = [f"c{i}" for i in range(8)]
    for i, name in enumerate(names):
        write_raw(raw / name, stories(100, seed=i, words=5))
    weights = dict.fromkeys(names, 1 / len(names))
    write_json(raw / "source.json", {"name": "mix", "kind": "mix", "mix": weights})
    document, write = module._document, module.write_shard
    monkeypatch.setattr(module, "_document", lambda *each: events.append("encode") or document(*each))
    monkeypatch.setattr(module, "write_shard", lambda *each: events.append("write") or write(*each))
    tokenize(raw, tmp_path / "tokens", workers=1)
    assert events.count("write") == 3 * len(names)
    assert "encode" in events[events.index("write") :]


def test_ctrl_c_does_not_wait_for_the_batches_that_lie_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, document = [], module._document

    def slow(*arguments: object) -> object:
        encoded.append(1)
        time.sleep(0.0002)
        return document(*arguments)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_document", slow)
    monkeypatch.setattr(module, "write_shard", interrupted)
    raw = write_raw(tmp_path / "raw" / "tales", stories(20_000, words=3))
    with pytest.raises(KeyboardInterrupt):
        tokenize(raw, tmp_path / "out", workers=1, shard_bytes=1000)
    assert len(encoded) < 2 * 4096 + 64


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """75 MB more text, in one row group: the peak of a process of its own stays the same within 30 MB."""
    peaks = []
    for thousands in (25, 100):  # the first fills the workers' queue
        texts = [f"{i} " + "some words " * 90 for i in range(thousands * 1000)]
        raw = write_raw(tmp_path / "raw" / f"size{thousands}", texts)
        command = script(raw, tmp_path / f"{thousands}", "bytes", 1 << 20)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
        size = read_json(tmp_path / f"{thousands}" / "meta.json")["components"][f"size{thousands}"]["splits"]
        assert size["train"]["bytes"] > thousands * 900_000
    assert peaks[1] - peaks[0] < 30


@pytest.mark.parametrize("limit", [300, 10_000, 100_000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files fails as a full disk does: at the start, in the survey, in a shard."""
    raw = write_raw(tmp_path / "raw" / "tales", stories(2000))
    out = tmp_path / "out"
    done = subprocess.run(script(raw, out, "bytes", 1 << 20, limit), capture_output=True, text=True)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert "UserError" in message and "out" in message and "the file grew past the size limit" in message
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def check_refused(tmp_path: Path, raw: Path, message: str, tokenizer: str = "bytes") -> None:
    """A clear error, and nothing left behind."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        tokenize(raw, tmp_path / "out", tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_empty_corpora(tmp_path: Path) -> None:
    check_refused(tmp_path, write_raw(tmp_path / "raw" / "a", []), "a: the corpus is empty: no document")
    check_refused(
        tmp_path, write_raw(tmp_path / "raw" / "a", ["", None, b"\xff"]), "3 documents, 2 are empty and 1"
    )
    few = write_raw(tmp_path / "raw" / "few", stories(2))
    check_refused(tmp_path, few, "corpus 'few': split 'test' has no documents: 2 kept, split by hash")


def test_bad_raw_folders(tmp_path: Path) -> None:
    check_refused(tmp_path, tmp_path / "raw" / "none", r"source\.json: no such file")
    raw = write_raw(tmp_path / "raw" / "a", stories(300))
    check_refused(tmp_path, raw, "unknown tokenizer 'bpe4096'.*did you mean", "bpe4096")
    check_refused(tmp_path, raw, "no such vocabulary file; run `stlm fetch gpt2`", "gpt2")
    source = read_json(raw / "source.json")
    write_json(raw / "source.json", {**source, "text": "txt"})
    check_refused(tmp_path, raw, r"train-00000\.parquet: no column 'txt' \(did you mean 'text'\?\)")
    for content, key in (
        ([], "the whole file"),
        ({**source, "files": [{"path": "train-00000.parquet"}]}, r"files\.0\.sha256"),
        ({**source, "files": ["train-00000.parquet"]}, r"files\.0"),
        ({"kind": "mix", "mix": ["a"]}, "mix"),
        ({"kind": "mix", "mix": {"a": "much"}}, r"mix\.a"),
    ):
        write_json(raw / "source.json", content)
        check_refused(tmp_path, raw, rf"source\.json: not what its stage writes \({key}: ")
    write_json(raw / "source.json", {"kind": "mix"})
    check_refused(tmp_path, raw, r"source\.json: a mix of no component; run `stlm fetch a` again")
    write_json(raw / "source.json", source)
    path = raw / "train-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    check_refused(tmp_path, raw, r"train-00000\.parquet: truncated: ")
    path.write_bytes(whole[:500] + b"zz" + whole[502:])
    check_refused(tmp_path, raw, r"train-00000\.parquet: damaged")
    path.unlink()
    check_refused(tmp_path, raw, r"train-00000\.parquet: no such file")


def test_a_parquet_file_that_was_corrupt_when_fetched(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw" / "a", stories(300))
    path, source = raw / "train-00000.parquet", read_json(raw / "source.json")
    whole = path.read_bytes()
    for damaged in (whole[:-50], b"PAR1" + b"\0" * 2000 + whole[2004:]):
        path.write_bytes(damaged)
        source["files"] = [{"path": path.name, "sha256": sha256(path), "bytes": len(damaged)}]
        write_json(raw / "source.json", source)
        check_refused(tmp_path, raw, r"train-00000\.parquet: truncated or corrupt parquet file")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_other_types_of_text_columns(tmp_path: Path, kind: pa.DataType) -> None:
    texts = stories(300)
    raw = write_raw(tmp_path / "raw" / "a", texts)
    path, source = raw / "train-00000.parquet", read_json(raw / "source.json")
    column = (
        pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts).cast(kind)
    )
    pq.write_table(pa.table({"text": column}), path)
    source["files"] = [{"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}]
    write_json(raw / "source.json", source)
    tokenize(raw, tmp_path / "out")
    assert sorted(text for here in texts_of(tmp_path / "out").values() for text in here) == sorted(texts)
