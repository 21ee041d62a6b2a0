"""Arguments and options that are missing, unknown or out of range, places to stand in, texts for `new`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bad.case import Case, put

_GENERATE = ("generate", "tiny/baseline", "Once")
# Of `generate`: option, values.
_OPTIONS = {
    "--tokens": ("0", "-1", "1.5", "ten", "", "9" * 5000, "1" + "0" * 30, "٣"),
    "--temperature": ("-1", "nan", "inf", "hot", "1e400"),
    "--top-k": ("0", "-1", "x", "1" + "0" * 30),
    "--top-p": ("0", "-0.1", "1.1", "nan"),
    "--min-p": ("-0.1", "1.1", "nan", "x"),
    "--seed": ("-1", "x", "9" * 5000, "0.5"),
    "--samples": ("0", "x", "1" + "0" * 30),
    "--device": ("", "gpu", "cuda:99", "cuda", "meta", "c" * 300, "cpu:7:7"),
}
_SIZES = (
    ("1e400", "beyond floating point"),
    ("1e30", "more than can be"),
    ("1e18", "10^18"),
    ("0", "nothing"),
    ("1", "a parameter"),
    ("-5M", "negative"),
    ("nan", "not a number"),
    ("inf", "infinity"),
    ("", "empty"),
    ("20m", "a small letter"),
    ("M", "no number"),
    ("9" * 5000, "5,000 digits"),
    ("1e" + "9" * 5000, "an exponent of 5,000 digits"),
    ("٢M", "other digits"),
    ("1\n0M", "a newline"),
    ("x" * 100_000, "100,000 characters"),
)


def _elsewhere(path: str) -> Callable[[Path], None]:
    """Leave nothing of the project but one empty folder."""

    def spoil(project: Path) -> None:
        for name in os.listdir(project):
            own = project / name
            shutil.rmtree(own) if own.is_dir() else own.unlink()
        (project / path).mkdir(parents=True)

    return spoil


def _remove(*paths: str) -> Callable[[Path], None]:
    def spoil(project: Path) -> None:
        for path in paths:
            own = project / path
            shutil.rmtree(own) if own.is_dir() else own.unlink()

    return spoil


def _file_for(path: str) -> Callable[[Path], None]:
    """Put a file in a folder's place."""

    def spoil(project: Path) -> None:
        shutil.rmtree(project / path)
        (project / path).write_text("no folder")

    return spoil


def _texts(content: bytes, name: str = "one.txt", copies: int = 1) -> Callable[[Path], None]:
    """One text, in place of those of the project."""

    def spoil(project: Path) -> None:
        shutil.rmtree(project / "texts")
        (project / "texts").mkdir()
        for copy in range(copies):
            (project / "texts" / f"{copy}-{name}").write_bytes(content)

    return spoil


def _command_line() -> list[Case]:
    found = [
        Case("no verb", (), expects="required: VERB"),
        Case("an unknown verb", ("frobnicate",), expects="invalid choice"),
        Case("an empty verb", ("",), expects="invalid choice"),
        Case("a verb of 10,000 characters", ("v" * 10_000,), expects="invalid choice"),
        Case("an unknown option", ("study", "tiny", "--nonsense"), expects="unrecognized arguments"),
        Case("too many arguments", ("study", "tiny", "more"), expects="unrecognized arguments"),
        Case("an option before the verb", ("--set", "a=1", "study"), expects="error"),
        Case("--set without a value", ("study", "tiny", "--set"), expects="expected one argument"),
    ]
    for verb, rest in (
        ("fetch", ()),
        ("tokenize", ("synthetic",)),
        ("train", ("tiny",)),
        ("evaluate", ("tiny",)),
        ("contamination", ()),
        ("report", ()),
        ("compare", ("tiny/baseline",)),
        ("generate", ("tiny/baseline",)),
        ("export", ("tiny/baseline",)),
        ("new", ("x",)),
        ("use", ()),
        ("fingerprint", ()),
    ):
        found.append(Case(f"{verb}: an argument too few", (verb, *rest), expects="arguments are required"))
    for verb in ("sync", "document"):
        found.append(Case(f"{verb}: an argument too many", (verb, "x"), expects="unrecognized arguments"))
    return found


def _numbers() -> list[Case]:
    found = [
        Case(f"sizes: {what}", ("sizes", "--", text), expects="no number of parameters|no model of the rule")
        for text, what in _SIZES
    ]
    for value in ("0", "1", "-1", "1" + "0" * 12, "9" * 5000, "x", "1.5"):
        shown = value if len(value) < 20 else f"{len(value)} digits"
        found.append(Case(f"sizes: --context {shown}", ("sizes", f"--context={value}"), expects="context"))
    for value in ("0", "-1", "x", "1" + "0" * 12, "9" * 5000):
        shown = value if len(value) < 20 else f"{len(value)} digits"
        arguments = ("tokenize", "synthetic", "bytes", f"--memory={value}")
        found.append(Case(f"tokenize: --memory {shown}", arguments, expects="--memory"))
    for value in ("0", "-1", "nan", "inf", "soon", "1e-400", "9" * 5000):
        shown = value if len(value) < 20 else f"{len(value)} digits"
        arguments = ("new", "mine", "--text", "texts", f"--minutes={value}")
        found.append(Case(f"new: --minutes {shown}", arguments, expects="--minutes"))
    for option, values in _OPTIONS.items():
        for value in values:
            shown = value if len(value) < 35 else f"{len(value)} characters"
            said = "error: "
            found.append(
                Case(f"generate: {option} {shown!r}", (*_GENERATE, f"{option}={value}"), expects=said)
            )
    return found


