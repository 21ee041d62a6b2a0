"""The words of the synthetic stories: about 600 word forms of simple English, with their inflections."""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """A count noun; ``gender`` is "f", "m" or "" (animals and things)."""

    singular: str
    plural: str
    gender: str = ""


class Verb(NamedTuple):
    base: str
    third: str  # she sings
    past: str
    participle: str  # she has sung


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _regular(text: str, gender: str = "") -> tuple[Noun, ...]:
    return tuple(Noun(noun, _plural(noun), gender) for noun in text.split())


def _regular_verb(base: str) -> Verb:
    if base.endswith("e"):
        past = base + "d"
    elif base.endswith("y") and base[-2] not in "aeiou":
        past = base[:-1] + "ied"
    else:
        past = base + "ed"
    return Verb(base, _plural(base), past, past)


def _verbs(regular: str, irregular: str) -> tuple[Verb, ...]:
    """Regular verbs by their base; irregular ones as base/past/participle."""
    parts = (verb.split("/") for verb in irregular.split())
    return tuple(map(_regular_verb, regular.split())) + tuple(
        Verb(base, _plural(base), past, participle) for base, past, participle in parts
    )


WOMEN = _words("Anna Mia Lily Emma Rosa Clara Ella Nora Lucy Sara Ivy Zoe")
MEN = _words("Tom Ben Max Jack Leo Sam Paul Hugo Fred Noah Finn Carl Dan")

PEOPLE = (
    *_regular("girl queen mother sister aunt princess", "f"),
    Noun("woman", "women", "f"),
    *_regular("boy king father brother uncle prince", "m"),
    Noun("man", "men", "m"),
)
ANIMALS = (
    *_regular("dog cat rabbit bear fox bird horse frog duck lion monkey cow pig hen turtle squirrel"),
    *_regular("teacher farmer doctor baker neighbour friend"),
    Noun("mouse", "mice"),
    Noun("goose", "geese"),
    Noun("child", "children"),
)
BEINGS = (*PEOPLE, *ANIMALS)
IRREGULAR = tuple(noun for noun in BEINGS if noun.plural in _words("women men mice geese children"))
REGULAR = tuple(noun for noun in BEINGS if noun not in IRREGULAR)
THINGS = _regular(
    "ball cup hat book lamp kite doll drum coin key ring spoon plate rope bell shoe stone letter pencil "
    "glove mirror puzzle robot crown flute basin candle blanket apple pear cake carrot pie"
)
MASS = _words("water milk sand snow bread honey rice paint sugar soup")
# Where a thing is kept; where people go.
CONTAINERS = tuple(
    f"{preposition} the {noun}"
    for preposition, nouns in {
        "in": "box basket bag drawer bucket pocket chest pot cupboard",
        "on": "table shelf chair roof wall bench",
        "under": "bed tree sofa bridge stairs rug",
        "behind": "door curtain fence barn",
    }.items()
    for noun in nouns.split()
)
PLACES = _words(
    "garden kitchen forest park school market castle village library meadow cave valley tower hall desert "
    "station"
)

COLOURS = _words("red blue green yellow black white brown pink orange purple grey golden")
QUALITIES = _words(
    "big small old new heavy light soft pretty strange clean dirty round wet dry broken shiny cheap fine"
)
FEELINGS = _words("happy sad angry proud afraid excited sleepy lonely calm worried glad brave kind")
ADVERBS = _words("slowly quickly quietly loudly happily sadly again together alone well badly today")
NUMBERS = _words("two three four five six seven many some")

INTRANSITIVE = _verbs(
    "laugh play jump dance walk work rest wait climb talk listen smile cry shout",
    "sleep/slept/slept run/ran/run swim/swam/swum sing/sang/sung sit/sat/sat stand/stood/stood "
    "fly/flew/flown fall/fell/fallen eat/ate/eaten drink/drank/drunk speak/spoke/spoken write/wrote/written",
)
TRANSITIVE = _verbs(
    "push carry like want use clean open kick paint move wash borrow love need",
    "see/saw/seen find/found/found take/took/taken hide/hid/hidden break/broke/broken hold/held/held "
    "bring/brought/brought buy/bought/bought choose/chose/chosen steal/stole/stolen know/knew/known "
    "draw/drew/drawn throw/threw/thrown forget/forgot/forgotten lose/lost/lost drop/dropped/dropped",
)
# Those whose past and participle differ: "Anna saw it", "Anna has seen it".
STRONG = tuple(verb for verb in TRANSITIVE if verb.past != verb.participle)
# Verbs that never take an object, so that one is an error.
NEVER_TRANSITIVE = tuple(
    verb for verb in INTRANSITIVE if verb.base in _words("laugh sleep smile wait cry rest fall sit listen")
)
REFLEXIVE = _verbs(
    "help wash dress blame trust enjoy follow",
    "hurt/hurt/hurt see/saw/seen teach/taught/taught hide/hid/hidden",
)

# What goes with a clause, with or without a gap: "Anna heard what Tom saw", "Anna heard that Tom saw it".
KNOWING = _words("heard guessed learned remembered")

# What one does when, where and with what; none of these words has another part in the stories.
STATES = {
    "hungry": "ate some soup", "thirsty": "drank a glass of water", "tired": "went to bed early",
    "cold": "put on a warm coat", "hot": "took off every sock", "late": "ran all the way",
    "curious": "looked at the map", "ill": "called for help", "bored": "read a long poem",
    "muddy": "had a bath", "rich": "bought a horse", "scared": "turned on the light",
}  # fmt: skip
SPOTS = {
    "bakery": "bought some bread", "pool": "swam for an hour", "theatre": "watched a play",
    "zoo": "fed the animals", "bank": "saved some money", "stable": "rode a pony",
    "mill": "ground some flour", "harbour": "counted the ships", "orchard": "picked some plums",
    "church": "sang a song", "shop": "paid for some toys", "hill": "saw the sun go down",
}  # fmt: skip
TOOLS = {
    "axe": "cut the wood", "pen": "wrote a note", "broom": "swept the floor", "pan": "fried an egg",
    "net": "caught a fish", "spade": "dug a hole", "towel": "dried the dishes", "needle": "sewed a shirt",
    "camera": "took a picture", "hose": "watered the flowers", "ticket": "boarded the train",
    "hammer": "mended the roof",
}  # fmt: skip

IN_THE_PAST = ("Yesterday", "Last week", "Long ago", "Last night")
IN_GENERAL = ("Every day", "Every morning", "Every week", "Each night")
