"""The small project that every bad input gets a copy of: everything in it is made by `stlm` itself.

params/                  the repository's, the synthetic data smaller, and the studies `tiny` and `half`
data/                    raw and tokens of `synthetic`, the benchmarks' items
results/tiny/            of `tiny`: runs `baseline` and `learned` (checkpoints at steps 3 and 6), the
                         published model `other`, contamination and report
.state/half/baseline/    the state of a run that was stopped
published/other/         a published model: `tiny/baseline`, exported
exported/                the same
texts/                   texts of a user, for `stlm new`
dvc.yaml                 `tiny` is the active study
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from bad.case import Case
from bad.child import REPOSITORY, Child, start
from stlm.errors import UserError

_SMALLER = {
    "corpora.yaml": ("part: corpus, seed: 0, size: 16000", "part: corpus, seed: 0, size: 300"),
    "benchmarks.yaml": ("part: pairs, seed: 1, size: 150", "part: pairs, seed: 1, size: 4"),
}
TINY = """\
description: A study that trains within a second.
corpus: synthetic
tokenizer: bpe-320
seeds: [0]
model: {layers: 1, width: 32, heads: 2, kv_heads: 1, ffn_width: 64, context: 64}
training:
  steps: 6
  batch_size: 4
  accumulation: 1
  learning_rate: 1.0e-3
  min_learning_rate: 1.0e-4
  warmup_steps: 2
  checkpoints: [3]
  validate_every: 3
  validation_bytes: 7000
  log_every: 2
  save_every: 3
evaluation: {benchmarks: [synthetic_pairs, synthetic_choice], modes: [harness, paper], limit: 60}
variants:
  baseline:
  learned:
    model: {positions: learned}
published:
  other: {folder: published/other}
"""
HALF = TINY.partition("published:")[0]
HALF = HALF.replace("steps: 6", "steps: 100000").replace("save_every: 3", "save_every: 5")
_STAGES = (
    "fetch synthetic",
    "fetch synthetic_pairs",
    "fetch synthetic_choice",
    "tokenize synthetic bpe-320",
    "train tiny baseline",
    "train tiny learned",
    "export tiny/baseline published/other",
    "export tiny/baseline exported",
    "evaluate tiny baseline",
    "evaluate tiny learned",
    "evaluate tiny other",
    "contamination tiny",
    "report tiny",
    "use tiny",
)


def build(folder: Path) -> Path:
    """Make the small project in `folder`, which must not be there; returns it. Call `prepare` before."""
    shutil.copytree(REPOSITORY / "params", folder / "params")
    for name, (old, new) in _SMALLER.items():
        path = folder / "params" / name
        text = path.read_text(encoding="utf-8")
        if old not in text:
            raise LookupError(f"params/{name} no longer has {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")
    (folder / "params" / "tiny.yaml").write_text(TINY, encoding="utf-8")
    (folder / "params" / "half.yaml").write_text(HALF, encoding="utf-8")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        text = f"A story of number {number}. " * 20
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as streams:
        for stage in _STAGES:
            child = _start(folder, Path(streams), stage)
            _check(child, stage, child.poll(wait=True))
        child = _start(folder, Path(streams), "train half baseline")
        status = _stop_halfway(child, folder / ".state" / "half" / "baseline" / "state.pt")
        _check(child, "train half baseline", status, 128 + signal.SIGTERM)
    return folder


def _start(folder: Path, streams: Path, stage: str) -> Child:
    return start(Case(stage, tuple(stage.split())), folder, streams)


def _stop_halfway(child: Child, state: Path) -> int | None:
    """Let a training go on until its state is saved, and stop it as a cluster does; its exit status."""
    while (status := child.poll()) is None and not state.exists():
        time.sleep(0.01)
    if status is None:
        os.kill(child.process, signal.SIGTERM)
        status = child.poll(wait=True)
    return status


def _check(child: Child, stage: str, status: int | None, expected: int = 0) -> None:
    if status != expected:
        raise UserError(f"the small project: stlm {stage} ended with {status}:\n{''.join(child.printed())}")
