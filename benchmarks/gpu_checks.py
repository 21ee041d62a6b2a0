"""The checks of benchmarks/gpu_check.py: each a function that returns figures, or raises.

They run on CUDA, or at tiny shapes on a CPU. Trainings in float32 are held against the same on the CPU,
within what another order of sums makes.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_parts import attention, generation, head_loss, mfu, scoring
from gpu_runs import (
    BYTES,
    device,
    difference,
    losses,
    make_run,
    on_cuda,
    on_the_cpu,
    summary,
    trained,
    worker,
)

from stlm.files import sha256
from stlm.study.runs import Run
from stlm.training.loop import Trainer

HOME = Path(__file__).resolve().parent.parent
# Of losses in float32, between devices and ways of computing.
CLOSE = 5e-3
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


class Skip(Exception):
    """The machine lacks what a check needs."""


class Check(NamedTuple):
    """A check, the seconds it may take, and how many GPUs it needs."""

    function: Callable[[], dict[str, Any]]
    seconds: float = 60
    gpus: int = 0


def cuda_tests() -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests"], cwd=HOME, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    assert done.returncode == 0 and counts.get("passed"), done.stdout[-1500:]
    return counts


def as_on_the_cpu(**keys: Any) -> dict[str, Any]:
    """Train a tiny run here and on the CPU, both in float32."""
    begin = time.perf_counter()
    here = trained(make_run("here", **keys))
    seconds = time.perf_counter() - begin
    with on_the_cpu():
        expected = trained(make_run("cpu", **keys))
    found = {"largest_difference": difference(here, expected), "loss": here[-1], "seconds": round(seconds, 1)}
    assert found["largest_difference"] < CLOSE, f"the curve is not the CPU's: {here}, {expected}"
    assert here[-1] < here[0], f"the loss does not fall: {here}"
    return found


def training() -> dict[str, Any]:
    """AdamW, in float32 as on the CPU, and in the arithmetic that `auto` chooses."""
    found = as_on_the_cpu()
    run = make_run("auto", precision="auto", steps=30)
    curve = trained(run)
    assert curve[-1] < curve[0], f"the loss does not fall: {curve}"
    return {**found, "auto": {"precision": summary(run)["precision"], "loss": curve[-1]}}


def muon() -> dict[str, Any]:
    """Muon, also in bfloat16."""
    found = as_on_the_cpu(optimizer="muon")
    curve = trained(make_run("bfloat16", optimizer="muon", precision="bfloat16", steps=30))
    assert curve[-1] < curve[0], f"the loss does not fall: {curve}"
    return {**found, "bfloat16_loss": curve[-1]}


def byte_level() -> dict[str, Any]:
    """A byte-level model over words."""
    return as_on_the_cpu(tokenizer="words", model={"bytes": BYTES})


def documents() -> dict[str, Any]:
    """Attention within documents, with grouped heads."""
    return as_on_the_cpu(data={"attention": "within"})


def compiled() -> dict[str, Any]:
    """torch.compile: compiles, and the curve is that of eager training; also over bytes and documents."""
    kinds: dict[str, dict[str, Any]] = {"one layer": {"model": {"layers": 1}}}
    if on_cuda():  # on a CPU each takes a minute
        kinds = {
            "tokens": {},
            "documents": {"data": {"attention": "within"}},
            "bytes": {"tokenizer": "words", "model": {"bytes": BYTES}},
        }
    found: dict[str, Any] = {}
    for kind, keys in kinds.items():
        begin = time.perf_counter()
        run = make_run(f"compiled-{kind}", **keys, compile=True)
        curve = trained(run)
        seconds = round(time.perf_counter() - begin, 1)
        if not summary(run)["compiled"]:
            raise Skip("torch.compile finds no toolchain here: see the warning of a training")
        apart = difference(curve, trained(make_run(f"eager-{kind}", **keys)))
        found[kind] = {"seconds": seconds, "largest_difference": apart}
        assert apart < CLOSE, f"{kind}: compiled training differs: {curve}"
    return found


def no_toolchain() -> dict[str, Any]:
    """Where torch.compile finds no C compiler, training warns and goes on without."""
    caches = {name: os.path.abspath(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    run = make_run("without", compile=True, steps=4)
    # Also nothing of that name on the path, where inductor and Triton look next.
    tools = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": os.path.dirname(sys.executable)}
    status, said = worker(run, **tools, STLM_KERNELS="0", **caches)
    assert status == 0, said[-1000:]
    warned = [line for line in said.splitlines() if "torch.compile failed" in line]
    assert bool(warned) != summary(run)["compiled"], said[-1000:]
    return {"compiled": summary(run)["compiled"], "warning": warned[:1]}


def dropout_schedules() -> dict[str, Any]:
    """A dropout that changes at each step compiles nothing anew, nor do watching and validating."""
    from torch._dynamo.utils import counters

    graphs: list[int] = []
    step = Trainer.step

    def counting(self: Trainer) -> None:
        step(self)
        graphs.append(counters["stats"]["unique_graphs"])

    run = make_run(
        "dropout",
        model={"dropout": 0.2, "attention_dropout": 0.1},
        dropout_schedule="linear",
        compile=True,
        watch_every=3,
    )
    compile_ = torch.compile if on_cuda() else lambda f: torch_compile(f, backend="eager")
    torch_compile = torch.compile
    with mock.patch.object(Trainer, "step", counting), mock.patch.object(torch, "compile", compile_):
        curve = trained(run)
    if not summary(run)["compiled"]:
        raise Skip("torch.compile finds no toolchain here")
    assert graphs[0] > 0 and graphs[0] == graphs[-1], f"compiled anew while training: {graphs}"
    return {"graphs": graphs[-1], "steps": len(graphs), "loss": curve[-1]}


def _weights(run: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (run.folder / "checkpoints").glob("step-*/*.safetensors")
    return load_file(file)


def resume() -> dict[str, Any]:
    """Killed and resumed, a run ends with the weights of one that was not."""
    kill = """
