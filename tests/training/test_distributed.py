"""Several processes, started by torchrun or forked with its variables, train one run as one process does."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from forked import in_processes

from stlm.errors import Interrupted, UserError
from stlm.files import read_json
from stlm.tokens.config import DataConfig
from stlm.training.checkpoints import load_checkpoint
from stlm.training.distributed import Group, LostPeer, processes
from stlm.training.divergence import RECORD
from stlm.training.loop import Trainer, train

WORKER = """
import os, sys
from stlm.cli import main
from stlm.study.runs import Run
from stlm.training import loop
import stlm.cli

def train(options):
    exec(BEFORE, globals())
    loop.train(Run.model_validate_json(RUN))

stlm.cli.train = train
sys.exit(main(["train", "study", "run"]))
"""


def torchrun(run, size, before="", **keys):
    """Train `run` in `size` processes; `before` is run in each of them first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUN": run.model_dump_json(), "BEFORE": before}
    variables = "import os; RUN, BEFORE = os.environ['RUN'], os.environ['BEFORE']"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    with open("worker.py", "w") as file:
        file.write(variables + WORKER)
    return subprocess.Popen(
        [*command, "worker.py"], env=environment, stderr=subprocess.PIPE, text=True, **keys
    )


def train_forked(run: str, before: str = "") -> None:
    """What a forked process does: the verb of the command line, with the run (JSON) instead of a study's."""
    exec(WORKER, {"RUN": run, "BEFORE": before})


def finish(process, timeout=300):
    """Wait for the end; what was said on stderr. Hanging is a failure."""
    try:
        return process.communicate(timeout=timeout)[1]
    finally:
        process.kill()


