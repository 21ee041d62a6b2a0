"""The byte-level model: reads chunks of bytes and predicts the bytes of the next chunk.

Tokens are chunks, numbered by a table (stlm.tokens.chunks). A byte transformer within each chunk, followed by
pooling, replaces the embedding. A second byte transformer replaces the head: it writes the next chunk symbol
by symbol (Hillier et al. 2024, section 5.2; MegaByte, Yu et al. 2023; Learn Your Tokens, Thawani et al.
2023). The core between them is an ordinary transformer.

Tensor names are those of stlm.model.transformer, and further: N chunks, T positions in a row of chunks, W the
byte dimension, S symbols, R rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.block import NORMS, Block
from stlm.model.config import CHUNK_BYTES, ModelConfig
from stlm.model.flops import children_flops, forward_flops
from stlm.model.graphs import outside_graphs
from stlm.model.head_loss import head_loss
from stlm.model.layout import Layout
from stlm.model.packed_chunks import Packing, Table, Written
from stlm.model.projection import INITIAL_STD, block_matrices
from stlm.model.transformer import Transformer, sinusoidal_table
from stlm.tokens.chunks import END, END_OF_TEXT, SYMBOLS, ChunkTable

# Added to the logits of symbols that a rule forbids: their probability becomes zero in float32.
_FORBIDDEN = -1e4


class MeanPooling(nn.Module):
    """The mean of a chunk's bytes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.bytes.width, config.width, bias=False)

    def flops(self, length: float) -> float:
        """Forward FLOPs of a chunk of `length` bytes, which yields one vector of the core's width."""
        return forward_flops(self.up, 1) + children_flops(self, length, without=("up",))

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        return self.up(packing.mean(x_TW))


class LastPooling(MeanPooling):
    """A chunk's last byte."""

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        return self.up(packing.last(x_TW))


