"""Checks what training and evaluation will need before they start, and reports all problems at once.

An error after hours of training costs those hours if it could have been reported before. Checks are cheap:
slow ones are done once for each change of a file. Only the record of that is written.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stlm.errors import UserError
from stlm.evaluation.benchmarks import FileBenchmark, benchmark
from stlm.evaluation.config import EvaluationConfig
from stlm.files import read_json, write_record
from stlm.outputs import EVALUATION, TRAINING, names
from stlm.study.runs import Run, Study
from stlm.units import byte_size

if TYPE_CHECKING:
    from stlm.training.memory import Memory, Room

RAW = Path("data/raw")
# Files of benchmarks that were read completely and are valid.
CHECKED = Path(".state/benchmarks.json")
# A run is warned if less than this multiple of its disk space is free: other runs and logs need some too.
_DISK_TO_SPARE = 1.5


class Findings:
    """Reasons to stop the run (`problems`) and information for the user (`notes`), one line each."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def look(self) -> Iterator[None]:
        """Collect the UserError of a check, and continue with the next one."""
        try:
            yield
        except UserError as error:
            self.problems += [line for line in str(error).splitlines() if line not in self.problems]

    def conclude(self, name: str) -> None:
        """Print the notes; raise UserError with all problems."""
        # Of several processes that train together, one prints for all.
        if os.environ.get("RANK", "0") == "0":
            for note in self.notes:
                print(f"{name}: {note}", file=sys.stderr)
        if len(self.problems) == 1:
            raise UserError(self.problems[0])
        if self.problems:
            raise UserError(f"{name}: {len(self.problems)} problems:\n" + "\n".join(self.problems))


def check_training(study: Study, run: Run, raw: Path = RAW) -> None:
    """Refuse to train `run` if training, or its later evaluation, cannot succeed.

    Raises UserError with all problems, one line each; doubtful findings go to standard error.
    """
    from stlm.evaluation.text_items import check_text_items
    from stlm.training.devices import choose_device

    found = Findings()
    tokens = len(found.problems)
    with found.look():
        check_tokens(run)
    if len(found.problems) == tokens:
        with found.look():
            check_text_items(study.evaluation, run.tokens_folder)
    _look_at_dependencies(found, run)
    with found.look():
        check_answers(run)
    check_folders(found, run)
    if run.training.wandb:
        from stlm.training.tracking import check_tracking

        with found.look():
            if note := check_tracking():
                found.notes.append(note)
    device = choose_device(run.training)
    check_memory(found, run, device.device.type, device.precision, device.compiled)
    check_cut_memory(found, study, run, device.device.type)
    check_disk(found, run)
    # Last, because it records the files that it has read only if nothing is wrong.
    check_benchmark_files(found, study.evaluation, raw)
    found.conclude(f"run {run.name}")


def _look_at_dependencies(found: Findings, run: Run) -> None:
    """Look for the checkpoints of other runs and the published models that a run reads."""
    from stlm.training.checkpoints import last_checkpoint
    from stlm.training.dependencies import check_fetched

    for other in run.depends.values():
        with found.look():
            last_checkpoint(run, other)
    for name in run.sources.values():
        with found.look():
            check_fetched(name)


def check_teaching(run: Run) -> None:
    """Refuse to ask a run's teacher if it, or the text, is missing; UserError with all problems."""
    found = Findings()
    with found.look():
        check_tokens(run)
    _look_at_dependencies(found, run)
    with found.look():
        check_writable(Path("data/taught"))
    found.conclude(f"run {run.name}")


def check_answers(run: Run) -> None:
    """Refuse to train on a teacher's answers that are not there."""
    for technique in run.techniques.values():
        for folder in technique.inputs(run):
            if not (folder / "meta.json").exists():
                raise UserError(f"{folder}: no such folder; run: stlm teach {run.study} {run.name}")


def check_evaluation(name: str, results: Path, state: Path) -> None:
    """Refuse to score the run or model `name` if its results, or finished parts, could not be written.

    `results` and `state` are its folders for these. Raises UserError with one line for each problem.
    """
    found = Findings()
    for file in names(EVALUATION):
        with found.look():
            _is_file(results / file)
    for folder in (results, state / "evaluation"):
        with found.look():
            check_writable(folder)
    found.conclude(name)


