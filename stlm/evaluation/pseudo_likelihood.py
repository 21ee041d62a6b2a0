"""Scores of a model that predicts masked tokens from both sides: pseudo-log-likelihoods.

Shapes: B rows (copies of texts, each with one token masked), L length, C some of the rows, D width, V
vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stlm.evaluation.encoding import Encoded, RequestEncoder, adds_no_token, lost_on_the_left
from stlm.evaluation.forwards import by_length
from stlm.evaluation.interface import Progress, Request, Score, no_progress
from stlm.evaluation.token_model import BATCH_TOKENS, products_in
from stlm.model.prefixes import Prefixes

# Rows whose logits over the vocabulary are held at once.
_LOGIT_ROWS = 512


class _Text(NamedTuple):
    """The tokens of a text, of which those from `first` on are scored, each after the token before it."""

    tokens: np.ndarray
    first: int
    truncated: bool


class PseudoLikelihood:
    """A `LanguageModel` whose score of a text is the sum over its tokens of log P(token | all others)
    (Salazar et al. 2020, "Masked language model scoring", equation 2).

    Each token is masked in turn and predicted at the position before it, with attention in both directions
    and the end-of-text token before the text. A text of n scored tokens is n rows of a batch. The scores are
    no log-probabilities of texts, which would sum to one: there are none of documents. The forward pass is in
    `precision`, the head in float32.
    """

    def __init__(
        self,
        transformer: nn.Module,
        mask: int,
        encoder: RequestEncoder,
        device: str = "cpu",
        precision: Literal["float32", "bfloat16"] = "float32",
        batch_tokens: int | None = None,
    ) -> None:
        self.transformer, self.mask, self.encoder = transformer.to(device).eval(), mask, encoder
        self.device, self.precision = torch.device(device), precision
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self.context: int = transformer.config.context
        self.precise: PseudoLikelihood = self
        if precision == "bfloat16":
            self.precise = PseudoLikelihood(transformer, mask, encoder, device, "float32", batch_tokens)

    def loglikelihoods(
        self, requests: Sequence[Request], progress: Progress = no_progress, greedy: bool = False
    ) -> list[Score]:
        """See `LanguageModel`: of a continuation, the tokens after the context; of a `whole` text, all.

        `greedy`: whether each token is the most probable one at its place, given all others.
        """
        texts = self._texts(requests)
        # A text that several requests ask for, such as the same in two modes, is scored once.
        index: dict[tuple[bytes, int], int] = {}
        numbers = [index.setdefault((text.tokens.tobytes(), text.first), len(index)) for text in texts]
        distinct = list(dict(zip(numbers, texts, strict=True)).values())
        asked = Counter(numbers)
        totals, best = np.zeros(len(distinct)), np.ones(len(distinct), dtype=bool)
        waiting = np.array([len(text.tokens) - text.first for text in distinct])
        progress(sum(asked[number] for number in np.flatnonzero(waiting == 0)))
        for rows in self._batches(distinct):
            logprob_B, best_B = self._score(distinct, rows, greedy)
            owners = np.array([number for number, _ in rows])
            np.add.at(totals, owners, logprob_B)
            np.logical_and.at(best, owners, best_B)
            np.subtract.at(waiting, owners, 1)
            progress(sum(asked[number] for number in np.unique(owners) if not waiting[number]))
        return [
            Score(
                float(totals[number]),
                len(text.tokens) - text.first,
                text.truncated,
                bool(best[number]) if greedy else None,
            )
            for number, text in zip(numbers, texts, strict=True)
        ]

    def document_loglikelihoods(
        self, documents: Sequence[Sequence[int]], stride: int | None = None, progress: Progress = no_progress
    ) -> list[float]:
        """Not defined: pseudo-log-likelihoods are no probabilities."""
        raise NotImplementedError("pseudo-log-likelihoods are no probabilities of documents")

    def _texts(self, requests: Sequence[Request]) -> list[_Text]:
        """The text of each request, without what exceeds the context on its left."""
        encoded = self.encoder(requests)
        cuts = [max(0, len(self._with_start(item)) - self.context) for item in encoded]
        texts = []
        for request, item, cut, lost in zip(
            requests, encoded, cuts, lost_on_the_left(requests, cuts), strict=True
        ):
            tokens, first = self._with_start(item), 1
            if not request.whole:
                first = item.n_context + (not item.starts_with_eot)
                if len(tokens) <= first and request.continuation:
                    raise adds_no_token(request)
            # What is left begins with a token that is not scored, as none is before it.
            first = max(first, lost + 1) - cut
            texts.append(_Text(tokens[cut:], min(first, len(tokens) - cut), lost > 0))
        return texts

    def _with_start(self, item: Encoded) -> np.ndarray:
        if item.starts_with_eot:
            return item.tokens
        return np.concatenate([np.array([self.encoder.eot], dtype=item.tokens.dtype), item.tokens])

    def _batches(self, texts: Sequence[_Text]) -> Iterator[list[tuple[int, int]]]:
        """Batches of rows: a text's number and the place of the masked token; the longest texts first."""
        rows = [
            (number, place)
            for number, text in enumerate(texts)
            for place in range(text.first, len(text.tokens))
        ]
        return by_length(rows, lambda row: len(texts[row[0]].tokens), self.batch_tokens)

    @torch.inference_mode()
    def _score(
        self, texts: Sequence[_Text], rows: Sequence[tuple[int, int]], greedy: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each row, log P of the masked token [B], float64, and whether it is the most probable one."""
        number_B, place_B = np.array(rows).T
        length_B = np.array([len(texts[number].tokens) for number in number_B])
        L = int(length_B.max())
        tokens_BL = np.zeros((len(rows), L), dtype=np.int64)
        for b, number in enumerate(number_B):
            tokens_BL[b, : length_B[b]] = texts[number].tokens
        row_B = np.arange(len(rows))
        targets_B = tokens_BL[row_B, place_B]
        tokens_BL[row_B, place_B] = self.mask
        tokens, targets, places, lengths = (
            torch.from_numpy(array).to(self.device)
            for array in (tokens_BL, targets_B, row_B * L + place_B - 1, length_B)
        )
        # Padding, which stands after the text, is beyond the visible prefix.
        with products_in(self.precision, self.device):
            hidden_BD = self.transformer.hidden(tokens, Prefixes(lengths, L), places).float()
        logprob_B = torch.empty(len(rows), dtype=torch.float64)
        best_B = torch.ones(len(rows), dtype=torch.bool)
        for begin in range(0, len(rows), _LOGIT_ROWS):
            here = slice(begin, begin + _LOGIT_ROWS)
            logits_CV = self.transformer.head(hidden_BD[here]).float()
            logprob_B[here] = _chosen(logits_CV.log_softmax(dim=-1), targets[here]).double().cpu()
            if greedy:
                best_B[here] = (logits_CV.argmax(dim=-1) == targets[here]).cpu()
        return logprob_B.numpy(), best_B.numpy()


def _chosen(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    return logits_CV.gather(1, targets_C[:, None])[:, 0]
