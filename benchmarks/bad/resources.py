"""What a study needs of the machine and of earlier stages: memory, disk, folders, benchmarks, logins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bad.case import Case, put
from stlm.files import read_json, write_record

_TRAIN, _EVALUATE = ("train", "tiny", "baseline"), ("evaluate", "tiny", "baseline")
_CHOICE = "data/raw/synthetic_choice/validation.parquet"
_TOKENS = "data/tokens/synthetic/bpe-320"
_NOBODY = {"HOME": "/nowhere", "WANDB_CONFIG_DIR": "/nowhere", "NETRC": "/nowhere/netrc"}


def _train(*settings: str) -> tuple[str, ...]:
    return (*_TRAIN, *(part for setting in settings for part in ("--set", setting)))


def _folder(path: str) -> Callable[[Path], None]:
    """A folder in the place of `path`."""

    def spoil(project: Path) -> None:
        (project / path).unlink(missing_ok=True)
        (project / path).mkdir(parents=True)

    return spoil


def _file(path: str) -> Callable[[Path], None]:
    """A file in the place of the folder `path`."""

    def spoil(project: Path) -> None:
        shutil.rmtree(project / path, ignore_errors=True)
        put(path, "a file")(project)

    return spoil


def _gone(path: str) -> Callable[[Path], None]:
    def spoil(project: Path) -> None:
        target = project / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return spoil


def _read_only(path: str) -> Callable[[Path], None]:
    """A folder in which nobody but its owner may write."""

    def spoil(project: Path) -> None:
        (project / path).mkdir(parents=True, exist_ok=True)
        (project / path).chmod(0o555)

    return spoil


def _link_to_nothing(project: Path) -> None:
    shutil.rmtree(project / ".state")
    (project / ".state").symlink_to("nowhere")


def _rows(change: Callable[[pa.Table], pa.Table], path: str = _CHOICE) -> Callable[[Path], None]:
    """A benchmark's file with a change in it, of which no record says that it is one."""

    def spoil(project: Path) -> None:
        (project / path).with_name("source.json").unlink()
        pq.write_table(change(pq.read_table(project / path)), project / path)

    return spoil


def _with_label(value: int | None) -> Callable[[pa.Table], pa.Table]:
    """The label of the third row."""

    def change(table: pa.Table) -> pa.Table:
        labels = table.column("label").to_pylist()
        labels[2] = None if value is None else type(labels[0])(value)
        place = table.column_names.index("label")
        return table.set_column(place, "label", pa.array(labels, table.schema.field("label").type))

    return change


def _vocabulary(project: Path) -> None:
    path = project / _TOKENS / "meta.json"
    write_record(path, read_json(path) | {"vocab_size": 319})