def check_tokens(run: Run) -> None:
    """Check that token shards exist, their tokenizer loads, and its vocabulary is the model's."""
    from stlm.tokens.tokenizer import load_tokenizer

    again = f"run: stlm tokenize {run.corpus} {run.tokenizer}"
    path = run.tokens_folder / "meta.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; {again}")
    meta = read_json(path)
    try:
        tokenizer = load_tokenizer(run.tokens_folder / "tokenizer")
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{run.tokens_folder / 'tokenizer'}: not a tokenizer that loads ({reason}); {again}"
        ) from None
    if run.model.bytes is not None:
        return
    written = meta.get("vocab_size") if isinstance(meta, dict) else None
    for source, size in ((path, written), (run.tokens_folder / "tokenizer", tokenizer.vocab_size)):
        if size != run.model.vocab_size:
            raise UserError(
                f"{source}: vocab_size: found {size}, expected {run.model.vocab_size} as in {run.tokenizer}; "
                f"{again}"
            )


def check_folders(found: Findings, run: Run) -> None:
    """Check that the run can write its folders, and that no folder stands for a file or the reverse."""
    state = run.state_folder
    outputs = (*TRAINING, *EVALUATION)
    files = [run.folder / output.name for output in outputs if not output.is_folder]
    for file in (*files, state / "state.pt", state.with_name(f"{run.name}.lock")):
        with found.look():
            _is_file(file)
    folders = [run.folder / output.name for output in outputs if output.is_folder]
    for folder in (run.folder, *folders, state, state / "output", state / "evaluation"):
        with found.look():
            check_writable(folder)


def _is_file(path: Path) -> None:
    """Reject a folder in the place of a file that will be written."""
    if path.is_dir():
        raise UserError(f"{path}: a folder stands where a file is to be written; move it away")


def check_writable(folder: Path) -> None:
    """Reject a folder in which nothing can be written, or that cannot be created."""
    ancestor = folder
    while not os.path.lexists(ancestor) and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        what = "a link to nothing" if ancestor.is_symlink() and not ancestor.exists() else "a file"
        raise UserError(f"{ancestor}: {what} stands where a folder is to be written; move it away")
    try:
        # The file has no name if the system supports that, and is removed at once.
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{ancestor}: nothing can be written there ({reason}); make it writable, or free space"
        ) from None


def check_benchmark_files(found: Findings, config: EvaluationConfig, raw: Path = RAW) -> None:
    """Read each fetched benchmark once for each change of its files; name those that are not fetched.

    A missing one is no problem: training does not read it, and both engines may fetch it later.
    """
    chosen = [entry for entry in map(benchmark, config.benchmarks) if isinstance(entry, FileBenchmark)]
    missing = sorted({entry.data_name for entry in chosen if not (raw / entry.data_name).exists()})
    if missing:
        wanted = "; ".join(f"stlm fetch {name}" for name in missing)
        found.notes.append(f"not fetched yet, needed for evaluation only: {wanted}")
    known = _checked()
    looked: dict[str, Any] = {}
    for entry in chosen:
        folder = raw / entry.data_name
        if entry.data_name in missing:
            continue
        with found.look():
            key, stamp = f"{entry.name} {folder}", [entry.version, *_stamps(entry.files(folder)[1])]
            if known.get(key) != stamp:
                entry.load(folder)
                looked[key] = stamp
    if looked and not found.problems:
        # Another run's check may have written at the same time; what is lost is checked again.
        with suppress(UserError, OSError):
            write_record(CHECKED, {**_checked(), **looked})


