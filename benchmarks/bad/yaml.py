"""Parameters that parse strangely: as files of params/, as dvc.yaml and after --set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from bad.case import Case, edit, put
from bad.project import TINY

STUDY, CORPORA = "params/tiny.yaml", "params/corpora.yaml"
_LAUGHS = "a0: &a0 [x, x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 40)
)
_BYTES = "model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 64, context: 64}"

# Texts that no YAML file of a study can be: what is wrong, the text, what must be said.
TEXTS: tuple[tuple[str, str | bytes, str], ...] = (
    ("an empty file", "", "found nothing"),
    ("nothing but a comment", "# later\n", "found nothing"),
    ("a list", "- corpus\n- tokenizer\n", "expected keys and values, found list"),
    ("a text", "corpus\n", "expected keys and values, found str"),
    ("a number", "12\n", "expected keys and values, found int"),
    ("a list as a key", TINY + "? [a, b]\n: 1\n", "a key is a text"),
    ("a mapping as a key", TINY + "{a: 1}: 2\n", "a key is a text"),
    ("a key that is an alias of a list", TINY + "x: &x [1]\n*x : 2\n", "a key is a text"),
    ("a number as a key", TINY + "12: 3\n", "put it in quotes: '12'"),
    ("null as a key", TINY + "~: 3\n", "not null"),
    ("nothing as a key", TINY + "? \n: 3\n", "a key is a text"),
    ("a key given twice", TINY + "corpus: synthetic\n", "'corpus' is given twice"),
    ("a key twice, in two styles", TINY + '"corpus": synthetic\n', "'corpus' is given twice"),
    ("a merge key", TINY + "<<: {corpus: other}\n", "<<: no such key"),
    ("two merge keys", TINY + "<<: {}\n<<: {}\n", "given twice"),
    ("an alias of nothing", TINY + "x: *nothing\n", "nothing"),
    ("an anchor inside itself, a list", TINY + "x: &x [*x]\n", "&x contains itself"),
    ("an anchor inside itself, a mapping", TINY + "x: &x {y: {z: *x}}\n", "&x contains itself"),
    ("the whole file inside itself", "&x\ncorpus: *x\n", "&x contains itself"),
    ("a billion laughs", TINY + _LAUGHS, "aliases written out"),
    ("nesting of 2,000, flow", TINY + "x: " + "[" * 2000 + "]" * 2000 + "\n", "nested more than"),
    ("nesting of 100,000, flow", TINY + "x: " + "[" * 100_000 + "\n", "nested more than"),
    ("nesting of 2,000, mappings", TINY + "x: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n", "nested more"),
    (
        "nesting of 500, block",
        TINY + "x:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 500)),
        "nested more than",
    ),
    ("a list that does not end", TINY + "x: [1, 2\n", "line"),
    ("a mapping that does not end", TINY + "x: {a: 1\n", "line"),
    ("a quote that does not end", TINY + 'x: "a\n', "line"),
    ("a tab as indentation", TINY.replace("  steps", "\tsteps"), "line"),
    ("a key without a colon", TINY + "steps\n", "line"),
    ("two colons", TINY + "x: a: b\n", "line"),
    ("a second document", TINY + "---\ncorpus: other\n", "found a second"),
    ("a percent sign", TINY + "%TAG\n", "YAML"),
    ("an at sign", TINY + "x: @home\n", "YAML"),
    ("NUL bytes", TINY.encode() + b"\0\0\0", "not valid YAML"),
    ("NUL, escaped", TINY.replace("folder: published/other", r'folder: "published\0"'), "NUL"),
    ("a control character", TINY.encode() + b"\x07", "not valid YAML"),
    ("invalid UTF-8", TINY.encode() + b"x: \xff\xfe\n", "not UTF-8"),
    ("Latin-1", TINY.encode() + "label: Größe\n".encode("latin-1"), "not UTF-8"),
    ("UTF-16", TINY.encode("utf-16"), "not UTF-8"),
    ("a lone surrogate, escaped", TINY + 'x: "\\ud800"\n', "not valid YAML"),
    ("random bytes", bytes(range(256)) * 8, "not UTF-8"),
    ("!!int abc", TINY + "x: !!int abc\n", "!!int abc"),
    ("!!float of a list", TINY + "x: !!float [1]\n", "core types"),
    ("!!bool perhaps", TINY + "x: !!bool perhaps\n", "!!bool perhaps"),
    ("!!timestamp of nonsense", TINY + "x: !!timestamp yesterday\n", "core types"),
    ("!!binary of nonsense", TINY + "x: !!binary '%%%'\n", "core types"),
    ("!!set", TINY + "x: !!set {a, b}\n", "core types"),
    ("a Python object", TINY + "x: !!python/object/apply:os.system [ls]\n", "core types"),
    ("a tag of its own", TINY + "x: !mine 3\n", "core types"),
    ("a number of 5,000 digits", TINY.replace("steps: 6", "steps: " + "6" * 5000), "5,000 digits"),
    ("a float of 5,000 digits", TINY.replace("1.0e-3", "1" * 5000 + ".0"), "finite"),
)
# Values that are read otherwise than meant, or are out of range: what, old, new, what must be said.
VALUES: tuple[tuple[str, str, str, str], ...] = (
    ("corpus: no", "corpus: synthetic", "corpus: no", "unknown corpus 'no'"),
    ("corpus: null", "corpus: synthetic", "corpus:", "corpus"),
    ("corpus: a date", "corpus: synthetic", "corpus: 2026-01-01", "unknown corpus '2026-01-01'"),
    ("corpus: a path", "corpus: synthetic", "corpus: ../raw/synthetic", "unknown corpus"),
    ("tokenizer: a number", "tokenizer: bpe-320", "tokenizer: 320", "tokenizer"),
    ("tied: yes", "context: 64}", "context: 64, tied: yes}", "model.tied: .*'yes'"),
    ("seeds with underscores", "seeds: [0]", "seeds: [1_000]", "seeds.0: .*'1_000'"),
    ("seeds: 12:30:00", "seeds: [0]", "seeds: [12:30:00]", "seeds"),
    ("seeds: a number", "seeds: [0]", "seeds: 0", "seeds"),
    ("seeds: none", "seeds: [0]", "seeds: []", "seeds"),
    ("seeds twice, one in octal", "seeds: [0]", "seeds: [8, 0o10]", "given twice"),
    ("seeds: negative", "seeds: [0]", "seeds: [-1]", "seeds.0"),
    ("seeds: 2**32", "seeds: [0]", "seeds: [4294967296]", "seeds.0"),
    ("seeds: a fraction", "seeds: [0]", "seeds: [0.5]", "seeds.0"),
    ("steps: a date that is none", "steps: 6", "steps: 2026-02-31", "training.steps: .*'2026-02-31'"),
    ("steps: a date", "steps: 6", "steps: 2026-02-01", "training.steps"),
    ("steps: .inf", "steps: 6", "steps: .inf", "training.steps"),
    ("steps: 0", "steps: 6", "steps: 0", "training.steps"),
    ("steps: text", "steps: 6", "steps: '6'", "training.steps"),
    ("steps: 10^20", "steps: 6", "steps: 100000000000000000000", "digits"),
    ("steps: 10^17, checkpoints within", "checkpoints: [3]", "checkpoints: [100000000000000000]", "outside"),
    ("layers: 10^20", "layers: 1", "layers: 100000000000000000000", "digits"),
    ("layers: 10^12", "layers: 1", "layers: 1000000000000", "model.layers: .*10000"),
    ("layers: 0", "layers: 1", "layers: 0", "model.layers"),
    ("layers: 1e3", "layers: 1", "layers: 1.5", "model.layers"),
    (
        "heads that do not divide 10^17",
        "width: 32, heads: 2",
        "width: 100000000000000000, heads: 7",
        "divide",
    ),
    ("learning_rate: .nan", "1.0e-3", ".nan", "training.learning_rate: .*finite"),
    ("learning_rate: .inf", "1.0e-3", ".inf", "training.learning_rate: .*finite"),
    ("learning_rate: 1e400", "1.0e-3", "1e400", "training.learning_rate: .*finite"),
    ("dropout: -0.1", "context: 64}", "context: 64, dropout: -0.1}", "model.dropout"),
    (
        "byte layers: 10^12",
        _BYTES,
        _BYTES[:-1] + ", bytes: {encoder_layers: 1000000000000}}",
        "encoder_layers",
    ),
    ("model: a list", _BYTES, "model: [1, 2]", "model"),
    ("model: a text", _BYTES, "model: large", "model"),
    ("training: null", _BYTES, _BYTES + "\nbaseline: ~", "baseline"),
    (
        "variants: none",
        TINY[TINY.index("variants:") : TINY.index("published:")],
        "variants: {}\n",
        "variants",
    ),
    (
        "variants: a list",
        TINY[TINY.index("variants:") : TINY.index("published:")],
        "variants: [a]\n",
        "variants",
    ),
    (
        "a variant: a number",
        "  learned:\n    model: {positions: learned}",
        "  learned: 3",
        "variants.learned",
    ),
    (
        "a benchmark twice",
        "[synthetic_pairs, synthetic_choice]",
        "[synthetic_pairs, synthetic_pairs]",
        "twice",
    ),
    (
        "a benchmark that is a list",
        "[synthetic_pairs, synthetic_choice]",
        "[[synthetic_pairs]]",
        "benchmarks",
    ),
    ("a benchmark that is null", "[synthetic_pairs, synthetic_choice]", "[~]", "benchmarks"),
    ("benchmarks: a number", "[synthetic_pairs, synthetic_choice]", "3", "benchmarks"),
    ("modes: unknown", "modes: [harness, paper]", "modes: [off]", "evaluation.modes"),
    ("limit: a million digits", "limit: 60", "limit: " + "6" * 1_000_000, "digits"),
    (
        "published: a folder that is a list",
        "{folder: published/other}",
        "{folder: [a]}",
        "published.other.folder",
    ),
    ("published: nothing", "{folder: published/other}", "", "published.other"),
    (
        "many mistakes at once",
        "  learned:\n",
        "".join(f"  v{n}: {{nonsense: 1}}\n" for n in range(200)) + "  learned:\n",
        "problems more",
    ),
    (
        "a key of 1,000 characters",
        "corpus: synthetic",
        f"{'k' * 1_000}: 1\ncorpus: synthetic",
        "no such key",
    ),
    ("a value of a million characters", "steps: 6", "steps: " + "s" * 1_000_000, "training.steps"),
)
_SHARES = """
mixed:
  description: two
  licence: none
  mix: {synthetic: SHARE}
