"""Constructions of the synthetic grammar: each makes a sentence, and the same sentence with one error.

The stories (`stlm.corpora.stories`) use only the good sentence, the minimal pairs both. They never share a
sentence: each construction ties one word to another (a verb to its subject, an adjective to its noun). One
such combination in five is held out: only the pairs use it, and the stories use only the others.
"""

from __future__ import annotations

import contextlib
import functools
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stlm.corpora import lexicon as words
from stlm.corpora.lexicon import Noun, Verb

_T = TypeVar("_T")
HELD_OUT_OF = 5  # one combination in so many


class NoChoiceError(LookupError):
    """A word has no combination on the speaker's side of the hold-out."""


@functools.cache
def held_out(first: str, second: str) -> bool:
    """Whether this combination of lemmas is held out of the corpus, for the pairs."""
    return zlib.crc32(f"{first} {second}".encode()) % HELD_OUT_OF == 0


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    names: tuple[str, ...]
    beings: tuple[Noun, ...]
    things: tuple[Noun, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Speaker:
    """Random choices within a cast; ``held``: whether combinations are held-out ones."""

    rng: random.Random
    cast: Cast
    held: bool = False

    def pick(self, choices: Sequence[_T]) -> _T:
        return self.rng.choice(choices)

    def tied(self, to: str, choices: Sequence[_T], lemma: Callable[[_T], str]) -> _T:
        """A choice whose combination with ``to`` is on this speaker's side of the hold-out.

        Raises ``NoChoiceError`` if there is none, which happens only with short lists on the held-out side.
        """
        possible = [one for one in choices if held_out(to, lemma(one)) == self.held]
        if not possible:
            raise NoChoiceError(to)
        return self.pick(possible)

    def verb(self, subject: str, verbs: Sequence[Verb]) -> Verb:
        return self.tied(subject, verbs, lambda verb: verb.base)

    def adjective(self, noun: str, adjectives: Sequence[str]) -> str:
        return self.tied(noun, adjectives, str)

    def name(self) -> str:
        return self.pick(self.cast.names)

    def two_names(self) -> tuple[str, str]:
        first, second = self.rng.sample(self.cast.names, 2)
        return first, second

    def being(self, nouns: Sequence[Noun] = words.BEINGS) -> Noun:
        """One of ``nouns``, from the cast if the cast has any of them."""
        return self.pick([one for one in self.cast.beings if one in nouns] or nouns)

    def thing(self) -> Noun:
        return self.pick(self.cast.things)

    def other(self, noun: Noun, nouns: Sequence[Noun]) -> Noun:
        return self.pick([one for one in nouns if one != noun])

    def place(self) -> str:
        """An adverbial of place or manner."""
        return (
            f"in the {self.pick(self.cast.places)}" if self.rng.random() < 0.6 else self.pick(words.ADVERBS)
        )


def new_cast(rng: random.Random) -> Cast:
    """Two or three people by name, two beings, three things and two places."""
    names = rng.sample(words.WOMEN + words.MEN, rng.choice((2, 2, 3)))
    return Cast(
        tuple(names),
        tuple(rng.sample(words.BEINGS, 2)),
        tuple(rng.sample(words.THINGS, 3)),
        tuple(rng.sample(words.PLACES, 2)),
    )


def is_woman(name: str) -> bool:
    return name in words.WOMEN


Pair = tuple[str, str]
CONSTRUCTIONS: dict[str, tuple[str, Callable[[Speaker], Pair]]] = {}


def _construction(phenomenon: str) -> Callable[[Callable[[Speaker], Pair]], Callable[[Speaker], Pair]]:
    """Register a function as the paradigm of its name, within ``phenomenon``."""

    def register(function: Callable[[Speaker], Pair]) -> Callable[[Speaker], Pair]:
        CONSTRUCTIONS[function.__name__] = (phenomenon, function)
        return function

    return register


def _swap(sentence: str, good: str, bad: str) -> Pair:
    """The sentence with its ``{}`` replaced by the good word, and by the bad one."""
    return sentence.format(good), sentence.format(bad)


# --- agreement of subject and verb ---


@_construction("subject_verb_agreement")
def agreement_regular(s: Speaker) -> Pair:
    return _agreeing(s, s.being(words.REGULAR))


@_construction("subject_verb_agreement")
def agreement_irregular_plural(s: Speaker) -> Pair:
    return _agreeing(s, s.being(words.IRREGULAR))


def _agreeing(s: Speaker, noun: Noun) -> Pair:
    verb = s.verb(noun.singular, words.INTRANSITIVE)
    if s.rng.random() < 0.5:
        return _swap(f"The {noun.singular} {{}} {s.place()}.", verb.third, verb.base)
    return _swap(f"The {noun.plural} {{}} {s.place()}.", verb.base, verb.third)


@_construction("subject_verb_agreement")
def agreement_attractor(s: Speaker) -> Pair:
    """The noun next to the verb has the other number."""
    noun = s.being()
    near = s.other(noun, words.BEINGS)
    verb = s.verb(noun.singular, words.INTRANSITIVE)
    link = s.pick(("near", "behind", "beside"))
    if s.rng.random() < 0.5:
        return _swap(f"The {noun.singular} {link} the {near.plural} {{}} {s.place()}.", verb.third, verb.base)
    return _swap(f"The {noun.plural} {link} the {near.singular} {{}} {s.place()}.", verb.base, verb.third)


@_construction("subject_verb_agreement")
def agreement_be(s: Speaker) -> Pair:
    noun = s.being()
    feeling = s.adjective(noun.singular, words.FEELINGS)
    now, then = ("is", "are"), ("was", "were")
    singular, plural = s.pick((now, then))
    if s.rng.random() < 0.5:
        return _swap(f"The {noun.singular} {{}} {feeling}.", singular, plural)
    return _swap(f"The {noun.plural} {{}} {feeling}.", plural, singular)


# --- reflexives ---


@_construction("anaphor_agreement")
def anaphor_gender(s: Speaker) -> Pair:
    if s.rng.random() < 0.7:
        subject = lemma = s.name()
        woman = is_woman(subject)
    else:
        noun = s.being(words.PEOPLE)
        subject, lemma, woman = f"The {noun.singular}", noun.singular, noun.gender == "f"
    verb = s.verb(lemma, words.REFLEXIVE)
    good, bad = ("herself", "himself") if woman else ("himself", "herself")
    return _swap(f"{subject} {verb.past} {{}} {s.place()}.", good, bad)


@_construction("anaphor_agreement")
def anaphor_number(s: Speaker) -> Pair:
    noun = s.being(words.PEOPLE)
    verb = s.verb(noun.singular, words.REFLEXIVE)
    alone = "herself" if noun.gender == "f" else "himself"
    if s.rng.random() < 0.5:
        return _swap(f"The {noun.singular} {verb.past} {{}} {s.place()}.", alone, "themselves")
    return _swap(f"The {noun.plural} {verb.past} {{}} {s.place()}.", "themselves", alone)


# --- determiners and nouns ---


@_construction("determiner_noun_agreement")
def determiner_noun(s: Speaker) -> Pair:
    return _determined(s, s.name(), s.thing())


@_construction("determiner_noun_agreement")
def determiner_noun_irregular(s: Speaker) -> Pair:
    return _determined(s, s.name(), s.being(words.IRREGULAR))


def _determined(s: Speaker, name: str, noun: Noun) -> Pair:
    verb = s.verb(name, words.TRANSITIVE)
    if s.rng.random() < 0.5:
        determiner, good, bad = s.pick(("this", "that", "one")), noun.singular, noun.plural
    else:
        determiner, good, bad = s.pick(("these", "those", "two", "many")), noun.plural, noun.singular
    return _swap(f"{name} {verb.past} {determiner} {{}} {s.place()}.", good, bad)


@_construction("determiner_noun_agreement")
def many_much(s: Speaker) -> Pair:
    name = s.name()
    verb = s.verb(name, words.TRANSITIVE)
    if s.rng.random() < 0.5:
        return _swap(f"{name} {verb.past} too {{}} {s.pick(words.MASS)}.", "much", "many")
    return _swap(f"{name} {verb.past} too {{}} {s.thing().plural}.", "many", "much")


# --- words that need a negation (negative polarity items) ---


@_construction("npi_licensing")
def npi_ever(s: Speaker) -> Pair:
    noun = s.being()
    verb = s.verb(noun.singular, words.TRANSITIVE)
    return _swap(f"{{}} {noun.singular} has ever {verb.participle} the {s.thing().singular}.", "No", "The")


@_construction("npi_licensing")
def npi_any(s: Speaker) -> Pair:
    verb = s.verb("nobody", words.TRANSITIVE)
    return _swap(f"{{}} {verb.past} any {s.thing().plural} {s.place()}.", "Nobody", "Somebody")


# --- forms of verbs ---


@_construction("irregular_forms")
def irregular_past(s: Speaker) -> Pair:
    name = s.name()
    verb = s.verb(name, words.STRONG)
    return _swap(f"{name} {{}} the {s.thing().singular} {s.place()}.", verb.past, verb.participle)


@_construction("irregular_forms")
def irregular_participle(s: Speaker) -> Pair:
    name = s.name()
    verb = s.verb(name, words.STRONG)
    return _swap(f"{name} has {{}} the {s.thing().singular} {s.place()}.", verb.participle, verb.past)


@_construction("tense")
def tense_of_adverb(s: Speaker) -> Pair:
    name = s.name()
    verb = s.verb(name, words.INTRANSITIVE)
    if s.rng.random() < 0.5:
        return _swap(f"{s.pick(words.IN_THE_PAST)} {name} {{}} {s.place()}.", verb.past, verb.third)
    return _swap(f"{s.pick(words.IN_GENERAL)} {name} {{}} {s.place()}.", verb.third, verb.past)


@_construction("tense")
def tense_of_auxiliary(s: Speaker) -> Pair:
    name = s.name()
    verb = s.verb(name, words.INTRANSITIVE)
    auxiliary = s.pick(("will", "can", "did not", "does not"))
    return _swap(f"{name} {auxiliary} {{}} {s.place()}.", verb.base, s.pick((verb.past, verb.third)))


# --- arguments, questions, quantifiers, possessives ---


@_construction("argument_structure")
def transitive(s: Speaker) -> Pair:
    name = s.name()
    verb, bad = s.verb(name, words.TRANSITIVE), s.pick(words.NEVER_TRANSITIVE)
    return _swap(f"{name} {{}} the {s.pick(words.QUALITIES)} {s.thing().singular}.", verb.past, bad.past)


@_construction("filler_gap")
def what_with_gap(s: Speaker) -> Pair:
    knower, name = s.two_names()
    verb = s.verb(name, words.TRANSITIVE)
    return _swap(f"{knower} {s.pick(words.KNOWING)} {{}} {name} {verb.past}.", "what", "that")


@_construction("filler_gap")
def that_without_gap(s: Speaker) -> Pair:
    knower, name = s.two_names()
    clause = f"{s.verb(name, words.TRANSITIVE).past} the {s.thing().singular}"
    return _swap(f"{knower} {s.pick(words.KNOWING)} {{}} {name} {clause}.", "that", "what")


@_construction("quantifiers")
def existential(s: Speaker) -> Pair:
    # A new thing: the story may place the things of the cast elsewhere.
    noun = s.pick([one for one in words.THINGS if one not in s.cast.things])
    quality = s.adjective(noun.singular, words.QUALITIES)
    place = s.pick(s.cast.places)
    if s.rng.random() < 0.5:
        article = "an" if quality[0] in "aeiou" else "a"
        return _swap(f"There was {{}} {quality} {noun.singular} in the {place}.", article, "every")
    return _swap(f"There were {{}} {quality} {noun.plural} in the {place}.", s.pick(words.NUMBERS), "all")


@_construction("possessives")
def possessive(s: Speaker) -> Pair:
    thing = s.thing()
    quality = s.adjective(thing.singular, words.QUALITIES)
    name = s.name()
    return _swap(f"{{}} {thing.singular} was {quality}.", f"{name}'s", name)


def pairs(rng: random.Random, paradigm: str, count: int) -> list[Pair]:
    """``count`` different minimal pairs of a paradigm, each (good, bad), held out from the corpus."""
    found: dict[str, str] = {}
    function = CONSTRUCTIONS[paradigm][1]
    while len(found) < count:
        with contextlib.suppress(NoChoiceError):  # try again with another cast
            good, bad = function(Speaker(rng, new_cast(rng), held=True))
            found.setdefault(good, bad)
    return list(found.items())
