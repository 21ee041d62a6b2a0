"""`stlm new`: what it finds, chooses and writes, and what it refuses before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from own_texts import HAN, THAI, english, fixed, unspaced, write_stories

from stlm.cli import main
from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.files import read_json
from stlm.new.new import Wishes, new
from stlm.study.catalogues import load_corpora
from stlm.study.load import load_study
from stlm.tokens.tokenize import tokenize_corpus


def make(name: str, *paths: str, **wishes) -> str:
    return new(name, paths, Wishes(**wishes), measure=fixed)


def params() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in Path("params").iterdir()}


def test_a_folder_becomes_a_corpus_and_a_study(project: Path) -> None:
    before = params()
    write_stories(project / "texts")
    said = make("own", "texts")
    assert "40 files (40 text)" in said and "40 documents" in said and "language: English" in said
    assert "a file is a document" in said and said.endswith("Run it: make all STUDY=own")
    # What was there is there still, comments too.
    after = params()
    assert after.pop("corpora.yaml").startswith(before.pop("corpora.yaml"))
    assert set(after) - set(before) == {"own.yaml"} and all(after[name] == before[name] for name in before)
    entry = load_corpora()["own"]
    assert (entry.language, entry.sources[0].path, entry.text) == ("en", "texts", "text")
    study = load_study("own")
    assert list(study.runs) != [] and study.corpora == ["own"]
    sizes = {run.variant: run.parameters.total for run in study.runs.values()}
    assert set(sizes) == {"baseline", "learned", "simple-ffn", "dropout-free", "fast"}
    assert max(sizes.values()) < 1.01 * min(sizes.values())  # matched
    assert len({run.tokens for run in study.runs.values()}) == 1


def test_each_choice_is_explained(project: Path) -> None:
    write_stories(project / "texts")
    make("own", "texts")
    lines = Path("params/own.yaml").read_text().splitlines()
    for key in ("tokenizer:", "seeds:", "model:", "  context:", "training:", "evaluation:", "variants:"):
        place = next(number for number, line in enumerate(lines) if line.startswith(key))
        assert lines[place - 1].lstrip().startswith("#"), key


def test_what_is_written_is_fetched_and_tokenized(project: Path) -> None:
    write_stories(project / "texts", count=120)
    make("own", "texts")
    record = fetch(load_corpora()["own"], Path("data/raw/own"))
    assert record["rows"] == 120 and record["language"] == "en"
    tokenizer = load_study("own").runs["baseline-s0"].tokenizer
    meta = tokenize_corpus(Path("data/raw/own"), Path("tokens"), tokenizer, Path(), progress=False)
    assert meta["documents"]["kept"] == 120


def test_a_name_that_is_taken_needs_force_and_force_changes_nothing_else(project: Path) -> None:
    write_stories(project / "texts")
    make("own", "texts")
    with Path("params/corpora.yaml").open("a") as file:
        file.write("# a remark on what follows\nlater:\n  description: x\n  licence: x\n  mix: {own: 1}\n")
    before = params()
    with pytest.raises(UserError, match=r"the corpus own in \S+ and the study params/own\.yaml: there"):
        make("own", "texts")
    with pytest.raises(UserError, match=r"the study params/smoke\.yaml: there already"):
        make("smoke", "texts")
    assert params() == before
    make("own", "texts", force=True)
    assert params() == before  # the same text gives the same files
    (project / "texts" / "story000.txt").write_text(unspaced(HAN, 3000))
    make("own", "texts", force=True)
    after = Path("params/corpora.yaml").read_text()
    assert after.count("\nown:\n") == 1 and after.endswith(before["corpora.yaml"].partition("# a remark")[2])
    assert load_corpora()["later"].mix == {"own": 1}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My-Corpus", r"'My-Corpus' cannot name a study: .* \(for example my-corpus\)"),
        ("été 2", r"\(for example ete-2\)"),
        ("1984", "begins with a letter$"),
        ("corpora", "'corpora' is the name of a file in params/"),
        ("blimp", "'blimp' is the name of a benchmark"),
        ("gpt2", "'gpt2' is the name of a vocabulary"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_words(project: Path, name: str, said: str) -> None:
    write_stories(project / "texts", 2)
    with pytest.raises(UserError, match=said):
        make(name, "texts")


def test_a_tiny_text_runs_and_is_warned_of_and_a_tinier_one_is_refused(project: Path) -> None:
    Path("tiny.txt").write_text(english(140))
    assert 10_000 < Path("tiny.txt").stat().st_size < 13_000
    said = make("tiny", "tiny.txt")
    assert "Caution" in said and "CAUTION" in Path("params/tiny.yaml").read_text()
    assert load_study("tiny").runs["baseline"].training.steps == 50
    Path("less.txt").write_text(english(50))
    before = params()
    with pytest.raises(UserError, match=r"bytes of text in .* are too few .*; the least is 10,000"):
        make("less", "less.txt")
    Path("empty.txt").write_text("")
    with pytest.raises(UserError, match="0 bytes of text in 0 documents"):
        make("less", "empty.txt")
    assert params() == before


def test_one_book_is_read_in_passages_or_cut_as_asked(project: Path) -> None:
    Path("book.txt").write_text(english(3000))
    said = make("book", "book.txt")
    assert "1 document, " in said and "cut into passages, the last 10% of each held out" in said
    assert load_corpora()["book"].sources[0].documents == "file"
    assert "a paragraph is a document" in make("parts", "book.txt", documents="paragraph")
    record = fetch(load_corpora()["parts"], Path("data/raw/parts"))
    assert record["rows"] == 375 and record["pieces"]


@pytest.mark.parametrize(("letters", "tag"), [(HAN, "zh"), (THAI, "th")])
def test_text_without_spaces(project: Path, letters: str, tag: str) -> None:
    (project / "texts").mkdir()
    for number in range(60):
        (project / "texts" / f"{number}.txt").write_text(unspaced(letters, 60, number), encoding="utf-8")
    said = make("own", "texts")
    assert "text without spaces between words" in said and "benchmarks: none" in said
    assert load_corpora()["own"].language == tag
    assert load_study("own").benchmarks == []
    assert "no spaces between them" in " ".join(Path("params/own.yaml").read_text().replace("#", "").split())


def test_last_word_is_asked_where_the_text_has_passages(project: Path) -> None:
    write_stories(project / "texts" / "train")
    (project / "texts" / "test.txt").write_text(english(4000, 1000))
    said = make("own", "texts")
    assert "splits declared by file names are kept: train 40, test 1 files" in said
    assert "benchmarks: last_word" in said and load_study("own").benchmarks == ["last_word"]


def test_text_in_other_encodings_and_odd_text_is_told(project: Path) -> None:
    folder = write_stories(project / "texts")
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbf" + english(20, 100).encode())
    (folder / "wide.txt").write_bytes(english(20, 101).encode("utf-16"))
    (folder / "tags.txt").write_text("<html><p>" + english(20, 102) + "</p></html>\x07\0")
    (folder / "twice.txt").write_text(english(20, 0))
    (folder / "empty.txt").write_text("")
    (folder / "long.txt").write_text("x" * 2000 + " and so on" * 10_000)
    (folder / "notes.pdf").write_text("x")
    (folder / ".hidden.txt").write_text(english(20))
    said = make("own", "texts")
    for line in (
        "byte-order marks: 2 (mark.txt, wide.txt)",
        "encoding utf-16: 1 files, converted to UTF-8",
        "empty files: 1 (empty.txt)",
        "left out, suffixes of no known format: .pdf (1)",
        "left out, hidden: 1 file",
        "exact duplicates of an earlier document, kept once: 1 of 45",
        "documents with NUL characters: 1 of 45",
        "documents with control characters: 1 of 45",
        "documents with tags of HTML: 1 of 45",
        "documents with words of more than 1,000 characters: 1 of 45",
        "documents with lines of more than 100,000 characters: 1 of 45",
    ):
        assert line in said, line


def test_markers_part_documents(project: Path) -> None:
    Path("eot.txt").write_text("\n<|endoftext|>\n".join(english(20, n) for n in range(60)))
    assert "60 documents" in make("eot", "eot.txt")
    assert load_corpora()["eot"].sources[0].separator
    assert fetch(load_corpora()["eot"], Path("data/raw/eot"))["rows"] == 60
    Path("other.txt").write_text("\n<|end|>\n".join(english(20, n) for n in range(60)))
    assert r"give --separator '<\|end\|>'" in make("other", "other.txt")
    assert "60 documents" in make("parted", "other.txt", separator=r"\n<\|end\|>\n")
    assert fetch(load_corpora()["parted"], Path("data/raw/parted"))["rows"] == 60


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"separator": "("}, r"--separator '\(': not a regular expression"),
        ({"separator": "x*"}, "matches the empty text"),
        ({"separator": "x", "documents": "line"}, "both say where documents end"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(project: Path, wishes: dict, said: str) -> None:
    write_stories(project / "texts", 2)
    with pytest.raises(UserError, match=said):
        make("own", "texts", **wishes)


def test_a_write_that_fails_leaves_params_as_they_were(project: Path, monkeypatch) -> None:
    write_stories(project / "texts")
    before = params()

    def full(name: str, **_) -> None:
        raise UserError("no such study can be")

    monkeypatch.setattr("stlm.new.new.load_study", full)
    with pytest.raises(UserError, match="no such study can be"):
        make("own", "texts")
    assert params() == before


def test_the_time_asked_for_bounds_the_study(project: Path) -> None:
    write_stories(project / "texts", count=120, sentences=60)
    make("short", "texts", minutes=3)
    make("long", "texts", minutes=60)
    short, long = (load_study(name).runs for name in ("short", "long"))
    total = [sum(run.flops for run in runs.values()) for runs in (short, long)]
    assert total[0] < 3 * 60 * 4e10 and total[0] * 2 < total[1] < 60 * 60 * 4e10
    assert len(short) == 5 and len(long) == 15  # time left goes to seeds
    said = make("least", "texts", minutes=0.1)
    assert "more than the 0.1 minutes asked for: the smallest study" in said


def test_the_command_says_what_is_missing(project: Path, capsys) -> None:
    assert main(["new", "own"]) == 2
    assert "--text" in capsys.readouterr().err
    assert main(["new", "own", "--text", "nowhere"]) == 2
    assert "--text nowhere: no such file or folder" in capsys.readouterr().err
    assert main(["new", "own", "--text", "x", "--minutes", "-1"]) == 2
    assert "expected minutes" in capsys.readouterr().err


def test_a_part_of_a_large_text_is_read_and_said(project: Path, monkeypatch) -> None:
    write_stories(project / "texts", count=200, sentences=20)
    monkeypatch.setattr("stlm.new.look.READ_BYTES", 60_000)
    said = make("own", "texts")
    size = sum(path.stat().st_size for path in Path("texts").iterdir())
    line = next(line for line in said.splitlines() if " documents, " in line)
    assert line.strip().startswith("about ") and "counted in" in said
    found = int(line.split()[1].replace(",", ""))
    assert abs(found - 200) <= 4 and f"about {size / 1000:,.0f} kB" in line
    assert "description" in yaml.safe_load(Path("params/own.yaml").read_text())


def test_the_record_of_a_corpus_without_language_is_as_before(project: Path) -> None:
    write_stories(project / "texts", 30)
    make("own", "texts")
    path = Path("params/corpora.yaml")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "# a guess" not in line))
    fetch(load_corpora()["own"], Path("data/raw/own"))
    assert "language" not in read_json(Path("data/raw/own/source.json"))
    assert "language" not in load_corpora()["own"].model_dump()


def test_held_out_files_are_no_part_of_the_train_files_fetched(project: Path) -> None:
    write_stories(project / "texts", count=40)
    (project / "texts" / "valid.txt").write_text(english(200, 1000))
    (project / "texts" / "test").mkdir()
    (project / "texts" / "test" / "b.txt").write_text(english(200, 1001))
    make("own", "texts")
    source = load_corpora()["own"].sources[0]
    assert source.files == {"train": "**/*.txt", "val": "valid.txt", "test": "test/b.txt"}
    record = fetch(load_corpora()["own"], Path("data/raw/own"))
    rows = {file["split"]: file["rows"] for file in record["files"]}
    assert rows == {"train": 40, "val": 1, "test": 1}
