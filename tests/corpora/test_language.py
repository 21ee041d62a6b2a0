"""The guess at a language: from short samples, and what it says where it cannot tell."""

from __future__ import annotations

import pytest

from stlm.corpora.language import guess

SAMPLES = {
    "en": "The quick brown fox jumps over the lazy dog and the children went home to eat their dinner.",
    "de": "Die Kinder gingen nach Hause und aßen ihr Abendessen, weil sie hungrig waren und es kalt war.",
    "fr": "Les enfants sont rentrés à la maison pour manger leur dîner avec leurs parents.",
    "es": "Los niños volvieron a casa para cenar con sus padres y sus hermanos.",
    "pt": "Eles foram para casa com os seus pais e não queriam jantar porque era tarde.",
    "nl": "De kinderen gingen naar huis om met hun ouders te eten en het was laat.",
    "it": "Lui è andato a casa e non sapeva che il bambino era con la madre.",
    "ru": "Дети пошли домой, чтобы поужинать с родителями, и он был рад.",
    "el": "Τα παιδιά πήγαν στο σπίτι",
    "ko": "아이들은 집에 갔다",
}
WITHOUT_SPACES = {
    "zh": "孩子们回家吃晚饭了，因为他们很饿。",
    "th": "เด็กๆ กลับบ้านไปกินข้าวเย็น",
    "ja": "子供たちは夕食を食べるために家に帰りました。",
}


@pytest.mark.parametrize("tag", SAMPLES)
def test_a_sentence_is_enough(tag: str) -> None:
    found = guess([SAMPLES[tag]])
    assert found.tag == tag and found.spaced


@pytest.mark.parametrize("tag", WITHOUT_SPACES)
def test_text_without_spaces_is_told(tag: str) -> None:
    found = guess([WITHOUT_SPACES[tag]])
    assert found.tag == tag and not found.spaced and "without spaces" in found.name


def test_two_languages_are_mixed_and_a_foreign_sentence_is_not() -> None:
    mixed = guess([SAMPLES["en"]] * 3 + [SAMPLES["de"]] * 2)
    assert mixed.tag == "mul" and mixed.name == "mixed: English, German"
    assert guess([SAMPLES["en"]] * 9 + [SAMPLES["de"]]).tag == "en"
    assert guess([SAMPLES["ru"]] * 2 + [SAMPLES["en"]]).tag == "mul"


def test_what_cannot_be_told_is_not_guessed() -> None:
    program = guess(["def f(x):\n    return x + 1\n"] * 5)
    assert program.tag is None and program.name == "not recognized (Latin letters)"
    numbers = guess(["1 2 3", "+-*/"])
    assert numbers.tag is None and "no letters" in numbers.name
    assert guess([]).tag is None
