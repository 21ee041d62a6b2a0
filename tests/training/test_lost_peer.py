"""Of processes that train together one is killed: the others end with status 2, and one of them says why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from forked import in_processes

WORKER = """
import os, sys, signal, time
import stlm.cli
from stlm.study.runs import Run
from stlm.training import lifeline, loop, resume
from stlm.training.loop import Trainer

RANK, VICTIM = int(os.environ["RANK"]), int(os.environ["VICTIM"])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def train(options):
    exec(os.environ["MOMENT"], globals())
    loop.train(Run.model_validate_json(os.environ["RUN"]))

stlm.cli.train = train
sys.exit(stlm.cli.main(["train", "study", "run"]))
"""

# The others wait in the exchange of gradients.
EXCHANGE = """
step = Trainer.step
def counting(self):
    if RANK == VICTIM and self.state.progress.step == 4:
        self.setup.group.__class__.sum = lambda *arguments: (time.sleep(0.3), die())
    step(self)
Trainer.step = counting
"""
# Between two exchanges, after the step's.
BETWEEN = """
from stlm.training.watch import Watch
before = Watch.before_update
def dying(self, step, tokens):
    if RANK == VICTIM and step == 5:
        die()
    before(self, step, tokens)
Watch.before_update = dying
"""
# The leader has written half of a state; the others are a step further.
WRITING = """
save = resume.save_state
def half(path, mark, model, optimizer, progress):
    if progress.step == 6:
        with loop_atomic(path) as temporary:
            temporary.write_bytes(b"half")
            die()
    save(path, mark, model, optimizer, progress)
from stlm.files import atomic_path as loop_atomic
resume.save_state = half
"""
# The leader is at long work of its own, as where it waits for a GPU, and never comes to an exchange.
ELSEWHERE = """
lifeline.GRACE = 1.0
step = Trainer.step
def elsewhere(self):
    if self.state.progress.step == 4:
        if RANK == VICTIM:
            die()
        time.sleep(3600)
    step(self)
Trainer.step = elsewhere
"""


def ends(run, size, victim, moment):
    """Exit statuses of processes that no torchrun started, which would end them, and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("worker.py", "w") as file:
        file.write(WORKER)
    own = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RUN": run.model_dump_json(),
        "MOMENT": moment,
        "VICTIM": str(victim),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "worker.py"],
            env={**own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(said)


def work(run, moment, victim):
    """What a forked process does: the same."""
    os.environ |= {"RUN": run, "MOMENT": moment, "VICTIM": victim}
    exec(WORKER, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "victim", "size"),
    [(EXCHANGE, 1, 2), (BETWEEN, 0, 2), (WRITING, 0, 3), (ELSEWHERE, 1, 3)],
    ids=["exchange", "between", "writing", "elsewhere"],
)
def test_the_others_end_as_promised(moment, victim, size, make_run):
    run = make_run(batch_size=6)
    if moment == EXCHANGE:  # the one for which whole processes begin and end
        statuses, said = ends(run, size, victim, moment)
    else:
        told = (run.model_dump_json(), moment, str(victim))
        statuses, said = in_processes(work, *told, size=size, store=False)
    expected = [2] * size
    expected[victim] = -signal.SIGKILL
    assert statuses == expected, said
    # Who tells is settled in the leader's store (torchrun's, where it started them): with that gone, each.
    assert 1 <= said.count("ended without a word") <= size - 1, said
    assert said.count("error: ") == said.count("ended without a word"), said
    assert "Traceback" not in said and "terminate called" not in said
    state = run.state_folder / "state.pt"
    assert state.exists(), "what was saved before stays"


@pytest.mark.slow
def test_processes_that_do_not_meet_are_told(make_run):
    """The address is one where no one listens."""
    moment = """
import datetime, torch.distributed as dist
meet = dist.rendezvous
dist.rendezvous = lambda url: meet(url, timeout=datetime.timedelta(seconds=1))
os.environ["RANK"] = "1"
"""
    told = (make_run().model_dump_json(), moment + 'os.environ["WORLD_SIZE"] = "2"', "5")
    statuses, said = in_processes(work, *told, size=1, store=False)
    assert statuses == [2], said
    assert "the 2 processes of this training did not find one another at 127.0.0.1:" in said
    assert "Traceback" not in said
