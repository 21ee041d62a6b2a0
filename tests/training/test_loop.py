"""Training for real, at a scale of seconds: what it learns, writes, survives and refuses."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import dvclive
import pytest
import torch
from filelock import FileLock

from stlm.errors import UserError
from stlm.files import read_json
from stlm.integrity import seal
from stlm.kernels import library
from stlm.tokens.batches import ValidationSet
from stlm.training import loop, publish
from stlm.training.checkpoints import load_checkpoint
from stlm.training.distributed import Group
from stlm.training.loop import Trainer, train
from stlm.training.records import CURVE_COLUMNS
from stlm.training.resume import resume


def weights(run, step):
    return load_checkpoint(run.folder / "checkpoints" / f"step-{step:07d}")[0].state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=0, rtol=0)


def curve(run):
    with (run.folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_writes_what_it_promises(make_run):
    run = make_run(steps=60, checkpoints=[20], validate_every=20, save_every=50)
    train(run)
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == ["checkpoints", "curve.csv", "train.json", "watch.csv"]
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["step-0000020", "step-0000060", "tokenizer"]
    rows = curve(run)
    assert list(rows[0]) == CURVE_COLUMNS
    validated = [float(row["val_bits_per_byte"]) for row in rows if row["val_bits_per_byte"]]
    # 257 symbols guessed uniformly cost 8 bits; letters in English words about 4.
    assert len(validated) == 3
    assert validated[-1] < validated[0]
    assert validated[-1] < 3.5
    summary = read_json(run.folder / "train.json")
    assert summary["tokens"] == 60 * 4 * 32 == run.tokens
    assert summary["parameters"]["total"] == run.parameters.total
    assert [entry["step"] for entry in summary["checkpoints"]] == [20, 60]
    assert summary["final"]["val_bits_per_byte"] == validated[-1]
    text = summary["validation"]
    assert run.training.validation_bytes <= text["bytes"] < text["bytes_total"]
    assert 1 < text["documents"] < text["documents_total"]
    assert not run.state_folder.exists()


def test_validation_is_the_exact_sum_over_the_text(make_run):
    """Bits per byte against an independent computation: one document's token after the other."""
    run = make_run(steps=2)
    train(run)
    model, _ = load_checkpoint(run.folder / "checkpoints" / "step-0000002")
    validation = ValidationSet(run.tokens_folder, run.model.context, run.training.validation_bytes)
    nats = 0.0
    with torch.no_grad():
        for x_BL, y_BL, mask_BL in validation.batches(1):
            logits_LV = model(torch.from_numpy(x_BL))[0]
            for logits_V, target, counts in zip(logits_LV, y_BL[0], mask_BL[0], strict=True):
                if counts:
                    nats -= logits_V.log_softmax(-1)[target].item()
    final = read_json(run.folder / "train.json")["final"]
    assert final["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / validation.n_bytes, rel=1e-5)
    assert final["val_char_perplexity"] == pytest.approx(math.exp(nats / validation.n_chars), rel=1e-5)


def test_accumulated_micro_batches_make_the_step_of_one_batch(make_run):
    whole = make_run("whole", model={"dropout": 0.0}, steps=4, batch_size=8)
    parts = make_run("parts", model={"dropout": 0.0}, steps=4, batch_size=2, accumulation=4)
    train(whole)
    train(parts)
    one, other = weights(whole, 4), weights(parts, 4)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-3)


def test_the_seed_decides_everything(make_run):
    first, second = make_run("first"), make_run("second")
    third = make_run("third").model_copy(update={"seed": 1})
    for run in (first, second, third):
        train(run)
    assert_same(weights(first, 12), weights(second, 12))
    assert not torch.equal(weights(first, 12)["norm.weight"], weights(third, 12)["norm.weight"])


def test_an_interrupted_run_ends_as_an_undisturbed_one(make_run, monkeypatch):
    plain, broken = make_run("plain", checkpoints=[5]), make_run("broken", checkpoints=[5])
    train(plain)
    step = Trainer.step

    def interrupted(self):
        if self.state.progress.step == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    assert not broken.folder.exists(), "nothing is published before the end"
    monkeypatch.setattr(Trainer, "step", step)
    train(broken)
    assert_same(weights(plain, 5), weights(broken, 5))
    assert_same(weights(plain, 12), weights(broken, 12))
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in curve(plain)]
    assert timeless == [{k: v for k, v in row.items() if "second" not in k} for row in curve(broken)]


