"""The estimate of the memory of a cut, beside its measured peak, and the runs that it refuses."""

from __future__ import annotations

import ctypes
import gc
import shutil
from pathlib import Path

import pytest

from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.files import sha256
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.preflight import check_training
from stlm.study.runs import Study
from stlm.training.checkpoints import save_checkpoint
from stlm.training.cut_memory import cut_memory
from stlm.training.dependencies import Dependency
from stlm.training.inherited import inherited_model
from stlm.training.loop import train
from stlm.training.memory import PROCESS, Room

MB = 1 << 20
UNITS = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn_width": 2560}
WIDE = {"layers": 3, "width": 1024, "heads": 8, "kv_heads": 4, "ffn_width": 256}
# What is loaded is much, and what is measured little; the contrary; and the stream.
CUTS = [
    (UNITS | {"ffn_width": 512, "vocab_size": 2**18}, {"layers": 1}, {"layers": "first"}),
    (UNITS, {"ffn_width": 1280}, {}),
    (UNITS, {"layers": 2, "ffn_width": 1280}, {"ffn": "taylor"}),
    (WIDE, {"width": 512, "heads": 4, "kv_heads": 4}, {}),
]


def status(key: str) -> int:
    """Bytes of the memory of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def peak_of(action) -> int:
    """The bytes that `action` holds at most, beyond what there was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed must not be counted as there
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured anew
    kept = action()
    peak = status("VmHWM") - before
    del kept
    return peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize(("parent", "smaller", "how"), CUTS, ids=["loaded", "units", "taylor", "width"])
def test_the_estimate_of_a_cut_lies_about_its_peak(make_run, tmp_path, parent, smaller, how):
    run = make_run(model=parent | smaller | {"dropout": 0.0}, inherit={"bytes": 20_000} | how)
    config = ModelConfig.model_validate(run.model.model_dump() | parent)
    folder = tmp_path / "larger" / "step-0000001"
    folder.parent.mkdir()
    save_checkpoint(folder, Transformer(config), {"step": 1, "tokens": 0})
    shutil.copytree(run.tokens_folder / "tokenizer", folder.parent / "tokenizer")
    origin = Dependency("larger", False, folder, config, sha256(folder / "model.safetensors"), "bytes")
    need = cut_memory(run, config, on_cpu=False)
    peak = peak_of(lambda: inherited_model(run, origin))
    assert origin.record["inherited"]["from"]["layers"] == config.layers
    assert peak > 100 * MB, "too little to tell"
    assert need.least < peak
    assert 0.8 < (need.likely - PROCESS) / peak < 1.5, (need, peak)


def test_the_runs_own_model_counts_where_it_is_on_the_cpu(make_run):
    run = make_run(model={"layers": 1})
    config = run.model.model_copy(update={"layers": 5})
    own = 4 * run.parameters.in_training
    there, elsewhere = (cut_memory(run, config, on_cpu) for on_cpu in (True, False))
    assert (there.least - elsewhere.least, there.likely - elsewhere.likely) == (own, own)
    # Of the same sizes, it is loaded, and that is all.
    assert cut_memory(run, run.model, on_cpu=False).least == 4 * run.parameters.total


@pytest.fixture
def started(make_run):
    """A run that starts from a larger one that was trained, and a study of both."""
    larger = make_run("larger", model={"layers": 6, "dropout": 0.0}, steps=2, warmup_steps=1)
    train(larger)
    run = make_run("cut", model={"dropout": 0.0}, start_from="larger", steps=2, warmup_steps=1)
    study = Study(
        name="test",
        description="",
        baseline="larger",
        runs={"larger": larger, "cut": run},
        evaluation=EvaluationConfig(benchmarks=[]),
        corpora=["tiny"],
        overrides=[],
    )
    return study, run


def test_a_cut_that_cannot_fit_is_refused_before_it_begins(started, monkeypatch, capsys):
    study, run = started
    need = cut_memory(run, study.runs["larger"].model)

    def has(total: int, free: int) -> None:
        room = Room(total, free, "this machine has")
        monkeypatch.setattr("stlm.training.memory.machine_room", lambda: room)

    has(need.least - 1, need.least - 1)
    monkeypatch.setattr("stlm.preflight.check_memory", lambda *_: None)  # a step needs as much here
    with pytest.raises(UserError, match=r"training.start_from: larger: to load it and cut it .*\.inherited/"):
        check_training(study, run)
    has(need.likely * 2, need.likely - 1)
    check_training(study, run)
    assert "to load larger and cut it to the run's sizes takes about" in capsys.readouterr().err
    has(need.likely * 2, need.likely)
    check_training(study, run)
    assert capsys.readouterr().err == ""
    train(run)
    capsys.readouterr()
    has(need.least - 1, need.least - 1)
    check_training(study, run)  # what was cut is kept
    assert capsys.readouterr().err == ""
