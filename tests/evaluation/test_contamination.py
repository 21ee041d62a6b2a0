"""The stage `contamination` of a small study, by the command line, against a search by sets of tuples."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.benchmarks import benchmark
from stlm.evaluation.contamination import measure_contamination
from stlm.files import sha256, write_json
from stlm.study.load import load_study
from stlm.tokens.shards import read_split
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer
from stlm.tokens.words import words

STUDY = """\
description: two corpora, one of them a mix
corpus: synthetic
tokenizer: bytes
evaluation: {benchmarks: [synthetic_pairs, synthetic_choice, arc_easy, mmlu, hellaswag]}
variants:
  baseline: {}
  again: {tokenizer: bpe-300}
  mixed: {corpus: paper_mix}
"""
# 13 words with the right answer, in a prompt that the training text has.
QUESTION = "Which of these is the warmest thing that a child may touch?"
PROMPT = "The following are multiple choice questions (with answers) about global facts."
LONG = "one morning the youngest of the three brothers set out to find his fortune beyond the hills"
HELD_OUT = "when the lamps had been lit the old woman told them of a ship with seven golden sails"


def write_corpus(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    path = folder / "train.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    entry = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(folder / "source.json", {"kind": "corpus", "files": [entry], "text": "text", "group": None})


def write_benchmark(name: str, rows: list[dict]) -> None:
    folder = Path("data/raw") / name
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{benchmark(name).splits[0]}.parquet")


def tokenize(corpus: str) -> None:
    out = Path("data/tokens") / corpus / "bytes"
    tokenize_corpus(Path("data/raw") / corpus, out, "bytes", Path(), progress=False)


def train_documents(corpus: str, split: str = "train") -> list[list[str]]:
    folder = Path("data/tokens") / corpus / "bytes"
    tokenizer = load_tokenizer(folder / "tokenizer")
    return [words(tokenizer.decode(d.tokens)) for component in read_split(folder, split) for d in component]


def grams(own: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(own[i : i + n]) for i in range(len(own) - n + 1)}


@pytest.fixture
def study(project):
    """Token shards and benchmarks: some items in the training text, some in the held-out text alone."""
    (project / "params" / "tiny.yaml").write_text(STUDY)
    plain = [f"On day {i} the hen number {i} ran over hill {i % 7} and field {i % 5}." for i in range(300)]
    write_corpus(Path("data/raw/synthetic"), plain)
    tokenize("synthetic")
    write_corpus(
        Path("data/raw/paper_mix/one"),
        [*plain[:140], f"{PROMPT} Question: Answer: (A) {QUESTION.upper()} — a stove!", f"So {LONG}."],
    )
    write_corpus(Path("data/raw/paper_mix/two"), [f"Yes: {LONG}", *plain[140:290], f"Once, {HELD_OUT}."])
    write_json(Path("data/raw/paper_mix/source.json"), {"kind": "mix", "mix": {"one": 0.5, "two": 0.5}})
    tokenize("paper_mix")
    unseen = train_documents("synthetic", "test")[0]
    pair = {"UID": "p", "linguistics_term": "t"}
    write_benchmark(
        "synthetic_pairs",
        [
            {"sentence_good": "The hen number 7 ran.", "sentence_bad": "Nothing like this.", **pair},
            {"sentence_good": "Nothing like this.", "sentence_bad": "The hen number 7 ran.", **pair},
            {"sentence_good": " ".join(unseen), "sentence_bad": "No.", **pair},
        ],
    )
    endings = ["They sank.", "then some more words that are not there."]
    write_benchmark(
        "synthetic_choice",
        [
            {"ctx": f"{LONG},", "endings": endings, "label": 1, "kind": "k"},
            {"ctx": "On day 3 the", "endings": [LONG, "hen number 3 ran"], "label": 1, "kind": "k"},
            {
                "ctx": "On day 3 the hen",
                "endings": ["number 3 ran over hill 3", "sat"],
                "label": 0,
                "kind": "k",
            },
        ],
    )
    answers = {"text": ["ice", "a stove"], "label": ["A", "B"]}
    write_benchmark(
        "arc_easy",
        [
            {"id": "seen", "question": QUESTION, "choices": answers, "answerKey": "B"},
            {"id": "wrong", "question": QUESTION, "choices": answers, "answerKey": "A"},
        ],
    )
    write_benchmark(
        "mmlu",
        [
            {
                "question": "How warm?",
                "subject": "global_facts",
                "choices": ["a", "b", "c", "d"],
                "answer": 2,
            },
            {"question": f"Is it so that {HELD_OUT}?", "subject": "x", "choices": ["1"] * 4, "answer": 0},
        ],
    )
    write_benchmark(
        "hellaswag",
        [
            {
                "activity_label": "Once",
                "ctx_a": "On day 9 the hen",
                "ctx_b": "number 9",
                "endings": ["ran over", "sat", "slept", "ate"],
                "label": "0",
            }
        ],
    )
    return load_study("tiny")


def test_the_stage_counts_what_a_search_by_sets_counts(study, capsys):
    assert main(["contamination", "tiny"]) == 0
    record = json.loads((study.folder / "contamination.json").read_text())
    table = pq.read_table(study.folder / "contaminated-items.parquet").to_pylist()
    assert list(record["corpora"]) == ["synthetic", "paper_mix"]
    listed = {}
    for corpus, own in record["corpora"].items():
        documents = train_documents(corpus)
        assert own["documents"] == len(documents)
        assert list(own["benchmarks"]) == study.benchmarks
        for name, counted in own["benchmarks"].items():
            split, items = benchmark(name).load(Path("data/raw") / name)
            texts = {item.id: words(item.answered_text) for item in items}
            assert counted["items"] == len(texts) and counted["split"] == split
            shared = {
                n: {
                    item
                    for item, text in texts.items()
                    if any(grams(text, n) & grams(document, n) for document in documents)
                }
                for n in (8, 13)
            }
            whole = {
                item
                for item, text in texts.items()
                if any(tuple(text) in grams(document, len(text)) for document in documents)
            }
            for n in (8, 13):
                assert counted["shared"][str(n)] == len(shared[n])
                assert counted["long_enough"][str(n)] == sum(len(text) >= n for text in texts.values())
            assert counted["whole"] == len(whole)
            assert counted["contaminated"] == len(shared[13] | whole)
            for item in shared[8] | shared[13] | whole:
                listed[corpus, name, item] = (item in shared[8], item in shared[13], item in whole)
    found = {
        (row["corpus"], row["benchmark"], row["item"]): (row["shares_8"], row["shares_13"], row["whole"])
        for row in table
    }
    assert found == listed
    # What was planted, so that the search by sets is no empty one.
    assert listed["synthetic", "synthetic_pairs", "p-0"] == (False, False, True)
    assert ("synthetic", "synthetic_pairs", "p-1") not in listed
    assert not any(item.startswith("global_facts") for _, _, item in listed)
    assert listed["synthetic", "synthetic_choice", "2"] == (True, False, True)
    assert listed["paper_mix", "synthetic_choice", "0"] == (True, True, False)
    assert listed["paper_mix", "arc_easy", "seen"] == (True, True, True)
    assert listed["paper_mix", "arc_easy", "wrong"] == (True, False, False)
    assert listed["synthetic", "hellaswag", "0"] == (True, False, True)


def test_held_out_text_is_not_looked_at(study):
    measure_contamination(study)
    table = pq.read_table(study.folder / "contaminated-items.parquet").to_pylist()
    unseen = [row for row in table if (row["corpus"], row["item"]) == ("synthetic", "p-2")]
    assert not any(row["whole"] for row in unseen)


def test_examples_name_the_document_that_has_them(study):
    measure_contamination(study)
    record = json.loads((study.folder / "contamination.json").read_text())
    seen = 0
    for corpus, own in record["corpora"].items():
        folder = Path("data/tokens") / corpus / "bytes"
        tokenizer = load_tokenizer(folder / "tokenizer")
        components = {component.name: list(component) for component in read_split(folder, "train")}
        for counted in own["benchmarks"].values():
            for example in counted["examples"]:
                document = components[example["component"]][example["document"]]
                assert f" {example['words']} " in f" {' '.join(words(tokenizer.decode(document.tokens)))} "
                seen += 1
    assert seen > 6


def test_the_same_again_is_the_same_to_the_byte(study):
    def results() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in study.folder.iterdir()}

    measure_contamination(study)
    before = results()
    measure_contamination(study)
    assert results() == before
    assert set(before) == {"contamination.json", "contaminated-items.parquet"}


def test_a_study_without_benchmarks(study):
    assert main(["contamination", "tiny", "--set", "evaluation.benchmarks=[]"]) == 0
    record = json.loads((study.folder / "contamination.json").read_text())
    assert [own["benchmarks"] for own in record["corpora"].values()] == [{}, {}]
    assert pq.read_table(study.folder / "contaminated-items.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("data/raw/arc_easy/test.parquet", "stlm fetch arc_easy"),
        ("data/tokens/synthetic/bytes/meta.json", "meta.json: no such file"),
        ("data/tokens/paper_mix/bytes/train-two-00000.arrow", "train-two-00000.arrow: no such file"),
        ("data/tokens/paper_mix/bytes/tokenizer/tokenizer-name.json", "tokenizer-name.json: no such file"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(study, missing, told):
    Path(missing).unlink()
    with pytest.raises(UserError, match=told):
        measure_contamination(study)
    assert not study.folder.exists()


def passage(name: str, kind: str) -> str:
    """Sentences of which `last_word` makes one item: the last word stands in the first sentence too."""
    verbs = ("saw", "took", "fed", "lost", "found", "sold")
    middle = " ".join(f"Then {name} {verb} the {name}lantern on that {kind} day." for verb in verbs)
    return f"Once there was a {kind} and a {name}. {middle} So {name} lit the old {name}lantern."


def test_last_word_and_the_test_text_itself(project):
    (project / "params" / "held.yaml").write_text(
        "description: d\ncorpus: synthetic\ntokenizer: bytes\nevaluation: {benchmarks: [last_word]}\n"
        "variants: {baseline: {}}\n"
    )
    names = ["ada", "bea", "cid", "dan"]
    texts = {
        "train": [passage("eve", "goat"), "Before. " + passage("ada", "hare"), "Else."],
        "val": [passage("fay", "mule")],
        "test": [passage(name, "hare") for name in names],
    }
    folder = Path("data/raw/synthetic")
    folder.mkdir(parents=True)
    files = []
    for split, own in texts.items():
        path = folder / f"{split}.parquet"
        pq.write_table(pa.table({"text": own}), path)
        files.append(
            {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "split": split}
        )
    write_json(folder / "source.json", {"kind": "corpus", "files": files, "text": "text", "group": None})
    tokenize("synthetic")
    study = load_study("held")
    measure_contamination(study)
    own = json.loads((study.folder / "contamination.json").read_text())["corpora"]["synthetic"]
    counted = own["benchmarks"]["last_word"]
    assert (counted["items"], counted["whole"], counted["shared"]["13"]) == (4, 1, 1)
    assert counted["examples"][0]["document"] == 1
    held = own["held_out"]
    assert (held["val"]["share"], held["val"]["above_half"]) == (0.0, 0)
    assert (held["test"]["documents"], held["test"]["above_half"], held["test"]["worst"]) == (4, 1, 1.0)
