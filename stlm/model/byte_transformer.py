"""The byte-level model: chunks of bytes in, the next chunk's bytes out, the core's transformer in between.

Tokens are chunks, by their numbers in a table (stlm.tokens.chunks). What the embedding does elsewhere, a byte
transformer within each chunk does here, and its pooling; what the head does, a second one that writes the
next chunk symbol by symbol (Hillier et al. 2024, section 5.2; MegaByte, Yu et al. 2023; Learn Your Tokens,
Thawani et al. 2023).

Tensor names as in stlm.model.transformer; besides N chunks, T places in a row of chunks, d the byte dimension
(written W in names), S symbols, R rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.config import CHUNK_BYTES, ModelConfig
from stlm.model.flops import children_flops, forward_flops
from stlm.model.graphs import outside_graphs
from stlm.model.head_loss import head_loss
from stlm.model.layout import Layout
from stlm.model.packed_chunks import Packing, Table, Written
from stlm.model.projection import INITIAL_STD
from stlm.model.transformer import NORMS, Block, Transformer, block_matrices, sinusoidal_table
from stlm.tokens.chunks import END, END_OF_TEXT, SYMBOLS, ChunkTable

# Added to the logits of symbols that a rule forbids: their probability is zero in float32.
_FORBIDDEN = -1e4


class MeanPooling(nn.Module):
    """The mean of a chunk's bytes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.bytes.width, config.width, bias=False)

    def flops(self, length: float) -> float:
        """Forward FLOPs of a chunk of so many bytes, of which one vector is mapped to the core's width."""
        return forward_flops(self.up, 1) + children_flops(self, length, without=("up",))

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        return self.up(torch.cat([x_CLW.mean(dim=1) for x_CLW in packing.split(x_TW)]))


class LastPooling(MeanPooling):
    """A chunk's last byte."""

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        return self.up(torch.cat([x_CLW[:, -1] for x_CLW in packing.split(x_TW)]))


class AttentionPooling(MeanPooling):
    """The mean of a chunk's bytes by softmax weights, from one learned vector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.bytes.width, 1, bias=False)

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        scores = packing.split(self.score(x_TW))
        pooled = [
            (x_CLW * score_CL1.softmax(dim=1)).sum(dim=1)
            for x_CLW, score_CL1 in zip(packing.split(x_TW), scores, strict=True)
        ]
        return self.up(torch.cat(pooled))


class QueryPooling(nn.Module):
    """What a learned query finds in a chunk's bytes, attending with the core's heads and width (Byte2Word).

    The query is the same for all chunks: with the keys it makes one score a head and byte.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.bytes.width, config.heads, bias=False)
        self.up = nn.Linear(config.bytes.width, config.width, bias=False)

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        score_TH = self.score(x_TW)
        value_THE = self.up(x_TW).unflatten(1, (score_TH.shape[1], -1))
        pooled = [
            (value_CLHE * score_CLH.softmax(dim=1)[..., None]).sum(dim=1)
            for score_CLH, value_CLHE in zip(packing.split(score_TH), packing.split(value_THE), strict=True)
        ]
        return torch.cat(pooled).flatten(1)


POOLINGS: dict[str, type[nn.Module]] = {
    "mean": MeanPooling,
    "attention": AttentionPooling,
    "last": LastPooling,
    "query": QueryPooling,
}


