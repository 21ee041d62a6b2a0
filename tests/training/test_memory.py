"""The estimate of a step's memory, beside measured peaks, and what the machine is said to have."""

from __future__ import annotations

import pytest

from stlm.model.config import ModelConfig
from stlm.techniques.distillation import Distillation
from stlm.techniques.early_exit import EarlyExit
from stlm.techniques.mixture_of_depths import MixtureOfDepths
from stlm.techniques.series_activation import SeriesActivation
from stlm.training import memory
from stlm.training.memory import Room, machine_room, training_memory

MB = 1 << 20
# Peaks of a process after three steps, in MiB, on a CPU with the kernels (docs/training.md): the shape as
# layers, width, heads, key/value heads, FFN width, vocabulary, context; the batch; float32 and bfloat16.
PROCESS = 232
PEAKS = [
    ((2, 96, 4, 2, 256, 1280, 128), 8, 289, 284),
    ((2, 96, 4, 2, 256, 1280, 128), 128, 801, 562),
    ((4, 256, 8, 2, 768, 4096, 256), 8, 650, 490),
    ((4, 256, 8, 2, 768, 4096, 256), 32, 1674, 1007),
    ((8, 512, 16, 4, 1536, 50257, 512), 1, 1432, 1357),
    ((12, 128, 4, 4, 512, 512, 256), 32, 2261, 1376),
    ((1, 1024, 16, 4, 3072, 1024, 128), 8, 640, 620),
]
# The same of the third shape with a batch of 32, with techniques.
TECHNIQUE_PEAKS = [
    (MixtureOfDepths(), 989, 830),
    (MixtureOfDepths(first=1, every=1), 722, 681),
    (EarlyExit(p_max=0, curriculum=None), 1620, 1027),
    (EarlyExit(p_max=0.5, p_schedule="constant", scale=0), 1125, 966),
    (SeriesActivation(terms=4), 3545, 1848),
]
KEYS = ("layers", "width", "heads", "kv_heads", "ffn_width", "vocab_size", "context")


def sized(make_run, shape, **training):
    run = make_run(**training)
    return run.model_copy(update={"model": ModelConfig(**dict(zip(KEYS, shape, strict=True)))})


@pytest.mark.parametrize(("shape", "batch", "float32", "bfloat16"), PEAKS)
def test_the_estimate_lies_below_and_about_measured_peaks(make_run, shape, batch, float32, bfloat16):
    for precision, peak in (("float32", float32), ("bfloat16", bfloat16)):
        need = training_memory(sized(make_run, shape), precision, False, batch)
        assert need.least < (peak - PROCESS) * MB
        assert 0.85 < need.likely / (peak * MB) < 1.5


@pytest.mark.parametrize(("technique", "float32", "bfloat16"), TECHNIQUE_PEAKS)
def test_so_does_the_estimate_with_a_technique(make_run, technique, float32, bfloat16):
    run = sized(make_run, PEAKS[2][0]).model_copy(update={"techniques": {technique.key(): technique}})
    for precision, peak in (("float32", float32), ("bfloat16", bfloat16)):
        need = training_memory(run, precision, False, 32)
        assert need.least < (peak - PROCESS) * MB
        assert 0.85 < need.likely / (peak * MB) < 1.35


def test_a_teacher_is_held_throughout(make_run):
    student, teacher = sized(make_run, PEAKS[0][0]), sized(make_run, PEAKS[2][0])
    technique = Distillation(teacher="teacher")
    technique.set_others({"teacher": teacher})
    taught = student.model_copy(update={"techniques": {"distillation": technique}})
    plain, more = (training_memory(run, "float32", False, 8) for run in (student, taught))
    assert more.weights - plain.weights == 4 * teacher.parameters.total


def test_what_fits_is_what_the_estimate_says(make_run):
    run = sized(make_run, PEAKS[0][0])
    need = training_memory(run, "float32", False, 10**9)
    most = need.sequences_that_fit(4 << 30)
    assert training_memory(run, "float32", False, most).least <= 4 << 30
    assert training_memory(run, "float32", False, most + 1).least > 4 << 30
    assert need.sequences_that_fit(1000) == 0


def test_moments_are_those_of_the_optimizer(make_run):
    adamw, muon, one = (
        training_memory(sized(make_run, PEAKS[4][0], **own), "float32", False, 1)
        for own in ({}, {"optimizer": "muon"}, {"steps": 1, "warmup_steps": 1})
    )
    parameters = sized(make_run, PEAKS[4][0]).parameters.total
    assert adamw.weights - muon.weights == 4 * parameters
    assert adamw.weights - one.weights == 8 * parameters


def test_a_validation_batch_of_a_large_vocabulary_counts(make_run):
    """Its logits are held whole, those of a training step in parts."""
    recipe = {"batch_size": 24, "validation_bytes": 5 * 10**6}
    need = training_memory(sized(make_run, PEAKS[4][0], **recipe), "float32", False, 1)
    assert need.likely - need.weights > 24 * 512 * 50257 * 8 > need.least
    few = training_memory(
        sized(make_run, PEAKS[4][0], **recipe | {"validation_bytes": 500}), "float32", False, 1
    )
    assert few.likely < need.likely / 2


def test_the_machine_has_memory_unless_less_is_allowed(monkeypatch):
    room = machine_room()
    assert room is not None and 0 < room.free <= room.total
    monkeypatch.setattr(memory, "_control_group_limit", lambda: 1 << 30)
    assert machine_room() == Room(1 << 30, min(room.free, 1 << 30), "this process's control group may use")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (1 << 29, 1 << 29))
    assert machine_room().total == 1 << 29 and "ulimit" in machine_room().what


def test_a_control_group_without_a_limit_has_none(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._limit(tmp_path / "memory.max") == []
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory._limit(tmp_path / "memory.max") == [1 << 30]