"""
ENTRIES: tuple[tuple[str, str, str], ...] = (
    ("a share of .inf", _SHARES.replace("SHARE", ".inf"), "mix.synthetic: .*finite"),
    ("a share of .nan", _SHARES.replace("SHARE", ".nan"), "mix.synthetic"),
    ("a share of 0", _SHARES.replace("SHARE", "0"), "mix.synthetic"),
    ("a share that is text", _SHARES.replace("SHARE", "half"), "mix.synthetic"),
    ("a mix of itself", _SHARES.replace("synthetic: SHARE", "mixed: 1"), "mixed"),
    ("a mix of nothing", _SHARES.replace("{synthetic: SHARE}", "{}"), "mixed"),
    ("an entry that is a list", "\nmixed: [a]\n", "mixed"),
    ("an entry that is nothing", "\nmixed:\n", "mixed"),
    ("an entry `off` without quotes", "\noff: {description: a, licence: b, sources: []}\n", "off"),
    ("an entry `true` without quotes", "\ntrue: {description: a}\n", "put it in quotes: 'true'"),
    (
        "an entry `1:30`",
        "\n1:30: {description: a, licence: b, mix: {synthetic: 1}}\n",
        "1:30.*cannot be a name",
    ),
    (
        "an entry that is a path",
        "\n../out: {description: a, licence: b, mix: {synthetic: 1}}\n",
        "cannot be a name",
    ),
    (
        "an entry of 300 characters",
        f"\n{'a' * 300}: {{description: a, licence: b, mix: {{synthetic: 1}}}}\n",
        "at most",
    ),
    (
        "an entry in another case",
        "\nSynthetic: {description: a, licence: b, mix: {synthetic: 1}}\n",
        "capital letters",
    ),
    (
        "a size of 10^20",
        "\nx: {description: a, licence: b, sources: [{kind: synthetic, size: 1" + "0" * 20 + "}]}\n",
        "digits",
    ),
    ("a kind of source that is none", "\nx: {description: a, licence: b, sources: [{kind: ftp}]}\n", "ftp"),
    ("a source that is a text", "\nx: {description: a, licence: b, sources: [hub]}\n", "sources"),
    (
        "a folder with NUL",
        '\nx: {description: a, licence: b, sources: [{kind: folder, path: "a\\0", files: {train: a}}]}\n',
        "NUL",
    ),
)
# After --set.
OVERRIDES: tuple[tuple[str, str], ...] = (
    ("model.layers", "expected key.path=value"),
    ("=3", "expected key.path=value"),
    ("model..layers=3", "expected key.path=value"),
    (".=3", "expected key.path=value"),
    ("model.layers=!!int abc", "!!int abc"),
    ("model.layers=[", "--set model.layers="),
    ("model.layers={[a]: 1}", "a key is a text"),
    ("model.layers=&x [*x]", "contains itself"),
    ("model.layers=" + "9" * 5000, "5,000 digits"),
    ("model.layers=" + "[" * 2000, "nested"),
    ("model.layers=2026-02-31", "model.layers: .*2026-02-31"),
    ("model.layers=010", "model.layers|params"),
    ("model.layers=1:30", "model.layers: .*'1:30'"),
    ("model.dropout=.nan", "model.dropout"),
    ("model.dropout=\udcff", "not valid Unicode"),
    ("seeds.0=1", "is a value, it has no keys"),
    ("seeds=~", "seeds"),
    ("model=~", "found None"),
    ("variants=~", "variants"),
    ("variants.baseline.model.layers.more=1", "layers"),
    ("evaluation.benchmarks={blimp: 3}", "benchmarks"),
    ("k" * 300 + "=1", "no such key"),
    (".".join("k" * 200) + "=1", "no parameter is so deep"),
    ("corpus=" + "c" * 300, "unknown corpus"),
    ("tokenizer=" + "t" * 300, "is none of gpt2"),
    ("corpus=a\nb", "corpus"),
    ("model.größe=2", "no such key"),
    ("training.batch_size=1e9", "batch_size"),
)


def _folder(path: str) -> Callable[[Path], None]:
    """Put a folder in a file's place."""

    def spoil(project: Path) -> None:
        (project / path).unlink()
        (project / path).mkdir()

    return spoil


