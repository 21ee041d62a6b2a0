"""The last word of a passage of held-out text, after LAMBADA (Paperno et al. 2016).

LAMBADA's passages come from novels, and people chose them: the last word can be guessed from the whole
passage, but not from its last sentence, and in most passages it has occurred before. Here, rules choose the
passages from the test split of the run's own corpus, so that models of children's books or of generated
stories are tested on such text. The items are the same for every tokenizer, but differ between corpora: only
runs on the same corpus can be compared.

A passage is a sequence of whole sentences, verbatim. Its last sentence ends in a word of letters only (four
or more, not a function word) that also occurs earlier in the passage, but not earlier in the last sentence.
The sentences before the last have at least 40 words (LAMBADA: 50 tokens, with punctuation), and are as few as
that takes. The whole passage has at most 120 words, which fits small contexts. The context is the passage up
to the word; a space and the word are scored; the punctuation after it is dropped, as in lm_eval 0.4's
`lambada_openai` (task version 1.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from stlm.evaluation.benchmarks.items import Item, Option, TextBenchmark

_MIN_BEFORE, _MAX_WORDS = 40, 120
# At most one passage per this many characters of a document: a few in a chapter, one in a short story.
_EVERY = 1500

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_CLOSING = "[\"'”’)\\]]*"
# A sentence ends with punctuation and closing quotes or brackets, before a capital letter or the text's end.
_END = re.compile(rf"[.!?]+{_CLOSING}(?=\s+[\"'“‘(\[]*[A-Z]|\s*\Z)")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Capt|Col|Gen|Lieut|Sgt|Jr|Sr|No|[A-Z])\Z")
_LAST = re.compile(rf"(?<=\S ){_WORD.pattern}(?=[.!?]+{_CLOSING}\Z)")
# Words of four letters or more that mark grammar, or say who speaks, rather than carry content.
_FUNCTION_WORDS = """
about above across after again against almost along already also although always among anybody anyone anything
around asked because been before behind being below beneath beside besides between beyond both cannot could
does doing done down during each either else enough even ever every everybody everyone everything from have
having hence here hers herself himself however indeed instead into itself just least less like many might mine
more moreover most much must myself near neither never nevertheless nobody none nothing once only onto other
others ought ours ourselves over perhaps quite rather said same saying says shall should since some somebody
someone something somewhat still such than that thee their theirs them themselves then there therefore these
they thine thing things this those though through thus thyself till together toward towards under unless until
upon very well were what whatever when whenever where whereas wherever whether which whichever while whoever
whole whom whose will with within without would yours yourself yourselves
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


class _Passage(NamedTuple):
    """The offsets of a passage: its begin, its last word, and its end with that word."""

    begin: int
    word: int
    end: int


def make(texts: Sequence[str], limit: int, seed: int) -> list[Item]:
    """At most `limit` items, in the order of `texts`; `seed` draws first documents, then passages in them.

    Documents are read until there are enough items. An id is a hash of the passage, so items of different
    corpora never share an id; a passage that occurs several times is one item.
    """
    found: dict[str, tuple[int, int, Item]] = {}
    for number in np.random.default_rng(seed).permutation(len(texts)):
        text = texts[int(number)]
        for passage in _chosen(text, np.random.default_rng([seed, int(number)])):
            item = _item(text, passage)
            found.setdefault(item.id, (int(number), passage.begin, item))
            if len(found) == limit:
                break
        if len(found) == limit:
            break
    return [item for _, _, item in sorted(found.values(), key=lambda entry: entry[:2])]


def _item(text: str, passage: _Passage) -> Item:
    # The space before the word is scored with the word.
    context, word = text[passage.begin : passage.word - 1], text[passage.word : passage.end]
    digest = blake2b(f"{context} {word}".encode(errors="replace"), digest_size=8).hexdigest()
    return Item(digest, (Option(context, " " + word, word),), 0)


def _chosen(text: str, rng: np.random.Generator) -> Iterator[_Passage]:
    """Passages that do not overlap, at most one per `_EVERY` characters, drawn from all in that span."""
    end, block, waiting = 0, 0, []
    for passage in [*_passages(text), None]:
        if waiting and (passage is None or passage.word // _EVERY != block):
            drawn = waiting[int(rng.integers(len(waiting)))]
            yield drawn
            end, waiting = drawn.end, []
        if passage is not None and passage.begin >= end:
            block = passage.word // _EVERY
            waiting.append(passage)


def _passages(text: str) -> Iterator[_Passage]:
    """Yield each passage of `text` that makes an item, in the order of the last words."""
    sentences = list(_sentences(text))
    words = [[word.casefold() for word in _WORD.findall(text, *span)] for span in sentences]
    for number, (begin, end) in enumerate(sentences):
        last = _LAST.search(text[begin:end])
        if last is None or "\n\n" in text[begin:end]:
            continue
        word = last.group().casefold()
        if len(word) < 4 or not word.isalpha() or word in _STOP_WORDS or word in words[number][:-1]:
            continue
        first, before = number, 0
        while first and before < _MIN_BEFORE:
            first -= 1
            before += len(words[first])
        if before < _MIN_BEFORE or before + len(words[number]) > _MAX_WORDS:
            continue
        if any(word in earlier for earlier in words[first:number]):
            yield _Passage(sentences[first][0], begin + last.start(), begin + last.end())


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each sentence; text after the last full stop is not one."""
    begin = 0
    for match in _END.finditer(text):
        if match.group() == "." and _ABBREVIATION.search(text, max(0, match.start() - 12), match.start()):
            continue
        yield begin + len(text[begin : match.end()]) - len(text[begin : match.end()].lstrip()), match.end()
        begin = match.end()


LAST_WORD = TextBenchmark(name="last_word", version="1", modes=("harness",), make=make, default_limit=2000)
