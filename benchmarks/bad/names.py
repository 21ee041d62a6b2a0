"""Names that are none: paths, other alphabets, too long, in every verb."""

from __future__ import annotations

from itertools import cycle

from bad.case import Case, edit

LONG = "a" * 300
# What no study is called, and no run.
STUDIES: tuple[tuple[str, str], ...] = (
    ("", "an empty name"),
    (".", "a dot"),
    ("..", "two dots"),
    ("../params/tiny", "a path from above"),
    ("./tiny", "a path from here"),
    ("params/tiny.yaml", "its file"),
    ("tiny.yaml", "its file's name"),
    ("/etc/passwd", "an absolute path"),
    ("tiny/baseline", "a run"),
    ("tiny ", "a space at its end"),
    ("ti ny", "a space inside"),
    ("Tiny", "a capital letter"),
    ("tiny\n", "a newline at its end"),
    ("ti\nny", "a newline inside"),
    ("tíny", "an accent"),
    ("ｔｉｎｙ", "full-width letters"),
    ("тiny", "a Cyrillic letter"),
    ("ti\x1b[31mny", "an escape sequence"),
    ("ti\udcffny", "a byte that is not UTF-8"),
    ("-tiny", "a dash at its beginning"),
    ("tiny*", "a star"),
    ("corpora", "a file of params/ that is no study"),
    ("active", "a word that is taken"),
    ("tniy", "letters in another order"),
    (LONG, "300 characters"),
    ("a" * 101, "101 characters"),
    ("a" * 100_000, "100,000 characters"),
    ("a/" * 5000, "a path of 5,000 folders"),
)
_OF_STUDY = (
    ("study",),
    ("use",),
    ("contamination",),
    ("report",),
    ("train", "baseline"),
    ("evaluate", "baseline"),
)
_SAID = "no study's name|no such study|required: STUDY|arguments are required|invalid"
RUNS: tuple[tuple[str, str], ...] = (
    ("", "an empty name"),
    ("../learned", "a path"),
    ("basline", "a letter left out"),
    ("Baseline", "a capital letter"),
    ("baseline\n", "a newline"),
    ("baseline-s0", "a seed that has no run of its own"),
    (LONG, "300 characters"),
    ("a" * 100_000, "100,000 characters"),
    ("\udcff", "a byte that is not UTF-8"),
)
PLACES: tuple[tuple[str, str], ...] = (
    ("", "nothing"),
    ("tiny", "a study"),
    ("tiny/", "a study and a slash"),
    ("/", "the root"),
    ("..", "two dots"),
    ("tiny/nothing", "a run that is not there"),
    ("tiny/baseline@", "a step that is none"),
    ("tiny/baseline@7", "a step without a checkpoint"),
    ("tiny/baseline@-3", "a negative step"),
    ("tiny/baseline@step-", "a step without a number"),
    ("tiny/baseline@" + "9" * 5000, "a step of 5,000 digits"),
    ("tiny/baseline@٣", "a step in other digits"),
    ("results/tiny", "a folder of no run"),
    ("dvc.yaml", "a file"),
    ("dvc.yaml/x", "a file as a folder"),
    (LONG, "300 characters"),
    (f"tiny/{LONG}", "a run of 300 characters"),
    ("a/" * 5000, "a path of 5,000 folders"),
    ("\udcff/\udcff", "bytes that are not UTF-8"),
    ("tiny/base\nline", "a newline"),
)
DATA: tuple[tuple[str, str], ...] = (
    ("", "an empty name"),
    ("../raw/synthetic", "a path"),
    ("synthetc", "a letter left out"),
    ("SYNTHETIC", "capital letters"),
    ("tiny", "a study"),
    (LONG, "300 characters"),
    ("a" * 100_000, "100,000 characters"),
    ("syn\nthetic", "a newline"),
    ("\udcff", "a byte that is not UTF-8"),
)
TOKENIZERS: tuple[tuple[str, str], ...] = (
    ("", "an empty name"),
    ("bpe-", "no size"),
    ("bpe-0", "size 0"),
    ("bpe-257", "one token too few"),
    ("bpe-00300", "zeros before its size"),
    ("bpe--300", "a negative size"),
    ("bpe-300.0", "a fraction"),
    ("bpe-1e4", "a size with an exponent"),
    ("bpe-٣٠٠", "a size in other digits"),
    ("bpe-99999999999", "99,999,999,999 tokens"),
    ("bpe-" + "9" * 5000, "a size of 5,000 digits"),
    ("BPE-300", "capital letters"),
    ("stride-0", "stride 0"),
    ("stride-04", "a zero before its stride"),
    ("stride-17", "a stride too long"),
    ("stride-" + "9" * 5000, "a stride of 5,000 digits"),
    ("stride-", "no stride"),
    ("gpt3", "an unknown vocabulary"),
    ("../bpe-300", "a path"),
    (LONG, "300 characters"),
    ("\udcff", "a byte that is not UTF-8"),
)
# Of variants and published models, as YAML has them.
VARIANTS: tuple[tuple[str, str, str], ...] = (
    ("010", "ten", "put it in quotes: '010'"),
    ("0x1f", "a number in hexadecimal", "put it in quotes"),
    ("1e3", "a number with an exponent", "put it in quotes"),
    (".inf", "infinity", "put it in quotes"),
    ("true", "true", "put it in quotes: 'true'"),
    ("False", "false", "put it in quotes: 'False'"),
    ("~", "null", "put it in quotes: '~'"),
    ("null", "null in letters", "put it in quotes: 'null'"),
    ("1:30", "a time", "a name is lower-case letters"),
    ("2026-02-31", "a date", "a name is lower-case letters"),
    ('"010"', "digits in quotes", "a name is lower-case letters"),
    ('""', "nothing", "a name is lower-case letters"),
    ("../learned", "a path", "a name is lower-case letters"),
    ("a b", "a space", "a name is lower-case letters"),
    ('"a\\nb"', "a newline", "a name is lower-case letters"),
    ("Learned", "a capital letter", "a name is lower-case letters"),
    ("größer", "an umlaut", "a name is lower-case letters"),
    (LONG, "300 characters", "at most 100"),
)
NEW: tuple[tuple[str, str], ...] = (
    ("", "an empty name"),
    ("My-Text", "capital letters"),
    ("my text", "a space"),
    ("../text", "a path"),
    ("corpora", "a file of params/"),
    ("blimp", "a benchmark"),
    ("gpt2", "a vocabulary"),
    ("tiny", "a study that is there"),
    ("synthetic", "a corpus that is there"),
    ("文", "another alphabet"),
    (LONG, "300 characters"),
    ("a" * 100_000, "100,000 characters"),
    ("\udcff", "a byte that is not UTF-8"),
    ("a\nb", "a newline"),
)


