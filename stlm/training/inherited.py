"""What a run inherits: the model that it starts from, with the run's tokens, cut to the sizes of the run's.

Cutting takes time, and what is measured differs in its last digits between machines. So the cut model is kept
next to the runs' states, in a folder named by a hash of all that it depends on: a resumed run, all processes
of a group, and runs that differ in nothing else start from the same weights.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from stlm.files import read_json, sha256
from stlm.model.cut import cut_context, cut_vocabulary
from stlm.model.cutting import cut, measuring_flops
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.study.start import SIZES, is_cut
from stlm.tokens.batches import Batches
from stlm.tokens.config import DataConfig
from stlm.tokens.shards import read_split
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.dependencies import Dependency
from stlm.training.distributed import Group

# The text that is measured on does not depend on the run's seed: what is kept is a property of the model.
_SEED = 0
# Increases whenever the same weights, text and settings would be cut in another way.
_FORMAT = 1


def inherited_model(run: Run, origin: Dependency, group: Group | None = None) -> Transformer:
    """The model of `origin` with the run's vocabulary and sizes; `origin.record` gets what was kept, and why.

    Without anything to cut it is the origin's model itself. In a group, the leader cuts.
    """
    if _is_whole(run, origin):
        return origin.load()

    def make() -> tuple[Transformer, dict[str, Any]]:
        model, record = _cut(run, origin)
        return model, {"inherited": record}

    model, description = kept_next_to_states(run, _fingerprint(run, origin), make, group)
    origin.record["inherited"] = description["inherited"]
    return model


def kept_next_to_states(
    run: Run,
    name: str,
    make: Callable[[], tuple[Transformer, dict[str, Any]]],
    group: Group | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """The model that `make` returns, and what describes it, made once for each `name`, a hash.

    In a group, the leader makes it.
    """
    group = group or Group()
    folder = _folder(run, name)
    if group.leads:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # runs of other seeds may start at the same time
            if not folder.exists():
                _write(folder, make)
        group.largest(1)
    else:
        while not group.largest(0):
            pass
    return load_checkpoint(folder)


def is_kept(run: Run) -> bool:
    """Whether what the run inherits was cut before, and is read instead of the larger model.

    Raises UserError where what the run starts from is not there yet.
    """
    origin = Dependency.read(run, "start")
    return not _is_whole(run, origin) and _folder(run, _fingerprint(run, origin)).exists()


def _is_whole(run: Run, origin: Dependency) -> bool:
    """Whether nothing is cut."""
    shorter = run.model.positions == "learned" and run.model.context < origin.model.context
    same_tokens = origin.ids(run.tokens_folder / "tokenizer") is None
    return same_tokens and not shorter and not is_cut(run.model, origin.model)


def _folder(run: Run, name: str) -> Path:
    """Where a model of this name, a hash, is kept."""
    return run.state_folder.parent / ".inherited" / name[:24]


def _fingerprint(run: Run, origin: Dependency) -> str:
    depends = {
        "format": _FORMAT,
        "origin": origin.model.model_dump(mode="json"),
        "weights": origin.weights_sha256,
        "tokens": sha256(run.tokens_folder / "meta.json"),
        "model": run.model.model_dump(mode="json", include={*SIZES, "context", "value_embeddings", "tied"}),
        "inherit": run.training.inherit.model_dump(mode="json"),
        "weights_of_mix": run.data.weights,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, make: Callable[[], tuple[Transformer, dict[str, Any]]]) -> None:
    """Make a model and keep it; it leaves memory before it is read again."""
    model, description = make()
    save_checkpoint(folder, model, {"step": 0, "tokens": 0, **description})


def _cut(run: Run, origin: Dependency) -> tuple[Transformer, dict[str, Any]]:
    """The smaller model, and the record of what it kept."""
    started, model = time.perf_counter(), with_tokens(run, origin)
    record: dict[str, Any] = {"from": {name: getattr(origin.model, name) for name in (*SIZES, "vocab_size")}}
    if is_cut(run.model, model.config):
        rows_NM = calibration_rows(run)
        record["flops"] = measuring_flops(model, run.model, run.training.inherit, rows_NM)
        model, chosen = cut(model, run.model, run.training.inherit, rows_NM)
        record |= {"measured_on_tokens": rows_NM[:, 1:].numel(), **chosen}
    return model, record | {"seconds": round(time.perf_counter() - started, 1)}


def with_tokens(run: Run, origin: Dependency) -> Transformer:
    """The model of `origin` that reads the run's tokens, in rows of the run's length."""
    model, ids = origin.load(), origin.ids(run.tokens_folder / "tokenizer")
    if ids is not None:
        model = cut_vocabulary(model, torch.from_numpy(ids))
    if run.model.context < model.config.context:
        model = cut_context(model, run.model.context)
    return model


def calibration_rows(run: Run, length: int | None = None) -> Tensor:
    """Rows [N, L + 1] of the run's training text, about `length` bytes long; L is its context.

    None: `training.inherit.bytes`.
    """
    folder, context = run.tokens_folder, run.model.context
    chunks = sum((component.n_tokens - 1) // context for component in read_split(folder, "train"))
    length = run.training.inherit.bytes if length is None else length
    rows = min(chunks, max(1, round(length / _row_bytes(folder, context))))
    text = Batches(folder, context, rows, _SEED, DataConfig(weights=run.data.weights))
    return torch.from_numpy(text.batch(0))


def _row_bytes(folder: Path, context: int) -> float:
    """Mean bytes of a row of the train split."""
    components = read_json(folder / "meta.json")["components"].values()
    splits = [component["splits"]["train"] for component in components]
    return context * sum(split["bytes"] for split in splits) / sum(split["tokens"] for split in splits)