def _places() -> list[Case]:
    """Folders that no project is in, and what is missing or in the way."""
    verbs = (
        ("study",),
        ("study", "smoke"),
        ("fetch", "synthetic"),
        ("tokenize", "synthetic", "bytes"),
        ("train", "tiny", "baseline"),
        ("evaluate", "tiny", "baseline"),
        ("contamination", "tiny"),
        ("report", "tiny"),
        ("new", "mine", "--text", "texts"),
        ("use", "tiny"),
        ("fingerprint", "synthetic"),
        ("document",),
    )
    found = [
        Case(f"{' '.join(verb)}: not in a project", verb, _elsewhere("texts"), "top folder|no such file")
        for verb in verbs
    ]
    found += [
        Case("sync: not in a project", ("sync",), _elsewhere("x"), "stlm use STUDY"),
        Case("sync: no repository of DVC", ("sync",), None, "dvc status"),
        Case("compare: not in a project", ("compare", "a/b", "a/c"), _elsewhere("x"), "a/b"),
        Case("generate: not in a project", ("generate", "a/b", ""), _elsewhere("x"), "a/b"),
        Case("export: not in a project", ("export", "a/b", "c"), _elsewhere("x"), "a/b"),
        Case("document: no README", ("document",), None, "README.md"),
        Case(
            "tokenize: nothing fetched",
            ("tokenize", "synthetic", "bytes"),
            _remove("data"),
            "stlm fetch|no such file",
        ),
        Case(
            "tokenize: a vocabulary not fetched", ("tokenize", "synthetic", "gpt2"), None, "stlm fetch gpt2"
        ),
        Case(
            "train: nothing tokenized", ("train", "tiny", "learned"), _remove("data"), "tokenize|no such file"
        ),
        Case("fetch: no mirror", ("fetch", "gutenberg_children"), None, "--mirror"),
        Case(
            "fetch: a mirror that is not there", ("fetch", "blimp", "--mirror", "no"), None, "no is no folder"
        ),
        Case("fetch: a mirror that is a file", ("fetch", "blimp", "--mirror", "dvc.yaml"), None, "no folder"),
        Case(
            "fetch: an empty mirror", ("fetch", "childes", "--mirror", "texts"), None, "none of its sources"
        ),
        Case("fetch: a mirror of 300 characters", ("fetch", "blimp", "--mirror", "m" * 300), None, "m"),
        Case(
            "fetch: STLM_MIRROR is nowhere",
            ("fetch", "childes"),
            None,
            "STLM_MIRROR",
            env={"STLM_MIRROR": "no"},
        ),
        Case("fetch: data is a file", ("fetch", "synthetic"), _file_for("data"), "data"),
        Case(
            "tokenize: data/tokens is a file",
            ("tokenize", "synthetic", "bytes"),
            _file_for("data/tokens"),
            "tokens",
        ),
        Case("train: results is a file", ("train", "tiny", "learned"), _file_for("results"), "results"),
        Case(
            "report: a run is not trained", ("report", "tiny"), _remove("results/tiny/runs"), "results/tiny"
        ),
        Case("export: a folder that is there", ("export", "tiny/baseline", "texts"), None, "texts"),
        Case("export: into a file", ("export", "tiny/baseline", "dvc.yaml"), None, "dvc.yaml"),
        Case("export: below a file", ("export", "tiny/baseline", "dvc.yaml/x"), None, "dvc.yaml"),
        Case("export: a folder of 300 characters", ("export", "tiny/baseline", "o" * 300), None, "too long"),
        Case("export: no folder", ("export", "tiny/baseline", ""), None, "error: "),
        Case("export: the root", ("export", "tiny/baseline", "/"), None, "error: "),
        Case(
            "export: a folder that may not be written",
            ("export", "tiny/baseline", "locked/out"),
            lambda project: (project / "locked").mkdir(mode=0o500),
            "permission denied",
            unprivileged=True,
        ),
        Case("use: dvc.yaml is no UTF-8", ("use", "tiny"), put("dvc.yaml", b"\xff"), "now lists", 0),
        Case(
            "fingerprint: data is unreadable",
            ("fetch", "synthetic"),
            lambda project: os.chmod(project / "data" / "raw", 0),
            "permission denied",
            unprivileged=True,
        ),
    ]
    return found


