"""A byte-level model as a `LanguageModel`: the same engine, with chunks as tokens.

The whole text of a request is cut into chunks. log P(continuation | context) is a sum over the symbols after
the context's last byte, each given those before: bytes and, if it is a symbol, the end of the chunk that
holds that byte. A context may therefore end inside a chunk; the text is not cut anew there. With `spaces` and
strides, the sum is the logarithm of P(context continuation ...) / P(context ...), the probabilities of texts
with these beginnings. With `words` it includes the end of the continuation's last chunk, which is a symbol:
the texts begin this way and have a boundary there. As for tokens, trailing white space of the context counts
as part of the continuation. A context that ends within the first chunk follows an end of text, since nothing
else precedes it.

Shapes: N positions, D width, P log-probabilities wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stlm.evaluation.encoding import Encoded
from stlm.evaluation.forwards import Forward, Row
from stlm.evaluation.interface import Progress, Request, no_progress
from stlm.evaluation.token_model import TokenModel
from stlm.model.byte_transformer import ByteTransformer
from stlm.tokens.chunks import ChunkTable, chunk_table
from stlm.tokens.tokenizer import Tokenizer, chunker_of

# Chunks scored at once: with about six symbols each, their logits stay in the processor's cache.
_CHUNKS = {"cpu": 1024, "cuda": 65536}


class ChunkRequests:
    """Encodes requests as sequences of chunks, numbered in order of appearance; 0 is the end of a text.

    A chunk cut by the end of a context gets one number for each cut. `tokenizer` determines where chunks end;
    the texts need not come from its corpus.
    """

    eot = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.chunker = chunker_of(tokenizer)
        self._numbers: dict[tuple[bytes, int], int] = {(b"", 0): self.eot}
        self._known: dict[str, list[bytes]] = {}
        self._table: ChunkTable | None = None

    @property
    def table(self) -> ChunkTable:
        """The chunks numbered so far."""
        if self._table is None or len(self._table.n_inputs_V) < len(self._numbers):
            chunks, skips = zip(*self._numbers, strict=True)
            self._table = chunk_table(self.chunker, chunks, skips)
        return self._table

    def __call__(self, requests: Sequence[Request]) -> list[Encoded]:
        return [self._encode(request) for request in requests]

    def chunks_of(self, ids: Sequence[int]) -> np.ndarray:
        """The chunk numbers of a tokenizer's ids."""
        distinct, which = np.unique(np.asarray(ids, np.int64), return_inverse=True)
        numbers = [self._number(self.tokenizer.decode_bytes([token])) for token in distinct.tolist()]
        return np.array(numbers, np.int32)[which]

    def _number(self, chunk: bytes, given: int = 0) -> int:
        """The number of a chunk whose first `given` symbols are not scored."""
        return self._numbers.setdefault((chunk, given), len(self._numbers))

    def _encode(self, request: Request) -> Encoded:
        text = request.context + request.continuation
        if text not in self._known:
            self._known[text] = self.chunker.split(text.encode())
        chunks = self._known[text]
        numbers = [self._number(chunk) for chunk in chunks]
        rest = len(request.context.rstrip().encode())
        if rest == 0 or not numbers:
            return Encoded(np.array([self.eot, *numbers], np.int32), 1, True)
        if request.whole:
            return Encoded(np.array(numbers, np.int32), 1, False)
        place = 0
        while rest > len(chunks[place]):
            rest -= len(chunks[place])
            place += 1
        # The chunk with the context's last byte is scored from there on, if any of it is left.
        if rest < len(chunks[place]) or not self._ends_certainly(chunks[place]):
            numbers[place] = self._number(chunks[place], rest)
        else:
            place += 1
        if place == 0 or request.begins:
            return Encoded(np.array([self.eot, *numbers], np.int32), place + 1, True)
        return Encoded(np.array(numbers, np.int32), place, False)

    def _ends_certainly(self, chunk: bytes) -> bool:
        table = chunk_table(self.chunker, [chunk])
        return len(table.symbols_T) == len(chunk)


class ByteModel(TokenModel):
    """Scores text with a `ByteTransformer`, in float32; its tokens are chunks."""

    def __init__(
        self,
        transformer: ByteTransformer,
        encoder: ChunkRequests,
        device: str = "cpu",
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__(transformer, encoder, device, "float32", batch_tokens)

    def document_loglikelihoods(
        self, documents: Sequence[Sequence[int]], stride: int | None = None, progress: Progress = no_progress
    ) -> list[float]:
        """See `LanguageModel`; `documents` are ids of the tokenizer that the model was trained with."""
        encoded = [self.encoder.chunks_of(document) for document in documents]
        return super().document_loglikelihoods(encoded, stride, progress)

    def _first_tokens(self, tokens_F: np.ndarray) -> np.ndarray:
        self.transformer.use(self.encoder.table)
        eot_11 = torch.full((1, 1), self.encoder.eot, device=self.device)
        with torch.inference_mode():
            hidden_1D = self.transformer.hidden(eot_11)[0]
            targets_F = torch.from_numpy(tokens_F).to(self.device)
            picked_F = torch.zeros_like(targets_F)
            return self._pick(hidden_1D, eot_11[0], picked_F, targets_F, True)

    def _run(
        self,
        forwards: Sequence[Forward],
        rows: Sequence[Row],
        done: Progress = no_progress,
        greedy: bool = False,
    ) -> list[np.ndarray]:
        self.transformer.use(self.encoder.table)
        return super()._run(forwards, rows, done, greedy)

    def _pick(
        self, hidden_ND: Tensor, read_N: Tensor, picked_P: Tensor, targets_P: Tensor, greedy: bool
    ) -> np.ndarray:
        found = []
        for picked, targets in zip(
            *(x_P.split(_CHUNKS[self.device.type]) for x_P in (picked_P, targets_P)), strict=True
        ):
            logprob, best = self.transformer.log_probabilities(hidden_ND[picked], targets, read_N[picked])
            found.append(torch.stack([logprob.double(), best.double()], dim=1))
        return torch.cat(found).cpu().numpy()
