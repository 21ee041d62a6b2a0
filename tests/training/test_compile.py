"""torch.compile is tried before the first step, and where it fails training warns and goes on without."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from stlm.errors import Interrupted
from stlm.files import read_json
from stlm.training.compilation import compile_objective
from stlm.training.devices import compiler_error
from stlm.training.distributed import Group
from stlm.training.loop import Trainer, train

MISSING = "Failed to find C compiler. Please specify via CC environment variable."


def failing(function):
    def call(*arguments, **keys):
        raise RuntimeError(f"backend='inductor' raised:\n{MISSING}\nand more lines")

    return call


def summary(run):
    return read_json(run.folder / "train.json")


def weights(run):
    return [checkpoint["weights_sha256"] for checkpoint in summary(run)["checkpoints"]]


@pytest.mark.parametrize("dropout_schedule", ["constant", "linear"])
def test_without_a_toolchain_training_warns_and_is_the_plain_one(
    dropout_schedule, make_run, monkeypatch, capsys
):
    plain = make_run("plain", dropout_schedule=dropout_schedule)
    train(plain)
    monkeypatch.setattr(torch, "compile", failing)
    run = make_run("compiled", dropout_schedule=dropout_schedule, compile=True)
    train(run)
    said = capsys.readouterr().err
    assert said.count("torch.compile failed") == said.count(MISSING) == 1
    assert "raised:" not in said
    assert summary(run)["compiled"] is False
    assert summary(run)["kernels"] == summary(plain)["kernels"]
    assert weights(run) == weights(plain)


def test_the_trial_changes_no_weight(make_run, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    plain, compiled = make_run("plain"), make_run("compiled", compile=True)
    train(plain)
    train(compiled)
    assert summary(compiled)["compiled"] is True
    assert "torch.compile failed" not in capsys.readouterr().err
    assert weights(compiled) == weights(plain)


def test_the_group_compiles_together_or_not(make_run, monkeypatch, capsys):
    class Failed(Group):
        """Of which another process could not."""

        def largest(self, value):
            return 1

    calls = []
    monkeypatch.setattr(
        torch, "compile", lambda function: lambda *a, **k: calls.append(1) or function(*a, **k)
    )
    trainer = Trainer(make_run(compile=True), Failed())
    compile_objective(trainer.state)
    assert not trainer.setup.device.compiled and len(calls) == 1
    (tokens, *_) = trainer.setup.micro_batches.of_step(1, trainer.setup.share)
    trainer.setup.loss(tokens, 1)
    assert len(calls) == 1
    assert "another process could not" in capsys.readouterr().err


def test_too_little_memory_is_not_the_compilers_fault(make_run, monkeypatch):
    def full(*arguments, **keys):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        train(make_run(compile=True))


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled later"])
def test_a_run_that_goes_on_in_another_way_says_so(first, make_run, monkeypatch, capsys):
    def stopping(self):
        step(self)
        if self.state.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    step = Trainer.step
    ways = [lambda function: function, failing]
    run = make_run(compile=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", ways[not first])
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Interrupted):
            train(run)
    monkeypatch.setattr(torch, "compile", ways[first])
    train(run)
    said = capsys.readouterr().err
    assert ("so far compiled, now not" if first else "so far not, or not all, compiled, now compiled") in said
    assert summary(run)["compiled"] is False


@pytest.mark.parametrize(
    ("message", "line"),
    [("backend='inductor' raised:\n  No compiler\nx", "No compiler"), ("one", "one"), ("", "ValueError")],
)
def test_the_telling_line(message, line):
    assert compiler_error(ValueError(message)) == line
