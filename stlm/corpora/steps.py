"""Questions whose answers need several steps, and the steps written out.

There are two kinds. *Arithmetic*: a number from 0 to 9 is changed by one operation a step; only the last
digit is kept, so that without any one of its numbers all answers are about equally likely. *Entities*: four
persons each hold a thing, or are somewhere; two of them exchange at a time, and a step is an exchange that
moves what is asked about. Other exchanges are told, too.

A text is a question, a line for each step (or none), and the line of the answer. The candidates among which
the answer is chosen contain every intermediate result: all ten digits, or all persons of the story.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from stlm.corpora import lexicon as words
from stlm.corpora.grammar import is_woman

# The numbers of steps of an item.
STEPS = (1, 2, 3, 4)
MODULUS = 10
PERSONS = 4
# Exchanges, at most, that do not move what is asked about.
_OTHER_EXCHANGES = 2
# What comes before the answer.
MARKER = "\nAnswer:"

# Items fall into so many parts by their content. One part is asked by the benchmarks, one is each of the
# corpora's val and test splits, and the others are their train split.
_PARTS = 20
_PART_OF = {"benchmark": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Item:
    """A question with its steps in words, its answer, and the candidates among which it is chosen.

    `content` is what two items must not have in common if one is trained on and the other is asked.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    options: tuple[str, ...]
    content: str

    @property
    def side(self) -> str:
        """Where the item may occur: `benchmark`, `val`, `test` or `train`."""
        part = zlib.crc32(self.content.encode()) % _PARTS
        return next((side for side, own in _PART_OF.items() if own == part), "train")

    def text(self, written: bool) -> str:
        """The document: the question and the answer, with the steps between them if they are `written`."""
        steps = "".join(f"\n{step}" for step in self.steps) if written else ""
        return f"{self.question}{steps}{MARKER} {self.answer}"


# --- arithmetic ---


@dataclass(frozen=True)
class _Wording:
    """A chain in words: its start, an addition, a subtraction and the question. `{0}` is the number."""

    start: str
    add: str
    subtract: str
    question: str


def _wording(rng: random.Random) -> _Wording:
    """One of three wordings, two of which are about somebody."""
    name, colour = rng.choice(words.WOMEN + words.MEN), rng.choice(words.COLOURS)
    she = "she" if is_woman(name) else "he"
    return rng.choice(
        (
            _Wording("{0}", " + {0}", " - {0}", " = ?"),
            _Wording(
                f"The {colour} dial of {name} shows {{0}}.",
                " It goes up by {0}.",
                " It goes down by {0}.",
                " What does it show?",
            ),
            _Wording(
                f"{name} is on stone {{0}} of the {colour} ring.",
                f" {she.capitalize()} walks on by {{0}}.",
                f" {she.capitalize()} walks back by {{0}}.",
                f" Where is {she}?",
            ),
        )
    )


def arithmetic(rng: random.Random, steps: int, answer: str | None = None) -> Item:
    """A chain of additions and subtractions modulo ten, which ends at `answer` (None: at any number)."""
    changes = [rng.choice((1, -1)) * rng.randint(1, MODULUS - 1) for _ in range(steps)]
    end = rng.randrange(MODULUS) if answer is None else int(answer)
    value = first = (end - sum(changes)) % MODULUS
    wording, lines = _wording(rng), []
    question, chain = wording.start.format(first), str(first)
    for change in changes:
        question += (wording.add if change > 0 else wording.subtract).format(abs(change))
        sign, before = "+" if change > 0 else "-", value
        value = (value + change) % MODULUS
        chain += f" {sign} {abs(change)}"
        lines.append(f"{before} {sign} {abs(change)} = {value}")
    question += wording.question
    # A single step is a fact, which must be known: all 180 are trained on, in other words than those asked.
    content = question if steps == 1 else chain
    return Item(question, tuple(lines), str(value), digits(), content)


def digits() -> tuple[str, ...]:
    """The answers of arithmetic."""
    return tuple(map(str, range(MODULUS)))


# --- entities ---


@dataclass(frozen=True)
class _Telling:
    """Who holds what, or who is where: how it is told. `{0}` is a person, `{1}` a thing or a place."""

    values: tuple[str, ...]
    first: str
    further: str
    exchange: str
    question: str


