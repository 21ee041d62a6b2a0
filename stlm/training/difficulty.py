"""The difficulty of chunks of the training text for a reference model, kept in files for other runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from stlm.errors import UserError
from stlm.files import atomic_path, sha256
from stlm.integrity import check_seal, seal
from stlm.model.transformer import Transformer
from stlm.remedy import remedy
from stlm.study.runs import Run
from stlm.tokens.shards import ComponentTokens
from stlm.training.checkpoints import last_checkpoint, load_checkpoint, read_description
from stlm.training.distributed import Group

# The tokens and logits in one batch (a logit has 4 bytes; the loss needs a few times that).
_TOKENS, _LOGITS = 8192, 2**25


class Reference:
    """The last checkpoint of a run as a measure of difficulty: the mean loss of a chunk's tokens, in nats.

    Call it with a component of `run`'s training text, its number, and chunks (positions in its token stream
    in units of the context); it returns a float32 for each chunk. The scores are computed once, in float32,
    and stored next to the runs' states, in files named by a hash of everything that they depend on, so runs
    with the same chunks share them. All processes of a group make the same calls; the leader computes, and
    the others wait.
    """

    def __init__(self, run: Run, device: torch.device, group: Group | None = None) -> None:
        assert "reference" in run.depends
        self.run, self.device, self.group = run, device, group or Group()
        self.checkpoint = last_checkpoint(run, run.depends["reference"])
        self.weights_sha256 = str(read_description(self.checkpoint)[1]["weights_sha256"])
        self.folder = run.state_folder.parent / ".difficulty"  # no run's name starts with a dot
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
                self._keep(path, self._measure(component, chunks))
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
        self._given.update(scores.astype("<f4").tobytes())
        return scores

    def _keep(self, path: Path, scores: np.ndarray) -> None:
        """Write the scores; keep a file that another run wrote first, as that run's order depends on it."""
        if not path.exists():
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
        model, _ = load_checkpoint(self.checkpoint, self.device)
        context = self.run.model.context
        rows = max(1, min(_TOKENS, _LOGITS // self.run.model.vocab_size) // context)
        scores = np.empty(len(chunks), np.float32)
        tokens = np.empty((rows, context + 1), np.int64)
        starts = range(0, len(chunks), rows)
        for start in tqdm(starts, f"{self.run.name}: difficulty of {component.name}", mininterval=5.0):
            batch = chunks[start : start + rows]
            for row, chunk in enumerate(batch):
                component.read(int(chunk) * context, tokens[row])
            scores[start : start + len(batch)] = mean_losses(model, tokens[: len(batch)], self.device)
            self.group.largest(0)  # a sign of life for the waiting processes, which time out otherwise
        return scores


@torch.no_grad()
def mean_losses(model: Transformer, tokens: np.ndarray, device: torch.device) -> np.ndarray:
    """The mean loss [B], in nats, of the tokens after the first in each row [B, L + 1]."""
    tokens_BM = torch.from_numpy(tokens).to(device)
    logits_BLV = model(tokens_BM[:, :-1]).float()
    losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BM[:, 1:], reduction="none")
    return losses_BL.mean(dim=1).cpu().numpy()
