"""Stories of the synthetic grammar, and multiple-choice questions about them.

A story states facts, has sentences made by the constructions of `stlm.corpora.grammar`, and then asks about
the facts and answers. There are two kinds of facts, of which the first is easier to learn:

- *known* consequences, always the same: who has an axe cuts the wood, who is cold puts on a coat;
- *told* facts, new in each story: where a thing was, whose it was, its colour. Two things have different
  values, so that an answer needs the sentence about the right thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stlm.corpora import grammar
from stlm.corpora import lexicon as words
from stlm.corpora.grammar import Cast, Speaker, is_woman, new_cast

OPTIONS = 4


@dataclass(frozen=True)
class FactKind:
    """A kind of fact: its values (`{1}`), and sentences that state a value of a subject (`{0}`)."""

    values: tuple[str, ...]
    statement: str
    question: str
    paraphrase: str = ""  # `{2}` is somebody
    of_things: bool = True  # the subject is a thing, else somebody
    deeds: Mapping[str, str] | None = None  # known: value -> what it leads to

    def answer(self, subject: str, value: str) -> str:
        if self.deeds is not None:
            return f"{subject} {self.deeds[value]}."
        return self.statement.format(subject, value)


def _known(deeds: Mapping[str, str], statement: str, question: str) -> FactKind:
    return FactKind(tuple(deeds), statement, question, of_things=False, deeds=deeds)


_NAMES = words.WOMEN + words.MEN
TOLD: dict[str, FactKind] = {
    "where": FactKind(
        words.CONTAINERS, "The {0} was {1}.", "Where was the {0}?", paraphrase="{2} put the {0} {1}."
    ),
    "whose": FactKind(_NAMES, "The {0} belonged to {1}.", "Whose was the {0}?"),
    "colour": FactKind(
        words.COLOURS, "The {0} was {1}.", "What colour was the {0}?", paraphrase="{2} painted the {0} {1}."
    ),
}
KNOWN: dict[str, FactKind] = {
    "state": _known(words.STATES, "{0} was {1}.", "What did {0} do then?"),
    "spot": _known(words.SPOTS, "{0} went to the {1}.", "What did {0} do there?"),
    "tool": _known(words.TOOLS, "{0} had the {1}.", "What did {0} do with it?"),
}
FACTS = TOLD | KNOWN
Fact = tuple[FactKind, str, str]  # kind, subject, value


def _stated(s: Speaker, fact: Fact) -> str:
    """The fact as a statement, as a paraphrase, or said by one person and confirmed by another.

    The repetition is the first kind of looking back that a small model learns.
    """
    kind, subject, value = fact
    chance, (first, second) = s.rng.random(), s.two_names()
    statement = kind.statement.format(subject, value)
    if chance < 0.2 and kind.paraphrase:
        return kind.paraphrase.format(subject, value, first)
    if chance < 0.5 and not kind.deeds:
        return f'"{statement[:-1]}," said {first}. "Yes. {statement[:-1]}," said {second}.'
    return statement


def _told(s: Speaker, kind: FactKind) -> list[Fact]:
    """Two facts of a kind about the cast."""
    things = [noun.singular for noun in s.rng.sample(s.cast.things, 2)]
    values = s.cast.names if kind.values is _NAMES else kind.values
    return [(kind, thing, value) for thing, value in zip(things, s.rng.sample(values, 2), strict=True)]


# --- sentences that are in no pair, but show the words of pairs in correct use ---


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
    sentence = s.pick(("I like the {thing}", "We can play {place}", "This is my {thing}", "I am {feeling}"))
    sentence = sentence.format(thing=s.thing().singular, place=s.place(), feeling=s.pick(words.FEELINGS))
    return f'"{sentence}," said {s.name()}.'


_PLAIN: tuple[Callable[[Speaker], str], ...] = (_somebody, _has, _every, _pronoun, _saying)
# Constructions with many words occur twice, because a small model needs to see them more often.
_TWICE = ("agreement_regular", "agreement_attractor", "anaphor_gender", "npi_ever", "tense_of_adverb")
_PARADIGMS = tuple(
    function
    for name, (_, function) in grammar.CONSTRUCTIONS.items()
    for _ in range(2 if name in _TWICE else 1)
)


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


def _question(s: Speaker, fact: Fact) -> str:
    kind, subject, value = fact
    question, answer = kind.question.format(subject), kind.answer(subject, value)
    if s.rng.random() < 0.7:
        return f"{question} {answer}"
    asking, answering = s.two_names()
    return f'"{question}" asked {asking}. "{answer[:-1]}," said {answering}.'


def _consequence(s: Speaker, fact: Fact) -> str:
    """The consequence of a known fact: "So she cut the wood."."""
    kind, subject, value = fact
    return f"So {kind.answer('she' if is_woman(subject) else 'he', value)}"


def _known_facts(s: Speaker, count: int) -> list[Fact]:
    """Facts of different kinds about the cast."""
    return [(kind, s.name(), s.pick(kind.values)) for kind in s.rng.sample(tuple(KNOWN.values()), count)]


def story(rng: random.Random) -> str:
    """One story: an opening, three facts and other sentences in random order, questions about the facts.

    A consequence comes right after its fact, or as an answer, at once or at the end: a model that has learned
    to look back one sentence can go on to look back further.
    """
    s = Speaker(rng, new_cast(rng))
    is_told = rng.random() < 0.5
    facts = _told(s, s.pick(tuple(TOLD.values()))) + _known_facts(s, 1) if is_told else _known_facts(s, 3)
    body, end = [_sentence(s) for _ in range(rng.randint(1, 3))], []
    for fact in facts:
        stated, chance = _stated(s, fact), rng.random()
        if fact[0].deeds and chance < 0.5:
            body.append(f"{stated} {_consequence(s, fact)}")
        elif chance < 0.7:
            body.append(f"{stated} {_question(s, fact)}")
        else:
            body.append(stated)
            end.append(_question(s, fact))
    rng.shuffle(body)
    rng.shuffle(end)
    return " ".join([_opening(s), *body, *end])


def _quadruples(rng: random.Random, values: Sequence[str]) -> Iterator[list[str]]:
    """Endless sets of four values, in which all values are equally frequent."""
    while True:
        order = rng.sample(values, len(values))
        for start in range(0, len(order) - OPTIONS + 1, OPTIONS):
            yield order[start : start + OPTIONS]


def choice_items(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """``count`` items: ctx (a story and a question), endings (four answers), label, kind.

    Within each set of four values each one is right once, so that without the story all options are equally
    likely. For a told fact, one wrong option is also in the story, as the value of another thing.
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
    kind, cast = FACTS[name], new_cast(rng)
    wrong = rng.choice([option for option in options if option != right])
    if kind.values is _NAMES:  # only these two of the options may occur in the story
        cast = Cast((right, wrong), cast.beings, cast.things, cast.places)
    s = Speaker(rng, cast)
    if name in KNOWN:
        subject = s.name()
        facts = [(kind, subject, right)]
    else:
        (_, subject, _), (_, other, _) = _told(s, kind)
        facts = [(kind, subject, right), (kind, other, wrong)]
    body = [_stated(s, fact) for fact in facts] + [_sentence(s) for _ in range(rng.randint(1, 2))]
    rng.shuffle(body)
    order = rng.sample(options, OPTIONS)
    return {
        "ctx": " ".join([_opening(s), *body, kind.question.format(subject)]),
        "endings": [kind.answer(subject, option) for option in order],
        "label": order.index(right),
        "kind": name,
    }
