"""Options of the command line: their types, and the options of verbs that have many."""

from __future__ import annotations

import argparse
import re

from stlm.errors import shortened

# The types in which `stlm export RUN FILE.gguf` stores matrices.
GGUF_TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
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


def add_importance_options(verb: argparse.ArgumentParser) -> None:
    """The options of `stlm importance`."""
    verb.add_argument(
        "--layers",
        type=whole_number(1),
        nargs="+",
        default=(),
        metavar="N",
        help="numbers of layers to cut to; default: three quarters, a half, a third, and the run's",
    )
    verb.add_argument(
        "--loss", action="store_true", help="also leave out layers by the loss without them, which takes long"
    )


def add_drafts_options(verb: argparse.ArgumentParser) -> None:
    """The options of `stlm drafts`."""
    at_least_1 = whole_number(1, 10**18)
    verb.add_argument(
        "--lengths", type=at_least_1, nargs="+", default=[2, 4, 8], metavar="N", help="default: 2 4 8"
    )
    verb.add_argument("--prompt", default="", help="the beginning of each text; default: none")
    verb.add_argument(
        "--tokens", type=at_least_1, default=256, metavar="N", help="to draw in each round; default: 256"
    )
    verb.add_argument(
        "--rounds", type=at_least_1, default=3, metavar="N", help="of which the fastest counts; default: 3"
    )
    _add_sampling_options(verb)


def _add_sampling_options(verb: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and on which device."""

    def option(name: str, kind, default, text: str, metavar: str) -> None:
        verb.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    option("--temperature", float, 0.8, "0: always the most probable token; 1: as trained; default: 0.8", "T")
    option("--top-k", whole_number(1, 10**18), None, "draw from the K most probable tokens", "K")
    option("--top-p", float, 1.0, "draw from the most probable tokens that sum to P", "P")
    option("--min-p", float, 0.0, "draw from tokens of at least M times the best one's probability", "M")
    option("--device", str, None, "cpu, cuda or cuda:N; default: CUDA where there is one", "NAME")


def _replaces(argument: argparse.Action) -> type[argparse.Action]:
    """The action of an option with which `argument` is not expected.

    An argument that were optional from the start could not follow an option.
    """

    class Replaces(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None) -> None:
            setattr(namespace, self.dest, values)
            argument.nargs, argument.required = "?", False

    return Replaces


def add_generate_options(verb: argparse.ArgumentParser, prompt: argparse.Action) -> None:
    """The options of `stlm generate`, whose argument `prompt` --prompts, --prefix and --suffix replace."""

    def option(name: str, kind, default, text: str, metavar: str) -> None:
        verb.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    at_least_1 = whole_number(1, 10**18)
    option(
        "--tokens", at_least_1, 100, "most tokens to add (of a byte-level model: bytes; default: 100)", "N"
    )
    _add_sampling_options(verb)
    verb.add_argument(
        "--prompts",
        action=_replaces(prompt),
        metavar="FILE",
        help="in place of PROMPT, a file with a prompt a line (.jsonl: a JSON text); prints JSON lines",
    )
    for name, where in (("--prefix", "before"), ("--suffix", "after")):
        verb.add_argument(
            name,
            action=_replaces(prompt),
            metavar="TEXT",
            help=f"in place of PROMPT, the text {where} what is written, by a run trained to infill; default "
            "beside the other one: empty",
        )
    option("--batch", at_least_1, 32, "most texts of --prompts that are written at once; default: 32", "N")
    option("--seed", whole_number(0), 0, "what is drawn; default: 0", "N")
    option("--samples", at_least_1, 1, "how many texts, with seeds that follow one another", "N")
    option("--readout", str, None, "a language model within the model, as in evaluation.json: exit-2", "NAME")
    option(
        "--draft",
        str,
        None,
        "who drafts tokens, which the model verifies several at once: an exit of the model, such as "
        "exit-2; its further heads, ahead-3; another model with the same tokenizer, named like RUN; auto: "
        "the fastest that `stlm drafts` measured",
        "DRAFT",
    )
    option("--draft-length", at_least_1, None, "most tokens of a draft; default: 4", "N")
    option("--fallback", float, None, "end a draft where its best token has a probability below P", "P")
    option(
        "--rollback",
        float,
        None,
        "accept drafted tokens with a surprise of at most D nats: faster, but no longer the model's text",
        "D",
    )
    verb.add_argument(
        "--no-cache",
        action="store_true",
        help="read the whole text again for each token: slower, no other text",
    )


def add_export_options(verb: argparse.ArgumentParser) -> None:
    """The options of `stlm export`."""
    verb.add_argument("--force", action="store_true", help="replace what was exported there before")
    verb.add_argument(
        "--type",
        type=str.upper,
        choices=GGUF_TYPES,
        help="of a GGUF file: how matrices are stored; default: F32, as trained",
    )
    verb.add_argument(
        "--fallback",
        type=str.upper,
        choices=GGUF_TYPES,
        help="of a GGUF file: how matrices are stored whose rows --type cannot hold; default: none, an error",
    )


def add_import_options(verb: argparse.ArgumentParser) -> None:
    """The options of `stlm import`: what is said of the model; by default what the file says."""
    verb.add_argument("--licence", help="its licence")
    verb.add_argument("--origin", help="who published it, and where")
    verb.add_argument("--prefix", metavar="TOKEN", help="the token that texts began with in training")
    verb.add_argument(
        "--training-tokens", type=whole_number(1), metavar="N", help="tokens that it was trained on"
    )
    verb.add_argument("--force", action="store_true", help="replace a model of this name")
