"""Latents: what one vector, or one code, keeps of a thought, and how well a prediction of it fits.

Shapes: N thoughts, M predictions, D width, Z numbers of a latent, S levels of each of a code's, X = Z S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of finite scalar quantization: how far the bound stays from the outermost levels' edges.
_FSQ_MARGIN = 1e-3


class UnitVectors(nn.Module):
    """Latents as vectors of root mean square 1, without a gain: neither their norm nor a distance can shrink.

    Their variance over thoughts is between 0 (all are equal) and 1 (their mean is zero).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.numbers = self.predicted = width

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Latents [N, Z], float32."""
        return F.rms_norm(pooled_ND.float(), pooled_ND.shape[-1:])

    def losses(self, predicted_NZ: Tensor, latent_NZ: Tensor) -> Tensor:
        """[N]: the mean square error of each predicted latent. That of the mean latent is the variance."""
        return (predicted_NZ.float() - latent_NZ).square().mean(dim=-1)

    def scores(self, predicted_MZ: Tensor, latent_NZ: Tensor) -> Tensor:
        """[M, N]: how well each latent fits each prediction. As latents have one norm, the order is that of
        their distance from it and of their cosine with it."""
        return predicted_MZ.float() @ latent_NZ.T


class Codes(nn.Module):
    """Latents as codes: Z numbers, each rounded to one of S levels (finite scalar quantization, Mentzer et
    al. 2023, arXiv 2309.15505, section 3.1 and appendix A.1), with a straight-through gradient."""

    def __init__(self, width: int, numbers: int, levels: int) -> None:
        super().__init__()
        self.numbers, self.levels, self.predicted = numbers, levels, numbers * levels
        self.into = nn.Linear(width, numbers, bias=False)
        # Scoring in bfloat16 must round to the codes that training did.
        self.into.keeps_float32 = True
        nn.init.normal_(self.into.weight, std=1 / math.sqrt(width))

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Codes [N, Z], float32: multiples of 1 / (S // 2), from -1 on."""
        with torch.autocast(pooled_ND.device.type, enabled=False):
            x_NZ = F.linear(pooled_ND.float(), self.into.weight.float())
            half = (self.levels - 1) * (1 - _FSQ_MARGIN) / 2
            # With an even number of levels there is one more below 0 than above.
            offset = 0.0 if self.levels % 2 else 0.5
            bounded_NZ = torch.tanh(x_NZ + math.atanh(offset / half)) * half - offset
            rounded_NZ = bounded_NZ + (bounded_NZ.round() - bounded_NZ).detach()
            return rounded_NZ / (self.levels // 2)

    def levels_of(self, latent_NZ: Tensor) -> Tensor:
        """The level [N, Z] of each number of codes, from 0."""
        return (latent_NZ * (self.levels // 2)).round().long() + self.levels // 2

    def _log_probabilities(self, predicted_NX: Tensor) -> Tensor:
        return predicted_NX.float().unflatten(-1, (self.numbers, self.levels)).log_softmax(dim=-1)

    def losses(self, predicted_NX: Tensor, latent_NZ: Tensor) -> Tensor:
        """[N]: the cross-entropy of each code's numbers in nats, their mean. The codes get no gradient."""
        level_NZ1 = self.levels_of(latent_NZ)[..., None]
        return -self._log_probabilities(predicted_NX).gather(-1, level_NZ1)[..., 0].mean(dim=-1)

    def scores(self, predicted_MX: Tensor, latent_NZ: Tensor) -> Tensor:
        """[M, N]: the log-probability of each code by each prediction."""
        code_NZS = F.one_hot(self.levels_of(latent_NZ), self.levels).float()
        return self._log_probabilities(predicted_MX).flatten(1) @ code_NZS.flatten(1).T