import signal
step = Trainer.step
def killed(self):
    step(self)
    if self.state.progress.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.step = killed
"""
    keys = {"model": {"dropout": 0.1}, "precision": "auto"}
    plain, again, broken = (make_run(name, **keys) for name in ("plain", "again", "broken"))
    for run in (plain, again):
        trained(run)
    status, said = worker(broken, before=kill)
    assert status == -9, said[-1000:]
    status, said = worker(broken)
    assert status == 0 and "resuming after step 4" in said, said[-1000:]

    def apart(run: Run) -> float:
        own = _weights(run)
        return max(float((own[name] - weight).abs().max()) for name, weight in _weights(plain).items())

    found = {
        "identical": losses(broken) == losses(plain) and apart(broken) == 0,
        "largest_difference": apart(broken),
        "of_two_undisturbed_runs": apart(again),
    }
    assert difference(losses(broken), losses(plain)) < CLOSE, f"{losses(broken)}, {losses(plain)}"
    assert found["identical"] or found["of_two_undisturbed_runs"] > 0, f"resumed to other weights: {found}"
    return found


def two_processes() -> dict[str, Any]:
    """Two processes with gloo, on the CPU: NCCL takes a GPU for each."""
    return _group({"CUDA_VISIBLE_DEVICES": ""})


def two_gpus() -> dict[str, Any]:
    """Two processes with NCCL, and what the other does when one is killed."""
    found = _group({})
    kill = """
import signal
step = Trainer.step
def killed(self):
    if self.setup.group.rank == 1 and self.state.progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
Trainer.step = killed
"""
    begin = time.perf_counter()
    status, said = worker(make_run("lost"), *TORCHRUN, before=kill)
    assert said.count("ended without a word") == 1 and status == 1, said[-1500:]
    assert re.search(r"exitcode +: 2\b", said), f"the survivor did not end with 2: {said[-1500:]}"
    return {**found, "seconds_to_end_after_a_kill": round(time.perf_counter() - begin, 1)}


def _group(environment: dict[str, str]) -> dict[str, Any]:
    one, two = make_run("one"), make_run("two")
    status, said = worker(one, **environment)
    assert status == 0, said[-1000:]
    status, said = worker(two, *TORCHRUN, **environment, OMP_NUM_THREADS="1")
    assert status == 0, said[-1500:]
    apart = difference(losses(two), losses(one))
    assert summary(two)["processes"] == 2 and apart < CLOSE, f"{losses(two)}, {losses(one)}"
    return {"largest_difference": apart, "device": summary(two)["device"]}


def nccl_alone() -> dict[str, Any]:
    """A group of one process on one GPU, with the backends that several take."""
    import torch.distributed as dist

    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    store = dist.FileStore(os.path.abspath("store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    dist.new_group(backend="gloo")
    tensors = [torch.full((1000,), 3.0, device=device) for device in ("cpu", "cuda")]
    for tensor in tensors:
        dist.all_reduce(tensor)
    assert all(float(tensor.sum()) == 3000 for tensor in tensors)
    dist.destroy_process_group()
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def fingerprints() -> dict[str, Any]:
    """Which code was checked, file by file: a commit may be dirty."""
    files = sorted((HOME / "stlm").rglob("*.py"))
    digest = hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
    return {"files": len(files), "sha256": digest[:16], "device": device()}


# In the order of what should be known first.
CHECKS: dict[str, Check] = {
    "code": Check(fingerprints),
    "CUDA tests": Check(cuda_tests, 120, gpus=1),
    "training": Check(training),
    "muon": Check(muon),
    "byte-level model": Check(byte_level),
    "attention within documents": Check(documents),
    "head and loss": Check(head_loss),
    "float32 scoring in bounded memory": Check(scoring, 90),
    "generation": Check(generation),
    "mfu": Check(mfu, 150),
    "compile": Check(compiled, 180),
    "no toolchain to compile": Check(no_toolchain, 90),
    "dropout schedules": Check(dropout_schedules, 90),
    "ways of attention": Check(attention, 120),
    "resume": Check(resume, 90),
    "two processes, gloo": Check(two_processes, 90),
    "NCCL, one process": Check(nccl_alone, gpus=1),
    "two processes, NCCL": Check(two_gpus, 120, gpus=2),
}