def curve(run):
    with (run.folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def assert_near(one, other):
    """The same curves and weights but for the order in which float32 numbers are added."""
    for first, second in zip(curve(one), curve(other), strict=True):
        for name in ("train_loss", "grad_norm", "val_loss", "val_bits_per_byte"):
            if first[name]:
                assert float(first[name]) == pytest.approx(float(second[name]), rel=2e-5), name
    last = f"step-{one.training.steps:07d}"
    first, second = (
        load_checkpoint(run.folder / "checkpoints" / last)[0].state_dict() for run in (one, other)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_of_torchrun_train_as_one(make_run):
    sizes = {"model": {"dropout": 0.0}, "checkpoints": [5]}
    one, two = make_run("one", **sizes), make_run("two", **sizes)
    train(one)
    process = torchrun(two, 2)
    said = finish(process)
    assert process.returncode == 0, said
    check_trained_as_one(one, two, said)


@pytest.mark.slow
def test_two_processes_train_as_one_with_dropout(make_run):
    """Each process works on whole micro-batches."""
    sizes = {"model": {"dropout": 0.1}, "accumulation": 2, "checkpoints": [5]}
    one, two = make_run("one", **sizes), make_run("two", **sizes)
    train(one)
    statuses, said = in_processes(train_forked, two.model_dump_json())
    assert statuses == [0, 0], said
    check_trained_as_one(one, two, said)


def check_trained_as_one(one, two, said):
    assert_near(one, two)
    assert said.count("bits per byte on validation") == 1, "one process tells"
    assert "float32, 2 processes" in said
    assert read_json(one.folder / "train.json")["processes"] == 1
    assert read_json(two.folder / "train.json")["processes"] == 2
    assert not two.state_folder.exists()


LEADER_MEASURES = """
from stlm.training.difficulty import Reference
measure = Reference._measure
def measuring(*arguments):
    print("measuring", file=sys.stderr)
    return measure(*arguments)
Reference._measure = measuring
"""


@pytest.mark.slow
def test_difficulty_is_measured_by_one_process_while_the_others_wait(make_run):
    sizes = {"model": {"dropout": 0.0}, "steps": 6}
    train(make_run("reference", **sizes))
    data = {"data": DataConfig(order="difficulty", reference="reference")}
    one, two = (make_run(name, **sizes).model_copy(update=data) for name in ("one", "two"))
    statuses, said = in_processes(train_forked, two.model_dump_json(), LEADER_MEASURES)
    assert statuses == [0, 0], said
    assert said.count("measuring") == 1, said
    train(one)
    assert_near(one, two)


SIGNAL_SELF = """
import signal
from stlm.training.loop import Trainer
step = Trainer.step
def stopping(self):
    step(self)
    if self.setup.group.rank == 1 and self.state.progress.step == 7:
        os.kill(os.getpid(), signal.SIGTERM)
Trainer.step = stopping
"""


@pytest.mark.slow
def test_the_number_of_processes_may_change_while_a_run_is_stopped(make_run, monkeypatch):
    """One process for 3 steps, two up to step 7, one to the end: the run of one process throughout."""
    sizes = {"accumulation": 2, "steps": 12, "checkpoints": [5]}
    plain, changing = make_run("plain", **sizes), make_run("changing", **sizes)
    train(plain)
    step = Trainer.step

    def stopping(self):
        step(self)
        if self.state.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Interrupted):
            train(changing)
    statuses, said = in_processes(train_forked, changing.model_dump_json(), SIGNAL_SELF)
    assert "2 processes, resuming after step 3" in said
    assert said.count("stopped by SIGTERM after step 7 of 12") == 1, "a signal to one process stops all"
    assert statuses == [143, 143], said
    train(changing)
    assert_near(plain, changing)
    assert [row["step"] for row in curve(plain)] == [row["step"] for row in curve(changing)]


FAIL_IN_ONE = """
from stlm.errors import UserError
from stlm.training.loop import Trainer
step = Trainer.step
def failing(self):
    if self.setup.group.rank == {rank} and self.state.progress.step == 4:
        {action}
    step(self)
Trainer.step = failing
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "who"), [(0, "the leader"), (1, "the other")])
def test_an_error_in_one_process_ends_all_and_is_told_once(rank, who, make_run):
    action = f"raise UserError('{who} met a problem')"
    before = FAIL_IN_ONE.format(rank=rank, action=action)
    statuses, said = in_processes(train_forked, make_run().model_dump_json(), before)
    assert statuses == [2, 2], said
    assert said.count(f"error: {who} met a problem") == said.count("error: ") == 1, said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_killed_process_ends_all_and_is_told_once(make_run):
    before = FAIL_IN_ONE.format(rank=1, action="os.kill(os.getpid(), 9)")
    process = torchrun(make_run(), 2, before)
    begin = time.monotonic()
    said = finish(process)
    assert time.monotonic() - begin < 240, "gloo waits for half an hour"
    assert process.returncode == 1, "torchrun's own status"
    assert said.count("error: a process of this training ended without a word") == 1, said
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said.split("torch/distributed/elastic")[0]
    assert sorted(re.findall(r"exitcode +: (-?\d+)", said)) == ["-9", "2"], said


def test_rows_of_one_micro_batch_are_summed_and_not_those_of_another(make_run, monkeypatch):
    """Four processes and two micro-batches: two share the rows of each."""
    training = make_run(accumulation=2, batch_size=4).training
    groups = [Group(rank, 4) for rank in range(4)]
    shares = [group.share(training) for group in groups]
    assert [share.micros.start for share in shares] == [0, 0, 1, 1]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(Group, "sum", lambda _, tensors: sent.append(tensors[0].clone()))
    own = [torch.tensor([10.0**rank, 1.0]) for rank in range(4)]
    for group, share, tensor in zip(groups, shares, own, strict=True):
        group.sum_over_rows(tensor, share)
    monkeypatch.setattr(Group, "sum", lambda _, tensors: tensors[0].copy_(sum(sent)))
    found = [g.sum_over_rows(t, s).tolist() for g, s, t in zip(groups, shares, own, strict=True)]
    assert found == [[11, 2], [11, 2], [1100, 2], [1100, 2]]
    alone = Group().share(training)
    assert Group().sum_over_rows(own[0], alone) is own[0]


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(make_run):
    statuses, said = in_processes(train_forked, make_run(model={"vocab_size": 300}).model_dump_json())
    assert said.count("vocab_size: found 257, expected 300") == 1
    assert statuses == [2, 2], said


REFUSE = """
from functools import partial
from stlm.errors import UserError

def check():
    raise UserError("no room for the run")

loop.train = partial(loop.train, check=check)
"""


@pytest.mark.slow
def test_what_is_checked_before_training_is_told_once(make_run):
    statuses, said = in_processes(train_forked, make_run().model_dump_json(), REFUSE)
    assert said.count("error: no room for the run") == 1, said
    assert statuses == [2, 2], said


DIVERGE = """
from stlm.training.loop import Trainer
build = Trainer.__init__
def planted(self, *arguments):
    build(self, *arguments)
    def fault(module, inputs, output):
        return output if self.state.progress.step < 3 else output * float("inf")
    self.setup.model.blocks[1].ffn.register_forward_hook(fault)
Trainer.__init__ = planted
"""


@pytest.mark.slow
def test_a_divergence_of_several_processes_is_explained_once(make_run):
    run = make_run(model={"layers": 2})
    statuses, said = in_processes(train_forked, run.model_dump_json(), DIVERGE)
    assert said.count("training diverged") == 1, said
    assert "step 4: the loss is nan" in said
    assert "Where: the feed-forward output of block 2 is the first that is not finite." in said
    assert statuses == [2, 2], said
    assert "Traceback" not in said
    assert (run.state_folder / RECORD).exists()


def test_a_group_that_torchrun_did_not_start_is_told(make_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but RANK is not set.*torchrun"), processes():
        pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:27533. This is"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:2: Connection reset by peer"),
        RuntimeError("[gloo/transport/tcp/pair.cc:431] writev [127.0.0.1]:2: Broken pipe"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"),
        RuntimeError("[gloo/transport/tcp/pair.cc:1008] Application timeout caused pair closure"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ],
)
def test_a_process_that_is_gone_is_told_from_other_errors(error, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises(LostPeer, match="ended without a word"):
        Group(0, 2).wait()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Tensors must be contiguous")]
)
def test_other_errors_of_an_exchange_are_told_as_they_are(error, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises(type(error)) as told:
        Group(0, 2).sum([torch.ones(2)])
    assert told.value is error


@pytest.mark.slow
def test_two_processes_start_from_what_one_of_them_cut(make_run):
    large = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "dropout": 0.0}
    small = {**large, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 24}
    train(make_run("origin", model=large))
    one, two = (make_run(name, model=small, start_from="origin") for name in ("one", "two"))
    statuses, said = in_processes(train_forked, two.model_dump_json())
    assert statuses == [0, 0], said
    train(one)
    assert_near(one, two)
    start = read_json(two.folder / "train.json")["depends"]["start"]
    assert start["inherited"] == read_json(one.folder / "train.json")["depends"]["start"]["inherited"]
