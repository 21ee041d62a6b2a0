"""How near a changed model stays to the one that it was made from: distributions of the next token compared.

Shapes: B rows, L positions, N counted positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.errors import UserError
from stlm.evaluation.perplexity import TestText
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.training.checkpoint_names import checkpoints_by_step
from stlm.training.checkpoints import load_checkpoint
from stlm.training.dependencies import Dependency
from stlm.training.inherited import with_tokens

# Tokens of the test text that are compared, the first of its documents: both models compute all logits.
MOST_TOKENS = 2**16
# Tokens of a forward pass, and the logits of one model that are held at once.
_BATCH_TOKENS, _LOGITS = 2**12, 2**23


def compare_with_start(run: Run, text: TestText | None, eot: int, device: str) -> dict[str, Any] | None:
    """Compare a run's last checkpoint with what the run started from, on the test text.

    None: its techniques do not ask for it (`Technique.keeps_near`), no text is measured, or the two have not
    the same tokens. Raises UserError where what it started from is missing or was trained again.
    """
    if text is None or "start" not in run.dependencies:
        return None
    if not any(technique.keeps_near for technique in run.techniques.values()):
        return None
    folder = checkpoints_by_step(run.folder)
    model, description = load_checkpoint(folder[max(folder)], device)
    origin = Dependency.read(run, "start")
    found, expected = origin.weights_sha256, description["depends"]["start"]["weights_sha256"]
    if found != expected:
        raise UserError(
            f"{origin.folder}: other weights than {run.name} started from (SHA-256 {found[:12]}..., "
            f"{expected[:12]}... then); run: stlm train {run.study} {run.name}"
        )
    before = with_tokens(run, origin).to(device).eval()
    print(f"{run.name}: comparing its distributions with those of {origin.name}", file=sys.stderr)
    return {
        "of": origin.name,
        "weights_sha256": found,
        **compare(before, model, [document.tokens for document in text.documents], eot),
    }


@torch.inference_mode()
def compare(
    before: Transformer, after: Transformer, documents: Sequence[Sequence[int]], eot: int
) -> dict[str, float | int]:
    """The mean Kullback-Leibler divergence D(before || after) of the next token in nats, the share of
    positions at which both hold the same token for the most probable, and the number of positions.

    Documents are read in rows as long as the context, the first one after the end-of-text token, until
    `MOST_TOKENS` are counted. In float32.
    """
    divergence, same, count = 0.0, 0, 0
    for tokens_BL, rows_N in _batches(documents, eot, before.config.context):
        device = before.embedding.weight.device
        tokens_BL, rows_N = tokens_BL.to(device), rows_N.to(device)
        hidden = [model.hidden(tokens_BL, None, rows_N) for model in (before, after)]
        for parts in zip(
            *(x.split(max(1, _LOGITS // before.config.vocab_size)) for x in hidden), strict=True
        ):
            p_NV, q_NV = (
                F.log_softmax(model.head(x_ND).float(), dim=-1)
                for model, x_ND in zip((before, after), parts, strict=True)
            )
            divergence += (p_NV.exp() * (p_NV - q_NV)).sum(dim=-1).double().sum().item()
            same += (p_NV.argmax(dim=-1) == q_NV.argmax(dim=-1)).sum().item()
            count += len(p_NV)
    if not math.isfinite(divergence):
        raise UserError(
            "the divergence of the two models is not finite: do their weights give finite numbers?"
        )
    # Rounding may take the divergence of equal models a little below 0.
    return {"kl_divergence": max(0.0, divergence / count), "agreement": same / count, "tokens": count}


def _batches(documents: Sequence[Sequence[int]], eot: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [B, L] of token ids, and the flat places [N] after which a token of the text stands."""
    rows: list[np.ndarray] = []
    left, size = MOST_TOKENS, max(1, _BATCH_TOKENS // context)
    for document in documents:
        inputs = np.insert(np.asarray(document, dtype=np.int64), 0, eot)[:-1]
        for begin in range(0, len(inputs), context):
            rows.append(inputs[begin : begin + context][:left])
            left -= len(rows[-1])
            if len(rows) == size or not left:
                yield _batch(rows)
                rows = []
            if not left:
                return
    if rows:
        yield _batch(rows)


def _batch(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens_BL = np.zeros((len(rows), longest), dtype=np.int64)  # no token sees the padding at the right
    for number, row in enumerate(rows):
        tokens_BL[number, : len(row)] = row
    places = [number * longest + place for number, row in enumerate(rows) for place in range(len(row))]
    return torch.from_numpy(tokens_BL), torch.tensor(places)