class ChunkEncoder(nn.Module):
    """Chunks to vectors of the core's width: byte embedding, byte transformer within each chunk, pooling."""

    parameter_group, one_group = "byte encoder", True
    parameter_groups: ClassVar[dict[str, str]] = {"bytes": "byte embedding"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own = config.byte_blocks(config.bytes.encoder_layers)
        self.bytes = nn.Embedding(SYMBOLS, own.width)
        self.blocks = nn.ModuleList([Block(own) for _ in range(own.layers)])
        for block in self.blocks:
            block.attention.attended = 1.0  # a byte sees all of its chunk
        self.norm = NORMS[own.norm](own.width, eps=own.norm_eps)
        self.pool = POOLINGS[config.bytes.pooling](config)
        self.table = Table()
        self.register_buffer("places_LW", None, persistent=False)

    def flops(self, length: float, chunk_bytes: float = CHUNK_BYTES) -> float:
        """Forward FLOPs of `length` chunks, all of `chunk_bytes` bytes."""
        return length * children_flops(self, chunk_bytes)

    @property
    def weight(self) -> Tensor:
        """The byte embedding's [S, W]."""
        return self.bytes.weight

    def fill(self, table: ChunkTable) -> None:
        """From now on read chunks of `table`."""
        self.table.fill(table, self.weight.device)
        # A chunk's bytes, and its end.
        places_LW = sinusoidal_table(table.longest + 1, self.weight.shape[1])
        self.places_LW = places_LW.to(self.weight.device)

    def look_up(self, symbols_T: Tensor, place_T: Tensor) -> Tensor:
        """Vectors [T, W] of symbols at places in their chunks."""
        # As where the core has sinusoidal positions: unscaled, they would drown the bytes.
        return self.bytes(symbols_T) * math.sqrt(self.weight.shape[1]) + self.places_LW[place_T]

    @outside_graphs
    def forward(self, chunks_BL: Tensor) -> Tensor:
        """[B, L, D], float32. A chunk that comes more than once is worked on once."""
        chunks_N, which_BL = chunks_BL.unique(return_inverse=True)
        symbols_T, packing = self.table.read(chunks_N)
        x_1TW = self.look_up(symbols_T, packing.place_T)[None]
        for block in self.blocks:
            x_1TW = block(x_1TW, None, packing)
        pooled_ND = self.pool(self.norm(x_1TW[0]), packing).float()
        return F.embedding(packing.order_N.argsort()[which_BL], pooled_ND)


class ByteDecoder(nn.Module):
    """Writes chunks: a causal byte transformer that is given the core's vector in front of each block."""

    parameter_group, one_group = "byte decoder", True
    parameter_groups: ClassVar[dict[str, str]] = {"output": "head"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own = config.byte_blocks(config.bytes.decoder_layers)
        # A part of the core's vector of its own for each block: together they carry more than the byte
        # dimension.
        self.condition = nn.Linear(config.width, own.layers * own.width, bias=False)
        self.blocks = nn.ModuleList([Block(own) for _ in range(own.layers)])
        self.norm = NORMS[own.norm](own.width, eps=own.norm_eps)
        self.output = None if config.tied else nn.Linear(own.width, SYMBOLS, bias=False)

    def flops(self, length: float, symbols: float = CHUNK_BYTES + 1) -> float:
        """Forward FLOPs of `length` chunks, all of so many symbols, the logits of each included."""
        width = self.condition.out_features // len(self.blocks)
        # The head's matrix is the byte embedding's where it is tied.
        head = 2 * SYMBOLS * width * symbols
        written = children_flops(self, symbols, without=("condition", "output"))
        return length * (forward_flops(self.condition, 1) + written + head)

    def forward(self, x_ND: Tensor, look_up, written: Written) -> Tensor:
        """[T, W], from which the symbols of `written` follow, given the core's x_ND for its chunks."""
        packing = written.packing
        # Each place reads the symbol before its own; at a chunk's first place that is an end of chunk.
        before_T = F.pad(written.symbols_T[:-1], (1, 0)).masked_fill(packing.place_T == 0, END)
        y_TW = look_up(before_T, packing.place_T)
        # Looked up, not indexed: on a CPU an index's gradient is added number by number.
        conditions_NX = self.condition(F.embedding(packing.order_N, x_ND))
        for condition_NW, block in zip(
            conditions_NX.chunk(len(self.blocks), dim=1), self.blocks, strict=True
        ):
            y_TW = y_TW + F.embedding(packing.chunk_T, condition_NW)
            y_TW = block(y_TW[None], None, packing)[0]
        return self.norm(y_TW)


class ByteTransformer(Transformer):
    """A language model over chunks of bytes: proper probabilities of any text, without a vocabulary.

    `use` gives it the table of the chunks that its inputs and targets name. The core is the `Transformer`'s,
    unchanged; a dropout acts there alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = ChunkEncoder(config)
        self.output = None
        self.decoder = ByteDecoder(config)
        self._initialize_bytes()

    def _initialize_bytes(self) -> None:
        """Normal, for outputs as large as the inputs, whatever the width: 0.02 is for wide models.

        The projections into the residual stream are as the core's, relative to that. Chunks' vectors start as
        small as tokens' embeddings do, so that the core starts as it does on tokens.
        """
        for part in (self.embedding, self.decoder):
            for name, parameter in part.named_parameters():
                if parameter.dim() == 2:
                    scale = 1.0
                    if name.endswith(("attention.out.weight", "ffn.down.weight")):
                        scale = 0.0 if self.config.zero_init else 1 / math.sqrt(2 * len(part.blocks))
                    elif name == "pool.up.weight":
                        scale = INITIAL_STD
                    nn.init.normal_(parameter, std=scale / math.sqrt(parameter.shape[1]))

    def flops(self, length: float, chunk_bytes: float = CHUNK_BYTES, ends_written: bool = True) -> float:
        """Forward FLOPs of a sequence of `length` chunks, each read and written, all of `chunk_bytes` bytes.

        `ends_written`: a chunk's end is a symbol, too.
        """
        core = children_flops(self, length, without=("embedding", "decoder"))
        read = self.embedding.flops(length, chunk_bytes)
        return core + read + self.decoder.flops(length, chunk_bytes + ends_written)

    def use(self, table: ChunkTable) -> None:
        """From now on tokens are the chunks of `table`."""
        self.embedding.fill(table)

    def matrix_parts(self) -> dict[tuple[int, ...], list[nn.Parameter]]:
        """The blocks' matrices as `Transformer` gives them, those of both byte transformers, and what maps
        between them and the core."""
        parts = super().matrix_parts()
        width, condition = self.config.bytes.width, self.decoder.condition.weight
        parts.setdefault((width,) * (len(condition) // width), []).append(condition)
        parts.setdefault((), []).append(self.embedding.pool.up.weight)
        for part in (self.embedding, self.decoder):
            for rows, own in block_matrices(part.blocks, self.config.byte_blocks(1)).items():
                parts.setdefault(rows, []).extend(own)
        return parts

    def hidden_loss(self, x_ND: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean cross-entropy of a chunk in nats, float32, given `hidden` of the chunks before, flat."""
        return self._mean_loss(x_ND, targets_BL.flatten(), tokens_BL.flatten())

    def loss(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        mask_BL: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, float32: the mean over all chunks, or the sum over the text of a mask's.

        A chunk's is the sum over its symbols.
        """
        x_ND = self.hidden(tokens_BL, layout).flatten(0, 1)
        if mask_BL is None:
            return self.hidden_loss(x_ND, tokens_BL, targets_BL)
        here_N, chunks_N, before_N = mask_BL.flatten(), targets_BL.flatten(), tokens_BL.flatten()
        return -self.log_probabilities(x_ND[here_N], chunks_N[here_N], before_N[here_N])[0].sum()

    @outside_graphs
    def _mean_loss(self, x_ND: Tensor, chunks_N: Tensor, before_N: Tensor) -> Tensor:
        written, y_TW = self._write(x_ND, chunks_N, before_N)
        # The rules as more inputs of the head: one product makes the logits, forbidden ones far below all.
        allowed_RS = self.embedding.table.allowed_RS
        forbidden_SR = torch.zeros(allowed_RS.T.shape, device=y_TW.device).masked_fill(
            ~allowed_RS.T, _FORBIDDEN
        )
        rule_TR = F.one_hot(written.rules_T, len(allowed_RS)).to(y_TW.dtype)
        mean = head_loss(
            torch.cat([y_TW, rule_TR], dim=1),
            torch.cat([self._head_weight(), forbidden_SR], dim=1),
            written.symbols_T,
        )
        return mean * (len(written.symbols_T) / len(chunks_N))

    @outside_graphs
    def log_probabilities(
        self, x_ND: Tensor, chunks_N: Tensor, before_N: Tensor, ends: bool = False
    ) -> tuple[Tensor, Tensor]:
        """log P of each chunk [N], float32, given the core's vectors before it; and whether it is the first
        choice, symbol by symbol.

        With `ends`, ends of text count; without, they are no part of a text. What the table skips is given.
        """
        table = self.embedding.table
        written, y_TW = self._write(x_ND, chunks_N, before_N)
        logits_TS = F.linear(y_TW, self._head_weight()).float()
        logits_TS = logits_TS.masked_fill(~table.allowed_RS[written.rules_T], -torch.inf)
        packing = written.packing
        counts_T = packing.place_T >= table.skips_V[chunks_N[packing.order_N]][packing.chunk_T]
        if not ends:
            counts_T &= written.symbols_T != END_OF_TEXT
        found_T = -F.cross_entropy(logits_TS, written.symbols_T, reduction="none")
        missed_T = (logits_TS.argmax(dim=1) != written.symbols_T) & counts_T
        sums_2N = torch.zeros(2, len(chunks_N), device=y_TW.device)
        sums_2N[0].index_add_(0, packing.chunk_T, torch.where(counts_T, found_T, 0.0))
        sums_2N[1].index_add_(0, packing.chunk_T, missed_T.float())
        restored_2N = sums_2N[:, packing.order_N.argsort()]
        return restored_2N[0], restored_2N[1] == 0

    def next_logits(self, x_D: Tensor, begun: Sequence[int], rule: int) -> Tensor:
        """Logits [S], float32, of the symbol after those already written of a chunk, minus infinity for what
        the rule forbids, given the core's vector before the chunk."""
        symbols_T = torch.tensor([*begun, END], device=x_D.device)
        packing = Packing(torch.tensor([len(symbols_T)], device=x_D.device), causal=True)
        y_TW = self.decoder(x_D[None], self.embedding.look_up, Written(symbols_T, symbols_T, packing))
        logits_S = F.linear(y_TW[-1], self._head_weight()).float()
        return logits_S.masked_fill(~self.embedding.table.allowed_RS[rule], -torch.inf)

    def _write(self, x_ND: Tensor, chunks_N: Tensor, before_N: Tensor) -> tuple[Written, Tensor]:
        written = self.embedding.table.write(chunks_N, before_N)
        return written, self.decoder(x_ND, self.embedding.look_up, written)

    def _head_weight(self) -> Tensor:
        """Byte vectors to logits [S, W]."""
        return self.embedding.weight if self.decoder.output is None else self.decoder.output.weight
