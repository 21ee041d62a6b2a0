"""Items written by hand in the benchmarks' columns, to trip up prompts, tokenizers and rules."""

from __future__ import annotations

from typing import Any

LONG = "The old woman who lived by the river had seven cats, and every cat had seven kittens of its own. " * 7
ODD = "Zoë’s naïve café — 水は水 🙂\u200d👩, “£3.50”…"


def _pair(paradigm: str, good: str, bad: str) -> dict[str, Any]:
    return {"sentence_good": good, "sentence_bad": bad, "UID": paradigm, "linguistics_term": "island_effects"}


def _scene(activity: str, a: str, b: str, endings: list[str], label: int) -> dict[str, Any]:
    return {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": endings, "label": str(label)}


def _question(number: int, question: str, texts: list[str], labels: str, key: str) -> dict[str, Any]:
    choices = {"text": texts, "label": list(labels)}
    return {"id": f"Q_{number}", "question": question, "choices": choices, "answerKey": key}


def _blank(sentence: str, first: str, second: str, answer: int) -> dict[str, Any]:
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(answer)}


def _exam(subject: str, question: str, choices: list[str], answer: int) -> dict[str, Any]:
    return {"question": question, "subject": subject, "choices": choices, "answer": answer}


PAIRS = [
    _pair(
        "adjunct_island",
        "Who should Derek hug after shocking Richard?",
        "Who should Derek hug Richard after?",
    ),
    _pair("adjunct_island", ODD, ODD + "?"),
    # The same sentence twice: a tie, which lm_eval gives to the first, the good one.
    _pair("adjunct_island", "What had Claire climbed?", "What had Claire climbed?"),
    _pair("causative", "Aaron breaks the glass.", "Aaron appeared the glass."),
    _pair("causative", "  Two  spaces  here.", "Two spaces here. "),
    _pair("causative", "<|endoftext|> Rose opened it.", "Rose opened it <|endoftext|>."),
    _pair("wh_island", "Who have those men revealed they helped?", "Who have those men revealed who helped?"),
    _pair("wh_island", "1 2 3 44 555 6666", "6666 555 44 3 2 1"),
    _pair("wh_island", "x", "y"),
    _pair("wh_island", "It's the dog's; they'd've gone.", "Its the dogs; theyd gone."),
    _pair("transitive", "A\tlady\ncares.", "A lady\n\ncares."),
    _pair("transitive", "Some ladies cared for Al.", "Some ladies slept Al."),
    _pair("transitive", LONG, LONG + "So?"),
]
SCENES = [
    _scene(
        "Roof shingle removal",
        "A man sits on a roof. [header] He  rests.",
        "he STARTS",
        ["pulling.", "up [title] it.", " holds it.", "ends."],
        3,
    ),
    # The bracket at the end leaves a space, which counts as the ending's.
    _scene(
        "Washing dishes",
        "A woman stands at a sink. [step]",
        "",
        ["She [substeps] washes.", "It rains.", "He eats soap.", "They fly."],
        0,
    ),
    _scene("Ties", "Two boys run.", "they", ["stop.", "stop.", "stop.", "go."], 1),
    _scene("Ties", "Two boys run.", "they", ["go.", "go.", "run far away home.", "sit."], 0),
    _scene("Unicode", ODD, "É alors", ["水", "naïve", "🙂🙂", "“so”"], 2),
    _scene(
        "Long", LONG, "then the cats", ["slept.", "ran away from the river.", "sang.", "were many more."], 1
    ),
    _scene("Long", LONG + LONG, "then", [LONG[:90], "a", "b", LONG[:60]], 1),
    _scene("[title] Title", " [title] First.", "second [x] ", ["[a] b", "c [d]", "e  f", "g"], 2),
    _scene("Double  spaces", "He  waits.   Long.", "she  comes", ["a  b", "a b", "a   b", "ab"], 3),
    _scene("Digits", "1 + 1", "is", ["2", "3", "11", "two"], 0),
    _scene("Newlines", "First\nsecond\n", "\nthird", ["\nfourth", "fourth\n", "4", "four"], 0),
    _scene("Too long", "An ending", "that", ["is long. " + LONG, "a", "b", "c"], 0),
]
QUESTIONS = [
    _question(1, "Which is hot?", ["ice", "fire", "snow"], "123", "2"),
    _question(2, "Which is cold?", ["ice", "fire", "snow", "sun"], "ABCD", "A"),
    _question(3, "Which, of five, is it?", ["a", "b", "c", "d", "e"], "ABCDE", "E"),
    _question(4, f"What does {ODD} mean?", ["水", "naïve café", "🙂", "3.50"], "ABCD", "C"),
    _question(5, "Trailing space? ", ["yes ", " no", "  maybe", "so"], "ABCD", "B"),
    _question(6, "Two lines\nand a tab\there?", ["one", "two", "both", "none"], "ABCD", "D"),
    _question(7, LONG + "How many cats?", ["seven", "49", "56", "none"], "1234", "1"),
    _question(8, LONG + LONG + "How many?", ["seven kittens each", "7", "too many cats", "0"], "ABCD", "C"),
    _question(9, "The same answers?", ["same", "same", "other", "same"], "ABCD", "B"),
    _question(10, "<|endoftext|>", ["<|endoftext|>", "end", "of", "text"], "ABCD", "A"),
    _question(11, "Which is 10?", ["10", "1 0", "ten", "X"], "ABCD", "A"),
    _question(12, "True?", ["true", "false"], "AB", "B"),
]
BLANKS = [
    _blank("Sarah was better than Maria so _ always got the easier cases.", "Sarah", "Maria", 2),
    _blank("The trophy does not fit the case because _ is too big.", "the trophy", "the case", 1),
    # The name ends in a space, which counts as the rest's.
    _blank("Ian ate Dennis's menudo after already having a bowl because _ enjoyed it.", "Ian ", "Dennis", 1),
    _blank("_ began it.", "He", "She", 1),
    _blank("Between a_b it stood.", "x", "y", 2),
    _blank("It was about the _, 2024.", "1st of May", "2nd of May", 1),
    _blank(f"{ODD} _ {ODD}", "Zoë", "水", 2),
    _blank("The names are alike, so _ is anyone's guess.", "Ann", "Ann", 2),
    _blank(LONG + "So _ fed them.", "the woman", "the river", 1),
    _blank('Quote: "_", she said.', "No", "Yes", 2),
    _blank("Two  spaces  before  _  and  after.", "A", "B", 1),
    _blank("New\nlines _\nhere.", "one", "two", 2),
]
EXAMS = [
    _exam("abstract_algebra", " Find the degree of Q(sqrt(2)) over Q. \n", ["0", "4", "2", "6"], 2),
    _exam(
        "abstract_algebra",
        "Statement 1 | x^2 = 1. Statement 2 | x = 1.",
        ["True, True", "False, False", "True, False", "False, True"],
        3,
    ),
    _exam("abstract_algebra", "<|endoftext|> is", ["text", "the end", "<|endoftext|>", "a token"], 0),
    _exam(
        "high_school_us_history",
        LONG + LONG + "Who lived there?",
        ["A woman", "Cats", "A river", "Nobody"],
        0,
    ),
    _exam("high_school_us_history", ODD, ["é", "水", "🙂", "£"], 1),
    _exam("high_school_us_history", "When?\n\nAnd where?", ["1776\n", "1812", " 1861", "1945"], 1),
    _exam("anatomy", "Which bone?", ["the femur", "the femur", "the tibia", "the femur"], 1),
    _exam("anatomy", "Which  two  spaces?", ["a  b", "a b", "ab", ""], 0),
    _exam("anatomy", "A. B. C. D.?", ["A", "B", "C", "D"], 3),
    _exam("anatomy", "How many?", ["1", "2", "3", "4"], 2),
    _exam("world_religions", "\tTab?", ["yes", "no", "both", "neither"], 2),
    _exam("world_religions", "Answer:", ["Answer:", "Question:", "A.", "B."], 0),
]
# By benchmark: the file of the split that is scored, and its rows.
ITEMS = {
    "blimp": ("train", PAIRS),
    "hellaswag": ("validation", SCENES),
    "arc_easy": ("test", QUESTIONS),
    "arc_challenge": ("validation", QUESTIONS),
    "winogrande": ("validation", BLANKS),
    "mmlu": ("test", EXAMS),
}
