"""Which document goes where: declared splits, near-duplicates, few long texts; and what still leaks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from raw_samples import WORDS, stories, write_raw, write_splits

from stlm.errors import UserError
from stlm.files import read_json, write_json
from stlm.tokens.leaks import measure_leaks
from stlm.tokens.raw import passages
from stlm.tokens.shards import SPLITS, read_split
from stlm.tokens.shingles import DocumentHashes, sample, shingles, word_hashes
from stlm.tokens.splits import FEW_UNITS, Units, assign, clusters_of
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer
from stlm.tokens.words import words

Texts = dict[str, list[str]]


def tokenize(raw: Path, **options: int) -> Texts:
    """Split -> its texts."""
    folder = raw.parent.parent / "tokens"
    tokenize_corpus(raw, folder, "bytes", folder, progress=False, **options)
    tokenizer = load_tokenizer(folder / "tokenizer")
    return {
        split: [tokenizer.decode(document.tokens) for part in read_split(folder, split) for document in part]
        for split in SPLITS
    }


def meta(raw: Path) -> dict:
    return read_json(raw.parent.parent / "tokens" / "meta.json")


def rows(texts: list[str], **columns: list) -> list[dict]:
    return [
        dict(zip(("text", *columns), each, strict=True))
        for each in zip(texts, *columns.values(), strict=True)
    ]


def text(seed: object, n: int) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=n))


def where(found: Texts, wanted: str) -> list[str]:
    return [split for split, texts in found.items() for own in texts if own == wanted]


def test_declared_splits_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kinds = {split: [f"{split} {t}" for t in stories(60, seed=i)] for i, split in enumerate(SPLITS)}
    raw = write_splits(tmp_path / "raw" / "own", {split: rows(texts) for split, texts in kinds.items()})
    assert tokenize(raw) == kinds
    assert "own as the source declares them" not in (said := capfd.readouterr().err)
    assert "train, val and test as the source declares them" in said
    assert meta(raw)["splitting"]["components"]["own"]["by"] == "declared"


def test_a_missing_split_is_made_from_train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train, test = stories(400), stories(30, seed=1)
    raw = write_splits(tmp_path / "raw" / "own", {"train": rows(train), "test": rows(test)})
    found = tokenize(raw)
    assert found["test"] == test
    assert sorted(found["train"] + found["val"]) == sorted(train) and 5 < len(found["val"]) < 40
    assert "train and test as declared, val made from train by hash of document" in capfd.readouterr().err


def test_splits_by_a_column(tmp_path: Path) -> None:
    texts = stories(90)
    kinds = [["train", "validation", "test"][i % 3] for i in range(90)]
    raw = write_splits(tmp_path / "raw" / "own", {"train": rows(texts, part=kinds)}, split_column="part")
    found = tokenize(raw)
    assert found == {split: texts[i::3] for i, split in enumerate(SPLITS)}
    raw = write_splits(
        tmp_path / "raw" / "own",
        {"train": rows(texts, part=["train", "tets", "val"] * 30)},
        split_column="part",
    )
    with pytest.raises(UserError, match=r"column 'part': 'tets' is no split \(did you mean 'test'\?\)"):
        tokenize(raw)


def test_no_train_split(tmp_path: Path) -> None:
    raw = write_splits(tmp_path / "raw" / "wt", {"val": rows(stories(40)), "test": rows(stories(40, seed=1))})
    with pytest.raises(UserError, match=r"wt: no train split: the source declares val and test alone"):
        tokenize(raw)


def test_a_copy_of_held_out_text_is_no_training_text(tmp_path: Path) -> None:
    test = stories(30, seed=1)
    raw = write_splits(
        tmp_path / "raw" / "own",
        {"train": rows([*stories(100), *test[:10]]), "val": rows(stories(30, seed=2)), "test": rows(test)},
    )
    found = tokenize(raw)
    assert found["test"] == test and len(found["train"]) == 100
    assert meta(raw)["documents"]["duplicates"] == 10


def test_what_leaks_between_declared_splits_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train, test = stories(50), stories(50, seed=1)
    test[:30] = [text + " Changed." for text in train[:30]]
    raw = write_splits(
        tmp_path / "raw" / "own",
        {"train": rows(train), "val": rows(stories(50, seed=2)), "test": rows(test)},
    )
    tokenize(raw)
    leak = meta(raw)["leaks"]["test"]
    assert leak["above_half"] == 30 and 0.5 < leak["share"] < 0.7
    assert "sequences stand in train, 30 of 50 documents by more than a half" in capfd.readouterr().err


def test_near_duplicates_go_to_one_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Editions of books under titles that differ, a collection and its parts: none is divided."""
    texts, titles = [], []
    for book in range(120):
        for part in range(3):
            texts.append(text((book, part), 200))
            titles.append(f"Book {book}")
        if book % 4 == 0:  # again, with a changed word in thirty
            own = texts[-1].split()
            texts.append(" ".join(word if i % 30 else "edited" for i, word in enumerate(own)))
            titles.append(f"The Complete Book {book}")
        if book % 4 == 1:
            texts.append("More. " + text((book, 9), 100))
            titles.append(f"BOOK – {book}!")
    raw = write_raw(tmp_path / "raw" / "books", texts, groups=titles)
    found = tokenize(raw)
    split_of = {t: split for split, own in found.items() for t in own}
    for book in range(0, 120, 4):
        joined = {
            split_of[t] for t, title in zip(texts, titles, strict=True) if title.endswith(f"Book {book}")
        }
        assert len(joined) == 1
    for book in range(1, 120, 4):
        joined = {
            split_of[t]
            for t, title in zip(texts, titles, strict=True)
            if title.strip("!").endswith(f" {book}")
        }
        assert len(joined) == 1
    assert meta(raw)["splitting"]["least_containment"] == 0.1
    assert meta(raw)["splitting"]["components"]["books"] | {"splits": 0} == {
        "by": "hash", "declared": ["train"], "unit": "title",
        "units": 150, "joined": 60, "clusters": 30, "kept_in_train": 0, "splits": 0,
        "documents": 420, "duplicates": 0,
    }  # fmt: skip
    assert meta(raw)["leaks"]["test"]["above_fifth"] == meta(raw)["leaks"]["val"]["above_fifth"] == 0
    assert "60 of 150 joined with near-duplicates" in capfd.readouterr().err


