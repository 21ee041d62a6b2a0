"""A transformer with its tokenizer as a `LanguageModel`, which scores many short texts fast.

Shapes: B batch, L length, D width, V vocabulary, N scored positions of a batch, P requested
log-probabilities.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.evaluation.encoding import Encoded, RequestEncoder, adds_no_token, lost_on_the_left
from stlm.evaluation.forwards import Forward, Row, SharedPrefixes, by_length, pack, windows
from stlm.evaluation.interface import Progress, Request, Score, no_progress
from stlm.kernels.library import kernels_for
from stlm.model.layout import CausalRows
from stlm.model.segments import Segments

# Logits held at once, as positions by tokens: few enough for a CPU's cache, enough to fill a GPU.
_LOGITS = {"cpu": (1024, 2048), "cuda": (4096, 2**15)}
# Tokens in a batch: on a CPU, 1,024 to 8,192 were equally fast when prefixes are computed once.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


def products_in(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which matrix products are in `precision`, float32 or bfloat16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


class _Part(NamedTuple):
    """The place of a request's log-probabilities: a forward pass, its first position, its final token."""

    forward: int
    start: int
    final: int
    starts_document: bool
    n_tokens: int
    truncated: bool


class TokenModel:
    """Scores text with a transformer: its `config.context`, `config.vocab_size`, `hidden`, `head`, `logit`.

    These attributes are those of `stlm.model.transformer.Transformer`; a model with `packs = False` takes no
    `segments` and gets one sequence in each row. The forward pass runs in `precision`, for which a copy of
    the linear layers is kept; the log-softmax is float32. `batch_tokens` bounds a batch, padding included
    (None: chosen for the device).
    """

    def __init__(
        self,
        transformer: nn.Module,
        encoder: RequestEncoder,
        device: str = "cpu",
        precision: Literal["float32", "bfloat16"] = "float32",
        batch_tokens: int | None = None,
    ) -> None:
        transformer = transformer.to(device).eval()
        self.encoder = encoder
        self.device = torch.device(device)
        self.precision = precision
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        if batch_tokens is None and getattr(transformer, "calls_head", False):
            self.batch_tokens //= 16  # such a model returns the logits of all positions
        self.context: int = transformer.config.context
        if batch_tokens is None:
            # Rows that a technique makes longer hold fewer tokens.
            places = getattr(transformer, "most_places", self.context)
            self.batch_tokens = max(1, self.batch_tokens * self.context // places)
        techniques = getattr(transformer, "techniques", ())
        self.packs: bool = getattr(
            transformer, "packs", all("packing" in technique.supported for technique in techniques)
        )
        self._reads_answers: bool = getattr(transformer, "reads_answers", False)
        self.reads_prefixes: bool = getattr(transformer, "reads_prefixes", False)
        self.packs = self.packs and not (self._reads_answers or self.reads_prefixes)
        self.transformer: nn.Module = transformer
        self.precise: TokenModel = self
        if precision == "bfloat16":
            self.transformer = _linear_in_bfloat16(transformer)
            self.precise = TokenModel(transformer, encoder, device, "float32", batch_tokens)

    def loglikelihoods(
        self, requests: Sequence[Request], progress: Progress = no_progress, greedy: bool = False
    ) -> list[Score]:
        """See `LanguageModel`. A common prefix of requests is computed once."""
        return self._scores(self.encoder(requests), requests, progress, greedy)

    def score_tokens(
        self, encoded: Sequence[Encoded], progress: Progress = no_progress, greedy: bool = False
    ) -> list[Score]:
        """`loglikelihoods` of requests that are already encoded; none of them is `whole`."""
        return self._scores(encoded, [Request("", "")] * len(encoded), progress, greedy)

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
        forwards, owners = [], []
        for owner, document in enumerate(documents):
            tokens = np.insert(np.asarray(document, dtype=np.int32), 0, self.encoder.eot)
            for window in windows(tokens, self.context, stride):
                forwards.append(window._replace(answer=window.start) if self.reads_prefixes else window)
                owners.append(owner)
        found = self._run(forwards, _alone(forwards), lambda done: progress(len(done)))
        totals = [0.0] * len(documents)
        for owner, found_P2 in zip(owners, found, strict=True):
            totals[owner] += float(found_P2[:, 0].sum())
        return totals

    @torch.inference_mode()
    def next_logits(self, sequences: Sequence[Sequence[int]], answers: Sequence[int] | None = None) -> Tensor:
        """Logits [B, V], float32, of the token after each sequence of ids, none longer than the context.

        `answers`: of each sequence, the index of the last token of what it answers, -1 for nothing; None: for
        nothing in all of them. Models that do not read it ignore it.
        """
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        tokens_BL = np.zeros((len(sequences), int(lengths.max())), dtype=np.int64)
        for b, sequence in enumerate(sequences):
            tokens_BL[b, : len(sequence)] = sequence  # no token sees the padding at the right
        rows_B = torch.arange(len(sequences), device=self.device) * tokens_BL.shape[1] + lengths - 1
        layout = None
        if (self._reads_answers or self.reads_prefixes) and max(answers or (-1,)) >= 0:
            layout = CausalRows(tokens_BL.shape[1], torch.tensor(answers, device=self.device))
        with products_in(self.precision, self.device):
            hidden_BD = self.transformer.hidden(torch.from_numpy(tokens_BL).to(self.device), layout, rows_B)
            return self.transformer.head(hidden_BD).float()

    def _scores(
        self, encoded: Sequence[Encoded], requests: Sequence[Request], progress: Progress, greedy: bool
    ) -> list[Score]:
        forwards, parts = self._plan(requests, encoded)
        waiting = np.bincount([p.forward for p in parts if p.forward >= 0], minlength=len(forwards))
        progress(sum(part.forward < 0 for part in parts))
        shared = SharedPrefixes(forwards)
        if self.packs:
            rows = list(pack(shared.forwards, shared.order, shared.common, self.batch_tokens))
        else:
            rows = _alone(shared.forwards)
        found = self._run(shared.forwards, rows, lambda done: progress(int(waiting[done].sum())), greedy)
        found = shared.restore(found)
        begin = [e.tokens[0] for e, part in zip(encoded, parts, strict=True) if part.starts_document]
        first = iter(self._first_tokens(np.array(begin, np.int64)).tolist() if begin else ())
        scores = []
        for part in parts:
            total, best = 0.0, True
            if part.forward >= 0:
                forward, found_P2 = forwards[part.forward], found[part.forward]
                inner_P2, final_2 = (
                    found_P2[part.start - forward.start : forward.inner],
                    found_P2[forward.inner + part.final],
                )
                total = float(inner_P2[:, 0].sum() + final_2[0])
                best = bool(final_2[1] and inner_P2[:, 1].all())
            if part.starts_document:
                logprob, is_best = next(first)
                total += logprob
                best = best and bool(is_best)
            scores.append(Score(total, part.n_tokens, part.truncated, best if greedy else None))
        return scores

    def _plan(
        self, requests: Sequence[Request], encoded: Sequence[Encoded]
    ) -> tuple[list[Forward], list[_Part]]:
        """The distinct forward passes that the requests need, and the place of each request in them."""
        excess = [max(0, len(e.tokens) - (self.context + 1)) for e in encoded]
        lost = lost_on_the_left(requests, excess)
        forwards: list[Forward] = []
        index: dict[tuple[bytes, int], int] = {}
        parts = []
        for request, item, request_cut, cut in zip(requests, encoded, excess, lost, strict=True):
            first_target = max(1 if request.whole else item.n_context, cut + 1)
            n_tokens = len(item.tokens) - first_target
            starts_document = request.whole and cut == 0 and not item.starts_with_eot
            if n_tokens <= 0:
                if request.continuation and not request.whole:
                    raise adds_no_token(request)
                parts.append(_Part(-1, 0, 0, starts_document, int(starts_document), cut > 0))
                continue
            # Position p of the input predicts token p + 1 of the sequence.
            tokens, start, last = (
                item.tokens[request_cut:-1],
                first_target - 1 - request_cut,
                int(item.tokens[-1]),
            )
            # After an empty context begins a text, and no answer.
            answer = -1
            if self.reads_prefixes:
                answer = start
            elif self._reads_answers and (request.begins or not item.starts_with_eot):
                answer = max(-1, item.n_context - 1 - request_cut)
            number = index.setdefault((tokens.tobytes(), answer), len(forwards))
            if number == len(forwards):
                forwards.append(Forward(tokens, start, [last], answer))
            else:
                known = forwards[number]
                if last not in known.finals:
                    known.finals.append(last)
                if start < known.start:
                    forwards[number] = known._replace(start=start)
            final = forwards[number].finals.index(last)
            parts.append(_Part(number, start, final, starts_document, n_tokens + starts_document, cut > 0))
        return forwards, parts

    def _first_tokens(self, tokens_F: np.ndarray) -> np.ndarray:
        """[F, 2]: each token's log-probability as a document's first, and whether it is the best."""
        logits_V = self.precise.next_logits([[self.encoder.eot]])[0].double().cpu()
        best_V = torch.zeros_like(logits_V)
        best_V[logits_V.argmax()] = 1
        return torch.stack([torch.log_softmax(logits_V, dim=0), best_V], dim=1).numpy()[tokens_F]

    def _run(
        self,
        forwards: Sequence[Forward],
        rows: Sequence[Row],
        done: Progress = no_progress,
        greedy: bool = False,
    ) -> list[np.ndarray]:
        """For each forward pass [P, 2], its inner targets and then its final tokens: the log-probability
        and, if `greedy`, whether (1 or 0) they are the most probable tokens."""
        results: list[np.ndarray] = [np.empty((0, 2))] * len(forwards)
        for batch in self._batches(rows):
            numbers = np.concatenate([row.numbers for row in batch])
            ends = np.cumsum(np.concatenate([row.counts for row in batch]))
            for number, found_P2 in zip(
                numbers, np.split(self._score_batch(batch, greedy), ends[:-1]), strict=True
            ):
                results[number] = found_P2
            done(numbers)
        return results

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Batches within the budget: a row of several sequences alone, other rows by length."""
        yield from ([row] for row in rows if len(row.numbers) > 1)
        alone = [row for row in rows if len(row.numbers) == 1]
        yield from by_length(alone, lambda row: len(row.tokens), self.batch_tokens)

    def _score_batch(self, batch: Sequence[Row], greedy: bool) -> np.ndarray:
        """[P, 2] as in `_run`, row after row. Padding stands at the right, where no token sees it."""
        length = max(len(row.tokens) for row in batch)
        tokens_BL = np.zeros((len(batch), length), dtype=np.int64)
        for b, row in enumerate(batch):
            tokens_BL[b, : len(row.tokens)] = row.tokens
        flat_P = np.concatenate([row.picked + b * length for b, row in enumerate(batch)])
        targets_P = np.concatenate([row.targets for row in batch])
        rows_N, picked_P = np.unique(flat_P, return_inverse=True)
        with torch.inference_mode():
            tokens, targets, rows, picked = (
                torch.from_numpy(a).to(self.device) for a in (tokens_BL, targets_P, rows_N, picked_P)
            )
            several = len(batch[0].numbers) > 1
            layout = Segments(batch[0].positions, batch[0].segments, self.device) if several else None
            if any(row.answer >= 0 for row in batch):
                answers_B = torch.tensor([row.answer for row in batch], device=self.device)
                layout = CausalRows(length, answers_B)
            with products_in(self.precision, self.device):
                hidden_ND = self.transformer.hidden(tokens, layout, rows)
            return self._pick(hidden_ND, tokens.flatten()[rows], picked, targets, greedy)

    def _pick(
        self, hidden_ND: Tensor, read_N: Tensor, picked_P: Tensor, targets_P: Tensor, greedy: bool
    ) -> np.ndarray:
        """[P, 2]: log P(target) after the residual vector picked; with `greedy`, whether it is the best.

        `read_N` are the last tokens that the vectors depend on.
        """
        # In float32, whatever the precision: the error of this logit would remain in the difference of two
        # options, while the errors of the vocabulary's other logits average out. This comes first, as a head
        # may return views of its input, which are overwritten next.
        logit_P = self.precise.transformer.logit(hidden_ND[picked_P].float(), targets_P)
        rows, columns = _LOGITS[self.device.type]
        found = [self._normalize(part_ND, columns, greedy) for part_ND in hidden_ND.split(rows)]
        lse_N = torch.cat([lse for lse, _ in found])
        found_P2 = torch.zeros(len(picked_P), 2, dtype=torch.float64, device=self.device)
        found_P2[:, 0] = logit_P.double() - lse_N[picked_P]
        if greedy:
            found_P2[:, 1] = torch.cat([best for _, best in found])[picked_P] == targets_P
        return found_P2.cpu().numpy()

    def _normalize(self, hidden_ND: Tensor, columns: int, greedy: bool) -> tuple[Tensor, Tensor]:
        """The log of the summed exponentials [N] of all logits and, with `greedy`, the most probable token.

        The vocabulary is processed in parts, so that the logits [N, columns] stay in the processor's cache.
        """
        if self.precision == "bfloat16":
            hidden_ND = hidden_ND.bfloat16()  # once, not for each part
        lse_N = torch.full((len(hidden_ND),), -torch.inf, device=self.device)
        top_N, best_N = lse_N.clone(), torch.zeros(len(hidden_ND), dtype=torch.int64, device=self.device)
        sum_N = torch.zeros_like(lse_N)
        for begin in range(0, self.transformer.config.vocab_size, columns):
            with products_in(self.precision, self.device):
                logits_NV = self.transformer.head(hidden_ND, slice(begin, begin + columns))
            kernels = kernels_for(logits_NV)
            if kernels is not None:
                best = best_N if greedy else None
                kernels.log_sum(*logits_NV.shape, logits_NV.contiguous(), begin, top_N, sum_N, best)
                continue
            if greedy:
                highest_N, place_N = logits_NV.max(dim=-1)
                best_N = torch.where(highest_N > top_N, begin + place_N, best_N)
                top_N = torch.maximum(top_N, highest_N)
            else:
                highest_N = logits_NV.amax(dim=-1)
            # In place, as memory is the bottleneck. Rounding an exponential to bfloat16 matters little
            # compared with rounding its logit.
            part_N = logits_NV.sub_(highest_N[:, None]).exp_().sum(dim=-1, dtype=torch.float32)
            lse_N = torch.logaddexp(lse_N, highest_N + part_N.log())
        return torch.logaddexp(lse_N, top_N + sum_N.log()) if kernels is not None else lse_N, best_N


def _alone(forwards: Sequence[Forward]) -> list[Row]:
    """Each forward in its own row."""
    return list(pack(forwards, range(len(forwards)), [0] * len(forwards), capacity=0))


def _linear_in_bfloat16(transformer: nn.Module) -> nn.Module:
    """A copy with linear layers in bfloat16: autocast would convert the weights at every call.

    Those that say `keeps_float32` stay as they are.
    """
    transformer = copy.deepcopy(transformer)
    halves: dict[nn.Parameter, nn.Parameter] = {}  # layers that share a weight share its copy
    for module in transformer.modules():
        if isinstance(module, nn.Linear) and not getattr(module, "keeps_float32", False):
            # A separate parameter: an embedding that is tied to the head stays in float32.
            if module.weight not in halves:
                halves[module.weight] = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
            module.weight = halves[module.weight]
    return transformer