def _no_rights(path: str, rights: int = 0) -> Callable[[Path], None]:
    return lambda project: os.chmod(project / path, rights)


def _link(path: str, target: str) -> Callable[[Path], None]:
    """Put a symbolic link in a file's place."""

    def spoil(project: Path) -> None:
        (project / path).unlink()
        (project / path).symlink_to(target)

    return spoil


def _file_for_params(project: Path) -> None:
    shutil.rmtree(project / "params")
    (project / "params").write_text("")


def _verbs() -> cycle[tuple[str, ...]]:
    """The verbs that read a study, in turns."""
    return cycle(
        [
            ("study", "tiny"),
            ("train", "tiny", "baseline"),
            ("evaluate", "tiny", "baseline"),
            ("contamination", "tiny"),
            ("report", "tiny"),
            ("use", "tiny"),
            ("fingerprint", "tiny", "other"),
        ]
    )


def _studies() -> list[Case]:
    verbs = _verbs()
    found = [Case(f"study: {what}", next(verbs), put(STUDY, text), said) for what, text, said in TEXTS]
    found += [
        Case(f"study: {what}", next(verbs), edit(STUDY, old, new), said) for what, old, new, said in VALUES
    ]
    readers = cycle(
        [("fetch", "synthetic"), ("tokenize", "synthetic", "bytes"), ("fingerprint", "synthetic")]
    )
    for what, entry, said in ENTRIES:
        spoil = _append(CORPORA, entry)
        found.append(Case(f"corpora: {what}", next(readers), spoil, said))
    return found