@pytest.mark.slow
def test_kill_9_and_again(make_run, tmp_path):
    """A process killed without warning in the middle; the second goes on and reaches the same weights."""
    sizes = {"model": {"layers": 2, "width": 64}, "steps": 60, "save_every": 5, "checkpoints": [30]}
    plain, killed = make_run("plain", **sizes), make_run("killed", **sizes)
    script = (
        "import sys; from stlm.study.runs import Run; from stlm.training.loop import train\n"
        "train(Run.model_validate_json(sys.argv[1]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    subprocess.run([*command, plain.model_dump_json()], check=True, env=environment)
    process = subprocess.Popen(
        [*command, killed.model_dump_json()], env=environment, stderr=subprocess.DEVNULL
    )
    state = killed.state_folder / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.folder.exists()
    done = subprocess.run(
        [*command, killed.model_dump_json()], check=True, env=environment, capture_output=True, text=True
    )
    assert "resuming after step" in done.stderr
    assert_same(weights(plain, 60), weights(killed, 60))
    assert_same(weights(plain, 30), weights(killed, 30))


def test_two_processes_do_not_train_the_same_run(make_run):
    run = make_run()
    run.state_folder.parent.mkdir(parents=True)
    with FileLock(run.state_folder.parent / "tiny-run.lock"):
        with pytest.raises(UserError, match="another process is training it"):
            train(run)
        train(make_run("another"))
    train(run)


def test_a_state_that_cannot_be_written_is_told(make_run):
    run = make_run()
    run.state_folder.parent.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"tiny-run.lock: cannot write: .*"):
        train(run)


def test_it_says_how_it_ended(make_run, capsys):
    run = make_run()
    train(run)
    bits = read_json(run.folder / "train.json")["final"]["val_bits_per_byte"]
    assert f"tiny-run: {bits:.4f} bits per byte on validation text" in capsys.readouterr().err


def test_a_repository_without_a_commit_is_told(make_run):
    subprocess.run(["git", "init", "--quiet"], check=True)
    with pytest.raises(UserError, match="make a first commit"):
        train(make_run())


def test_a_changed_recipe_starts_afresh(make_run, monkeypatch, capsys):
    run = make_run()
    monkeypatch.setattr(loop, "publish", lambda *arguments: None)
    train(run)
    train(make_run(learning_rate=5e-3))
    assert "resuming" not in capsys.readouterr().err
    train(make_run(learning_rate=5e-3))
    assert "resuming after step 12" in capsys.readouterr().err


def test_recording_more_or_less_does_not_start_afresh(make_run, monkeypatch, capsys):
    monkeypatch.setattr(loop, "publish", lambda *arguments: None)
    train(make_run())
    train(make_run(log_every=1, save_every=7))
    assert "resuming after step 12" in capsys.readouterr().err


def test_a_state_of_another_recipe_is_set_aside(make_run, monkeypatch, capsys):
    run = make_run()
    monkeypatch.setattr(loop, "publish", lambda *arguments: None)
    train(run)
    train(make_run(learning_rate=5e-3))
    assert "set aside as" in capsys.readouterr().err
    aside = run.state_folder.with_name("tiny-run.aside")
    assert (aside / "state.pt").exists()


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_publishing_it_publishes_all_the_next_time(moment, make_run, monkeypatch):
    """Cut short after each of the four outputs, and the published ones deleted, as both engines do."""
    run = make_run(checkpoints=[5])
    count = 0

    def cut_after(function):
        def wrapped(*arguments, **keys):
            nonlocal count
            if count == moment:
                raise KeyboardInterrupt
            count += 1
            return function(*arguments, **keys)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(publish, "write_rows", cut_after(publish.write_rows))
        patch.setattr(publish, "write_record", cut_after(publish.write_record))
        patch.setattr(publish, "atomic_directory", cut_after(publish.atomic_directory))
        with pytest.raises(KeyboardInterrupt):
            train(run)
    shutil.rmtree(run.folder, ignore_errors=True)
    train(run)
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["step-0000005", "step-0000012", "tokenizer"]
    weights(run, 5), weights(run, 12)
    assert not run.state_folder.exists()


def test_a_run_that_goes_on_without_its_kernels_says_so(make_run, monkeypatch, capsys):
    """Rounding differs from there on: what it ends with is recorded as of a run without."""
    if not library.kernels().by_type:
        pytest.skip(f"no kernels: {library.kernels().why_none}")
    run, done, other = make_run(), make_run("done"), make_run("other")
    step = Trainer.step

    def stopped_after_half(trainer):
        if trainer.state.progress.step == 6:
            trainer.state.save()
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped_after_half)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "publish", lambda *arguments: None)
        train(done)
    assert "kernels" not in capsys.readouterr().err
    monkeypatch.setattr(library, "kernels", lambda: library.Found({}, "no compiler"))
    train(run)
    told = capsys.readouterr().err
    assert "float32, without kernels (no compiler)" in told
    assert "so far with kernels in C, now without: rounding differs" in told
    assert read_json(run.folder / "train.json")["kernels"] is False
    # One that had taken all its steps with them, and one that never had any.
    train(done)
    train(other)
    assert "so far" not in capsys.readouterr().err
    assert read_json(done.folder / "train.json")["kernels"] is True
    assert read_json(other.folder / "train.json")["kernels"] is False


def test_processes_with_and_without_kernels_do_not_mix(make_run):
    class Mixed(Group):
        def agrees(self, value: int) -> bool:
            return not isinstance(value, bool)

    with pytest.raises(UserError, match=r"some processes have kernels.*set STLM_KERNELS=0 for all"):
        resume(Trainer(make_run(), Mixed()).state)


