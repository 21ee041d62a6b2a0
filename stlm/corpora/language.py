"""Guess the language of text: first by its scripts, then by its most frequent words.

A few dozen languages are known; any other is reported as not recognized. Tags follow BCP 47 (`en`, `zh`), as
on the Hugging Face hub.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

SEVERAL = "mul"  # BCP 47: several languages
# Languages whose writing puts no spaces between words.
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo"})
# The least share of letters in a second script or language that makes a text mixed.
_MIXED = 0.2
# The least share of frequent words of a language in its text, and the least ratio to the next language.
_LEAST, _AHEAD = 0.12, 1.15
_SAMPLE = 2000  # characters of a document that are examined

# Scripts (the first word of a character's Unicode name) that are used by one language, or mostly by one.
_OF_SCRIPT = {
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "TIBETAN": "bo",
    "GREEK": "el",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "ETHIOPIC": "am",
}
_SCRIPTS_WITHOUT_SPACES = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
)
# Frequent words by script and language: they make up a quarter to a half of a running text.
_WORDS = {
    "LATIN": {
        "en": "the of and to a in that is was it for with as his on be at he i had by not but you from her "
        "she they are this which or have were him an all my said there so we when what me would one their no",
        "de": "der die das und in zu den ist von mit sich des auf für nicht ein eine als auch es an werden "
        "aus er hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
        "oder",
        "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il "
        "sont la avec son ou leur aux mais elle comme cette était je nous ses lui vous tout on même deux d l "
        "qu",
        "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus "
        "le ha me si sin sobre este ya entre cuando todo esta ser son dos también fue había era muy hasta "
        "desde",
        "it": "di e il la che in a un per è una sono non con si da come le dei nel alla più al del anche lo "
        "i della gli ma se su ha mi era questo ci delle dal suo sua ed quando loro essere molto o",
        "pt": "de a o que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à "
        "seu sua ou quando muito nos já eu também só pelo pela até isso ela entre era depois sem mesmo aos "
        "foi",
        "nl": "de en van het een in is dat op te zijn met voor niet aan er om ook als dan maar bij of uit "
        "nog naar heeft ze die hij door over zich had was deze wordt worden meer kan geen zo wat we ik je",
        "sv": "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi "
        "så kan när hon skulle nu där min efter vid mot eller under hade mycket alla",
        "da": "og i at det er en til på som med for af de den ikke har jeg der han var et men om fra vi sig "
        "kan så hun havde efter ved mod eller blev meget nu også skal",
        "no": "og i det er en til på som med for av de den ikke har jeg han var et men om fra vi seg kan så "
        "hun hadde etter ved mot eller ble mye nå også skal å",
        "fi": "ja on ei se että hän oli mutta kun niin ovat en joka myös kuin tai ole sen jos vain nyt "
        "minä hänen mitä sitä sekä olla vielä jo kaikki tämä sitten",
        "pl": "w i na się nie z do to że jest o a jak po co tak za od ale przez był tylko dla już jego jej "
        "było czy być by ze jako ich może są gdy sobie tym tego",
        "cs": "a se v na je že to s z do o i jako ale za by po pro jsem od tak si aby byl jeho který co "
        "jak když jen bylo nebo ve už ke při byla jsou není",
        "hu": "a az és hogy nem is egy volt ez meg csak de ha már még mint ki el vagy sem azt én ő van "
        "lesz mert akkor most aki ezt minden",
        "ro": "și de a în la cu o nu că se un pe este din ca mai pentru care au fost sau dar prin lui "
        "după sa ei îi fi era cum când sunt ce",
        "tr": "ve bir bu da de için ile çok ne o ama gibi daha kadar sonra var ki olarak olan ben değil "
        "her onu şey yok en mi",
        "id": "yang dan di itu dengan untuk dari ini pada tidak ke dalam akan adalah oleh juga saya ada "
        "mereka telah bisa atau seorang sebagai karena dia lebih",
        "vi": "và là của có không một được trong cho các với đã người những này đến khi từ ra như để về "
        "còn tôi anh lại nhưng",
    },
    "CYRILLIC": {
        "ru": "и в не на я что с он как а это по но к из у то за его так же она все от был о мы бы вы ты "
        "для только мне было когда ее или до ещё уже ни если они",
        "uk": "і в не на що з як а це до я та у він за по але від так й його її було про для вона ми ви "
        "щоб був коли або є вже ще тільки бо",
        "bg": "и на да се в не е за от с че си по са като до беше ще но ли това той аз му бе след или "
        "тя как което когато само още",
        "sr": "и је у да се на су за не од са као што то а по он из би али или ће када био само до "
        "још ја ми који",
    },
    "ARABIC": {
        "ar": "في من على أن إلى عن التي الذي لا ما هذا كان هذه مع و قد كل لم هو ذلك بين كما أو بعد ثم",
        "fa": "و در به از که این را با است آن برای یک می تا بر خود هم او شد بود ها نیز من",
        "ur": "کے کی میں ہے اور سے کا کو اس کہ ہیں پر نے ایک یہ بھی تھا وہ نہیں کر",
    },
}
_FREQUENT = {
    script: {tag: frozenset(words.split()) for tag, words in languages.items()}
    for script, languages in _WORDS.items()
}
NAMES = {
    "am": "Amharic",
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "bo": "Tibetan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "hy": "Armenian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ka": "Georgian",
    "km": "Khmer",
    "ko": "Korean",
    "lo": "Lao",
    "mul": "several languages",
    "my": "Burmese",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sr": "Serbian",
    "sv": "Swedish",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}


class Language(NamedTuple):
    """A guess: its tag (`mul`: several, None: not recognized), in words, whether spaces separate words."""

    tag: str | None
    name: str
    spaced: bool


@cache
def _script(character: str) -> str | None:
    """The script of a letter (or of a vowel sign); None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    script = unicodedata.name(character, "UNKNOWN").split()[0]
    return None if script in ("MODIFIER", "COMBINING", "FULLWIDTH", "UNKNOWN") else script