_TELLINGS = (
    _Telling(
        tuple(noun.singular for noun in words.THINGS),
        "{0} has the {1}",
        "{0} the {1}",
        "{0} and {1} swap.",
        "Who has the {1}?",
    ),
    _Telling(
        words.PLACES,
        "{0} is in the {1}",
        "{0} in the {1}",
        "{0} and {1} change places.",
        "Who is in the {1}?",
    ),
)


def entities(rng: random.Random, steps: int, names: list[str], answer: str | None = None) -> Item:
    """A story about four `names` and who holds what, or is where, in the end: `answer` (None: any of them).

    What is asked about moves in `steps` of the exchanges; the others, up to two, are between two persons who
    do not have it then.
    """
    start = holder = rng.randrange(PERSONS)
    moves = [True] * steps + [False] * rng.randint(0, _OTHER_EXCHANGES)
    rng.shuffle(moves)
    pairs, holders = [], []
    for is_move in moves:
        others = [person for person in range(PERSONS) if person != holder]
        if is_move:
            pair = [holder, rng.choice(others)]
            holder = pair[1]
            holders.append(holder)
        else:
            pair = rng.sample(others, 2)
        rng.shuffle(pair)
        pairs.append(pair)
    order = rng.sample(names, PERSONS)
    if answer is not None:
        place = order.index(answer)
        order[place], order[holder] = order[holder], answer
    telling = rng.choice(_TELLINGS)
    values = rng.sample(telling.values, PERSONS)
    told = [
        (telling.further if number else telling.first).format(name, value)
        for number, (name, value) in enumerate(zip(order, values, strict=True))
    ]
    exchanges = [telling.exchange.format(*(order[person] for person in pair)) for pair in pairs]
    value = values[start]
    question = " ".join(
        [f"{', '.join(told[:-1])} and {told[-1]}.", *exchanges, telling.question.format("", value)]
    )
    lines = tuple(telling.first.format(order[person], value) for person in holders)
    # Whatever the things and places are called, and in whichever order a pair is named.
    swaps = ", ".join("-".join(str(person) for person in sorted(pair)) for pair in pairs)
    content = f"{' '.join(order)}: {start}: {swaps}"
    return Item(question, lines, order[holder], tuple(order), content)


# --- items of a side ---


def _of_side(make: Callable[[], Item], sides: tuple[str, ...]) -> Item:
    """The first item that `make` gives of one of the `sides`."""
    while True:
        item = make()
        if item.side in sides:
            return item


def _names(rng: random.Random) -> list[str]:
    return rng.sample(words.WOMEN + words.MEN, PERSONS)


def _any(rng: random.Random) -> Item:
    """An item of either kind and of any number of steps."""
    steps = rng.choice(STEPS)
    return arithmetic(rng, steps) if rng.random() < 0.5 else entities(rng, steps, _names(rng))


def training_items(seed: int, count: int) -> Iterator[Item]:
    """`count` items of the corpora's splits, both kinds, with every number of steps equally often."""
    rng = random.Random(f"steps {seed}")
    for _ in range(count):
        yield _of_side(partial(_any, rng), ("train", "val", "test"))


def arithmetic_items(seed: int, count: int) -> Iterator[Item]:
    """`count` items that the corpora do not have. Each digit is right equally often for each number of steps,
    if the count is a multiple of 40."""
    rng = random.Random(f"steps of arithmetic {seed}")
    for number in range(count):
        steps = STEPS[number % len(STEPS)]
        answer = str(number // len(STEPS) % MODULUS)
        yield _of_side(partial(arithmetic, rng, steps, answer), ("benchmark",))


def entity_items(seed: int, count: int) -> Iterator[Item]:
    """`count` items that the corpora do not have. Four at a time, of one number of steps, are about the same
    four persons, of whom each is right once."""
    rng = random.Random(f"steps of entities {seed}")
    names: list[str] = []
    for number in range(count):
        turn, place = divmod(number, PERSONS)
        if place == 0:
            names = _names(rng)
        steps = STEPS[turn % len(STEPS)]
        item = _of_side(partial(entities, rng, steps, names, names[place]), ("benchmark",))
        options = list(item.options)
        rng.shuffle(options)
        yield replace(item, options=tuple(options))