class AttentionPooling(MeanPooling):
    """The mean of a chunk's bytes, with softmax weights from one learned vector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.bytes.width, 1, bias=False)

    def forward(self, x_TW: Tensor, packing: Packing) -> Tensor:
        return self.up(packing.weighted(x_TW, self.score(x_TW)))


class QueryPooling(nn.Module):
    """A learned query attends to a chunk's bytes, with the core's heads and width (Byte2Word).

    All chunks share the query, so query and key reduce to one score for each head and byte.
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
    """Encodes chunks as vectors of the core's width: byte embedding, byte transformer, pooling."""

    parameter_group, one_group = "byte encoder", True
    parameter_groups: ClassVar[dict[str, str]] = {"bytes": "byte embedding"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks_config = config.byte_blocks(config.bytes.encoder_layers)
        self.bytes = nn.Embedding(SYMBOLS, blocks_config.width)
        self.blocks = nn.ModuleList([Block(blocks_config) for _ in range(blocks_config.layers)])
        for block in self.blocks:
            block.attention.attended = 1.0  # a byte sees its whole chunk
        self.norm = NORMS[blocks_config.norm](blocks_config.width, eps=blocks_config.norm_eps)
        self.pool = POOLINGS[config.bytes.pooling](config)
        self.table = Table()
        self.register_buffer("places_LW", None, persistent=False)

    def flops(self, length: float, chunk_bytes: float = CHUNK_BYTES) -> float:
        """Forward FLOPs of `length` chunks, all of `chunk_bytes` bytes."""
        return length * children_flops(self, chunk_bytes)

    @property
    def weight(self) -> Tensor:
        """The weight [S, W] of the byte embedding."""
        return self.bytes.weight

    def fill(self, table: ChunkTable) -> None:
        """Read chunks of `table` from now on."""
        self.table.fill(table, self.weight.device)
        # A chunk's bytes and its end symbol.
        places_LW = sinusoidal_table(table.longest + 1, self.weight.shape[1])
        self.places_LW = places_LW.to(self.weight.device)

    def look_up(self, symbols_T: Tensor, place_T: Tensor) -> Tensor:
        """Vectors [T, W] of symbols at positions `place_T` in their chunks."""
        # Scaled as in a core with sinusoidal positions: unscaled, the positions would drown the bytes.
        return self.bytes(symbols_T) * math.sqrt(self.weight.shape[1]) + self.places_LW[place_T]

    @outside_graphs
    def forward(self, chunks_BL: Tensor) -> Tensor:
        """Chunk vectors [B, L, D], float32. A repeated chunk is encoded once."""
        chunks_N, which_BL = chunks_BL.unique(return_inverse=True)
        symbols_T, packing = self.table.read(chunks_N)
        x_1TW = self.look_up(symbols_T, packing.place_T)[None]
        for block in self.blocks:
            x_1TW = block(x_1TW, None, packing)
        pooled_ND = self.pool(self.norm(x_1TW[0]), packing).float()
        return F.embedding(packing.order_N.argsort()[which_BL], pooled_ND)


class ByteDecoder(nn.Module):
    """Writes chunks: a causal byte transformer that receives the core's vector before each block."""

    parameter_group, one_group = "byte decoder", True
    parameter_groups: ClassVar[dict[str, str]] = {"output": "head"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks_config = config.byte_blocks(config.bytes.decoder_layers)
        # Each block receives another projection of the core's vector: together they carry more than one
        # vector of the byte dimension could.
        self.condition = nn.Linear(config.width, blocks_config.layers * blocks_config.width, bias=False)
        self.blocks = nn.ModuleList([Block(blocks_config) for _ in range(blocks_config.layers)])
        self.norm = NORMS[blocks_config.norm](blocks_config.width, eps=blocks_config.norm_eps)
        self.output = None if config.tied else nn.Linear(blocks_config.width, SYMBOLS, bias=False)

    def flops(self, length: float, symbols: float = CHUNK_BYTES + 1) -> float:
        """Forward FLOPs of `length` chunks of `symbols` symbols each, with the logits of every symbol."""
        width = self.condition.out_features // len(self.blocks)
        # A tied head uses the byte embedding's matrix.
        head = 2 * SYMBOLS * width * symbols
        written = children_flops(self, symbols, without=("condition", "output"))
        return length * (forward_flops(self.condition, 1) + written + head)

    def forward(self, x_ND: Tensor, look_up, written: Written) -> Tensor:
        """Vectors [T, W] that predict the symbols of `written`, given the core's x_ND for its chunks."""
        packing = written.packing
        # Each position reads the symbol before it; a chunk's first position reads an end of chunk.
        before_T = F.pad(written.symbols_T[:-1], (1, 0)).masked_fill(packing.place_T == 0, END)
        y_TW = look_up(before_T, packing.place_T)
        # F.embedding instead of indexing: on a CPU, the gradient of indexing is added number by number.
        conditions_NX = self.condition(F.embedding(packing.order_N, x_ND))
        for condition_NW, block in zip(
            conditions_NX.chunk(len(self.blocks), dim=1), self.blocks, strict=True
        ):
            y_TW = y_TW + F.embedding(packing.chunk_T, condition_NW)
            y_TW = block(y_TW[None], None, packing)[0]
        return self.norm(y_TW)


class ByteTransformer(Transformer):
    """A language model over chunks of bytes, with proper probabilities of any text and no vocabulary.

    `use` sets the table of the chunks that inputs and targets refer to. The core is the unchanged
    `Transformer`; dropout acts on the core only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = ChunkEncoder(config)
        self.output = None
        self.decoder = ByteDecoder(config)
        self._initialize_bytes()

    def _initialize_bytes(self) -> None:
        """Draw normal weights that keep the variance of the inputs at any width: 0.02 suits wide models only.

        Projections into the residual stream are scaled down as in the core. Chunk vectors start as small as
        token embeddings do, so that the core starts as it does on tokens.
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
        """Forward FLOPs of a sequence: `length` chunks, each with `chunk_bytes` bytes, are read and written.

        `ends_written`: whether the end of a chunk is written as a symbol.
        """
        core = children_flops(self, length, without=("embedding", "decoder"))
        read = self.embedding.flops(length, chunk_bytes)
        return core + read + self.decoder.flops(length, chunk_bytes + ends_written)

    def use(self, table: ChunkTable) -> None:
        """Read and write chunks of `table` from now on."""
        self.embedding.fill(table)

    def matrix_parts(self) -> dict[tuple[int, ...], list[nn.Parameter]]:
        """The matrices of the core's blocks (see `Transformer`), of both byte transformers, and of the
        projections between them and the core."""
        parts = super().matrix_parts()
        width, condition = self.config.bytes.width, self.decoder.condition.weight
        parts.setdefault((width,) * (len(condition) // width), []).append(condition)
        parts.setdefault((), []).append(self.embedding.pool.up.weight)
        for part in (self.embedding, self.decoder):
            for rows, matrices in block_matrices(part.blocks).items():
                parts.setdefault(rows, []).extend(matrices)
        return parts

    def hidden_loss(self, x_ND: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean cross-entropy of a chunk in nats, float32, given the flattened `hidden` of those before it."""
        return self._mean_loss(x_ND, targets_BL.flatten(), tokens_BL.flatten())

    def loss(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        mask_BL: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, float32: the mean over all chunks or, with a mask, the sum over its text.

        The loss of a chunk is the sum over its symbols.
        """
        x_ND = self.hidden(tokens_BL, layout).flatten(0, 1)
        if mask_BL is None:
            return self.hidden_loss(x_ND, tokens_BL, targets_BL)
        here_N, chunks_N, before_N = mask_BL.flatten(), targets_BL.flatten(), tokens_BL.flatten()
        return -self.log_probabilities(x_ND[here_N], chunks_N[here_N], before_N[here_N])[0].sum()

    @outside_graphs
    def _mean_loss(self, x_ND: Tensor, chunks_N: Tensor, before_N: Tensor) -> Tensor:
        written, y_TW = self._write(x_ND, chunks_N, before_N)
        # The rules are further inputs of the head: one product makes the logits, the forbidden ones far
        # lower.
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
        """log P of each chunk [N], float32, given the core's vectors before it, and whether greedy decoding
        would choose it, symbol by symbol.

        `ends`: whether an end of text is scored as part of the text. Symbols that the table skips are given.
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
        """Logits [S], float32, of the symbol that follows the symbols `begun` of a chunk, given the core's
        vector before the chunk; minus infinity for symbols that the rule forbids."""
        symbols_T = torch.tensor([*begun, END], device=x_D.device)
        packing = Packing(torch.tensor([len(symbols_T)], device=x_D.device), causal=True)
        y_TW = self.decoder(x_D[None], self.embedding.look_up, Written(symbols_T, symbols_T, packing))
        logits_S = F.linear(y_TW[-1], self._head_weight()).float()
        return logits_S.masked_fill(~self.embedding.table.allowed_RS[rule], -torch.inf)

    def _write(self, x_ND: Tensor, chunks_N: Tensor, before_N: Tensor) -> tuple[Written, Tensor]:
        written = self.embedding.table.write(chunks_N, before_N)
        return written, self.decoder(x_ND, self.embedding.look_up, written)

    def _head_weight(self) -> Tensor:
        """The matrix [S, W] that maps byte vectors to logits."""
        return self.embedding.weight if self.decoder.output is None else self.decoder.output.weight