def _checked() -> dict[str, Any]:
    try:
        content = read_json(CHECKED)
    except (UserError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _stamps(files: Iterable[Path]) -> list[list[Any]]:
    """The properties that change when a file does."""
    found = [(file.name, file.stat()) for file in files]
    return [[name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in found]


def check_memory(found: Findings, run: Run, device: str, precision: str, compiled: bool) -> None:
    """Refuse a step if this machine, or its GPU, surely has too little memory; warn if it is close.

    Processes that train together share the rows of a micro-batch, and on a CPU the memory of the machine.
    """
    from stlm.training.memory import machine_room, training_memory

    # Parts of a micro-batch as in `stlm.training.distributed.Group.share`.
    group, local = _processes("WORLD_SIZE"), _processes("LOCAL_WORLD_SIZE")
    sequences = max(1, run.training.batch_size // (group // math.gcd(group, run.training.accumulation)))
    need = training_memory(run, precision, compiled, sequences)
    room, processes = (_gpu_room(), 1) if device == "cuda" else (machine_room(), local)
    if room is None:
        return
    if need.least * processes > room.total:
        found.problems.append(_too_much(run, need, room, processes))
    elif need.likely * processes > room.free:
        found.notes.append(
            f"a step takes about {byte_size(need.likely * processes)} of memory, and {byte_size(room.free)} "
            f"are free ({room.what} {byte_size(room.total)}); if it is killed, lower training.batch_size and "
            "raise training.accumulation"
        )


def check_cut_memory(found: Findings, study: Study, run: Run, device: str) -> None:
    """Refuse a run if this machine surely has too little memory for what it starts from; warn if it is close.

    One process cuts for all. A cut that is kept already needs no more than training does.
    """
    if "start" not in run.dependencies:
        return
    from stlm.study.catalogues import load_models
    from stlm.training.cut_memory import cut_memory
    from stlm.training.inherited import is_kept
    from stlm.training.memory import machine_room

    if "start" in run.sources:
        origin = load_models()[run.sources["start"]].model.config
    else:
        origin = study.runs[run.depends["start"]].model
    need, room = cut_memory(run, origin, device == "cpu"), machine_room()
    if room is None or need.likely <= room.free:
        return
    with found.look():
        if is_kept(run):
            return
    name = run.dependencies["start"].name
    has = f"{room.what} {byte_size(room.total)}"
    if need.least > room.total:
        found.problems.append(
            f"training.start_from: {name}: to load it and cut it to the run's sizes takes at least "
            f"{byte_size(need.least)} of memory, but {has}; start from a smaller model, or let a larger "
            f"machine cut it and copy {run.state_folder.parent / '.inherited'}/"
        )
    else:
        found.notes.append(
            f"to load {name} and cut it to the run's sizes takes about {byte_size(need.likely)} of memory, "
            f"and {byte_size(room.free)} are free ({has})"
        )


def _processes(variable: str) -> int:
    """The number that torchrun set in a variable; 1 if it is missing or invalid (training rejects that)."""
    value = os.environ.get(variable, "") if "RANK" in os.environ else ""
    return max(1, int(value)) if value.isdecimal() else 1


def _gpu_room() -> Room:
    import torch

    from stlm.training.memory import Room

    free, total = torch.cuda.mem_get_info()
    return Room(total, free, f"{torch.cuda.get_device_name()} has")


def _too_much(run: Run, need: Memory, room: Room, processes: int) -> str:
    share = room.total // processes
    has = f"{room.what} {byte_size(room.total)}" + (f" for {processes} processes" if processes > 1 else "")
    if need.weights + need.gradients > share:
        return (
            f"model: {run.parameters.in_training:,} parameters in {run.model.layers:,} layers need at least "
            f"{byte_size(need.weights + need.gradients)} of memory to train (weights, gradients and the "
            f"optimizer's moments in float32), but {has}; lower model.layers or model.width"
        )
    most = need.sequences_that_fit(share)
    advice = (
        f"more than {most:,} cannot fit; raise training.accumulation instead"
        if most
        else "not even 1 fits; lower model.context, model.layers or model.width"
    )
    return (
        f"training.batch_size: {need.sequences:,} sequences of {run.model.context:,} tokens at once need at "
        f"least {byte_size(need.least)} of memory, but {has}; {advice}"
    )


def check_disk(found: Findings, run: Run) -> None:
    """Refuse a run whose checkpoints and states cannot fit the disk; warn if they nearly fill it."""
    weights = 4 * run.parameters.in_training
    state = run.state_folder
    done = sum(1 for _ in (state / "output" / "checkpoints").glob("step-*"))
    kept = weights * max(0, len(run.training.checkpoint_steps) - done)
    # A new state is written before the previous one is removed.
    moments = 2 if run.training.optimizer == "adamw" else 1
    states = 1 if run.training.steps <= run.training.save_every or (state / "state.pt").is_file() else 2
    needed = {state: kept + states * (1 + moments) * weights}
    if (state_disk := _disk(state)) is None:
        return
    published = _disk(run.folder)
    if published is not None and published[0] != state_disk[0]:
        # Another file system: checkpoints are copied there, not linked.
        needed[run.folder] = weights * len(run.training.checkpoint_steps)
    for folder, size in needed.items():
        place = _disk(folder)
        if place is None or size * _DISK_TO_SPARE < place[1]:
            continue
        text = (
            f"{folder}: {len(run.training.checkpoint_steps)} checkpoints of {byte_size(weights)} and the "
            f"states that training resumes from take {byte_size(size)}, and {byte_size(place[1])} are free "
            "on that disk"
        )
        if size > place[1]:
            found.problems.append(f"{text}; free some, or keep fewer (training.checkpoints)")
        else:
            found.notes.append(text)


def _disk(folder: Path) -> tuple[int, int] | None:
    """The file system of the present or future `folder`, and its free bytes."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return folder.stat().st_dev, shutil.disk_usage(folder).free
    except OSError:
        return None