def _append(path: str, text: str) -> Callable[[Path], None]:
    def spoil(project: Path) -> None:
        with (project / path).open("a", encoding="utf-8") as file:
            file.write(text)

    return spoil


def _places() -> list[Case]:
    """Files that are folders, unreadable or missing."""
    found = []
    for path, verb in (
        (STUDY, ("study", "tiny")),
        (CORPORA, ("fetch", "synthetic")),
        ("params/benchmarks.yaml", ("fingerprint", "synthetic")),
        ("dvc.yaml", ("train", "tiny", "baseline")),
    ):
        found += [
            Case(f"{path}: a folder", verb, _folder(path), path),
            Case(f"{path}: unreadable", verb, _no_rights(path), "permission denied", unprivileged=True),
        ]
        if path != "dvc.yaml":  # one that leads nowhere is none
            found.append(Case(f"{path}: a link to itself", verb, _link(path, Path(path).name), path))
    for path, verb in (
        (CORPORA, ("tokenize", "synthetic", "bytes")),
        ("params/vocabularies.yaml", ("fetch", "synthetic")),
    ):
        found.append(
            Case(f"{path}: missing", verb, lambda project, path=path: (project / path).unlink(), path)
        )
    for verb in (
        ("study",),
        ("use", "tiny"),
        ("fetch", "synthetic"),
        ("document",),
        ("new", "x", "--text", "texts"),
    ):
        found.append(Case(f"{verb[0]}: params/ is a file", verb, _file_for_params, "top folder|params"))
    found.append(
        Case(
            "study: params/ is unreadable",
            ("study", "tiny"),
            _no_rights("params"),
            "permission denied",
            unprivileged=True,
        )
    )
    return found