def scripts(text: str) -> Counter[str]:
    """The letters of `text` by script, as Unicode names them: LATIN, CYRILLIC, CJK."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = _script(character)
        if script is not None:
            found[script] += count
    return found


def _of_document(text: str) -> tuple[str | None, Counter[str]]:
    """The language of one document, by its main script, and its number of letters by script."""
    letters = scripts(text)
    if not letters:
        return None, letters
    # Japanese mixes kana with Han characters; Chinese has no kana.
    if (letters["HIRAGANA"] + letters["KATAKANA"]) > 0.1 * (letters["CJK"] + letters["HIRAGANA"]):
        japanese = sum(letters.pop(script, 0) for script in ("CJK", "HIRAGANA", "KATAKANA"))
        letters["HIRAGANA"] = japanese
    script = letters.most_common(1)[0][0]
    if script not in _FREQUENT:
        return _OF_SCRIPT.get(script), letters
    words = re.findall(r"[^\W\d_]+", text.lower())
    shares = sorted(
        (
            (sum(map(frequent.__contains__, words)) / max(len(words), 1), tag)
            for tag, frequent in _FREQUENT[script].items()
        ),
        reverse=True,
    )
    (best, tag), (second, _) = shares[:2]
    return (tag if best >= _LEAST and best >= _AHEAD * second else None), letters


def _named(script: str) -> str:
    """A script in words."""
    return "Han" if script == "CJK" else script.capitalize()


def guess(texts: Iterable[str]) -> Language:
    """The language of `texts`, by the first characters of each."""
    languages: Counter[str | None] = Counter()
    letters: Counter[str] = Counter()
    for text in texts:
        tag, counted = _of_document(text[:_SAMPLE])
        languages[tag] += counted.total()
        letters += counted
    total = letters.total()
    if not total:
        return Language(None, "no letters: numbers or signs alone", True)
    spaced = sum(letters[script] for script in _SCRIPTS_WITHOUT_SPACES) <= total / 2
    known = {tag: count for tag, count in languages.items() if tag is not None}
    frequent = sorted((tag for tag in known if known[tag] >= _MIXED * total), key=lambda tag: -known[tag])
    mixed = [script for script, count in letters.most_common() if count >= _MIXED * total]
    if len(frequent) > 1 or (frequent and len(mixed) > 1):
        what = [NAMES[tag] for tag in frequent] if len(frequent) > 1 else [_named(script) for script in mixed]
        return Language(SEVERAL, f"mixed: {', '.join(what)}", spaced)
    if frequent and known[frequent[0]] >= total / 2:
        without = "" if spaced else ", text without spaces between words"
        return Language(frequent[0], NAMES[frequent[0]] + without, spaced)
    name = _named(letters.most_common(1)[0][0])
    return Language(None, f"not recognized ({name} letters)" + ("" if spaced else ", no spaces"), spaced)
