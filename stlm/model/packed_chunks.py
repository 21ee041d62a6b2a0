"""Chunks of bytes in one row, without padding, and attention within each of them.

Chunks lie in the order of their lengths, so that those of a length are a block [C, L] of the row: attention
is one batch a length, and all else is one product over the row.

Shapes: N chunks, T places of the row (bytes or symbols), V chunks of a table, H heads, E head width; C chunks
of a length L.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stlm.model.layout import Layout
from stlm.tokens.chunks import ChunkTable

# The length of some chunks that lie together, and how many they are.
Block = tuple[int, int]
_ARRAYS = [name for name in ChunkTable._fields if name != "longest"]


class Packing(Layout):
    """Chunks that lie in one row, of which each attends to itself alone.

    `order_N` are the chunks as they lie, by length; `chunk_T` and `place_T` say of each place the chunk (its
    number in that order) and the place in the chunk; `blocks` are the lengths and how many chunks have each.
    """

    def __init__(self, lengths_N: Tensor, causal: bool) -> None:
        lengths_N, self.order_N = lengths_N.sort(stable=True)
        self.lengths_N, self.causal = lengths_N, causal
        self.blocks = [(length, count) for length, count in enumerate(lengths_N.bincount().tolist()) if count]
        self.chunk_T = torch.arange(len(lengths_N), device=lengths_N.device).repeat_interleave(lengths_N)
        ends_N = lengths_N.cumsum(dim=0)
        self.place_T = torch.arange(len(self.chunk_T), device=lengths_N.device)
        self.place_T -= (ends_N - lengths_N)[self.chunk_T]
        self.positions = self.place_T[None]

    def split(self, x_TX: Tensor) -> list[Tensor]:
        """The blocks [C, L, ...] of a row [T, ...]."""
        parts = x_TX.split([length * count for length, count in self.blocks])
        return [
            part.unflatten(0, (count, length))
            for part, (length, count) in zip(parts, self.blocks, strict=True)
        ]

    def before(self, x_1TX: Tensor) -> Tensor:
        """What `x_1TX` has at the place before, in its chunk; zeros at a chunk's first place."""
        return F.pad(x_1TX[:, :-1], (0, 0, 1, 0)) * (self.positions > 0)[..., None]

    def attend(self, q_1THE: Tensor, k_1THE: Tensor, v_1THE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`; with `causal`, a place sees its chunk up to itself, otherwise all of it."""
        assert not dropout, "byte transformers have no dropout"
        return _ChunkAttention.apply(q_1THE[0], k_1THE[0], v_1THE[0], self.blocks, self.causal)[None]


class _ChunkAttention(torch.autograd.Function):
    """Attention within each chunk, by products of all chunks and heads of a length at once.

    torch's fused attention works on one head of one chunk at a time, and on a CPU takes three times as long
    for chunks of a few bytes. The weights, a few for each place, are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, blocks: Sequence[Block], causal: bool
    ) -> Tensor:
        y_THE, weights = torch.empty_like(q_THE), []
        with torch.autocast(q_THE.device.type, enabled=False):
            for here, (length, _) in _places(blocks):
                q_XLE, k_XLE, v_XLE = (_heads(x[here], length) for x in (q_THE, k_THE, v_THE))
                score_XLL = torch.bmm(q_XLE, k_XLE.transpose(1, 2)).mul_(1 / math.sqrt(q_XLE.shape[2]))
                if causal:
                    score_XLL.add_(score_XLL.new_full((length, length), -torch.inf).triu_(1))
                weight_XLL = torch.softmax(score_XLL, dim=-1)
                _put(y_THE[here], torch.bmm(weight_XLL, v_XLE))
                weights.append(weight_XLL)
        ctx.save_for_backward(q_THE, k_THE, v_THE, *weights)
        ctx.blocks = blocks
        return y_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THE: Tensor) -> tuple[Tensor | None, ...]:
        q_THE, k_THE, v_THE, *weights = ctx.saved_tensors
        dq_THE, dk_THE, dv_THE = (torch.empty_like(x) for x in (q_THE, k_THE, v_THE))
        for (here, (length, _)), weight_XLL in zip(_places(ctx.blocks), weights, strict=True):
            q_XLE, k_XLE, v_XLE, dy_XLE = (_heads(x[here], length) for x in (q_THE, k_THE, v_THE, dy_THE))
            _put(dv_THE[here], torch.bmm(weight_XLL.transpose(1, 2), dy_XLE))
            dweight_XLL = torch.bmm(dy_XLE, v_XLE.transpose(1, 2))
            dscore_XLL = torch._softmax_backward_data(dweight_XLL, weight_XLL, -1, weight_XLL.dtype)
            dscore_XLL.mul_(1 / math.sqrt(q_XLE.shape[2]))
            _put(dq_THE[here], torch.bmm(dscore_XLL, k_XLE))
            _put(dk_THE[here], torch.bmm(dscore_XLL.transpose(1, 2), q_XLE))
        return dq_THE, dk_THE, dv_THE, None, None


def _places(blocks: Sequence[Block]) -> Iterator[tuple[slice, Block]]:
    """Where each block lies in the row."""
    begin = 0
    for length, count in blocks:
        yield slice(begin, begin + length * count), (length, count)
        begin += length * count


def _heads(x_THE: Tensor, length: int) -> Tensor:
    """A block's heads as [X, L, E], X = C H."""
    return x_THE.unflatten(0, (-1, length)).transpose(1, 2).flatten(0, 1)


def _put(target_THE: Tensor, x_XLE: Tensor) -> None:
    """Write a block's heads [X, L, E] to their places in the row."""
    H, L = target_THE.shape[1], x_XLE.shape[1]
    target_THE.unflatten(0, (-1, L)).copy_(x_XLE.unflatten(0, (-1, H)).transpose(1, 2))


class Written(NamedTuple):
    """Symbols of chunks that were written in a row: their places, their rules, and how the chunks lie."""

    symbols_T: Tensor
    rules_T: Tensor
    packing: Packing


class Table(nn.Module):
    """A :class:`~stlm.tokens.chunks.ChunkTable` on the model's device. No part of the model's weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in _ARRAYS:
            self.register_buffer(name, None, persistent=False)

    def fill(self, table: ChunkTable, device: torch.device) -> None:
        """From now on read `table`."""
        for name in _ARRAYS:
            setattr(self, name, torch.from_numpy(getattr(table, name)).to(device))

    def read(self, chunks_N: Tensor) -> tuple[Tensor, Packing]:
        """The symbols [T], int64, that the model reads of chunks [N], and how they lie."""
        packing = Packing(self.n_inputs_V[chunks_N], causal=False)
        return self._symbols(chunks_N, packing)[0], packing

    def write(self, chunks_N: Tensor, before_N: Tensor) -> Written:
        """The symbols to write for chunks [N], each of which follows one of `before_N`."""
        packing = Packing(self.begins_V[chunks_N + 1] - self.begins_V[chunks_N], causal=True)
        symbols_T, at_T = self._symbols(chunks_N, packing)
        first_N = self.following_V[before_N[packing.order_N]]
        rules_T = torch.where(packing.place_T == 0, first_N[packing.chunk_T], self.rules_T[at_T])
        return Written(symbols_T, rules_T.long(), packing)

    def _symbols(self, chunks_N: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """The first symbols of each chunk, and where they are in the table [T]."""
        at_T = self.begins_V[chunks_N[packing.order_N]][packing.chunk_T] + packing.place_T
        return self.symbols_T[at_T].long(), at_T