def _dvc() -> list[Case]:
    """What dvc.yaml may have become."""
    found = []
    readers = cycle(
        [("train", "tiny", "baseline"), ("report", "tiny"), ("sync",), ("study",), ("fetch", "synthetic")]
    )
    for what, text, said in (
        ("empty", "", "found nothing"),
        ("a list", "- a\n", "found list"),
        ("not YAML", "a: [\n", "dvc.yaml, line"),
        ("without vars", "stages: {}\n", "stlm use STUDY"),
        ("vars that are a text", "vars: tiny\n", "stlm use STUDY"),
        ("a study that is a list", "vars: [{study: [tiny]}]\n", "stlm use STUDY"),
        ("stages that are a list", "vars: [{study: tiny}]\nstages: [a]\n", "stlm use STUDY"),
        ("stages that are a text", "vars: [{study: tiny}]\nstages: all\n", "stlm use STUDY"),
        ("a number as a stage", "vars: [{study: tiny}]\nstages: {1: {}}\n", "a key is a text"),
        ("NUL bytes", "vars: [{study: tiny}]\n\0", "dvc.yaml"),
        ("conflicts of git", "<<<<<<< HEAD\nvars: [{study: tiny}]\n=======\n", "dvc.yaml"),
    ):
        for _ in range(2):
            verb = next(readers)
            found.append(Case(f"dvc.yaml: {what}: {verb[0]}", verb, put("dvc.yaml", text), said))
    stage = put("dvc.yaml", "vars: [{study: tiny}]\nstages: {a: }\n")
    path = put("dvc.yaml", "vars: [{study: ../params/tiny}]\n")
    gone = put("dvc.yaml", "vars: [{study: gone}]\n")
    found += [
        Case("dvc.yaml: a stage that is nothing", ("report", "tiny"), stage, "stlm use tiny"),
        Case("dvc.yaml: a study that is a path", ("study",), path, "no study's name"),
        Case("dvc.yaml: a study that is a path: sync", ("sync",), path, "no study's name"),
        Case("dvc.yaml: a study that is gone", ("study",), gone, "gone.yaml: no such study"),
        Case("dvc.yaml: a study that is gone: sync", ("sync",), gone, "gone.yaml: no such study"),
    ]
    return found


def _overrides() -> list[Case]:
    verbs = cycle(
        [
            ("study", "tiny"),
            ("train", "tiny", "baseline"),
            ("evaluate", "tiny", "baseline"),
            ("report", "tiny"),
        ]
    )
    return [
        Case(f"--set {text[:40]!r} ({len(text)})", (*next(verbs), "--set", text), None, said)
        for text, said in OVERRIDES
    ]


def _accepted() -> list[Case]:
    """What YAML 1.2 reads as it stands."""
    return [
        Case(
            f"a variant named {name}, a text in YAML 1.2",
            ("study", "tiny"),
            edit(STUDY, "  learned:", f"  {name}:"),
            said,
            0,
        )
        for name, said in (("off", r"\boff\b"), ("yes", r"\byes\b"), ("on", r"\bon\b"), ("n", r"\bn\b"))
    ] + [
        Case(
            "a date as a label",
            ("study", "tiny"),
            edit(STUDY, "  learned:", "  learned:\n    label: 2026-02-31"),
            "2026-02-31",
            0,
        ),
        Case("a byte order mark", ("study", "tiny"), put(STUDY, "\ufeff" + TINY), "study tiny", 0),
        Case(
            "lines that end as on Windows",
            ("study", "tiny"),
            put(STUDY, TINY.replace("\n", "\r\n")),
            "study tiny",
            0,
        ),
    ]


def cases() -> list[Case]:
    """The cases of this topic."""
    return [*_studies(), *_places(), *_dvc(), *_overrides(), *_accepted()]
