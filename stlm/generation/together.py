"""Continuations of prompts of one length, all written at once.

Shapes: R prompts, P tokens of each, C tokens that follow, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.generation.sampling import Sampling
from stlm.model.cache import Cache
from stlm.model.inference import Inference
from stlm.model.transformer import Transformer


@torch.no_grad()
def continuations(model: Transformer, prompts_RP: Tensor, length: int, sampling: Sampling) -> Tensor:
    """Tokens [R, C] that follow the prompts, C = `length`; the end of a text is a token as any other.

    The model is in evaluation mode, and its context holds prompts and continuations. Tokens are drawn with
    torch's global random numbers of the CPU. Keys and values are cached; passes are in float32, in C where
    the model has such (`stlm.model.inference.why_not`).
    """
    (R, P), device = prompts_RP.shape, prompts_RP.device
    # The last token is drawn, and not read.
    cache = Cache(model.config, R, device, layers=len(model.blocks), places=P + length - 1)
    inference = Inference.of(model)

    def read(tokens_RL: Tensor, begin: int) -> Tensor:
        """The logits [R, V] after these tokens, which begin at a position."""
        L = tokens_RL.shape[1]
        if inference is None:
            last_R = torch.arange(1, R + 1, device=device) * L - 1
            with torch.autocast(device.type, enabled=False):
                return model.head(model.hidden(tokens_RL, cache.extend(L), last_R))
        rows = [row for row in range(R) for _ in range(L)]
        positions = list(range(begin, begin + L)) * R
        last = range(L - 1, R * L, L)
        return inference.read(tokens_RL.flatten().tolist(), rows, positions, cache, last)

    written: list[Tensor] = []
    unread_RL, begin = prompts_RP, 0
    while len(written) < length:
        logits_RV = read(unread_RL, begin)
        begin += unread_RL.shape[1]
        unread_RL = sampling.choose(logits_RV)[:, None]
        written.append(unread_RL)
    return torch.cat(written, dim=1)
