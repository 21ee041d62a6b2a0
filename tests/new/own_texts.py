"""Small texts, and a measured speed that is always the same."""

from __future__ import annotations

import random
from pathlib import Path

from stlm.model.config import ModelConfig
from stlm.new.speed import Speed

NOUNS = [
    "lantern",
    "river",
    "Margaret",
    "kettle",
    "meadow",
    "letter",
    "garden",
    "thunder",
    "window",
    "sailor",
    "mountain",
    "baker",
]
SMALL = ["the", "and", "of", "a", "to", "was", "that", "with", "he", "she", "in", "for", "on", "not", "had"]
OTHER = ["found", "old", "carried", "green", "remembered", "seven", "painted", "quiet", "followed", "mended"]
HAN = "孩子们回家吃晚饭了因为他们很饿天上有月亮人山水火木土大小中国学生老师朋友"
THAI = "เด็กกลับบ้านไปกินข้าวเย็นกับพ่อแม่และพี่น้องในวันที่ฝนตก"


def english(sentences: int, seed: int = 0) -> str:
    """Sentences that end in nouns, eight to a paragraph."""
    rng = random.Random(seed)
    told = []
    for number in range(sentences):
        words = rng.choices(SMALL, k=6) + rng.choices(OTHER + NOUNS, k=6)
        rng.shuffle(words)
        end = "\n\n" if number % 8 == 7 else " "
        told.append(f"Then {' '.join(words)} the {rng.choice(NOUNS)}.{end}")
    return "".join(told).strip()


def unspaced(letters: str, sentences: int, seed: int = 0) -> str:
    """Sentences without spaces between words."""
    rng = random.Random(seed)
    return "".join("".join(rng.choices(letters, k=rng.randrange(5, 20))) + "。" for _ in range(sentences))


def write_stories(folder: Path, count: int = 40, sentences: int = 20) -> Path:
    """A folder of files, a story each."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"story{number:03}.txt").write_text(english(sentences, number), encoding="utf-8")
    return folder


def fixed(model: ModelConfig, rows: int, runs: int) -> Speed:
    """In place of a measurement."""
    assert model.vocab_size and rows > 0 and runs > 1
    return Speed(2e10, 2, "as in tests")
