"""The stage `teach`: asks a run's teacher about the text that the run will train on, and keeps the answers.

The answers are written in shards to a folder beside their target, each atomically. A killed stage goes on
with the first shard that is missing; the folder is renamed once all are there. Batches of the text are
computed by one thread each, in bfloat16 where the processor multiplies it: results do not depend on the
number of threads.

Shapes: B windows, T tokens of a window, R chunks, L positions of a chunk, K tokens kept at each, D width.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import (
    disk_errors,
    read_json,
    record_sha256,
    remove_leftovers,
    replace_directory,
    sha256,
    write_record,
)
from stlm.integrity import check_seal
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.provenance import code_version, processor_name
from stlm.study.runs import Run
from stlm.teaching.draw import largest, sample
from stlm.teaching.names import distillation, settings, taught_folder
from stlm.teaching.plan import Part, digest, parts_of
from stlm.teaching.shards import (
    META,
    Answers,
    bytes_per_position,
    id_type,
    joined,
    keys_of,
    open_answers,
    write_answers,
)
from stlm.teaching.teacher import Teacher
from stlm.techniques.distillation import Distillation
from stlm.tokens.ahead import ahead
from stlm.tokens.shards import read_meta
from stlm.training.dependencies import read_dependencies
from stlm.training.devices import Device, choose_device
from stlm.training.setup import TrainingText
from stlm.units import byte_size

# Changes when the same answers would be computed otherwise, or laid out otherwise.
_FORMAT = 1
# Tokens that a thread reads at once, and positions of a shard: a kill loses less than one.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 2**16}
_SHARD_POSITIONS = 2**16
_TO_SPARE = 1.05


@dataclass(frozen=True)
class _Job:
    """A shard to write: its windows of a part, and its file's name."""

    part: Part
    windows: list[tuple[int, np.ndarray]]
    name: str

    @property
    def chunks(self) -> np.ndarray:
        return np.concatenate([needed for _, needed in self.windows])


def teach(run: Run, progress: bool = True) -> Path:
    """Ask the teacher of `run`, and write its answers to the folder that training reads; returns it.

    What is there already is kept, if it is what would be written. Raises ``UserError`` if the run has no
    `taught`, for missing or damaged inputs, if the disk has no room, and while another process is at it.
    """
    technique, folder = distillation(run), taught_folder(run)
    if technique is None:
        raise UserError(
            f"run {run.name}: nothing to teach: techniques.distillation.taught is not set; `stlm train` asks "
            "the teacher itself, if there is one"
        )
    with _locked(folder):
        device = choose_device(run.training)
        dependencies = read_dependencies(run)
        text = TrainingText(run, device.device, dependencies)
        parts = parts_of(run, text.batches.rows, technique)
        plan = _plan(run, technique, parts, dependencies["teacher"].weights_sha256, device)
        if (folder / META).exists() and read_json(folder / META).get("plan") == plan:
            print(f"{folder}: the teacher's answers are there", file=sys.stderr)
            return folder
        model, subset = technique.load_teacher(run, device.device)
        teacher = Teacher(model, subset, device.dtype, technique.temperature)
        with disk_errors(folder):
            _write(run, technique, teacher, parts, folder, plan, progress)
    return folder


