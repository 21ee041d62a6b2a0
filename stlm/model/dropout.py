"""Dropout that a schedule changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose probability a schedule may change at every step.

    A number that changes would have torch.compile compile the model anew at each of its values. So a
    schedule's probability is a tensor: one graph serves them all. Without a schedule it is torch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("scheduled", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheduled is None or not self.training:
            return F.dropout(x, self.p, self.training)
        # In float32: bfloat16 has 256 values between 0.5 and 1, and shares of them are not the probability.
        kept = torch.rand_like(x, dtype=torch.float32) >= self.scheduled
        return x * (kept / (1 - self.scheduled)).to(x.dtype)

    def schedule(self, factor: float, device: torch.device) -> None:
        """From now on the probability is `factor`, between 0 and 1, times `p`."""
        if self.scheduled is None:
            self.scheduled = torch.empty((), device=device)
        self.scheduled.fill_(self.p * factor)
