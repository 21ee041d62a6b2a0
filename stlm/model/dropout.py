"""Dropout whose probability follows a schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose probability a schedule may change at every step.

    torch.compile would compile the model anew for each value of a Python number. A scheduled probability is
    therefore a tensor, and one graph serves all values. Without a schedule this is torch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("scheduled", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheduled is None or not self.training:
            return F.dropout(x, self.p, self.training)
        # In float32: bfloat16 has only 256 values between 0.5 and 1, too few for the probability.
        kept = torch.rand_like(x, dtype=torch.float32) >= self.scheduled
        return x * (kept / (1 - self.scheduled)).to(x.dtype)

    def schedule(self, factor: float, device: torch.device) -> None:
        """Set the probability to `factor`, between 0 and 1, times `p` from now on."""
        if self.scheduled is None:
            self.scheduled = torch.empty((), device=device)
        self.scheduled.fill_(self.p * factor)