def _plan(
    run: Run, technique: Distillation, parts: list[Part], weights: str, device: Device
) -> dict[str, Any]:
    """Everything that the answers depend on: others are not kept."""
    return {
        "format": _FORMAT,
        **settings(run, technique),
        "corpus": run.corpus,
        "tokenizer": run.tokenizer,
        "weights_sha256": weights,
        "tokens_sha256": record_sha256(run.tokens_folder / "meta.json"),
        "chunks_sha256": digest({part.component.name: part.chunks for part in parts}),
        "arithmetic": device.precision,
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = Path(".state") / "taught" / f"{folder.name}.lock"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is writing it ({path} is held); wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _write(
    run: Run,
    technique: Distillation,
    teacher: Teacher,
    parts: list[Part],
    folder: Path,
    plan: dict[str, Any],
    progress: bool,
) -> None:
    """Write the missing shards and meta.json beside `folder`, then rename."""
    partial = folder.parent / f".{folder.name}.partial"
    shards = partial / "shards"
    jobs = _jobs(parts, run.model.context)
    done = _prepare(partial, plan, jobs)
    positions = sum(len(part.chunks) for part in parts) * run.model.context
    _announce(run, technique, teacher, jobs, done, shards, positions)
    missing = [job for job in jobs if job.name not in done]
    started = time.perf_counter()
    asker = _Asker(run, technique, teacher)
    with tqdm(
        total=positions,
        initial=positions - sum(len(job.chunks) for job in missing) * run.model.context,
        desc=f"{run.name}: {technique.teacher} teaches",
        unit=" tokens",
        unit_scale=True,
        mininterval=5.0,
        disable=not progress,
    ) as bar:
        for job, answers in asker.shards(missing, bar.update):
            chunks = job.chunks
            keys = keys_of(asker.tokens(job.part, chunks))
            now = time.perf_counter()
            write_answers(shards / job.name, chunks, keys, answers, now - started)
            started = now
    record = {"plan": plan, **_record(run, technique, teacher, parts, asker.threads, shards)}
    write_record(shards / META, record)
    replace_directory(shards, folder)
    shutil.rmtree(partial)
    print(
        f"{folder}: {positions:,} positions in {record['seconds']:,.0f} s "
        f"({positions / max(record['seconds'], 1e-9):,.0f} a second)",
        file=sys.stderr,
    )


def _record(
    run: Run, technique: Distillation, teacher: Teacher, parts: list[Part], threads: int, shards: Path
) -> dict[str, Any]:
    """The content of meta.json but for the plan, once all shards are there."""
    windows = sum(len(part.windows) for part in parts)
    length = technique.taught.context or run.model.context
    positions = sum(len(part.chunks) for part in parts) * run.model.context
    record = {
        "context": run.model.context,
        "positions": positions,
        "tokens": windows * length,
        "flops": teaching_flops(teacher.model, windows, length, positions),
        "seconds": 0.0,
        "threads": threads,
        "device": str(teacher.device),
        "processor": processor_name(),
        "code": code_version(),
        "shards": [],
    }
    for job in _jobs(parts, run.model.context):
        path = shards / job.name
        shard = open_answers(path, run.model.context)
        record["seconds"] = round(record["seconds"] + shard.seconds, 3)
        entry = {"path": job.name, "component": job.part.component.name, "sha256": sha256(path)}
        entry |= {"answers": shard.digest, "size": path.stat().st_size, "chunks": len(job.chunks)}
        record["shards"].append(entry)
    return record


def teaching_flops(model: torch.nn.Module, windows: float, length: int, positions: float) -> float:
    """Forward FLOPs of `windows` of `length` tokens, with the logits of `positions` of them."""
    head = forward_flops(model.output, 1)
    return windows * (forward_flops(model, length) - length * head) + positions * head


def _jobs(parts: list[Part], context: int) -> list[_Job]:
    """The shards of all components, in order."""
    jobs = []
    for part in parts:
        windows = max(1, _SHARD_POSITIONS // (context * part.per_window))
        for number, begin in enumerate(range(0, len(part.windows), windows)):
            name = f"{part.component.name}-{number:05d}.arrow"
            jobs.append(_Job(part, part.windows[begin : begin + windows], name))
    return jobs


def _prepare(partial: Path, plan: dict[str, Any], jobs: list[_Job]) -> set[str]:
    """The shards that a killed stage with the same plan has written; everything else is removed."""
    shards, wanted = partial / "shards", {job.name for job in jobs}
    try:
        same = read_json(partial / "plan.json") == plan
    except UserError:
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        shards.mkdir(parents=True)
        write_record(partial / "plan.json", plan)
        return set()
    remove_leftovers(shards)
    done = set()
    for path in sorted(shards.iterdir()):
        try:
            if path.name not in wanted:
                raise UserError("of no use")
            check_seal(path)
            done.add(path.name)
        except UserError:
            path.unlink()
    return done


def _announce(
    run: Run,
    technique: Distillation,
    teacher: Teacher,
    jobs: list[_Job],
    done: set[str],
    folder: Path,
    positions: int,
) -> None:
    """Say how much will be written; refuse if the disk has no room for what is missing."""
    taught = technique.taught
    widths = teacher.config.width * len(taught.teacher_layers)
    each = bytes_per_position(teacher.vocabulary, taught.kept, taught.top_k is not None, widths)
    missing = sum(len(job.chunks) for job in jobs if job.name not in done) * run.model.context
    free = shutil.disk_usage(folder).free
    more = f", of which {byte_size(each * missing)} are missing" if done else ""
    print(
        f"{run.name}: {technique.teacher} is asked about {positions:,} positions: "
        f"{byte_size(each * positions)} ({each} bytes each){more}",
        file=sys.stderr,
    )
    if each * missing * _TO_SPARE > free:
        raise UserError(
            f"{folder}: the teacher's answers take {byte_size(each * missing)}, and {byte_size(free)} are "
            "free on that disk; free some, keep fewer tokens (techniques.distillation.taught), or train "
            "fewer steps"
        )


class _Asker:
    """Computes the answers of shards, several batches at a time."""

    def __init__(self, run: Run, technique: Distillation, teacher: Teacher) -> None:
        self.run, self.technique, self.teacher = run, technique, teacher
        self.context, self.window = run.model.context, technique.taught.context or run.model.context
        self.eot = read_meta(run.tokens_folder).eot if run.data.attention == "within" else None
        # On a CPU each thread computes a batch of its own, which is faster (docs/teachers.md).
        self.threads = torch.get_num_threads() if teacher.device.type == "cpu" else 1
        self.batch = max(1, _BATCH_TOKENS[teacher.device.type] // self.window)

    def tokens(self, part: Part, chunks: np.ndarray) -> np.ndarray:
        """The tokens [R, L] of chunks, int64."""
        out = np.empty((len(chunks), self.context), np.int64)
        for row, chunk in zip(out, chunks, strict=True):
            part.component.read(int(chunk) * self.context, row)
        return out

    def shards(self, jobs: list[_Job], advance: Callable[[int], Any]) -> Iterator[tuple[_Job, Answers]]:
        """Each shard with its answers. A few batches ahead are computed meanwhile: memory is bounded."""
        if not jobs:
            return
        several = self.teacher.device.type == "cpu" and self.threads > 1
        before = torch.get_num_threads()
        limit = (lambda: torch.set_num_threads(1)) if several else None
        with ThreadPoolExecutor(self.threads, initializer=limit) as pool:
            tasks = (
                (job, begin + self.batch >= len(job.windows), pool.submit(self._ask, job, begin))
                for job in jobs
                for begin in range(0, len(job.windows), self.batch)
            )
            parts: list[Answers] = []
            try:
                for job, last, task in ahead(tasks, 2 * self.threads):
                    parts.append(task.result())
                    advance(len(parts[-1].ids_RLK) * self.context)
                    if last:
                        yield job, joined(parts)
                        parts = []
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(before)

    def _ask(self, job: _Job, begin: int) -> Answers:
        """The answers for the needed chunks of some windows."""
        windows, part = job.windows[begin : begin + self.batch], job.part
        tokens_BT = torch.from_numpy(part.read(windows, self.context)).to(self.teacher.device)
        layout = None if self.eot is None else Documents.of(tokens_BT, self.eot)
        layers = self.technique.taught.teacher_layers
        *states, head_BTD = self.teacher.states(tokens_BT, layout, layers)
        chunks_R = np.concatenate([needed for _, needed in windows])
        window_R = np.repeat(np.arange(len(windows)), [len(needed) for _, needed in windows])
        rows = torch.from_numpy(window_R * part.per_window + chunks_R % part.per_window)

        def of_chunks(x_BTD: torch.Tensor) -> torch.Tensor:
            return x_BTD.unflatten(1, (part.per_window, self.context)).flatten(0, 1)[rows]

        kept = {layer: _narrow(of_chunks(state)) for layer, state in zip(layers, states, strict=True)}
        return self._keep(part.component.name, chunks_R, of_chunks(head_BTD), kept)

    def _keep(
        self, component: str, chunks_R: np.ndarray, head_RLD: torch.Tensor, states: dict[int, np.ndarray]
    ) -> Answers:
        """What is kept of the distributions at each position."""
        taught, R, L = self.technique.taught, len(chunks_R), self.context
        K, device = taught.kept, self.teacher.device
        ids = np.empty((R * L, K), id_type(self.teacher.vocabulary))
        log_q = np.empty((R * L, K), np.float16)
        rest = None if taught.top_k is None else np.empty(R * L, np.float16)
        uniform_NK = None
        if taught.tokens is not None:
            numbers = [_uniform(self.run.seed, component, int(chunk), L, K) for chunk in chunks_R]
            uniform_NK = torch.from_numpy(np.concatenate(numbers)).to(device)
        for here, q_CV in self.teacher.distributions(head_RLD.flatten(0, 1)):
            kept = largest(q_CV, K) if uniform_NK is None else sample(q_CV, uniform_NK[here])
            ids[here], log_q[here] = kept.ids_CK.cpu().numpy(), kept.log_q_CK.half().cpu().numpy()
            if rest is not None:
                rest[here] = kept.log_rest_C.half().cpu().numpy()
        rest_RL = None if rest is None else rest.reshape(R, L)
        return Answers(ids.reshape(R, L, K), log_q.reshape(R, L, K), rest_RL, states)


def _uniform(seed: int, component: str, chunk: int, positions: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float32 [L, K], of a chunk: the same whatever is computed with it."""
    generator = np.random.default_rng([seed, chunk, *component.encode()])
    return generator.random((positions, count), np.float32)


def _narrow(x: torch.Tensor) -> np.ndarray:
    """float16; values beyond its range become its largest, so that one outlier spoils no vector."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half().cpu().numpy()
