"""The difficulty of chunks of the training text for a reference model, kept in files for other runs."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import atomic_path, sha256, write_text
from stlm.integrity import check_seal, seal
from stlm.model.counts import build_on_meta
from stlm.model.flops import forward_flops
from stlm.remedy import remedy
from stlm.study.runs import Run
from stlm.teaching.subset import Subset
from stlm.teaching.teacher import Teacher
from stlm.tokens.shards import ComponentTokens
from stlm.training.dependencies import Dependency
from stlm.training.devices import cpu_multiplies_bfloat16
from stlm.training.distributed import Group

# The tokens in one batch.
_TOKENS = 8192


class Reference:
    """A model as a measure of difficulty: the mean loss of a chunk's tokens, in nats.

    The model is what `run` depends on in `role`: the last checkpoint of another run, or a published model.
    Call it with a component of `run`'s training text, its number, and chunks (positions in its token stream
    in units of the context); it returns a float32 for each chunk. The scores are computed once, in float32
    (for a published model in bfloat16 where the processor multiplies it), and stored next to the runs'
    states, in files named by a hash of everything that they depend on, so runs with the same chunks share
    them. All processes of a group make the same calls; the leader computes, and the others wait.
    """

    def __init__(
        self, run: Run, device: torch.device, group: Group | None = None, role: str = "reference"
    ) -> None:
        self.run, self.device, self.group = run, device, group or Group()
        self.model = Dependency.read(run, role)
        self.weights_sha256 = self.model.weights_sha256
        self.folder = run.state_folder.parent / ".difficulty"  # no run's name starts with a dot
        # What measuring the scores returned so far took, even if another run measured them.
        self.seconds = 0.0
        self.flops = 0.0
        self._given = hashlib.sha256()

    @property
    def given(self) -> str:
        """SHA-256 of all scores returned so far; a run's weights depend on them.

        Recomputed scores differ in the last digits with another number of threads or on another device.
        """
        return self._given.hexdigest()

    def __call__(self, component: ComponentTokens, number: int, chunks: np.ndarray) -> np.ndarray:
        path = self.folder / f"{component.name}-{self._fingerprint(component, chunks)[:24]}.npy"
        if self.group.leads:
            if not path.exists():
                begin = time.perf_counter()
                scores = self._measure(component, chunks)
                self._keep(path, scores, time.perf_counter() - begin)
            self.group.largest(1)
        else:
            while not self.group.largest(0):
                pass
        check_seal(path)
        scores = np.load(path, allow_pickle=False)
        if scores.shape != chunks.shape or not np.isfinite(scores).all():
            raise UserError(
                f"{path}: found {scores.shape}, expected {len(chunks)} finite numbers; {remedy(path)}"
            )
        with suppress(OSError, ValueError):  # scores of earlier versions do not say it
            self.seconds += float(_seconds_path(path).read_text())
        context = self.run.model.context
        self.flops += len(chunks) * forward_flops(build_on_meta(self.model.model), context)
        self._given.update(scores.astype("<f4").tobytes())
        return scores

    def _keep(self, path: Path, scores: np.ndarray, seconds: float) -> None:
        """Write the scores; keep a file that another run wrote first, as that run's order depends on it."""
        if not path.exists():
            write_text(_seconds_path(path), f"{seconds:.3f}\n")
            with atomic_path(path) as temporary:
                with temporary.open("wb") as file:
                    np.save(file, scores, allow_pickle=False)
                seal(temporary)

    def _fingerprint(self, component: ComponentTokens, chunks: np.ndarray) -> str:
        depends = {
            "weights": self.weights_sha256,
            "tokens": sha256(self.run.tokens_folder / "meta.json"),
            "component": component.name,
            "context": self.run.model.context,
            "chunks": hashlib.sha256(chunks.astype("<u4").tobytes()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _measure(self, component: ComponentTokens, chunks: np.ndarray) -> np.ndarray:
        narrow = self.model.published and self.device.type == "cpu" and cpu_multiplies_bfloat16()
        subset = Subset.of(self.model, self.run.tokens_folder)
        dtype = torch.bfloat16 if narrow else torch.float32
        reader = Teacher(self.model.load(self.device), subset, dtype)
        context = self.run.model.context
        rows = max(1, _TOKENS // context)
        scores = np.empty(len(chunks), np.float32)
        tokens = np.empty((rows, context + 1), np.int64)
        starts = range(0, len(chunks), rows)
        what = f"{self.run.name}: difficulty of {component.name} for {self.model.name}"
        for start in tqdm(starts, what, mininterval=5.0):
            batch = chunks[start : start + rows]
            for row, chunk in enumerate(batch):
                component.read(int(chunk) * context, tokens[row])
            scores[start : start + len(batch)] = mean_losses(reader, tokens[: len(batch)])
            self.group.largest(0)  # a sign of life for the waiting processes, which time out otherwise
        return scores


def _seconds_path(scores: Path) -> Path:
    """The file that says how long measuring `scores` took."""
    return scores.with_suffix(".seconds")


class Difference:
    """How much more a chunk's tokens surprise a smaller model than a larger one, in nats a token."""

    def __init__(self, smaller: Reference, larger: Reference) -> None:
        self.smaller, self.larger = smaller, larger

    def __call__(self, component: ComponentTokens, number: int, chunks: np.ndarray) -> np.ndarray:
        return self.smaller(component, number, chunks) - self.larger(component, number, chunks)


def mean_losses(reader: Teacher, tokens: np.ndarray) -> np.ndarray:
    """The mean loss [B], in nats, of the tokens after the first in each row [B, L + 1]."""
    return reader.losses(torch.from_numpy(tokens).to(reader.device)).mean(dim=1).cpu().numpy()
