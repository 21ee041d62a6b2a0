"""What is kept of a teacher's distribution: tokens sampled from it, or the most likely ones.

The logits of a position are read once. Their exponentials are summed in blocks; sampling (by the inverse of
the cumulative distribution) and the search for the largest then look at some of the blocks alone.

Shapes: C positions, V tokens, M blocks of them, K tokens kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens of a block: about the square root of the larger vocabularies.
BLOCK = 128
# Below one by the least that float32 tells: a product with it is smaller than the other factor.
_BELOW_ONE = 1 - 2**-23


class Kept(NamedTuple):
    """Tokens [C, K], the logarithms of their probabilities, and that of the rest's [C], or None."""

    ids_CK: Tensor
    log_q_CK: Tensor
    log_rest_C: Tensor | None


def padded(count: int) -> int:
    """`count`, up to a whole number of blocks."""
    return -(-count // BLOCK) * BLOCK


def weights_of(logits_CV: Tensor) -> Tensor:
    """exp(z - max z) of logits [C, V], float32: probabilities up to a factor."""
    logits_CV = logits_CV.float()
    return logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True)).exp_()


def sample(weights_CV: Tensor, uniform_CK: Tensor) -> Kept:
    """Tokens drawn independently with probabilities proportional to `weights_CV`, V in whole blocks.

    `uniform_CK`: a number in [0, 1) for each, which decides which token is drawn.
    """
    C, K = uniform_CK.shape
    weights_CMB = weights_CV.view(C, -1, BLOCK)
    ends_CM = weights_CMB.sum(dim=2).cumsum(dim=1)
    total_C1 = ends_CM[:, -1:]
    place_CK = torch.minimum(uniform_CK * total_C1, total_C1 * _BELOW_ONE)
    block_CK = torch.searchsorted(ends_CM, place_CK, right=True)
    before_CK = torch.where(block_CK > 0, ends_CM.gather(1, (block_CK - 1).clamp(min=0)), 0.0)
    inside_CKB = weights_CMB.gather(1, block_CK[..., None].expand(C, K, BLOCK)).cumsum(dim=2)
    last_CK1 = inside_CKB[..., -1:]
    # Rounding must not lead past the block's last token that has a probability.
    rest_CK1 = torch.minimum((place_CK - before_CK).clamp_(min=0)[..., None], last_CK1 * _BELOW_ONE)
    within_CK = torch.searchsorted(inside_CKB, rest_CK1, right=True)[..., 0].clamp_(max=BLOCK - 1)
    ids_CK = block_CK * BLOCK + within_CK
    return Kept(ids_CK, (weights_CV.gather(1, ids_CK) / total_C1).log(), None)


def largest(weights_CV: Tensor, count: int) -> Kept:
    """The `count` tokens with the largest weights, the largest first, V in whole blocks.

    They are in the blocks with the `count` largest maxima.
    """
    C, V = weights_CV.shape
    weights_CMB = weights_CV.view(C, -1, BLOCK)
    total_C = weights_CMB.sum(dim=2).sum(dim=1)
    if count * BLOCK >= V:
        top_CK, ids_CK = weights_CV.topk(count, dim=1)
    else:
        blocks_CK = weights_CMB.amax(dim=2).topk(count, dim=1).indices
        inside_CX = weights_CMB.gather(1, blocks_CK[..., None].expand(C, count, BLOCK)).flatten(1)
        top_CK, place_CK = inside_CX.topk(count, dim=1)
        ids_CK = blocks_CK.gather(1, place_CK // BLOCK) * BLOCK + place_CK % BLOCK
    q_CK = top_CK / total_C[:, None]
    rest_C = (1 - q_CK.sum(dim=1)).clamp_(min=2**-24)
    # A probability may underflow at a low temperature; its logarithm stays finite.
    return Kept(ids_CK, q_CK.clamp(min=2**-100).log(), rest_C.log())
