"""Attention over a trie of sequences that lie in one row, each token computed once.

Shapes: N tokens of the row, S segments, Q queries and C keys of a segment, H query heads, K key/value heads,
G = H / K query heads a group, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Group(NamedTuple):
    """Segments of similar length, padded. What padding yields goes to the row's place N, and is cut off."""

    queries_SQ: Tensor
    results_SQ: Tensor
    keys_SC: Tensor
    sees_SQC: Tensor  # whether the query may look at the key


class Segments:
    """Which tokens of a row attend to which: a sequence's own tokens to its path from the row's beginning.

    `positions` are the tokens' places in their sequences. Without padding in the row and without a product
    of each token with every other, attention costs what the sequences' own tokens and paths do.
    """

    def __init__(
        self, positions_N: np.ndarray, segments: Sequence[tuple[int, np.ndarray]], device: torch.device
    ) -> None:
        """`segments`: how many tokens, and the path that ends with them, as places in the row."""
        self.positions = torch.from_numpy(positions_N).to(device)[None]
        before_N = np.zeros(len(positions_N), np.int64)
        for _, path in segments:
            before_N[path[1:]] = path[:-1]
        self._before_N = torch.from_numpy(before_N).to(device)
        # Two steps to the doubling: few groups, little padding.
        by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
        for segment in segments:
            by_length.setdefault(round(2 * math.log2(segment[0])), []).append(segment)
        self.groups = [_group(own, len(positions_N), device) for own in by_length.values()]
        self._bias: list[Tensor] = []

    def before(self, x_1NX: Tensor) -> Tensor:
        """What `x_1NX` has at the token before each, in its sequence; zeros at a sequence's first token."""
        return x_1NX[:, self._before_N] * (self.positions > 0)[..., None]

    def attend(self, q_1NHE: Tensor, k_1NKE: Tensor, v_1NKE: Tensor, scale: float | None = None) -> Tensor:
        """Mixed values [1, N, H, E]. `scale` of the scores: 1 / sqrt(E) unless given."""
        N, H, E = q_1NHE.shape[1:]
        K = k_1NKE.shape[2]
        # Some models rotate queries and keys in float32 where their values are bfloat16.
        q_1NHE, k_1NKE = q_1NHE.to(v_1NKE.dtype), k_1NKE.to(v_1NKE.dtype)
        if not self._bias:  # the same for all layers
            self._bias = [_bias(group.sees_SQC, H // K, q_1NHE.dtype) for group in self.groups]
        # With the key/value heads first, a group's query heads lie side by side and need no copy of keys.
        q_KNX = q_1NHE.reshape(N, K, -1).transpose(0, 1)
        k_KNE, v_KNE = k_1NKE[0].transpose(0, 1), v_1NKE[0].transpose(0, 1)
        y_KNX = q_1NHE.new_empty(K, N + 1, H // K * E)
        for group, bias_1SXC in zip(self.groups, self._bias, strict=True):
            S, C = group.keys_SC.shape
            keys = group.keys_SC.flatten()
            y_KSXE = F.scaled_dot_product_attention(
                q_KNX.index_select(1, group.queries_SQ.flatten()).view(K, S, -1, E),
                k_KNE.index_select(1, keys).view(K, S, C, E),
                v_KNE.index_select(1, keys).view(K, S, C, E),
                attn_mask=bias_1SXC,
                scale=scale,
            )
            y_KNX.index_copy_(1, group.results_SQ.flatten(), y_KSXE.reshape(K, -1, H // K * E))
        return y_KNX[:, :N].transpose(0, 1).reshape(1, N, H, E)


def _group(segments: Sequence[tuple[int, np.ndarray]], length: int, device: torch.device) -> Group:
    S, Q, C = len(segments), max(n for n, _ in segments), max(len(path) for _, path in segments)
    queries, results, keys = np.zeros((S, Q), np.int64), np.full((S, Q), length), np.zeros((S, C), np.int64)
    before = np.empty((S, 1, 1), np.int64)
    for s, (n, path) in enumerate(segments):
        queries[s, :n] = results[s, :n] = path[len(path) - n :]
        keys[s, : len(path)] = path
        before[s] = len(path) - n
    sees = np.arange(C) <= before + np.arange(Q)[:, None]
    return Group(*(torch.from_numpy(array).to(device) for array in (queries, results, keys, sees)))


def _bias(sees_SQC: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: [1, S, Q G, C], 0 or minus infinity."""
    S, Q, C = sees_SQC.shape
    bias_SQC = torch.zeros(S, Q, C, dtype=dtype, device=sees_SQC.device).masked_fill_(~sees_SQC, -torch.inf)
    return bias_SQC[:, :, None].expand(S, Q, heads, C).reshape(1, S, Q * heads, C)
