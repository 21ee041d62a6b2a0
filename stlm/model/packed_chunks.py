"""Chunks of bytes in one row, without padding, and attention within each of them.

Chunks are sorted by length, so the chunks of one length form a block [C, L] of the row: attention is one
batch for each length, and everything else is one product over the row.

Shapes: N chunks, T positions of the row (bytes or symbols), V chunks of a table, H heads, E head width; C
chunks of a length L.
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

# The length of the chunks in a block, and their number.
Block = tuple[int, int]
_ARRAYS = [name for name in ChunkTable._fields if name != "longest"]


class Packing(Layout):
    """Chunks that lie in one row; each chunk attends to itself only.

    `order_N` sorts the chunks by length. `chunk_T` and `place_T` give, for each position of the row, the
    chunk (its index in that order) and the position in the chunk; `blocks` are the lengths, each with its
    number of chunks.
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

    def mean(self, x_TX: Tensor) -> Tensor:
        """The mean [N, X] of each chunk, in the order of `order_N`."""
        return torch.cat([x_CLX.mean(dim=1) for x_CLX in self.split(x_TX)])

    def last(self, x_TX: Tensor) -> Tensor:
        """Each chunk's last position [N, X], in the order of `order_N`."""
        return torch.cat([x_CLX[:, -1] for x_CLX in self.split(x_TX)])

    def weighted(self, x_TX: Tensor, score_T1: Tensor) -> Tensor:
        """The mean [N, X] of each chunk by the softmax of its scores, in the order of `order_N`."""
        parts = zip(self.split(x_TX), self.split(score_T1), strict=True)
        return torch.cat([(x_CLX * score_CL1.softmax(dim=1)).sum(dim=1) for x_CLX, score_CL1 in parts])

    def before(self, x_1TX: Tensor) -> Tensor:
        """`x_1TX` at the position before each in its chunk; zeros at a chunk's first position."""
        return F.pad(x_1TX[:, :-1], (0, 0, 1, 0)) * (self.positions > 0)[..., None]

    def attend(self, q_1THE: Tensor, k_1THE: Tensor, v_1THE: Tensor, dropout: float = 0.0) -> Tensor:
        """See `Layout.attend`. With `causal`, a position sees its chunk up to itself, otherwise all of it."""
        assert not dropout, "there is no dropout of attention within chunks"
        if (groups := q_1THE.shape[2] // k_1THE.shape[2]) > 1:
            k_1THE, v_1THE = (x.repeat_interleave(groups, dim=2) for x in (k_1THE, v_1THE))
        return _ChunkAttention.apply(q_1THE[0], k_1THE[0], v_1THE[0], self.blocks, self.causal)[None]


class _ChunkAttention(torch.autograd.Function):
    """Attention within each chunk, as products over all chunks and heads of one length.

    torch's fused attention processes one head of one chunk at a time; on a CPU that takes three times as long
    for chunks of a few bytes. The weights, a few for each position, are kept for the backward pass.
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
    """Yield the slice of each block in the row."""
    begin = 0
    for length, count in blocks:
        yield slice(begin, begin + length * count), (length, count)
        begin += length * count


def _heads(x_THE: Tensor, length: int) -> Tensor:
    """A block's heads as [X, L, E], X = C H."""
    return x_THE.unflatten(0, (-1, length)).transpose(1, 2).flatten(0, 1)


def _put(target_THE: Tensor, x_XLE: Tensor) -> None:
    """Write a block's heads [X, L, E] to their positions in the row."""
    H, L = target_THE.shape[1], x_XLE.shape[1]
    target_THE.unflatten(0, (-1, L)).copy_(x_XLE.unflatten(0, (-1, H)).transpose(1, 2))


class Written(NamedTuple):
    """Symbols of chunks to write in a row: the symbols, their rules, and the packing of the chunks."""

    symbols_T: Tensor
    rules_T: Tensor
    packing: Packing


class Table(nn.Module):
    """A :class:`~stlm.tokens.chunks.ChunkTable` on the model's device. It is not part of the weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in _ARRAYS:
            self.register_buffer(name, None, persistent=False)

    def fill(self, table: ChunkTable, device: torch.device) -> None:
        """Read `table` from now on."""
        for name in _ARRAYS:
            setattr(self, name, torch.from_numpy(getattr(table, name)).to(device))

    def read(self, chunks_N: Tensor) -> tuple[Tensor, Packing]:
        """The symbols [T], int64, that the model reads of chunks [N], and their packing."""
        packing = Packing(self.n_inputs_V[chunks_N], causal=False)
        return self._symbols(chunks_N, packing)[0], packing

    def write(self, chunks_N: Tensor, before_N: Tensor) -> Written:
        """The symbols to write for chunks [N]; `before_N` are the chunks before them."""
        packing = Packing(self.begins_V[chunks_N + 1] - self.begins_V[chunks_N], causal=True)
        symbols_T, at_T = self._symbols(chunks_N, packing)
        first_N = self.following_V[before_N[packing.order_N]]
        rules_T = torch.where(packing.place_T == 0, first_N[packing.chunk_T], self.rules_T[at_T])
        return Written(symbols_T, rules_T.long(), packing)

    def _symbols(self, chunks_N: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """The symbols of each chunk up to the length in `packing`, and their indices in the table [T]."""
        at_T = self.begins_V[chunks_N[packing.order_N]][packing.chunk_T] + packing.place_T
        return self.symbols_T[at_T].long(), at_T
