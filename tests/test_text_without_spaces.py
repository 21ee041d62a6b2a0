"""Text without spaces between words: what needs words is refused before training, all else works."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.contamination import measure_contamination
from stlm.files import read_json, sha256, write_json
from stlm.study.load import load_study
from stlm.tokens.tokenize import tokenize_corpus
from stlm.tokens.tokenizer import load_tokenizer

CHARACTERS = "孩子们回家吃晚饭了因为他们很饿天上有月亮人山水火木土大小中国学生老师朋友"
STUDY = """\
description: text without spaces
corpus: han
tokenizer: TOKENIZER
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 64, context: 64}
training: {steps: 2, batch_size: 2, accumulation: 1, warmup_steps: 1}
evaluation: {benchmarks: [last_word], modes: [harness]}
variants: {baseline: }
"""


def chinese(count: int) -> list[str]:
    """Documents of a few sentences."""
    rng = random.Random(0)
    return [
        "".join("".join(rng.choices(CHARACTERS, k=rng.randrange(5, 20))) + "。" for _ in range(8))
        for _ in range(count)
    ]


@pytest.fixture
def han(project: Path) -> Path:
    """A project with a corpus of Chinese characters, fetched."""
    with (project / "params" / "corpora.yaml").open("a") as file:
        file.write(
            "han:\n  description: characters\n  licence: none\n"
            "  sources: [{kind: mirror, path: han, files: {train: train.parquet}}]\n"
        )
    folder = project / "data" / "raw" / "han"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": chinese(300)}), folder / "train.parquet")
    entry = {"path": "train.parquet", "sha256": sha256(folder / "train.parquet"), "rows": 300}
    entry["bytes"] = (folder / "train.parquet").stat().st_size
    write_json(
        folder / "source.json",
        {"name": "han", "kind": "corpus", "files": [entry], "text": "text", "group": None},
    )
    return project


def write_study(project: Path, tokenizer: str, old: str = "", new: str = "") -> None:
    text = STUDY.replace("TOKENIZER", tokenizer)
    assert old in text
    (project / "params" / "han.yaml").write_text(text.replace(old, new) if old else text)


def test_last_word_is_refused_before_training(han: Path, capsys) -> None:
    write_study(han, "bpe-400")
    assert main(["tokenize", "han", "bpe-400"]) == 0
    assert main(["train", "han", "baseline"]) == 2
    assert "last_word found no item in the" in capsys.readouterr().err
    assert not (han / "results").exists() and not (han / ".state").exists()


def test_last_word_is_refused_when_the_study_is_read_where_the_language_is_known(han: Path) -> None:
    corpora = han / "params" / "corpora.yaml"
    corpora.write_text(corpora.read_text().replace("han:\n", "han:\n  language: zh-Hans\n"))
    write_study(han, "bpe-400")
    with pytest.raises(
        UserError, match="last_word asks for words, and the corpus han is text without spaces"
    ):
        load_study("han")
    write_study(han, "bpe-400", "[last_word]", "[]")
    assert load_study("han").benchmarks == []
    corpora.write_text(
        corpora.read_text() + "both: {description: x, licence: x, mix: {han: 1, synthetic: 1}}\n"
    )
    write_study(han, "bpe-400", "corpus: han", "corpus: both")
    assert load_study("han").benchmarks == ["last_word"]  # the other component may have passages


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-400", "words", "spaces", "stride-4"])
def test_tokenizers_give_the_text_back(han: Path, tokenizer: str) -> None:
    tokenize_corpus(Path("data/raw/han"), Path("tokens"), tokenizer, Path(), progress=False)
    found = load_tokenizer(Path("tokens/tokenizer"))
    for text in chinese(20):
        assert found.decode(found.encode_array(text)) == text


def test_contamination_is_counted(han: Path) -> None:
    pairs = [
        {"sentence_good": text[:40], "sentence_bad": text[:39], "UID": "a", "linguistics_term": "b"}
        for text in [*chinese(3), "完全没有出现过的句子"]
    ]
    (han / "data" / "raw" / "synthetic_pairs").mkdir()
    pq.write_table(pa.Table.from_pylist(pairs), "data/raw/synthetic_pairs/train.parquet")
    write_study(han, "bpe-400", "[last_word]", "[synthetic_pairs]")
    assert main(["tokenize", "han", "bpe-400"]) == 0
    measure_contamination(load_study("han"))
    counted = read_json(Path("results/han/contamination.json"))["corpora"]["han"]["benchmarks"]
    assert "synthetic_pairs" in counted


def test_a_study_runs_from_its_folder_to_its_report(project: Path, capsys) -> None:
    (project / "texts").mkdir()
    for number, text in enumerate(chinese(120)):
        (project / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    with (project / "params" / "corpora.yaml").open("a") as file:
        file.write(
            "han:\n  description: characters\n  licence: none\n  language: zh\n"
            "  sources: [{kind: folder, path: texts, files: {train: '**/*.txt'}}]\n"
        )
    write_study(project, "bpe-400", "[last_word]", "[]")
    for command in ("fetch han", "tokenize han bpe-400", "train han baseline", "evaluate han baseline"):
        assert main(command.split()) == 0, capsys.readouterr().err
    assert main(["contamination", "han"]) == main(["report", "han"]) == 0
    assert "Language: Chinese (zh)." in (project / "results/han/cards/baseline.md").read_text()
    assert read_json(Path("results/han/metrics.json"))["baseline"]["test_bits_per_byte"] > 1
