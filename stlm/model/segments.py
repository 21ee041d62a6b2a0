"""Attention over a trie of sequences that lie in one row; each token is computed once.

Shapes: N tokens of the row, S segments, Q queries and C keys of a segment, H query heads, K key/value heads,
G = H / K query heads a group, E head width; M places of a stretched row, P tokens and Q places of a path.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.layout import Layout, Selection, Stretched
from stlm.model.rotary import Rotary
from stlm.model.trie_attention import Sequences, attend_sequences, trie_attention


class Group(NamedTuple):
    """Segments of similar length, padded. Outputs at padding go to index N of the row, and are cut off."""

    queries_SQ: Tensor
    results_SQ: Tensor
    keys_SC: Tensor
    sees_SQC: Tensor  # whether the query may look at the key


class Segments(Layout):
    """A trie of sequences in one row: each token attends to the path from the row's beginning to itself.

    `positions` are the tokens' positions in their sequences. The row has no padding, and tokens are not
    multiplied with every other token, so attention costs what the sequences' own tokens and paths cost.
    """

    def __init__(
        self, positions_N: np.ndarray, segments: Sequence[tuple[int, np.ndarray]], device: torch.device
    ) -> None:
        """`segments`: the number of tokens, and the indices in the row of the path that ends with them."""
        self.positions = torch.from_numpy(positions_N).to(device)[None]
        # What the other attributes are made of when they are needed; None for selected tokens.
        self._given: tuple[np.ndarray, Sequence[tuple[int, np.ndarray]]] | None = positions_N, segments
        self._bias: list[Tensor] = []

    @cached_property
    def groups(self) -> list[Group]:
        """The segments for torch's attention: two groups for each doubling of the length.

        So there are few groups and little padding.
        """
        positions_N, segments = self._given
        by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
        for segment in segments:
            by_length.setdefault(round(2 * math.log2(segment[0])), []).append(segment)
        device = self.positions.device
        return [_group(members, len(positions_N), device) for members in by_length.values()]

    @cached_property
    def sequences(self) -> Sequences | None:
        """The segments for the kernel, or None where they are not nested as it needs."""
        return None if self._given is None else _nested(self._given[1])

    @cached_property
    def _begins_1N(self) -> Tensor:  # noqa: N802
        return self.positions == 0

    @cached_property
    def _before_N(self) -> Tensor:  # noqa: N802
        """The index of the token before each on its path; 0 at a sequence's first token."""
        positions_N, segments = self._given
        before_N = np.zeros(len(positions_N), np.int64)
        for _, path in segments:
            before_N[path[1:]] = path[:-1]
        return torch.from_numpy(before_N).to(self.positions.device)

    def before(self, x_1NX: Tensor) -> Tensor:
        """`x_1NX` at the token before each in its sequence; zeros at a sequence's first token."""
        return x_1NX[:, self._before_N] * ~self._begins_1N[..., None]

    def attend(
        self,
        q_1NHE: Tensor,
        k_1NKE: Tensor,
        v_1NKE: Tensor,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """See `Layout.attend`. `scale` multiplies the scores: 1 / sqrt(E) by default."""
        assert not dropout, "tries are for scoring, which drops nothing"
        N, H, E = q_1NHE.shape[1:]
        K = k_1NKE.shape[2]
        # Some models rotate queries and keys in float32 while their values are bfloat16.
        q_1NHE, k_1NKE = q_1NHE.to(v_1NKE.dtype), k_1NKE.to(v_1NKE.dtype)
        if self.sequences is not None:
            y_NHE = trie_attention(q_1NHE[0], k_1NKE[0], v_1NKE[0], self.sequences, scale=scale)
            if y_NHE is not None:
                return y_NHE[None]
        if not self._bias:  # the same for all layers
            self._bias = [_bias(group.sees_SQC, H // K, q_1NHE.dtype) for group in self.groups]
        # With the key/value heads first, a group's query heads are adjacent and need no copy of the keys.
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

    def attend_projections(
        self, qkv_BLSE: Tensor, heads: int, rope: Rotary | None, rows_N: Tensor | None = None
    ) -> Tensor | None:
        """See `Layout.attend_projections`."""
        if self.sequences is None:
            return None
        return attend_sequences(qkv_BLSE, heads, self.sequences, rope, rows_N)

    def select(self, selection: Selection) -> Segments:
        """See `Layout.select`: a token sees the selected tokens of its path, and keeps its position."""
        index_S = selection.index_BS[0]
        N, S = self.positions.shape[1], len(index_S)
        place_N = torch.full((N + 1,), S, device=index_S.device)  # each token's index in the new row; S: none
        place_N[index_S] = torch.arange(S, device=index_S.device)
        chosen_N = place_N < S
        selected = copy.copy(self)
        selected._given = selected.sequences = None
        selected.positions = self.positions[:, index_S]
        # The nearest selected token on each path: the jumps back double until they reach one.
        jump_N = torch.where(
            chosen_N[:N] | self._begins_1N[0], torch.arange(N, device=index_S.device), self._before_N
        )
        while not torch.equal(further_N := jump_N[jump_N], jump_N):
            jump_N = further_N
        before_S = jump_N[self._before_N[index_S]]
        selected._begins_1N = (self._begins_1N[0, index_S] | ~chosen_N[before_S])[None]
        selected._before_N = place_N[before_S].masked_fill(selected._begins_1N[0], 0)
        selected.groups = [_selected(group, place_N, chosen_N) for group in self.groups]
        selected._bias = []
        return selected

    def stretch(self, inserted_1N: Tensor, length: int | None = None) -> Stretched:
        """See `Layout.stretch`: what follows a token belongs to all sequences that continue it."""
        if self._given is None:
            return super().stretch(inserted_1N, length)
        (positions_N, segments), device = self._given, inserted_1N.device
        inserted_N = inserted_1N[0].cpu().numpy()
        last_N = (inserted_N + 1).cumsum() - 1
        place_N = last_N - inserted_N
        first_N, longer = np.empty_like(positions_N), []
        for own, path_P in segments:
            inserted_P = inserted_N[path_P]
            before_P = inserted_P.cumsum() - inserted_P
            new_P = slice(len(path_P) - own, None)
            first_N[path_P[new_P]] = positions_N[path_P[new_P]] + before_P[new_P]
            # The places of each token of the path, and of what follows it.
            begin_P = place_N[path_P] - before_P - np.arange(len(path_P))
            path_Q = np.repeat(begin_P, inserted_P + 1)
            path_Q += np.arange(len(path_Q))
            longer.append((own + int(inserted_P[new_P].sum()), path_Q))
        owner_M = np.repeat(np.arange(len(positions_N)), inserted_N + 1)
        positions_M = first_N[owner_M] + np.arange(len(owner_M)) - place_N[owner_M]
        place_1N, last_1N = (torch.from_numpy(array).to(device)[None] for array in (place_N, last_N))
        return Stretched(Segments(positions_M, longer, device), len(owner_M), place_1N, last_1N)


def _nested(segments: Sequence[tuple[int, np.ndarray]]) -> Sequences | None:
    """The segments as `Sequences`, or None if they are not nested.

    Each one's own tokens must follow the previous one's in the row, and each path begin as the previous one.
    """
    own_S = np.array([own for own, _ in segments])
    length_S = np.array([len(path) for _, path in segments])
    shared_S = length_S - own_S
    if (shared_S > np.concatenate([[0], length_S[:-1]])).any():
        return None
    path_P = np.concatenate([path for _, path in segments])
    begin_S = length_S.cumsum() - length_S
    place_P = np.arange(len(path_P)) - begin_S.repeat(length_S)
    is_own_P = place_P >= shared_S.repeat(length_S)
    nested = np.array_equal(path_P[is_own_P], np.arange(own_S.sum()))
    previous_P = (np.concatenate([[0], begin_S[:-1]]).repeat(length_S) + place_P)[~is_own_P]
    nested = nested and np.array_equal(path_P[~is_own_P], path_P[previous_P])
    return Sequences(*map(torch.from_numpy, (own_S, shared_S))) if nested else None


def _selected(group: Group, place_N: Tensor, chosen_N: Tensor) -> Group:
    """The group restricted to selected tokens: the others are not seen, and their outputs are cut off."""
    queries_SQ, results_SQ = place_N[group.queries_SQ], place_N[group.results_SQ]
    sees_SQC = group.sees_SQC & chosen_N[group.keys_SC][:, None]
    sees_SQC |= ~sees_SQC.any(dim=2, keepdim=True)  # avoids a softmax over nothing
    n = int(chosen_N.sum())
    keys_SC = place_N[group.keys_SC].clamp(max=n - 1)
    return Group(queries_SQ.clamp(max=n - 1), results_SQ, keys_SC, sees_SQC)


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
    """The mask added to the scores: [1, S, Q G, C], 0 or minus infinity."""
    S, Q, C = sees_SQC.shape
    bias_SQC = torch.zeros(S, Q, C, dtype=dtype, device=sees_SQC.device).masked_fill_(~sees_SQC, -torch.inf)
    return bias_SQC[:, :, None].expand(S, Q, heads, C).reshape(1, S, Q * heads, C)
