"""What a word is, and when two titles are one."""

from __future__ import annotations

import pytest

from stlm.tokens.words import normalize_title, words


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words("她说：“你好。”") == ["她", "说", "你", "好"]
    assert words("เด็ก") == list("เด็ก")
    assert words("GPT是模型") == ["gpt", "是", "模", "型"]
    assert words("Größe – 'quoted'; don’t") == ["größe", "quoted", "dont"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Tin Woodman of Oz … Undertaken by", "The tin woodman of Oz ... Undertakenby"),
        ("Grimms' Märchen", "GRIMMS MARCHEN"),
        ("Alice  in\nWonderland!", "Alice in Wonderland"),
    ],
)
def test_spellings_of_a_title(one: str, other: str) -> None:
    assert normalize_title(one.encode()) == normalize_title(other.encode())


def test_titles_that_stay_apart() -> None:
    titles = ["Oz, Part 1", "Oz, Part 2", "童話", "童话", "???", "!!!"]
    assert len({normalize_title(title.encode()) for title in titles}) == len(titles)
    assert normalize_title(b"\xff") == b"\xff"