def _cut(path: str) -> Callable[[Path], None]:
    def spoil(project: Path) -> None:
        content = (project / path).read_bytes()
        (project / path).write_bytes(content[: len(content) // 2])

    return spoil


def _many_checkpoints(project: Path) -> None:
    """Forty terabytes of them."""
    text = (project / "params" / "half.yaml").read_text().replace("width: 32", "width: 1024")
    steps = ", ".join(map(str, range(1, 100_000, 2)))
    (project / "params" / "half.yaml").write_text(
        text.replace("layers: 1", "layers: 16").replace("checkpoints: [3]", f"checkpoints: [{steps}]")
    )


def _memory() -> list[Case]:
    least = r"need at least [\d.,]+ .B of memory"
    return [
        Case(
            "memory: a batch of a billion sequences",
            _train("training.batch_size=1000000000"),
            expects=rf"batch_size: 1,000,000,000 sequences of 64 .*{least}.* more than [\d,]+ cannot fit",
        ),
        Case(
            "memory: a width of 400,000,000", _train("model.width=400000000"), expects=f"parameters .*{least}"
        ),
        Case("memory: a context of a billion tokens", _train("model.context=1000000000"), expects=least),
        Case(
            "memory: a million layers",
            _train("model.layers=1000000"),
            expects="layers: Input should be less than or equal to 10000",
        ),
        Case(
            "memory: ten thousand wide layers that share their matrices",
            _train(
                "model.layers=10000",
                "model.sharing={what: all}",
                "model.width=1024",
                "training.batch_size=64",
            ),
            expects=least,
        ),
        Case(
            "memory: a feed-forward network of 10^12", _train("model.ffn_width=1000000000000"), expects=least
        ),
        Case(
            "memory: a batch of a billion, and no tokens",
            _train("training.batch_size=1000000000", "tokenizer=bytes"),
            expects=rf"(?s)2 problems.*stlm tokenize synthetic bytes.*{least}",
        ),
        Case(
            "disk: more checkpoints than any disk holds",
            ("train", "half", "baseline"),
            spoil=_many_checkpoints,
            expects=r"50,?001 checkpoints of .*are free on that disk; free some, or keep fewer",
        ),
    ]


def _login() -> list[Case]:
    wandb = _train("training.wandb=true")
    return [
        Case(
            "wandb: no login", wandb, env=_NOBODY, expects="no login here: run `wandb login`, set WANDB_MODE="
        ),
        Case(
            "wandb: a key that is none",
            wandb,
            env={**_NOBODY, "WANDB_API_KEY": "short"},
            expects="Weights & Biases cannot start: .*40",
        ),
        Case(
            "wandb: no such mode",
            wandb,
            env={**_NOBODY, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "sideways"},
            expects="WANDB_MODE|mode",
        ),
        Case(
            "wandb: switched off",
            wandb,
            env={**_NOBODY, "WANDB_MODE": "disabled"},
            status=0,
            expects="WANDB_MODE=disabled: nothing is logged",
        ),
    ]


def _folders() -> list[Case]:
    half = ("train", "half", "baseline")
    in_place = "a folder stands where a file is to be written"
    no_folder = "a file stands where a folder is to be written"
    runs = "results/tiny/runs/baseline"
    cases = [
        Case("state: a folder", half, _folder(".state/half/baseline/state.pt"), rf"state\.pt: {in_place}"),
        Case("state: its lock is a folder", half, _folder(".state/half/baseline.lock"), in_place),
        Case("state: .state is a file", half, _file(".state"), rf"\.state: {no_folder}"),
        Case("state: the study's is a file", half, _file(".state/half"), no_folder),
        Case("state: the run's is a file", half, _file(".state/half/baseline"), no_folder),
        Case("state: its output is a file", half, _file(".state/half/baseline/output"), no_folder),
        Case("state: a link to nothing", half, _link_to_nothing, "a link to nothing stands where a folder"),
        Case("results: a file", half, _file("results"), f"results: {no_folder}"),
        Case("results: the run's is a file", _TRAIN, _file(runs), f"baseline: {no_folder}"),
        Case("results: the checkpoints are a file", _TRAIN, _file(f"{runs}/checkpoints"), no_folder),
        Case("results: train.json is a folder", _TRAIN, _folder(f"{runs}/train.json"), in_place),
        Case(
            "results: evaluation.json is a folder, told before training",
            _TRAIN,
            _folder(f"{runs}/evaluation.json"),
            in_place,
        ),
        Case(
            "evaluate: evaluation.json is a folder", _EVALUATE, _folder(f"{runs}/evaluation.json"), in_place
        ),
        Case("evaluate: items.parquet is a folder", _EVALUATE, _folder(f"{runs}/items.parquet"), in_place),
        Case("evaluate: .state is a file", _EVALUATE, _file(".state"), no_folder),
        Case(
            "evaluate: a published model's items.parquet is a folder",
            ("evaluate", "tiny", "other"),
            _folder("results/tiny/published/other/items.parquet"),
            in_place,
        ),
        Case(
            "evaluate: what is kept is a file", _EVALUATE, _file(".state/tiny/baseline/evaluation"), no_folder
        ),
    ]
    for folder in (".state/tiny/baseline", runs, f"{runs}/checkpoints"):
        cases.append(
            Case(
                f"train: {folder} cannot be written",
                _TRAIN,
                _read_only(folder),
                "nothing can be written there .*make it writable",
                unprivileged=True,
            )
        )
    return cases


def _benchmarks() -> list[Case]:
    fetch = "run: stlm fetch synthetic_choice"
    spoilt = {
        "lacks a column": (
            _rows(lambda table: table.drop_columns("label")),
            rf"lacks the column\(s\) label; .*{fetch}",
        ),
        "a label that is none": (
            _rows(_with_label(9)),
            rf"row 2: the answer '?9'? is none of 0, 1, 2, 3; {fetch}",
        ),
        "a row without a label": (_rows(_with_label(None)), f"row 2: the column label has no value; {fetch}"),
        "no rows": (_rows(lambda table: table.slice(0, 0)), "has no rows"),
        "endings that are no list": (
            _rows(lambda table: table.set_column(1, "endings", pa.array(["abc"] * len(table)))),
            "column endings: found string, expected a list",
        ),
        "no parquet file": (put(_CHOICE, "text"), rf"validation\.parquet: .*{fetch}"),
        "another split": (
            lambda project: (project / _CHOICE).rename(project / "data/raw/synthetic_choice/test.parquet"),
            f"no parquet file of the split validation .*{fetch}",
        ),
    }
    cases = [
        Case(f"{arguments[0]}: a benchmark: {name}", arguments, spoil, expects)
        for name, (spoil, expects) in spoilt.items()
        for arguments in (_TRAIN, _EVALUATE)
    ]
    gone = _gone("data/raw/synthetic_choice")
    return [
        *cases,
        Case(
            "evaluate: a benchmark fails, the others are kept",
            _EVALUATE,
            spoilt["lacks a column"][0],
            r"(?s)not scored: synthetic_choice.*once that is mended: stlm evaluate tiny baseline",
        ),
        Case(
            "train: a benchmark that is not fetched yet",
            _TRAIN,
            gone,
            "not fetched yet, needed for evaluation only: stlm fetch synthetic_choice",
            status=0,
        ),
        Case("evaluate: a benchmark that is not fetched", _EVALUATE, gone, fetch),
        Case(
            "evaluate: a published model, and a benchmark fails",
            ("evaluate", "tiny", "other"),
            spoilt["lacks a column"][0],
            "once that is mended: stlm evaluate tiny other",
        ),
    ]


def _made_before() -> list[Case]:
    again = "run: stlm tokenize synthetic bpe-320"
    tokenizer = f"{_TOKENS}/tokenizer"
    return [
        Case("train: no tokens", _TRAIN, _gone(_TOKENS), f"meta.json: no such file; {again}"),
        Case(
            "train: tokens of another vocabulary", _TRAIN, _vocabulary, f"found 319, expected 320 .*{again}"
        ),
        Case("train: no tokenizer", _TRAIN, _gone(tokenizer), again),
        Case("train: a tokenizer cut short", _TRAIN, _cut(f"{tokenizer}/tokenizer.json"), again),
        Case(
            "train: a tokenizer's description cut short",
            _TRAIN,
            _cut(f"{tokenizer}/tokenizer-name.json"),
            again,
        ),
        *(
            Case(
                f"outside the project: {arguments[0]}",
                arguments,
                _gone("params"),
                "no folder params/: run it in the project's top folder",
            )
            for arguments in (
                ("study", "tiny"),
                ("fetch", "synthetic"),
                ("tokenize", "synthetic", "bytes"),
                _TRAIN,
                _EVALUATE,
                ("contamination", "tiny"),
                ("report", "tiny"),
                ("use", "tiny"),
                ("fingerprint", "synthetic"),
            )
        ),
    ]


def cases() -> list[Case]:
    """The cases of this topic."""
    return [*_memory(), *_login(), *_folders(), *_benchmarks(), *_made_before()]
