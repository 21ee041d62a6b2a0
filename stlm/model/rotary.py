"""Rotary positions (Su et al. 2021): queries and keys are rotated by angles that grow with the position.

Shapes: L length, H heads, E head width; "..." any dimensions before.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Cosines and signed sines, [L, 1, E] or [B, L, 1, E]: the same for all heads.
Rotary = tuple[Tensor, Tensor]


def rope_tables(context: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [L, E] of rotary positions (Su et al. 2021, eq. 34; halves rotated)."""
    if torch.get_default_device().type == "meta":  # skips arithmetic on tensors without values
        return torch.empty(context, head_width), torch.empty(context, head_width)
    wavelengths_e = theta ** (torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle_Le = torch.arange(context, dtype=torch.float64)[:, None] / wavelengths_e
    cos_LE = angle_Le.cos().repeat(1, 2)
    # The table holds the sign of the rotation's second row, so applying it needs no negation.
    sin_LE = torch.cat([-angle_Le.sin(), angle_Le.sin()], dim=1)
    return cos_LE.float(), sin_LE.float()


def rotate(x_LHE: Tensor, cos_L1E: Tensor, sin_L1E: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of each head [..., L, H, E] by the position's angles."""
    first, second = x_LHE.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return torch.addcmul(x_LHE * cos_L1E, swapped, sin_L1E).to(x_LHE.dtype)


def rotate_back(x_LHE: Tensor, cos_L1E: Tensor, sin_L1E: Tensor) -> Tensor:
    """The inverse of `rotate`; it maps the gradient of the result to the gradient of the argument."""
    return rotate(x_LHE, cos_L1E, -sin_L1E)


def angles_at(rope: Rotary, index_BS: Tensor) -> Rotary:
    """The angles [B, S, 1, E] of some tokens of each row, given by their indices."""
    rows_B1 = torch.arange(len(index_BS), device=index_BS.device)[:, None]

    def at(table: Tensor) -> Tensor:
        if table.dim() == 4 and len(table) > 1:
            return table[rows_B1, index_BS]
        return table.view(-1, *table.shape[-2:])[index_BS]

    return at(rope[0]), at(rope[1])
