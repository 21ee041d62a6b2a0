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
import subprocess
import sys
import time
from pathlib import Path

from stlm.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
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
  validation_tokens: 2000
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
HALF = (
    TINY.partition("published:")[0].replace("steps: 6", "steps: 100000").replace("save_every: 3", "save_every: 5")
)
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
    """Make the small project in `folder`, which must not be there; about half a minute. Returns `folder`."""
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
    for stage in _STAGES:
        _start(folder, *stage.split(), check=True)
    _stop_halfway(folder)
    return folder


def environment() -> dict[str, str]:
    """What every command runs in: one thread, no network, no mirror, the code of this repository."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("STLM_", "WANDB_"))}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    set_here = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**kept, **set_here, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def _start(folder: Path, *arguments: str, check: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stlm", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if check:
        printed = process.communicate()[0]
        if process.returncode:
            raise UserError(f"the small project: stlm {' '.join(arguments)} failed:\n{printed}")
    return process


def _stop_halfway(folder: Path) -> None:
    """Train `half` until its state is saved, and stop it as a cluster does."""
    process = _start(folder, "train", "half", "baseline")
    state = folder / ".state" / "half" / "baseline" / "state.pt"
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    if process.returncode != 128 + signal.SIGTERM:
        raise UserError(f"the small project: stlm train half baseline did not stop:\n{printed}")
