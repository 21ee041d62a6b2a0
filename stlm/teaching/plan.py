"""Which parts of the training text a teacher is asked about, and what its answers depend on.

Training reads chunks: `context` tokens of a component's stream. Each chunk that a run reads while it is
taught is asked about once, however often it is repeated. The teacher may read several chunks at once, in a
*window*: window w holds the chunks from w times its size on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from stlm.tokens.batches import Batches
from stlm.tokens.shards import ComponentTokens

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.techniques.distillation import Distillation


@dataclass(frozen=True)
class Part:
    """The windows of one component, in rising order, with the chunks that are needed of each."""

    component: ComponentTokens
    chunks: np.ndarray  # sorted
    per_window: int  # chunks

    @cached_property
    def windows(self) -> list[tuple[int, np.ndarray]]:
        """The number of each window, and its needed chunks."""
        numbers, first = np.unique(self.chunks // self.per_window, return_index=True)
        needed = np.split(self.chunks, first[1:])
        return list(zip(numbers.tolist(), needed, strict=True))

    def read(self, windows: list[tuple[int, np.ndarray]], context: int) -> np.ndarray:
        """The tokens [B, T] of windows, int64; after the end of the stream, token 0, which nothing sees."""
        length = context * self.per_window
        out_BT = np.zeros((len(windows), length), np.int64)
        for row_T, (number, _) in zip(out_BT, windows, strict=True):
            start = number * length
            self.component.read(start, row_T[: min(length, self.component.n_tokens - start)])
        return out_BT


def chunks_needed(run: Run, batches: Batches, technique: Distillation) -> dict[str, np.ndarray]:
    """Component -> the chunks that `run` reads in its taught steps, sorted, each once; uint32."""
    read = {
        component.name: np.zeros(component.n_tokens // batches.context + 1, bool)
        for component in batches.components
    }
    accumulation = run.training.accumulation
    for step in technique.taught_steps(run.training.steps):
        for micro in range(accumulation):
            for component, start in batches.sources(step - 1, micro, accumulation):
                read[component.name][start // batches.context] = True
    chunks = {name: np.flatnonzero(flags).astype(np.uint32) for name, flags in sorted(read.items())}
    return {name: numbers for name, numbers in chunks.items() if len(numbers)}


def digest(chunks: dict[str, np.ndarray]) -> str:
    """SHA-256 of the chunks of all components."""
    found = hashlib.sha256()
    for name, numbers in chunks.items():
        found.update(f"{name} {len(numbers)} ".encode() + numbers.astype("<u4").tobytes())
    return found.hexdigest()


def parts_of(run: Run, batches: Batches, technique: Distillation) -> list[Part]:
    """The windows to read, by component."""
    window = technique.taught.context or run.model.context
    components = {component.name: component for component in batches.components}
    chunks = chunks_needed(run, batches, technique)
    return [Part(components[name], numbers, window // run.model.context) for name, numbers in chunks.items()]
