"""Stories of the synthetic grammar, and multiple choice about them.

A story states facts (where a thing was, whose, which colour; where somebody went), tells something with the
constructions of `stlm.corpora.grammar`, and then asks about a fact and answers. Each kind of fact is stated
of two things with different values, so that an answer needs the sentence about the right thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stlm.corpora import grammar
from stlm.corpora import lexicon as words
from stlm.corpora.grammar import Cast, Speaker, is_woman, new_cast

OPTIONS = 4


@dataclass(frozen=True)
class FactKind:
    """A kind of fact: what it is said of (`{0}`), its values (`{1}`), and its sentences."""

    subjects: tuple[str, ...]
    values: tuple[str, ...]
    statement: str
    paraphrase: str  # `{2}` is somebody
    question: str


_THINGS = tuple(noun.singular for noun in words.THINGS)
_NAMES = words.WOMEN + words.MEN
FACTS: dict[str, FactKind] = {
    "where": FactKind(
        _THINGS, words.CONTAINERS, "The {0} was {1}.", "{2} put the {0} {1}.", "Where was the {0}?"
    ),
    "whose": FactKind(
        _THINGS, _NAMES, "The {0} belonged to {1}.", "The {0} belonged to {1}.", "Whose was the {0}?"
    ),
    "colour": FactKind(
        _THINGS, words.COLOURS, "The {0} was {1}.", "{2} painted the {0} {1}.", "What colour was the {0}?"
    ),
    "went": FactKind(
        _NAMES, words.PLACES, "{0} went to the {1}.", "{0} went to the {1}.", "Where did {0} go?"
    ),
}


def _stated(s: Speaker, kind: FactKind, subject: str, value: str) -> str:
    """The fact in its own words, in other words, or said by one and confirmed by another.

    The echo is what a small model learns first of looking back.
    """
    chance, (first, second) = s.rng.random(), s.two_names()
    statement = kind.statement.format(subject, value)
    if chance < 0.2:
        return kind.paraphrase.format(subject, value, first)
    if chance < 0.6:
        return f'"{statement[:-1]}," said {first}. "Yes. {statement[:-1]}," said {second}.'
    return statement


def _facts(s: Speaker, kind: FactKind) -> list[tuple[str, str]]:
    """Two facts of a kind about the cast: (subject, value)."""
    subjects = s.cast.names if kind.subjects is _NAMES else [noun.singular for noun in s.cast.things]
    values = s.cast.names if kind.values is _NAMES else kind.values
    return list(zip(s.rng.sample(subjects, 2), s.rng.sample(values, 2), strict=True))


# --- sentences that are in no pair, but show its words where they belong ---


def _somebody(s: Speaker) -> str:
    return f"Somebody {s.verb('nobody', words.TRANSITIVE).past} the {s.thing().plural} {s.place()}."


def _has(s: Speaker) -> str:
    noun = s.being()
    verb = s.verb(noun.singular, words.TRANSITIVE)
    return f"The {noun.singular} has {verb.participle} the {s.thing().singular}."


def _every(s: Speaker) -> str:
    noun = s.thing()
    quality = s.adjective(noun.singular, words.QUALITIES)
    name = s.name()
    verb = s.verb(name, words.TRANSITIVE)
    return s.pick(
        (
            f"Every {noun.singular} was {quality}.",
            f"All {noun.plural} were {quality}.",
            f"{name} {verb.past} every {noun.singular}.",
            f"{name} {verb.past} all {noun.plural}.",
        )
    )


def _pronoun(s: Speaker) -> str:
    name = s.name()
    feeling, verb = s.adjective(name, words.FEELINGS), s.verb(name, words.INTRANSITIVE)
    return f"{name} was {feeling}. {'She' if is_woman(name) else 'He'} {verb.past} {s.place()}."


def _saying(s: Speaker) -> str:
    said = s.pick(("I like the {thing}", "We can play {place}", "This is my {thing}", "I am {feeling}"))
    said = said.format(thing=s.thing().singular, place=s.place(), feeling=s.pick(words.FEELINGS))
    return f'"{said}," said {s.name()}.'


_PLAIN: tuple[Callable[[Speaker], str], ...] = (_somebody, _has, _every, _pronoun, _saying)
_PARADIGMS = tuple(function for _, function in grammar.CONSTRUCTIONS.values())


def _sentence(s: Speaker) -> str:
    if s.rng.random() < 0.25:
        return s.pick(_PLAIN)(s)
    return s.pick(_PARADIGMS)(s)[0]


def _opening(s: Speaker) -> str:
    first, second = s.two_names()
    noun = s.being()
    article = "an" if noun.singular[0] in "aeiou" else "a"
    return s.pick(
        (
            f"This is a story about {first} and {second}.",
            f"One day {first} met {second}.",
            f"{first} and {second} lived near {article} {noun.singular}.",
            f"Once upon a time {first} and {second} were friends.",
        )
    )


def _question(s: Speaker, kind: FactKind, subject: str, value: str) -> str:
    question, answer = kind.question.format(subject), kind.statement.format(subject, value)
    if s.rng.random() < 0.7:
        return f"{question} {answer}"
    asking, answering = s.two_names()
    return f'"{question}" asked {asking}. "{answer[:-1]}," said {answering}.'


def story(rng: random.Random) -> str:
    """One story: an opening, two facts and one to three other sentences in any order, two questions."""
    s = Speaker(rng, new_cast(rng))
    kind = rng.choice(tuple(FACTS.values()))
    facts = [(kind, *fact) for fact in _facts(s, kind)]
    body = [_stated(s, *fact) for fact in facts]
    body += [_sentence(s) for _ in range(rng.randint(1, 3))]
    rng.shuffle(body)
    rng.shuffle(facts)
    return " ".join([_opening(s), *body, *(_question(s, *fact) for fact in facts)])


def _quadruples(rng: random.Random, values: Sequence[str]) -> Iterator[list[str]]:
    """Endless sets of four values, in which each value is as frequent as the others."""
    while True:
        order = rng.sample(values, len(values))
        for start in range(0, len(order) - OPTIONS + 1, OPTIONS):
            yield order[start : start + OPTIONS]


def choice_items(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """``count`` items: ctx (a story and a question), endings (four answers), label, kind.

    Within each set of four values each one is right once, so no option is likelier than another without the
    story; one wrong option is also in the story, said of something else.
    """
    sets = {name: _quadruples(rng, kind.values) for name, kind in FACTS.items()}
    made = 0
    while made < count:
        name = tuple(FACTS)[made // OPTIONS % len(FACTS)]
        options = next(sets[name])
        for right in options[: count - made]:
            yield _choice_item(rng, name, options, right)
            made += 1


def _choice_item(rng: random.Random, name: str, options: Sequence[str], right: str) -> dict[str, Any]:
    kind = FACTS[name]
    wrong = rng.choice([option for option in options if option != right])
    cast = new_cast(rng)
    # Only the two values of the facts may come up in the other sentences.
    if kind.values is _NAMES:
        cast = Cast((right, wrong), cast.beings, cast.things, cast.places)
    elif kind.values is words.PLACES:
        cast = Cast(cast.names, cast.beings, cast.things, (right, wrong))
    s = Speaker(rng, cast)
    (subject, _), (other, _) = _facts(s, kind)
    body = [_stated(s, kind, subject, right), _stated(s, kind, other, wrong)]
    body += [_sentence(s) for _ in range(rng.randint(1, 2))]
    rng.shuffle(body)
    order = rng.sample(options, OPTIONS)
    return {
        "ctx": " ".join([_opening(s), *body, kind.question.format(subject)]),
        "endings": [kind.statement.format(subject, option) for option in order],
        "label": order.index(right),
        "kind": name,
    }
