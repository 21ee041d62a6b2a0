"""The micro-batches that one process trains on: its share of each step's rows, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stlm.model.documents import Documents
from stlm.study.runs import Run
from stlm.tokens.batches import Batches
from stlm.tokens.shards import read_meta
from stlm.training.difficulty import Difference, Reference
from stlm.training.distributed import Share
from stlm.training.state import draws


class MicroBatches:
    """The micro-batches of a run's steps. `rows_before`: rows of the text that an earlier run trained on.
    `smaller`: if chunks are selected by the difference of its loss to the reference's.

    `rows`, read from the files, lets others look at a batch without training on it.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        reference: Reference | None = None,
        rows_before: int = 0,
        smaller: Reference | None = None,
    ) -> None:
        self._run, self._device = run, device
        config = run.training
        self.rows = Batches(
            run.tokens_folder,
            run.model.context,
            config.batch_size,
            run.seed,
            run.data,
            config.steps * config.accumulation * config.batch_size + rows_before,
            reference,
            rows_before,
            reference if smaller is None else Difference(smaller, reference),
        )
        # The end-of-text token, if attention stays within documents.
        self._eot = read_meta(run.tokens_folder).eot if run.data.attention == "within" else None

    def of_step(self, step: int, share: Share) -> Iterator[Tensor]:
        """The tokens [B, L + 1] of a share of a step; the random seed is set before each is yielded."""
        for micro in share.micros:
            # All randomness (dropout) depends on the seed and the position in training: a resumed run draws
            # the same numbers, and so does a group of processes if each works on whole micro-batches.
            torch.manual_seed(draws(self._run.seed, step, micro, share.rows.start))
            rows = self.rows.batch(step - 1, micro, self._run.training.accumulation)[share.rows]
            tokens = torch.from_numpy(rows)
            if self._device.type == "cuda":
                tokens = tokens.pin_memory()
            yield tokens.to(self._device, non_blocking=True)

    def layout(self, tokens_BL: Tensor) -> Documents | None:
        """The layout that keeps attention within the inputs' documents; None without that restriction."""
        return None if self._eot is None else Documents.of(tokens_BL, self._eot)