@pytest.mark.parametrize("more", [0, 900])
def test_near_duplicates_across_components_of_a_mix(tmp_path: Path, more: int) -> None:
    """Also where components hold out different shares: 5% of few documents, 1% of many."""
    shared = [text(i, 200) for i in range(300)]
    raw = tmp_path / "raw" / "mix"
    write_raw(raw / "one", [f"{t} One." for t in shared])
    write_raw(raw / "two", [*(f"{t} Two." for t in shared), *(text(("more", i), 60) for i in range(more))])
    write_json(raw / "source.json", {"name": "mix", "kind": "mix", "mix": {"one": 0.5, "two": 0.5}})
    found = tokenize(raw)
    for split in SPLITS:
        own = [t.removesuffix(" One.") for t in found[split] if t.endswith("One.")]
        assert own == [t.removesuffix(" Two.") for t in found[split] if t.endswith("Two.")] != []
    assert meta(raw)["leaks"]["test"]["share"] == meta(raw)["leaks"]["val"]["share"] == 0


def test_lines_that_components_of_a_mix_share_are_kept(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "mix"
    for name in ("one", "two"):
        lines = ["ACT I", "KING:", *(text((name, i), 12) for i in range(400))]
        write_splits(raw / name, {"train": rows(lines, file=["a.txt"] * 402)}, group="file", pieces=True)
    write_json(raw / "source.json", {"name": "mix", "kind": "mix", "mix": {"one": 0.5, "two": 0.5}})
    found = tokenize(raw)
    assert sum(t in ("ACT I", "KING:") for own in found.values() for t in own) == 4


@pytest.mark.parametrize("kind", ["lines", "licence"])
def test_a_text_that_stands_everywhere_does_not_stop_the_splitting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "lines":
        lines = [
            text((file, i), 9) if i else "SCENE I. A room in the castle of the king."
            for file in range(40)
            for i in range(60)
        ]
        files = [f"{i // 60}.txt" for i in range(2400)]
        raw = write_splits(
            tmp_path / "raw" / "own", {"train": rows(lines, file=files)}, group="file", pieces=True
        )
    else:
        licence = text("licence", 300)
        raw = write_raw(tmp_path / "raw" / "own", [f"{text(i, 1500)} {licence}" for i in range(60)])
    found = tokenize(raw)
    assert found["val"] and found["test"] and len(found["train"]) > 5 * len(found["test"])
    said = capfd.readouterr().err
    if kind == "licence":
        assert "warning: own: only documents that share 50% of their text are joined" in said
        assert meta(raw)["splitting"]["least_containment"] == 0.5
    else:
        assert meta(raw)["splitting"]["least_containment"] == 0.1
        assert meta(raw)["splitting"]["components"]["own"]["joined"] == 0


@pytest.mark.parametrize("column", ["file", None])
def test_a_declared_test_and_few_training_texts(tmp_path: Path, column: str | None) -> None:
    """One training file or book: val is its last part, the declared test stays as it is."""
    test = [f"T{i} " + text(("t", i), 400) for i in range(25)]
    if column:
        lines = [text(i, 20) for i in range(300)]
        files = {"train": rows(lines, file=["a"] * 300), "test": rows(test, file=["b"] * 25)}
        raw = write_splits(tmp_path / "raw" / "own", files, group="file", pieces=True)
    else:
        lines = [text(i, 20) + "\n" for i in range(300)]
        files = {"train": rows(["".join(lines)]), "test": rows(test)}
        raw = write_splits(tmp_path / "raw" / "own", files)
    found = tokenize(raw)
    assert found["test"] == test
    assert "".join(found["train"] + found["val"]) == "".join(lines)
    assert 0.02 < sum(map(len, found["val"])) / len("".join(lines)) < 0.09


def test_units_of_other_splits_do_not_count(tmp_path: Path) -> None:
    for seed in range(4):
        files = {"train": rows(stories(25, seed=seed)), "test": rows(stories(400, seed=9))}
        found = tokenize(write_splits(tmp_path / str(seed) / "raw" / "own", files))
        assert found["val"] and len(found["train"]) + len(found["val"]) == 25


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_documents_without_a_group_stand_alone(tmp_path: Path, empty: str | None) -> None:
    titles = [empty if i % 2 else f"Book {i // 20}" for i in range(600)]
    raw = write_splits(
        tmp_path / "raw" / "own", {"train": rows(stories(600, words=8), title=titles)}, group="title"
    )
    found = tokenize(raw)
    assert meta(raw)["splitting"]["components"]["own"]["units"] == 330
    assert all(10 < len(found[split]) < 70 for split in ("val", "test"))


def test_a_text_too_large_to_hold_out_stays_in_train(tmp_path: Path) -> None:
    for seed in range(5):
        texts = [text((seed, i), 3000 if i == 7 else 60) for i in range(30)]
        assert where(tokenize(write_raw(tmp_path / str(seed) / "raw" / "own", texts)), texts[7]) == ["train"]


def test_few_short_texts_are_not_cut(tmp_path: Path) -> None:
    texts = [text(i, 12) for i in range(15)]
    found = tokenize(write_raw(tmp_path / "raw" / "own", texts))
    assert sorted(t for own in found.values() for t in own) == sorted(texts)
    assert len(found["val"]) == len(found["test"]) == 1


def test_a_chain_cannot_swallow_a_corpus(tmp_path: Path) -> None:
    """Each text shares a third with the next one: clusters end at a tenth, what they touch is trained on."""
    chain = [f"{text(i, 100)} {text(i + 1, 100)} {text(i + 2, 100)}" for i in range(300)]
    apart = [text(("apart", i), 300) for i in range(700)]
    raw = write_raw(tmp_path / "raw" / "chain", [*chain, *apart])
    found = tokenize(raw)
    own = meta(raw)["splitting"]["components"]["chain"]
    assert own["kept_in_train"] == 300 and own["joined"] >= 290
    assert not {*found["val"], *found["test"]} & set(chain)
    assert found["val"] and found["test"]
    assert meta(raw)["leaks"]["test"]["share"] == meta(raw)["leaks"]["val"]["share"] == 0


def test_memory_changes_no_split(tmp_path: Path) -> None:
    texts = [text(i // 2, 200) + f" {i}" for i in range(400)]
    raw = write_raw(tmp_path / "raw" / "tales", texts)
    assert tokenize(raw) == tokenize(raw, memory_bytes=20_000)


def test_a_split_that_hashing_leaves_empty_is_filled(tmp_path: Path) -> None:
    for seed in range(6):
        texts = stories(FEW_UNITS + 2, seed=seed)
        found = tokenize(write_raw(tmp_path / str(seed) / "raw" / "few", texts))
        assert found["val"] and found["test"] and len(found["train"]) >= FEW_UNITS - 4
        assert sorted(t for own in found.values() for t in own) == sorted(texts)


def test_filling_takes_whole_clusters() -> None:
    units = [Units.of(np.array([1 << 62, 1 << 61, 1 << 63], np.uint64), np.ones(3), False)]
    links = [(1.0, 0, 1)]
    clusters = clusters_of(units, links)
    assert clusters.find(0) != clusters.find(1), "two of three are more than a tenth"
    many = [Units.of(np.arange(2**62, 2**62 + 30, dtype=np.uint64), np.ones(30), False)]
    joined = clusters_of(many, [(1.0, i, i + 1) for i in range(0, 30, 2)])
    (split,) = assign(many, joined, [(1e-9, 1e-9)])
    assert (split[0::2] == split[1::2]).all()
    assert [(split == index).sum() for index in range(3)] == [26, 2, 2]


def test_a_long_text_is_split_in_contiguous_parts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paragraphs = [f"{i}: {text(i, 40)}" for i in range(500)]
    book = "\n\n".join(paragraphs)
    raw = write_raw(tmp_path / "raw" / "book", [book])
    found = tokenize(raw)
    assert "".join(found["train"] + found["val"] + found["test"]) == book
    sizes = [sum(map(len, found[split])) / len(book) for split in SPLITS]
    assert sizes[0] == pytest.approx(0.9, abs=0.03) and min(sizes[1:]) > 0.02
    assert all(t.endswith("\n\n") for t in found["train"])
    said = capfd.readouterr().err
    assert "val and test are the last parts of the text, which is read in passages" in said
    assert "warning: book: val has" in said and "from one text" in said


def test_pieces_of_few_files_are_contiguous_and_of_many_stay_together(tmp_path: Path) -> None:
    lines = ["KING:", *(text(i, 8) for i in range(400)), "KING:", "KING:"]
    few = [*lines[:200], *lines[200:]]
    files = ["a.txt"] * 200 + ["b.txt"] * (len(few) - 200)
    about = {"group": "file", "pieces": True}
    raw = write_splits(tmp_path / "1" / "raw" / "play", {"train": rows(few, file=files)}, **about)
    found = tokenize(raw)
    of = {line: file for line, file in zip(few, files, strict=True) if line != "KING:"}
    for file in ("a.txt", "b.txt"):
        own = {split: [t for t in found[split] if of.get(t.strip()) == file] for split in SPLITS}
        assert [t.strip() for split in SPLITS for t in own[split]] == [t for t in of if of[t] == file]
        assert own["val"] and own["test"]
    assert sum(t.strip() == "KING:" for own in found.values() for t in own) == 3, "no line is a duplicate"

    many = [f"{i % 40} {line}" for i, line in enumerate(text(i, 8) for i in range(800))]
    files = [f"{i % 40}.txt" for i in range(800)]
    raw = write_splits(tmp_path / "2" / "raw" / "plays", {"train": rows(many, file=files)}, **about)
    found = tokenize(raw)
    in_split = {split: {t.split()[0] for t in own} for split, own in found.items()}
    assert sum(map(len, in_split.values())) == 40 and in_split["val"] and in_split["test"]


def test_duplicates_above_a_twentieth_are_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = stories(300)
    tokenize(write_raw(tmp_path / "raw" / "tales", [*texts, *texts[:30]]))
    assert "warning: tales: 9% of the documents are exact duplicates" in capfd.readouterr().err


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_passages_are_the_text(mark: str) -> None:
    whole = mark.join(["ünder", "thesea"] * 2000).encode()
    parts = passages(whole, 500)
    assert b"".join(parts) == whole
    assert all(250 < len(part) <= 1000 for part in parts)
    for part in parts:
        part.decode()
    if mark:
        assert all(part.endswith(mark.encode()) for part in parts[:-1])
    assert passages(b"short", 500) == [b"short"] and passages(b"", 500) == [b""]


def test_leaks_against_sets(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [text(i, 60) for i in range(40)]
    texts[30] = texts[2]
    texts[31] = texts[3].split(" ", 30)[-1] + " " + text("x", 30)
    texts[32] = "too short"
    splits = np.array([draw.choice([0, 0, 255]) if i < 30 else 1 + i % 2 for i in range(40)], np.uint8)
    splits[2:4] = 0
    hashes = [sample(shingles(word_hashes(t.encode()), 13), 1) for t in texts]
    np.concatenate(hashes).tofile(tmp_path / "grams")
    grams = DocumentHashes.of_lengths(tmp_path / "grams", np.array(list(map(len, hashes))), 1)
    found = measure_leaks(grams, splits)

    def sets(i: int) -> list[tuple[str, ...]]:
        own = words(texts[i])
        return [tuple(own[k : k + 13]) for k in range(len(own) - 12)]

    train = {gram for i in range(40) if splits[i] == 0 for gram in sets(i)}
    for index, name in ((1, "val"), (2, "test")):
        held = [i for i in range(40) if splits[i] == index]
        shares = [np.mean([gram in train for gram in sets(i)]) for i in held if sets(i)]
        every = [gram in train for i in held for gram in sets(i)]
        assert found[name] == {
            "documents": len(held),
            "ngrams": len(every),
            "share": pytest.approx(np.mean(every)),
            "above_half": sum(s > 0.5 for s in shares),
            "above_fifth": sum(s > 0.2 for s in shares),
            "worst": pytest.approx(max(shares)),
        }
    assert found["val"]["above_half"] == 1 and found["test"]["above_fifth"] == 1


def test_chinese_text_is_split_and_measured(tmp_path: Path) -> None:
    draw = random.Random(0)
    alphabet = [chr(c) for c in range(0x4E00, 0x4F00)]
    texts = ["".join(draw.choices(alphabet, k=300)) + "。" for _ in range(300)]
    texts[1] = texts[0][:280] + "不同的結尾。"
    raw = write_raw(tmp_path / "raw" / "zh", texts)
    found = tokenize(raw)
    assert where(found, texts[0]) == where(found, texts[1])
    assert meta(raw)["splitting"]["components"]["zh"]["joined"] == 2
    assert meta(raw)["leaks"]["test"]["share"] == 0
