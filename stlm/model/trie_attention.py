"""Attention over a trie of sequences, or over rows of one sequence, in one kernel: for scoring on a CPU.

torch's fused attention needs rotated queries and keys, and keys, values and a mask gathered for padded groups
of sequences. With sequences of a few tokens these passes over memory cost several times what attention does.
The kernel reads the projections, rotates them, and keeps the keys and values of one path in the cache.

Shapes: N tokens of a row, S sequences, H query heads, K key/value heads, E head width, R tokens asked for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stlm.kernels.library import kernels_for
from stlm.model.rotary import Rotary


class Sequences(NamedTuple):
    """How sequences lie in a row, one after another (int64).

    Each has `own_S` tokens, after the first `shared_S` tokens of the sequence before it.
    """

    own_S: Tensor
    shared_S: Tensor


def trie_attention(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    sequences: Sequences,
    rope: Rotary | None = None,
    scale: float | None = None,
    rows_R: Tensor | None = None,
) -> Tensor | None:
    """softmax(q k^T scale) v over the tokens of each sequence up to the query.

    Returns [N, H, E], or [R, H, E] for the queries `rows_R`; None: there is no kernel for these tensors, or
    gradients are wanted. `scale` is 1 / sqrt(E) by default. `rope`, the angles [N, 1, E] of the tokens,
    rotates queries and keys.
    """
    kernels = kernels_for(v_NKE)
    if kernels is None or torch.is_grad_enabled() or {q_NHE.dtype, k_NKE.dtype} != {v_NKE.dtype}:
        return None
    (N, H, E), K = q_NHE.shape, k_NKE.shape[1]
    q_NHE, k_NKE, v_NKE = (x if _is_dense(x) else x.contiguous() for x in (q_NHE, k_NKE, v_NKE))
    cos = sin = place_N = None
    angles = 0
    if rope is not None:
        cos, sin = (table.float().reshape(-1, E).contiguous() for table in rope)
        angles = E if len(cos) > 1 else 0
    asked = N
    if rows_R is not None:
        asked = len(rows_R)
        place_N = rows_R.new_full((N,), -1)
        place_N[rows_R] = torch.arange(asked)
    y_RHE = v_NKE.new_empty(asked, H, E)
    kernels.trie_attention(
        *(len(sequences.own_S), H, K, E),
        *(x.data_ptr() for x in (q_NHE, k_NKE, v_NKE)),
        *(x.stride(0) for x in (q_NHE, k_NKE, v_NKE)),
        *(cos, sin, angles, *sequences, place_N),
        1 / math.sqrt(E) if scale is None else scale,
        y_RHE,
    )
    # A token that is asked for twice is computed once.
    return y_RHE if place_N is None else y_RHE[place_N[rows_R]]


def attend_sequences(
    qkv_BLSE: Tensor, heads: int, sequences: Sequences, rope: Rotary | None, rows_N: Tensor | None
) -> Tensor | None:
    """`Layout.attend_projections` for rows that `sequences` describes, one after another."""
    B, L, S, E = qkv_BLSE.shape
    K = (S - heads) // 2
    qkv = qkv_BLSE.flatten(0, 1).split([heads, K, K], dim=1)
    y_NHE = trie_attention(*qkv, sequences, rope, rows_R=rows_N)
    return y_NHE if y_NHE is None or rows_N is not None else y_NHE.view(B, L, heads, E)


def _is_dense(x_NHE: Tensor) -> bool:
    """Whether the heads of a token are consecutive."""
    return x_NHE.stride(2) == 1 and x_NHE.stride(1) == x_NHE.shape[2]
