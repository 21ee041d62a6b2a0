"""Continuous thoughts: places between a question and what follows it, each of which reads the hidden state of
the place before instead of a token.

Hao et al. (2024), "Training Large Language Models to Reason in a Continuous Latent Space" (Coconut), arXiv
2412.06769, section 3. A question is followed by a learned vector that begins the thoughts, the thoughts, and
one that ends them. The input of a thought is the residual stream of the place before, after the last block
and the last norm. Thoughts are computed one after another, in as many passes, each of which computes nothing
but them: keys and values are kept.

Shapes: B rows, L tokens, M places, S places of a pass, D width, N flat positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stlm.model.cache import Cache
from stlm.model.layout import Layout, Selection, Stretched
from stlm.model.passes import Passes
from stlm.model.projection import INITIAL_STD

if TYPE_CHECKING:
    from stlm.model.transformer import Transformer

# What a place reads: a token's embedding, the vector that begins or ends thoughts, or a hidden state.
TOKEN, BEGIN, THOUGHT, END = range(4)
# Places that thoughts take besides their own.
MARKS = 2


class Places(NamedTuple):
    """Rows of M places, [B, M] each: what each reads, and in which pass it is computed.

    Pass 0 computes questions and what begins thoughts, pass n all n-th thoughts, and the last one the rest;
    -1 is padding. `tokens` are any where a place reads none. `positions` and `sequences`: see `Passes`.
    """

    tokens_BM: Tensor
    kinds_BM: Tensor
    passes_BM: Tensor
    positions_BM: Tensor
    sequences_BM: Tensor


class InsertedThoughts(nn.Module):
    """The vectors that begin and end thoughts, and so many thoughts between them where text has an answer.

    It is what `Transformer.insert` takes. Text without answers (`Layout.answers`) has no thoughts.
    """

    parameter_group = "thoughts"

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        # Flat, 2 D numbers: optimizers treat vectors as gains, without weight decay.
        self.weight = nn.Parameter(torch.empty(2 * width))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def times(self, count: int) -> InsertedThoughts:
        """The same vectors for another number of thoughts."""
        other = type(self)(count, 0)
        other.weight = self.weight
        return other.train(self.training)

    def vectors(self) -> Tensor:
        """[2, D], in float32: what begins thoughts, and what ends them."""
        return self.weight.view(2, -1)

    def longest(self, tokens: Any) -> Any:
        """The most places that so many tokens take, an int or a mean."""
        return tokens + self.count + MARKS

    def length(self, tokens: Any) -> Any:
        """The places that a text of so many tokens takes in evaluation, where it has no answer."""
        return tokens

    def stretch(self, layout: Layout, tokens_BL: Tensor) -> Stretched | None:
        """See `Transformer.insert`: nothing is inserted into text without an answer."""
        # What follows the thoughts that a cache holds stands as many places further on.
        return None if layout.in_rows else layout.stretch(torch.zeros_like(tokens_BL))

    def hidden(self, model: Transformer, tokens_BL: Tensor, layout: Layout, rows_N: Tensor | None) -> Tensor:
        """`Transformer.hidden` of rows of one sequence, or of a cache, with thoughts before their answers.

        That of the last token before an answer is the one at the end of the thoughts.
        """
        if isinstance(layout, Cache):
            x_BLD = self._in_cache(model, tokens_BL, layout)
        else:
            x_BLD = self._in_rows(model, tokens_BL, layout.answers)
        return model.finish(x_BLD if rows_N is None else x_BLD.flatten(0, 1)[rows_N])

    def read(self, model: Transformer, rows: Places) -> Tensor:
        """The residual stream [B, M, D] after the last block; zeros at padding."""
        x_BMD = model.token_vectors(rows.tokens_BM)
        for kind, vector_D in zip((BEGIN, END), self.vectors(), strict=True):
            x_BMD = torch.where((rows.kinds_BM == kind)[..., None], vector_D.to(x_BMD.dtype), x_BMD)
        passes, read_BMD = Passes(rows.positions_BM, rows.sequences_BM), torch.zeros_like(x_BMD)
        for number in range(1 + int(rows.passes_BM.max())):
            places = Selection.of(rows.passes_BM == number)
            x_BSD = places.take(x_BMD)
            is_thought_BS = rows.kinds_BM.gather(1, places.index_BS) == THOUGHT
            if is_thought_BS.any():
                before = Selection((places.index_BS - 1).clamp(min=0))
                thought_BSD = model.norm(before.take(read_BMD))
                x_BSD = torch.where(is_thought_BS[..., None], thought_BSD.to(x_BSD.dtype), x_BSD)
            read_BMD = places.add_to(read_BMD, model.read_vectors(x_BSD, passes.next(places)))
        return read_BMD

    def _in_rows(self, model: Transformer, tokens_BL: Tensor, answers_B: Tensor) -> Tensor:
        """The residual stream [B, L, D] of rows of one sequence, with thoughts after tokens `answers_B`."""
        (B, L), inserted = tokens_BL.shape, self.count + MARKS
        place_M = torch.arange(L + inserted, device=tokens_BL.device)
        has_B1 = answers_B[:, None] >= 0
        # How far a place is after the last token of the question; without an answer, none is after it.
        after_BM = (place_M - answers_B[:, None]).where(has_B1, 0)
        is_rest_BM = after_BM > inserted
        token_BM = (place_M - inserted * is_rest_BM).clamp(max=L - 1)
        kinds_BM = torch.where((after_BM >= 1) & ~is_rest_BM, THOUGHT, TOKEN)
        kinds_BM = kinds_BM.masked_fill(after_BM == 1, BEGIN).masked_fill(after_BM == inserted, END)
        passes_BM = (after_BM - 1).clamp(min=0, max=self.count + 1)
        rows = Places(
            tokens_BL.gather(1, token_BM),
            kinds_BM,
            passes_BM.masked_fill(~has_B1 & (place_M >= L), -1),
            place_M.expand(B, -1),
            torch.zeros_like(token_BM),
        )
        token_L = place_M[:L]
        last_BL = token_L + inserted * (has_B1 & (token_L >= answers_B[:, None]))
        return Selection(last_BL).take(self.read(model, rows))

    def _in_cache(self, model: Transformer, tokens_BL: Tensor, cache: Cache) -> Tensor:
        """As `_in_rows`, for rows of a cache, whose answers all begin after the same token."""
        answer, place = int(cache.answers[0]), cache.places.start
        assert answer >= 0 and bool((cache.answers == answer).all()), "rows of a cache have answers alike"
        x_BLD = model.token_vectors(tokens_BL)
        begin_B1D, end_B1D = (vector.to(x_BLD.dtype).expand(len(x_BLD), 1, -1) for vector in self.vectors())
        parts = []
        for number in range(self.count + 2):
            if number == 0:
                part_BSD = torch.cat([x_BLD[:, : answer + 1], begin_B1D], dim=1)
            elif number <= self.count:
                part_BSD = model.norm(parts[-1][:, -1:])
            else:
                part_BSD = torch.cat([end_B1D, x_BLD[:, answer + 1 :]], dim=1)
            end = place + part_BSD.shape[1]
            parts.append(model.read_vectors(part_BSD, cache.at(place, end)))
            place = end
        return torch.cat([parts[0][:, :answer], parts[-1]], dim=1)