def cases() -> list[Case]:
    """The cases of this topic."""
    found = []
    verbs = cycle(_OF_STUDY)
    for name, what in STUDIES:
        for _ in range(2):
            verb, *rest = next(verbs)
            given = ("--", name) if name.startswith("-") else (name,)
            found.append(Case(f"{verb}: a study: {what}", (verb, *given, *rest), None, _SAID))
    for name, what in RUNS:
        for verb in ("train", "evaluate"):
            found.append(Case(f"{verb}: a run: {what}", (verb, "tiny", name), None, "has no run"))
        found.append(
            Case(
                f"fingerprint: a model: {what}", ("fingerprint", "tiny", name), None, "has no published model"
            )
        )
    # `export` finds checkpoints as `generate` does, and `compare` its second as its first: some are enough.
    for number, (name, what) in enumerate(PLACES):
        found.append(Case(f"generate: {what}", ("generate", name, "Once")))
        found.append(Case(f"compare: {what}", ("compare", name, "tiny/baseline")))
        if number % 4 == 0:
            found.append(Case(f"export: {what}", ("export", name, "out")))
            found.append(Case(f"compare, the second: {what}", ("compare", "tiny/baseline", name)))
    for name, what in DATA:
        found.append(Case(f"fetch: {what}", ("fetch", name), None, "is in none of"))
        found.append(Case(f"tokenize: a corpus: {what}", ("tokenize", name, "bytes"), None, "unknown corpus"))
        found.append(Case(f"fingerprint: {what}", ("fingerprint", name), None, "is in none of"))
    verbs = cycle([("tokenize", "synthetic"), ("sizes", "10M", "--tokenizer"), ("study", "tiny", "--set")])
    for name, what in TOKENIZERS:
        verb = next(verbs)
        given = f"tokenizer='{name}'" if verb[0] == "study" else name
        found.append(
            Case(f"{verb[0]}: a tokenizer: {what}", (*verb, given), None, "tokenizer|chunks|Unicode")
        )
    for name, what, said in VARIANTS:
        for old in ("  learned:", "  other:"):
            kind = "a variant" if old == "  learned:" else "a published model"
            key = f"? {name}\n  :" if len(name) > 100 else f"{name}:"
            spoil = edit("params/tiny.yaml", old, f"  {key}")
            found.append(Case(f"study: {kind} named {what}", ("study", "tiny"), spoil, said))
    for name, what in NEW:
        found.append(Case(f"new: {what}", ("new", name, "--text", "texts"), None, "error: "))
    return found
