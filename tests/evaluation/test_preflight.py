"""What would stop a training or its evaluation is told before the first step, all at once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm import preflight
from stlm.errors import UserError
from stlm.evaluation.benchmarks import FileBenchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import RAW, evaluate_run
from stlm.files import read_json
from stlm.preflight import check_evaluation, check_training, check_writable
from stlm.study.runs import Study
from stlm.training.memory import Room

CHOICE = RAW / "synthetic_choice" / "validation.parquet"


@pytest.fixture
def check(run):
    """A function that checks `run`, with changes, as `stlm train` does."""
    evaluation = EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"])

    def check(evaluation=evaluation, model=None, **training):
        changed = run.model_copy(
            update={
                "model": run.model.model_copy(update=model or {}),
                "training": run.training.model_copy(update=training),
            }
        )
        study = Study(
            name="tiny",
            description="",
            baseline=run.name,
            runs={run.name: changed},
            evaluation=evaluation,
            corpora=[run.corpus],
            overrides=[],
        )
        check_training(study, changed)

    return check


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_where_nothing_is_wrong_nothing_is_said_or_left(check, tmp_path, capsys):
    before = contents(tmp_path)
    check()
    after = contents(tmp_path)
    assert capsys.readouterr() == ("", "")
    changed = {path.relative_to(tmp_path) for path in after if after[path] != before.get(path)}
    assert {str(path) for path in changed} <= {".", ".state", ".state/benchmarks.json"}


def test_all_that_is_wrong_is_told_at_once(check, run, monkeypatch):
    monkeypatch.setattr(
        "stlm.training.memory.machine_room", lambda: Room(8 << 30, 4 << 30, "this machine has")
    )
    table = pq.read_table(CHOICE)
    pq.write_table(table.drop_columns("label"), CHOICE)
    run.state_folder.joinpath("state.pt").mkdir(parents=True)
    shutil.rmtree(run.tokens_folder / "tokenizer")
    with pytest.raises(UserError) as told:
        check(batch_size=10**9)
    first, *lines = str(told.value).splitlines()
    assert first == "run tiny-run: 4 problems:"
    assert [line.partition(":")[0] for line in lines] == [
        f"{run.tokens_folder}/tokenizer/tokenizer-name.json",
        f"{run.state_folder}/state.pt",
        "training.batch_size",
        str(CHOICE),
    ]
    assert "run: stlm tokenize tiny bytes" in lines[0]
    assert "run: stlm fetch synthetic_choice" in lines[3]
    assert not preflight.CHECKED.exists()


@pytest.mark.parametrize(
    ("model", "training", "said"),
    [
        (
            {},
            {"batch_size": 10**9},
            r"batch_size: 1,000,000,000 sequences of .* more than [\d,]+ cannot fit",
        ),
        (
            {"width": 4 * 10**8, "heads": 2},
            {},
            "in 1 layers need at least .* 8.59 GB; lower model",
        ),
        ({"context": 10**9}, {}, "sequences of 1,000,000,000 tokens .*not even 1 fits"),
        ({"layers": 1000, "width": 1024}, {}, "1,000 layers need at least"),
    ],
)
def test_memory_that_cannot_be_had_is_refused_by_estimate(check, monkeypatch, model, training, said):
    monkeypatch.setattr(
        "stlm.training.memory.machine_room", lambda: Room(8 << 30, 4 << 30, "this machine has")
    )
    with pytest.raises(UserError, match=said):
        check(model=model, **training)


def test_memory_that_is_scarce_is_a_warning(check, monkeypatch, capsys):
    monkeypatch.setattr(
        "stlm.training.memory.machine_room", lambda: Room(8 << 30, 1 << 20, "this machine has")
    )
    check()
    assert "a step takes about" in capsys.readouterr().err


def test_processes_of_a_group_share_a_micro_batch_and_one_tells(check, monkeypatch, capsys):
    monkeypatch.setattr(
        "stlm.training.memory.machine_room", lambda: Room(1 << 20, 1 << 20, "this machine has")
    )
    for key, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"batch_size: 1,000 sequences .* for 2 processes"):
        check(batch_size=4000, accumulation=1)
    monkeypatch.setattr(
        "stlm.training.memory.machine_room", lambda: Room(8 << 30, 1 << 20, "this machine has")
    )
    check()
    assert capsys.readouterr().err == ""


def test_checkpoints_that_the_disk_cannot_hold_are_refused(check, run, monkeypatch, capsys):
    weights = 4 * run.parameters.total
    usage = shutil._ntuple_diskusage(10**12, 0, 3 * weights + 3 * 2 * weights - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    recipe = {"steps": 300, "save_every": 100, "checkpoints": (100, 200)}
    with pytest.raises(
        UserError, match=r"3 checkpoints of .* are free on that disk; free some, or keep fewer"
    ):
        check(**recipe)
    # One of them is there already.
    (run.state_folder / "output" / "checkpoints" / "step-0000100").mkdir(parents=True)
    check(**recipe)
    assert "are free on that disk" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.json", "evaluation.json", "items.parquet", "documents.parquet"])
def test_a_folder_in_a_files_place_is_refused(check, run, name):
    (run.folder / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: a folder stands where a file is to be written"):
        check()


@pytest.mark.parametrize(
    "place", [".state", ".state/tiny", ".state/tiny/tiny-run", ".state/tiny/tiny-run/output"]
)
def test_a_file_in_a_folders_place_is_refused(check, run, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("")
    with pytest.raises(UserError, match=rf"{place}: a file stands where a folder is to be written; move it"):
        check()
    if place.endswith("output"):
        check_evaluation(run.name, run.folder, run.state_folder)
        return
    with pytest.raises(UserError, match="stands where a folder is to be written"):
        check_evaluation(run.name, run.folder, run.state_folder)


def test_a_folder_where_nothing_can_be_made_is_refused(tmp_path, monkeypatch):
    check_writable(tmp_path / "not" / "there" / "yet")
    assert not list(tmp_path.iterdir())

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path}: nothing can be written there \(Permission denied\)"):
        check_writable(tmp_path / "not" / "there" / "yet")


def test_a_benchmark_is_read_once_for_each_change(check, monkeypatch):
    read = []
    load = FileBenchmark.load
    monkeypatch.setattr(FileBenchmark, "load", lambda own, folder: read.append(own.name) or load(own, folder))
    check()
    check()
    assert read == ["synthetic_pairs", "synthetic_choice"]
    table = pq.read_table(CHOICE)
    labels = np.full(len(table), 9)
    pq.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(labels)), CHOICE)
    for _ in range(2):  # what is wrong is told every time
        with pytest.raises(UserError, match="row 0: the answer 9 is none of 0, 1, 2, 3; run: stlm fetch"):
            check()
    preflight.CHECKED.write_text("{broken")
    with pytest.raises(UserError, match="the answer 9"):
        check()


def test_a_benchmark_that_is_not_fetched_is_said_in_a_line(check, capsys):
    check(EvaluationConfig(benchmarks=["mmlu", "mmlu_cloze", "hellaswag", "synthetic_pairs"]))
    said = (
        "run tiny-run: not fetched yet, needed for evaluation only: stlm fetch hellaswag; stlm fetch mmlu\n"
    )
    assert capsys.readouterr().err == said


def test_items_that_do_not_exist_are_told(check):
    with pytest.raises(UserError, match="last_word found no item in the"):
        check(EvaluationConfig(benchmarks=["last_word"]))


def test_tokens_of_another_vocabulary_are_told(check, run):
    path = run.tokens_folder / "meta.json"
    path.write_text(json.dumps(read_json(path) | {"vocab_size": 300}))  # of no checksum
    with pytest.raises(UserError, match="found 300, expected 257 as in bytes; run: stlm tokenize tiny bytes"):
        check()
    path.unlink()
    with pytest.raises(UserError, match=r"meta\.json: no such file; run: stlm tokenize tiny bytes"):
        check()


def test_wandb_without_a_login_is_told(check, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no login here"):
        check(wandb=True)


def test_what_passes_can_be_evaluated(check, run):
    check()
    check_evaluation(run.name, run.folder, run.state_folder)
    evaluate_run(run, EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"]))
