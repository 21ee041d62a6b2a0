"""Options of the command line: their types, and the options of verbs that have many."""

from __future__ import annotations

import argparse
import re

from stlm.errors import shortened

# The bound of options that have none; nobody means a number with more digits.
_MOST = 10**30


def whole_number(least: int, most: int = _MOST):
    """The type of an option: text -> a whole number from `least` to `most`."""

    def number(text: str) -> int:
        # Digits are counted first, because Python refuses to convert thousands of them.
        if not re.fullmatch("[0-9]{1,31}", text) or not least <= int(text) <= most:
            bound = "" if most == _MOST else f" and at most {most:,}"
            raise argparse.ArgumentTypeError(
                f"{shortened(text)!r}: expected a whole number of at least {least}{bound}"
            )
        return int(text)

    return number


def _minutes(text: str) -> float:
    """The type of an option: text -> a positive number of minutes."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{shortened(text)!r}: expected minutes, for example 30")
    return minutes


def add_new_options(verb: argparse.ArgumentParser) -> None:
    """The options of `stlm new`."""
    verb.add_argument(
        "--text", nargs="+", required=True, metavar="PATH", help="files, folders or quoted globs of text"
    )
    verb.add_argument("--column", help="column of JSON, CSV, parquet or Arrow files that holds the text")
    verb.add_argument(
        "--documents", choices=("file", "line", "paragraph"), help="what a document is in text files"
    )
    verb.add_argument(
        "--separator", default="", metavar="REGEX", help="where text files are cut instead; not kept"
    )
    verb.add_argument(
        "--minutes", type=_minutes, default=30.0, metavar="N", help="time for the study; default: 30"
    )
    verb.add_argument("--force", action="store_true", help="replace a corpus and study of this name")


def add_generate_options(verb: argparse.ArgumentParser) -> None:
    """The options of `stlm generate`."""

    def option(name: str, kind, default, text: str, metavar: str) -> None:
        verb.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    at_least_1 = whole_number(1, 10**18)
    option(
        "--tokens", at_least_1, 100, "most tokens to add (of a byte-level model: bytes; default: 100)", "N"
    )
    option("--temperature", float, 0.8, "0: always the most probable token; 1: as trained; default: 0.8", "T")
    option("--top-k", at_least_1, None, "draw from the K most probable tokens", "K")
    option("--top-p", float, 1.0, "draw from the most probable tokens that sum to P", "P")
    option("--min-p", float, 0.0, "draw from tokens of at least M times the best one's probability", "M")
    option("--seed", whole_number(0), 0, "what is drawn; default: 0", "N")
    option("--samples", at_least_1, 1, "how many texts, with seeds that follow one another", "N")
    option("--readout", str, None, "a language model within the model, as in evaluation.json: exit-2", "NAME")
    option("--device", str, None, "cpu, cuda or cuda:N; default: CUDA where there is one", "NAME")
    verb.add_argument(
        "--no-cache",
        action="store_true",
        help="read the whole text again for each token: slower, no other text",
    )
