"""A transformer with its tokenizer as a `LanguageModel`: fast scoring of many short texts.

Shapes: B batch, L length, D width, V vocabulary, N scored positions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.forwards import Forward, SharedPrefixes, windows
from stlm.evaluation.interface import Progress, Request, Score, no_progress

# Logits held at once, in floats: few enough to stay near the cache on a CPU, enough to fill a GPU.
_LOGITS = {"cpu": 2**21, "cuda": 2**27}
# Tokens in a batch: on a CPU, 2,048 went 1.2 to 1.4 times as fast as 8,192.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


class _Part(NamedTuple):
    """Where a request's log-probabilities are: a forward pass, the first position, which final token."""

    forward: int
    start: int
    final: int
    starts_document: bool
    n_tokens: int
    truncated: bool


class TokenModel:
    """Scores text with a transformer that offers `config.context`, `hidden(tokens_BL)` and `head(x)`.

    The forward pass runs in `precision`; the logits of the scored positions and their log-softmax are
    float32. `batch_tokens` bounds a batch, padding included (None: chosen for the device).
    """

    def __init__(
        self,
        transformer: nn.Module,
        encoder: RequestEncoder,
        device: str = "cpu",
        precision: Literal["float32", "bfloat16"] = "float32",
        batch_tokens: int | None = None,
    ) -> None:
        self.transformer = transformer.to(device).eval()
        self.encoder = encoder
        self.device = torch.device(device)
        self.precision = precision
        self.batch_tokens = batch_tokens or _BATCH_TOKENS[self.device.type]
        self.context: int = transformer.config.context

    def loglikelihoods(self, requests: Sequence[Request], progress: Progress = no_progress) -> list[Score]:
        """See `LanguageModel`. Requests with the same input tokens share one forward pass."""
        encoded = self.encoder(requests)
        forwards, parts = self._plan(requests, encoded)
        waiting = np.bincount([p.forward for p in parts if p.n_tokens], minlength=len(forwards))
        shared = SharedPrefixes(forwards)
        logprobs = shared.restore(self._run(shared.forwards, lambda done: progress(int(waiting[done].sum()))))
        progress(sum(not part.n_tokens for part in parts))
        first = self._first_token_logprobs() if any(part.starts_document for part in parts) else None
        scores = []
        for part, tokens in zip(parts, (e.tokens for e in encoded), strict=True):
            total = 0.0
            if part.n_tokens:
                forward, found = forwards[part.forward], logprobs[part.forward]
                inner = found[part.start - forward.start : forward.inner]
                total = float(inner.sum() + found[forward.inner + part.final])
                if part.starts_document:
                    total += float(first[tokens[0]])
            scores.append(Score(total, part.n_tokens, part.truncated))
        return scores

    def document_loglikelihoods(
        self, documents: Sequence[Sequence[int]], stride: int | None = None, progress: Progress = no_progress
    ) -> list[float]:
        """See `LanguageModel`."""
        stride = max(1, self.context // 2) if stride is None else stride
        if not 1 <= stride <= self.context:
            raise UserError(
                f"evaluation.perplexity.stride: {stride} does not lie between 1 and the model's context of "
                f"{self.context} tokens: some tokens would be left out"
            )
        eot = self.encoder.tokenizer.eot
        forwards, owners = [], []
        for owner, document in enumerate(documents):
            tokens = np.insert(np.asarray(document, dtype=np.int32), 0, eot)
            for window in windows(tokens, self.context, stride):
                forwards.append(window)
                owners.append(owner)
        logprobs = self._run(forwards, lambda done: progress(len(done)))
        totals = [0.0] * len(documents)
        for owner, found in zip(owners, logprobs, strict=True):
            totals[owner] += float(found.sum())
        return totals

    def _plan(
        self, requests: Sequence[Request], encoded: Sequence[Encoded]
    ) -> tuple[list[Forward], list[_Part]]:
        """The distinct forward passes that the requests need, and each request's place in them."""
        cuts = [max(0, len(e.tokens) - (self.context + 1)) for e in encoded]
        common_cut: dict[int, int] = {}
        for request, cut in zip(requests, cuts, strict=True):
            if request.whole and request.item is not None:
                common_cut[request.item] = max(cut, common_cut.get(request.item, 0))
        forwards: list[Forward] = []
        index: dict[bytes, int] = {}
        parts = []
        for request, item, own_cut in zip(requests, encoded, cuts, strict=True):
            cut = common_cut.get(request.item, own_cut) if request.whole else own_cut
            first_target = max(1 if request.whole else item.n_context, cut + 1)
            n_tokens = len(item.tokens) - first_target
            if n_tokens <= 0:
                parts.append(_Part(-1, 0, 0, False, 0, cut > 0))
                continue
            # Position p of the input predicts token p + 1 of the sequence.
            tokens, start, last = item.tokens[own_cut:-1], first_target - 1 - own_cut, int(item.tokens[-1])
            number = index.setdefault(tokens.tobytes(), len(forwards))
            if number == len(forwards):
                forwards.append(Forward(tokens, start, [last]))
            else:
                known = forwards[number]
                if last not in known.finals:
                    known.finals.append(last)
                if start < known.start:
                    forwards[number] = known._replace(start=start)
            starts_document = request.whole and cut == 0 and not item.starts_with_eot
            final = forwards[number].finals.index(last)
            parts.append(_Part(number, start, final, starts_document, n_tokens + starts_document, cut > 0))
        return forwards, parts

    def _first_token_logprobs(self) -> np.ndarray:
        """Log-probabilities [V] of a document's first token."""
        with torch.inference_mode():
            eot_BL = torch.tensor([[self.encoder.tokenizer.eot]], device=self.device)
            logits_V = self.transformer.head(self._hidden(eot_BL)[0, 0].float())
            return torch.log_softmax(logits_V.float(), dim=-1).double().cpu().numpy()

    def _run(self, forwards: Sequence[Forward], done: Progress) -> list[np.ndarray]:
        """For each forward pass, float64 log-probabilities: its inner targets, then its final tokens."""
        results: list[np.ndarray] = [np.empty(0)] * len(forwards)
        for numbers in self._batches(forwards):
            batch = [forwards[n] for n in numbers]
            found = self._score_batch(batch)
            ends = np.cumsum([f.inner + len(f.finals) for f in batch])
            for number, logprobs in zip(numbers, np.split(found, ends[:-1]), strict=True):
                results[number] = logprobs
            done(numbers)
        return results

    def _batches(self, forwards: Sequence[Forward]) -> Iterator[np.ndarray]:
        """Numbers of forwards of near-equal length, longest first, within the token budget."""
        lengths = np.array([len(f.tokens) for f in forwards], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        begin = 0
        while begin < len(order):
            size = max(1, self.batch_tokens // int(lengths[order[begin]]))
            yield order[begin : begin + size]
            begin += size

    def _score_batch(self, batch: Sequence[Forward]) -> np.ndarray:
        """Log-probabilities of the batch's targets, forward after forward.

        Padding stands at the right, where causal attention keeps it from every scored position.
        """
        length = max(len(f.tokens) for f in batch)
        tokens_BL = np.zeros((len(batch), length), dtype=np.int64)
        rows, picked_rows, targets = [], [], []
        n_rows = 0
        for b, forward in enumerate(batch):
            tokens_BL[b, : len(forward.tokens)] = forward.tokens
            rows.append(np.arange(forward.start, len(forward.tokens)) + b * length)
            last = n_rows + forward.inner
            picked_rows.append(np.arange(n_rows, last))
            picked_rows.append(np.full(len(forward.finals), last))
            targets.append(forward.tokens[forward.start + 1 :])
            targets.append(np.asarray(forward.finals, dtype=np.int64))
            n_rows = last + 1
        with torch.inference_mode():
            hidden_BLD = self._hidden(torch.from_numpy(tokens_BL).to(self.device))
            rows_N = torch.from_numpy(np.concatenate(rows)).to(self.device)
            scored_ND = hidden_BLD.flatten(0, 1)[rows_N].float()
            return self._pick(scored_ND, np.concatenate(picked_rows), np.concatenate(targets))

    def _hidden(self, tokens_BL: Tensor) -> Tensor:
        half = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            return self.transformer.hidden(tokens_BL)

    def _pick(self, scored_ND: Tensor, picked_rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log P(targets[i]) under the softmax of row picked_rows[i] (ascending), float64."""
        found = []
        rows = torch.from_numpy(picked_rows).to(self.device)
        targets = torch.from_numpy(targets.astype(np.int64)).to(self.device)
        chunk = max(1, _LOGITS[self.device.type] // self.transformer.config.vocab_size)
        for begin in range(0, len(scored_ND), chunk):
            end = min(begin + chunk, len(scored_ND))
            logits_NV = self.transformer.head(scored_ND[begin:end]).float()
            low, high = np.searchsorted(picked_rows, [begin, end])
            own = rows[low:high] - begin
            found.append(logits_NV[own, targets[low:high]] - torch.logsumexp(logits_NV, dim=-1)[own])
        return torch.cat(found).double().cpu().numpy()
