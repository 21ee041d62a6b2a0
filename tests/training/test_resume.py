"""A run that was stopped, by a signal, a kill or a disk that failed, ends as one that never was."""

from __future__ import annotations

import csv
import errno
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from stlm.errors import Interrupted, UserError
from stlm.files import read_json
from stlm.provenance import processor_name
from stlm.tokens.config import DataConfig
from stlm.training import curve, loop, resume
from stlm.training.loop import Trainer, train
from stlm.training.signals import StopSignals
from stlm.training.state import draws

# Wall-clock times; all else that a run writes must be the same.
TIMES = {"seconds", "tokens_per_second"}
NAMES = {"run", "variant", "label"}


@pytest.fixture(autouse=True)
def interruptible():
    """Tests that were started in the background ignore SIGINT, and training with them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def written(run):
    """Everything in the run's folder but wall times: the weights, the curve, DVCLive's files, train.json."""
    found = {}
    for path in sorted(run.folder.rglob("*")):
        name = str(path.relative_to(run.folder))
        if path.name == "curve.csv":
            with path.open() as file:
                found[name] = [
                    {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)
                ]
        elif path.name in ("train.json", "config.json"):
            found[name] = {
                k: v for k, v in read_json(path).items() if k not in {*TIMES, "run", "variant", "label"}
            }
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def assert_same(one, other):
    first, second = written(one), written(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name


def at_step(monkeypatch, step, action):
    """Do `action` once, in the middle of a step."""
    original, done = Trainer.step, []

    def wrapped(self):
        if self.state.progress.step + 1 == step and not done:
            done.append(True)
            action()
        return original(self)

    monkeypatch.setattr(Trainer, "step", wrapped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [1, 5, 6, 8, 12], ids=["first", "between", "save", "validation", "last"])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(number, step, make_run, monkeypatch, capfd):
    plain, stopped = make_run("plain", checkpoints=[5, 8]), make_run("stopped", checkpoints=[5, 8])
    train(plain)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=rf"after step {step} of 12, saved in .*state.pt") as stop:
            train(stopped)
    assert stop.value.status == 128 + number
    assert signal.getsignal(number) is handler
    assert f"{signal.Signals(number).name}: stopping after this step" in capfd.readouterr().err
    assert not stopped.folder.exists()
    train(stopped)
    assert f"resuming after step {step}" in capfd.readouterr().err
    assert_same(plain, stopped)


def train_stopping_always(run, monkeypatch):
    """Train a run of 12 steps that is stopped after each of them."""
    original = Trainer.step

    def stopping(self):
        original(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        for _ in range(12):
            with pytest.raises(Interrupted):
                train(run)


RICH = {
    "optimizer": "muon",
    "schedule": "wsd",
    "dropout_schedule": "triangular",
    "watch_every": 3,
}


@pytest.mark.parametrize(
    ("recipe", "data"),
    [
        ({}, {}),
        (RICH, {"order": "length", "attention": "within"}),
        (RICH, {"order": "length", "pacing": "competence"}),
    ],
    ids=["plain", "muon-and-schedules", "curriculum"],
)
def test_stopped_after_every_step_it_ends_the_same(recipe, data, make_run, monkeypatch):
    """The mean loss of a row spans several stops, and no row or checkpoint is lost or doubled."""
    sizes = {"checkpoints": [5], "accumulation": 2, "log_every": 5, **recipe}
    plain, stopped = (
        run.model_copy(update={"data": DataConfig(**data)})
        for run in (make_run("plain", **sizes), make_run("stopped", **sizes))
    )
    train(plain)
    train_stopping_always(stopped, monkeypatch)
    train(stopped)
    assert_same(plain, stopped)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with StopSignals(verbose=False) as signals:
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # an echo of the first, not a second
            assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])


def test_a_second_signal_ends_at_once():
    code = (
        "import time; from stlm.training.signals import StopSignals\n"
        "with StopSignals() as s:\n print('ready', flush=True)\n while True: time.sleep(0.05)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert process.poll() is None, "the first signal lets the step end"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 128 + signal.SIGINT


def full_disk(*arguments, **keys):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["state", "checkpoint", "signal"])
def test_a_disk_that_fills_up_while_saving_keeps_the_previous_state(moment, make_run, monkeypatch):
    """The state of step 3 stays, whichever later write fails, and the run goes on from it to the same end."""
    plain, broken = make_run("plain", checkpoints=[8]), make_run("broken", checkpoints=[8])
    train(plain)
    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            patch.setattr(curve, "save_checkpoint", full_disk_in(curve.save_checkpoint))
            expected = 6
        else:
            # Saves are due after steps 3, 6, ...: the second fails, at step 6 or at the signal in step 5.
            patch.setattr(torch, "save", fail_second(torch.save))
            expected = 3
        if moment == "signal":
            at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(UserError, match=r"cannot write.*no space left"):
            train(broken)
    state = torch.load(broken.state_folder / "state.pt", weights_only=True)
    assert f'"step": {expected}, "seconds"' in state["progress"]
    assert not list(broken.state_folder.rglob("*.partial"))
    train(broken)
    assert_same(plain, broken)


def full_disk_in(save_checkpoint):
    """`save_checkpoint` on a disk that is full once the weights are written."""

    def wrapped(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stlm.training.checkpoints.sha256", full_disk)
            return save_checkpoint(*arguments)

    return wrapped


def fail_second(save):
    calls = []

    def wrapped(content, path):
        save(content, path)
        calls.append(path)
        if len(calls) == 2:
            full_disk()

    return wrapped


def test_a_folder_that_became_unwritable_keeps_the_previous_state(make_run, monkeypatch, tmp_path):
    plain, broken = make_run("plain"), make_run("broken")
    train(plain)
    user = os.geteuid()

    def lose_permission():
        if user == 0:  # may write anywhere: go on as a user who owns nothing here
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        else:
            broken.state_folder.chmod(0o500)

    try:
        with monkeypatch.context() as patch:
            at_step(patch, 5, lose_permission)
            with pytest.raises(UserError, match=r"cannot write: permission denied"):
                train(broken)
    finally:
        os.seteuid(user)
        broken.state_folder.chmod(0o700)
    train(broken)
    assert_same(plain, broken)


def test_a_state_folder_that_is_no_folder_any_more(make_run, monkeypatch):
    """What root meets too: the write of the state fails for a reason that is no permission."""
    run = make_run()

    def replace():
        run.state_folder.rename(run.state_folder.with_name("moved"))
        run.state_folder.write_text("a file")

    at_step(monkeypatch, 5, replace)
    with pytest.raises(UserError, match="cannot write: a file stands where"):
        train(run)
    assert (run.state_folder.with_name("moved") / "state.pt").exists()


def test_the_signals_save_on_a_full_disk_for_real(make_run, monkeypatch):
    """The same by the system: files may not grow past a limit that is set in the middle of the run."""
    plain, broken = (make_run(name, model={"width": 64}) for name in ("plain", "broken"))
    train(plain)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit_and_stop():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with monkeypatch.context() as patch:
            at_step(patch, 5, limit_and_stop)
            with pytest.raises(UserError, match="cannot write"):
                train(broken)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(broken.state_folder.rglob("*.partial"))
    train(broken)
    assert_same(plain, broken)


def test_leftovers_of_kills_are_cleared_away_and_never_published(make_run, monkeypatch):
    """Partial and replaced files of a SIGKILL in any write: of the state, a checkpoint, the results."""
    plain, run = make_run("plain", checkpoints=[5]), make_run("killed", checkpoints=[5])
    train(plain)
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(run)
    (run.state_folder / ".state.pt.x.partial").write_text("half a state")
    kept = run.state_folder / "output" / "checkpoints"
    for left in (
        kept / ".step-0000005.x.partial",
        kept / ".step-0000005.y.old",
        run.folder / ".checkpoints.x.partial",
        run.folder / ".checkpoints.y.old",
    ):
        left.mkdir(parents=True)
        (left / "content").write_text("left over")
    (run.folder / ".curve.csv.x.partial").write_text("step")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "publish", lambda *arguments: None)
        train(run)
        assert sorted(path.name for path in run.state_folder.iterdir()) == ["output", "state.pt"]
    train(run)
    assert_same(plain, run)


def test_a_step_draws_of_its_own_and_those_of_earlier_versions():
    """Without accumulation they are those of the first version, so that its curves come out again."""
    assert draws(3, 7, 0, 0) == 3 * 1_000_003 + 7
    places = [(step, micro, row) for step in (1, 2, 3) for micro in (0, 1, 2) for row in (0, 4)]
    assert len({draws(0, *place) for place in places}) == len(places)


def test_a_state_without_the_newer_keys_is_resumed(make_run, monkeypatch):
    """States saved before `losses` and `grad_norm` were part of them, always right after a row."""
    plain, run = make_run("plain"), make_run("older")
    train(plain)
    original = resume.save_state

    def older(path, mark, model, optimizer, progress):
        pending = progress.__dict__.pop("losses"), progress.__dict__.pop("grad_norm")
        original(path, mark, model, optimizer, progress)
        progress.losses, progress.grad_norm = pending

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_state", older)
        at_step(patch, 8, kill)
        with pytest.raises(Killed):
            train(run)
    train(run)
    assert_same(plain, run)


def test_a_run_that_goes_on_by_other_code_or_elsewhere_says_so(make_run, monkeypatch):
    whole, run, done = make_run("whole"), make_run("parts"), make_run("done")

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    for other, step in ((run, 8), (done, None)):
        with monkeypatch.context() as patch:
            patch.setattr(resume, "processor_name", lambda: "Another CPU")
            if step is None:  # all steps are done, but nothing is published
                patch.setattr(loop, "publish", lambda *arguments: None)
                train(other)
            else:
                at_step(patch, step, kill)
                with pytest.raises(Killed):
                    train(other)
        train(other)
    train(whole)
    records = {own.name: read_json(own.folder / "train.json") for own in (whole, run, done)}
    assert "parts" not in records["whole"] and "parts" not in records["done"]
    assert [part["processor"] for part in records["parts"]["parts"]] == ["Another CPU", processor_name()]
    assert records["parts"]["processor"] == records["whole"]["processor"] == processor_name()
    assert records["done"]["processor"] == "Another CPU", "which took all steps"


def test_the_last_step_is_of_the_processor_that_a_run_came_back_to(make_run, monkeypatch):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    run = make_run("back")
    for processor, step in (("One", 4), ("Other", 8), ("One", None)):
        with monkeypatch.context() as patch:
            patch.setattr(resume, "processor_name", lambda processor=processor: processor)
            if step is None:
                train(run)
                continue
            at_step(patch, step, kill)
            with pytest.raises(Killed):
                train(run)
    record = read_json(run.folder / "train.json")
    assert [part["processor"] for part in record["parts"]] == ["Other", "One"]
    assert record["processor"] == "One"


def test_a_signal_saves_though_no_one_reads_what_training_tells(make_run, tmp_path):
    """As in `stlm train ... 2>&1 | tee log` and ctrl-C, where `tee` is the first to die."""
    run = make_run("unread", steps=2000, save_every=2000, validate_every=2000)
    program = (
        "import os, sys; from stlm.study.runs import Run; from stlm.training.loop import train\n"
        "train(Run.model_validate_json(os.environ['RUN']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "RUN": run.model_dump_json()},
        stderr=subprocess.PIPE,
    )
    while b"step/s" not in process.stderr.read1():
        pass
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert (run.state_folder / "state.pt").exists()


def test_a_signal_does_not_save_weights_that_a_gpu_has_spoilt_unnoticed(make_run, monkeypatch):
    """On a GPU steps are checked when a row is due; here a CPU stands in, its own check left out."""
    run = make_run(log_every=12, save_every=3)

    def spoil(trainer):
        with torch.no_grad():
            next(trainer.setup.model.parameters()).fill_(math.nan)

    original = Trainer.step

    def step(self):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "check_finite", lambda *arguments: None)
            original(self)
        if self.state.progress.step == 4:
            spoil(self)
        if self.state.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(UserError, match="training diverged"):
        train(run)
    state = torch.load(run.state_folder / "state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
