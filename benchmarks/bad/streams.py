"""Outputs that are closed, full, or of an encoding that lacks the characters, of every verb that prints."""

from __future__ import annotations

from bad.case import Case, edit

_PRINTS = (
    ("--help",),
    ("--version",),
    ("train", "--help"),
    ("study", "tiny"),
    ("sizes", "10M"),
    ("use", "tiny"),
    ("compare", "tiny/baseline", "tiny/learned"),
    ("compare", "tiny/baseline", "tiny/learned", "--json"),
    ("generate", "tiny/baseline", "Once", "--tokens=3"),
    ("fingerprint", "tiny", "other"),
)
_ENCODINGS = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
_FULL = "stdout: cannot write: no space left|output cannot be written: no space left"


def cases() -> list[Case]:
    """The cases of this topic."""
    found = []
    for arguments in _PRINTS:
        said = " ".join(arguments)
        found += [
            Case(f"{said}: no space", arguments, None, _FULL, output="full"),
            Case(f"{said}: stdout closed", arguments, status=0, output="closed"),
        ]
    for arguments in (("study", "nothing"), ("frobnicate",), ("sizes", "x"), ("train", "tiny", "nothing")):
        said = " ".join(arguments)
        found += [
            Case(f"{said}: no space for an error", arguments, output="full", both=True),
            Case(f"{said}: stderr closed", arguments, output="closed", both=True),
        ]
    unbuffered = {"PYTHONUNBUFFERED": "1"}
    for arguments in (("--help",), ("sizes", "10M")):
        said = " ".join(arguments)
        found.append(
            Case(f"{said}: no space, unbuffered", arguments, None, _FULL, env=unbuffered, output="full")
        )
    labelled = edit("params/tiny.yaml", "  learned:", "  learned:\n    label: Größe − 水 \\U0001F600 …")
    for encoding, env in _ENCODINGS.items():
        found += [
            Case(f"study tiny: {encoding}", ("study", "tiny"), labelled, "baseline", 0, env),
            Case(f"study: an error in {encoding}", ("study", "größe−水"), None, "no study's name", env=env),
            Case(f"an option in {encoding}", ("study", "tiny", "--größe−水"), None, "unrecognized", env=env),
            Case(
                f"generate: {encoding}", ("generate", "tiny/baseline", "水", "--tokens=3"), status=0, env=env
            ),
            Case(f"compare: {encoding}", ("compare", "tiny/baseline", "tiny/learned"), status=0, env=env),
        ]
    return found