def test_what_a_kill_left_of_a_checkpoint_is_not_published(make_run, monkeypatch):
    run = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "publish", lambda *arguments: None)
        train(run)
    (run.state_folder / "output" / "checkpoints" / ".step-0000012.x.partial").mkdir()
    train(run)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "step-0000012",
        "tokenizer",
    ]


def test_dvclive_has_the_curve_while_a_run_trains(make_run, monkeypatch):
    run = make_run()
    live: dict[str, Any] = {}
    original = loop.publish

    def publish(*arguments):
        live.update(read_json(run.state_folder / "output" / "dvclive" / "metrics.json"))
        original(*arguments)

    monkeypatch.setattr(loop, "publish", publish)
    train(run)
    last = curve(run)[-1]
    assert live["step"] == int(last["step"])
    assert live["val"]["bits_per_byte"] == float(last["val_bits_per_byte"])
    assert live["train_loss"] == float(last["train_loss"])
    assert not run.state_folder.exists() and not (run.folder / "dvclive").exists()


def test_a_disk_that_fills_up_in_the_records_is_told(make_run, monkeypatch):
    def full(self, *arguments, **keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dvclive.Live, "log_metric", full)
    with pytest.raises(UserError, match="cannot write: no space left"):
        train(make_run())


def test_a_diverging_loss_stops_the_run_and_keeps_the_last_good_checkpoint(make_run):
    run = make_run(
        checkpoints=[1], learning_rate=1e30, min_learning_rate=1e3, warmup_steps=0, clip=0, steps=6
    )
    with pytest.raises(UserError, match=r"step [2-6]: the loss is .*diverged.*step-0000001.*learning_rate"):
        train(run)
    kept = run.state_folder / "output" / "checkpoints" / "step-0000001"
    model, _ = load_checkpoint(kept)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not run.folder.exists()


def test_a_damaged_state_is_told(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(loop, "publish", lambda *arguments: None)
    train(run)
    state = run.state_folder / "state.pt"
    whole = state.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a state at all", b""):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match=r"state.pt: damaged.*delete .state/"):
            train(run)


def test_a_state_that_would_run_code_is_refused(make_run, monkeypatch, tmp_path):
    run = make_run()
    monkeypatch.setattr(loop, "publish", lambda *arguments: None)
    train(run)

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"fingerprint": Malicious()}, run.state_folder / "state.pt")
    seal(run.state_folder / "state.pt")
    with pytest.raises(UserError, match="the saved state is damaged"):
        train(run)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("first", ["checkpoint", "state"])
def test_a_full_disk_is_told_and_the_run_goes_on_later(first, make_run):
    run = make_run(model={"width": 64}, steps=6, checkpoints=[1] if first == "checkpoint" else [])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match="cannot write"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not run.folder.exists()
    assert not [path for path in run.state_folder.rglob("*.partial")]
    train(run)
    assert (run.folder / "train.json").exists()


def test_tokens_of_another_vocabulary_are_refused(make_run):
    run = make_run(model={"vocab_size": 300})
    with pytest.raises(UserError, match=r"meta.json: vocab_size: found 257, expected 300"):
        train(run)


def test_a_corpus_shorter_than_a_context_is_refused(make_run):
    with pytest.raises(UserError, match=r"fewer than one context \(100,000\)"):
        train(make_run(model={"context": 100_000}))


@pytest.mark.slow
def test_weights_and_biases_offline(make_run, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(make_run(wandb=True))
    assert list((tmp_path / "wandb").glob("offline-run-*")), "Weights & Biases recorded nothing"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_training_is_training(make_run):
    """torch.compile rounds differently, but the loss must follow the plain run's."""
    plain, compiled = (
        make_run("plain", model={"dropout": 0.0}),
        make_run("compiled", model={"dropout": 0.0}, compile=True),
    )
    train(plain)
    train(compiled)
    assert read_json(compiled.folder / "train.json")["compiled"] is True
    for one, other in zip(curve(plain), curve(compiled), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=1e-3)


def test_bfloat16_is_near_to_float32(make_run):
    plain, rounded = make_run("plain", steps=20), make_run("rounded", steps=20, precision="bfloat16")
    train(plain)
    train(rounded)
    summary = json.loads((rounded.folder / "train.json").read_text())
    assert summary["precision"] == "bfloat16"
    assert float(curve(plain)[-1]["val_loss"]) == pytest.approx(
        float(curve(rounded)[-1]["val_loss"]), rel=0.05
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_cuda_it_compiles_and_learns(make_run, capsys):
    run = make_run(steps=60, precision="auto")
    train(run)
    summary = read_json(run.folder / "train.json")
    assert summary["precision"] == "bfloat16"
    assert summary["compiled"] != ("torch.compile failed" in capsys.readouterr().err)
    assert summary["final"]["val_bits_per_byte"] < 3.5