def _new() -> list[Case]:
    """Texts that no study can be made of."""

    def case(
        what: str, spoil: Callable[[Path], None] | None, said: str, *more: str, text: str = "texts"
    ) -> Case:
        return Case(f"new: {what}", ("new", "mine", "--text", text, *more), spoil, said)

    return [
        case("no such file", None, "no such file or folder", text="nowhere"),
        case("a path of 300 characters", None, "error: ", text="n" * 300),
        case("an empty path", None, "error: ", text=""),
        case("a glob that finds nothing", None, "--text", text="texts/*.pdf"),
        case("a glob of 300 characters", None, "error: ", text="n" * 300 + "*"),
        case("a glob that does not end", None, "--text", text="texts/[a"),
        case("a byte in the path that is not UTF-8", None, "no such file", text="\udcff"),
        case("an empty folder", _texts(b"", copies=0), "no file of a known format"),
        case("empty files", _texts(b"", copies=3), "too few"),
        case("blanks alone", _texts(b" \n" * 1000), "too few"),
        case("a few words", _texts(b"once upon a time"), "too few"),
        case("files of an unknown format", _texts(b"x", "a.pdf"), "no file of a known format"),
        case("a parquet file that is none", _texts(b"PAR1", "a.parquet"), "a.parquet"),
        case("an Arrow file that is none", _texts(b"ARROW1", "a.arrow"), "a.arrow"),
        case("JSON lines that are none", _texts(b"{]\n", "a.jsonl"), "a.jsonl"),
        case("JSON nested 100,000 deep", _texts(b"[" * 100_000, "a.json"), "a.json"),
        case("JSON lines of numbers", _texts(b"1\n2\n", "a.jsonl"), "a.jsonl"),
        case("a CSV file of one column of numbers", _texts(b"a\n1\n2\n", "a.csv"), "error: "),
        case("a gzip file that is none", _texts(b"text", "a.txt.gz"), "a.txt.gz"),
        case("a gzip file cut short", _texts(b"\x1f\x8b\x08\0\0\0\0\0\0\3abc", "a.txt.gz"), "a.txt.gz"),
        case("a zstd file that is none", _texts(b"text", "a.jsonl.zst"), "a.jsonl.zst"),
        case("a column that is not there", _texts(b'{"a": "b"}\n', "a.jsonl"), "--column", "--column", "c"),
        case(
            "a column of 300 characters",
            _texts(b'{"a": "b"}\n', "a.jsonl"),
            "--column",
            "--column",
            "c" * 300,
        ),
        case("a separator that is no expression", None, "not a regular expression", "--separator", "("),
        case("a separator that is everywhere", None, "empty text", "--separator", "x*"),
        case("a separator of 100,000 brackets", None, "--separator", "--separator", "(" * 100_000),
        case("two ways to cut", None, "give one", "--separator", "x", "--documents", "line"),
        case("a way to cut that is none", None, "invalid choice", "--documents", "page"),
        Case(
            "new: a text that may not be read",
            ("new", "mine", "--text", "texts"),
            lambda project: os.chmod(project / "texts" / "0.txt", 0),
            "permission denied|Permission denied",
            unprivileged=True,
        ),
        Case(
            "new: a folder that may not be read",
            ("new", "mine", "--text", "texts"),
            lambda project: os.chmod(project / "texts", 0),
            "permission denied|Permission denied|no file",
            unprivileged=True,
        ),
        Case(
            "new: a link to itself",
            ("new", "mine", "--text", "texts/loop.txt"),
            lambda project: (project / "texts" / "loop.txt").symlink_to("loop.txt"),
            "loop.txt",
        ),
    ]


def _right() -> list[Case]:
    """What must go on working."""
    return [
        Case("train: another seed", ("train", "tiny", "baseline", "--set", "seeds=[3]"), status=0),
        Case("evaluate: a published model", ("evaluate", "tiny", "other"), status=0),
        Case("generate: an empty prompt", ("generate", "tiny/baseline", "", "--tokens=3"), status=0),
        Case(
            "generate: from stdin",
            ("generate", "tiny/baseline", "-", "--tokens=3"),
            None,
            "",
            0,
            stdin=b"Once",
        ),
        Case(
            "generate: stdin that is not UTF-8",
            ("generate", "tiny/baseline", "-"),
            None,
            "UTF-8",
            stdin=b"\xff",
        ),
        Case(
            "generate: a prompt that is not UTF-8",
            ("generate", "tiny/baseline", "\udcff"),
            None,
            "UTF-8|Unicode",
        ),
        Case("export: a folder whose name is not UTF-8", ("export", "tiny/baseline", "\udcff"), status=0),
        Case("sizes: the largest", ("sizes", "2B"), None, "2B baseline", 0),
    ]


def cases() -> list[Case]:
    """The cases of this topic."""
    return [*_command_line(), *_numbers(), *_places(), *_new(), *_right()]
