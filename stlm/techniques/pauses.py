"""Pauses: learned vectors after some of the tokens, which give a model more computation for its next token.

Goyal et al. (2024), "Think before you speak: Training language models with pause tokens", arXiv 2310.02226.

Shapes: B rows, L positions, N of them, C pauses after a token, D width, V learned vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.corpora.steps import MARKER
from stlm.errors import UserError
from stlm.model.activations import block_activations
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.model.layout import Layout, Stretched
from stlm.model.projection import INITIAL_STD
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique
from stlm.tokens.batches import Batches
from stlm.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.distributed import Group

# Pauses after a token, at most.
_MOST = 1000
# Rows of the training text by which `before` is checked, and the largest share of their answers that may have
# no pauses.
_SAMPLE, _MOST_WITHOUT = 64, 0.05


class Pauses(Technique):
    """Learned vectors, pauses, that follow some of the tokens in training, scoring and generation; the next
    token is predicted after the last of them (Goyal et al. 2024). They are within the model: no pause is a
    token of the text, a target, or counted by the context or in bits per byte."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "cache", "compile", "packing", "sharing"}
    )

    place: Literal["every", "answer"] = Field(
        "every",
        description="Where pauses stand. `every`: after every `every`-th token of a sequence, which is a "
        "row, or a document where attention is within documents. `answer`: in scoring between context and "
        "continuation, in generation after the prompt; in other text, and so in bits per byte, there are "
        "none; in training after tokens drawn at random, as many as with `every`, or see `before`.",
    )
    every: int = Field(
        8,
        ge=1,
        description="Tokens between pauses; with `place: answer` their mean distance in training, and with "
        "`before` the fewest tokens of a row for each place.",
    )
    before: str | None = Field(
        None,
        min_length=1,
        exclude_if=lambda before: before is None,  # records of earlier runs are without it
        description='With `place: answer`, the text that answers begin with, such as "\\nAnswer:": in '
        "training pauses stand before it, as in scoring. null: after tokens drawn at random.",
    )
    count: int = Field(1, ge=0, le=_MOST, description="Pauses at each place; 0: the plain model.")
    vectors: Literal["one", "each"] = Field(
        "one",
        description="Whether all pauses are one learned vector, as in the paper, or each of the `count` has "
        "its own.",
    )
    scored: tuple[int, ...] = Field(
        (),
        description="Numbers of pauses at which evaluation scores the last checkpoint, too, as `pauses-N`; "
        "0: without any. More than `count` need `vectors: one`.",
    )

    # The tokens of `before`.
    _marker: tuple[int, ...] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keys_fit(self) -> Pauses:
        if self.before is not None and self.place != "answer":
            raise ValueError(
                f"before: found {self.before!r} with place: {self.place}, expected null, or place: answer"
            )
        if min(self.scored, default=0) < 0 or len(set(self.scored)) < len(self.scored):
            raise ValueError(f"scored: {list(self.scored)}: expected numbers of at least 0, each once")
        if max(self.scored, default=0) > self.most:
            raise ValueError(
                f"scored: {max(self.scored)}: expected at most {self.most}, as many as there are vectors for"
            )
        return self

    @property
    def most(self) -> int:
        """The most pauses after a token for which there are vectors."""
        return _MOST if self.count and self.vectors == "one" else self.count

    def neutral(self) -> bool:
        """Whether there are no pauses: then nothing is added."""
        return self.count == 0

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        if self.every > run.model.context:
            raise ValueError(
                f"every: {self.every}: expected at most model.context, "
                f"{run.model.context}: no token would be followed by pauses"
            )
        if run.model.positions == "learned" and max(self.scored, default=0) > self.count:
            raise ValueError(
                f"scored: {max(self.scored)}: with model.positions: learned, positions are learned for "
                f"{self.count} pauses; expected at most as many"
            )

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. Learned positions of the context keep their values."""
        if not self.neutral():
            vectors = 1 if self.vectors == "one" else self.count
            answer = self.place == "answer"
            model.insert(PauseEmbeddings(self.every, self.count, answer, vectors, model.config.width))
            model.reads_answers = answer
            if self.before is not None:
                model.inserted_embeddings.mark(self._marker)

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`. Raises UserError for a text with other answers than `before` and `every`
        say."""
        if self.before is None or self.neutral():
            return
        context = run.model.context
        self._marker = tuple(load_tokenizer(run.tokens_folder / "tokenizer").encode(self.before))
        sample_BL = torch.from_numpy(Batches(run.tokens_folder, context, _SAMPLE, seed=0).batch(0)[:, :-1])
        answers_B = before_marker(sample_BL, self._marker).sum(dim=1)
        place = f"run {run.name}: techniques.{self.key()}"
        if not answers_B.any():
            raise UserError(
                f"{place}.before: found {self.before!r}, which is in no row of a sample of the corpus "
                f"{run.corpus}; expected the text that its answers begin with, such as {MARKER!r} of "
                "steps_plain"
            )
        without = [
            float((answers_B - most).clamp(min=0).sum() / answers_B.sum()) for most in range(context + 1)
        ]
        if without[context // self.every] > _MOST_WITHOUT:
            least = next(most for most, share in enumerate(without) if share <= _MOST_WITHOUT)
            raise UserError(
                f"{place}.every: found {self.every}, with which {without[context // self.every]:.0%} of the "
                f"answers have no pauses, as a row has as many as {int(answers_B.max())}; expected at most "
                f"{context // least}"
            )

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: with `place: answer`, the pauses of training."""
        if self.place == "every" or self.neutral():
            return 0.0
        model, context = build_on_meta(run.model, (self,)), run.model.context
        blocks = [
            forward_flops(model.blocks, length)
            for length in (context, model.inserted_embeddings.longest(context))
        ]
        return TRAINING_PASSES * (blocks[1] - blocks[0]) / context

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: blocks keep of a pause what they keep of a token."""
        pauses = self.count * (run.model.context // self.every) / run.model.context
        return pauses * run.model.layers * block_activations(run.model, narrow)

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """See `Technique.readouts`."""
        numbers = [number for number in self.scored if number != self.count]  # those of the model itself
        return {f"pauses-{number}": self.with_pauses(model, number) for number in numbers}

    def readout(self, model: Transformer, name: str) -> nn.Module | None:
        """See `Technique.readout`: any number of pauses that there are vectors and positions for."""
        found = re.fullmatch("pauses-(0|[1-9][0-9]{0,3})", name)
        most = self.count if model.config.positions == "learned" else self.most
        return None if found is None or int(found[1]) > most else self.with_pauses(model, int(found[1]))

    def with_pauses(self, model: Transformer, count: int) -> Transformer:
        """The model with another number of pauses after a token, and the same weights."""
        other = model.view()
        if count == 0:
            other.inserted_embeddings, other.reads_answers = None, False
        else:
            other.inserted_embeddings = model.inserted_embeddings.times(count)
            if count > self.count:
                other.make_positions(other.most_places)
        return other


class PauseEmbeddings(nn.Module):
    """The pauses' vectors, V learned ones, one for all pauses or one for each, and where pauses stand."""

    parameter_group = "pauses"

    def __init__(self, every: int, count: int, answer: bool, vectors: int, width: int) -> None:
        """`answer`: pauses stand before answers instead of after every `every`-th token."""
        super().__init__()
        self._every, self._count, self._answer, self._learned = every, count, answer, vectors
        # In training, what answers begin with; None: pauses stand after tokens drawn at random.
        self._marked, self._marker = False, None
        # Flat, V D numbers: optimizers treat vectors as gains, without weight decay.
        self.weight = nn.Parameter(torch.empty(vectors * width))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def mark(self, marker: tuple[int, ...] | None) -> None:
        """In training, let pauses stand before these tokens; None: it is not known yet which."""
        self._marked, self._marker = True, marker

    def times(self, count: int) -> PauseEmbeddings:
        """The same vectors for another number of pauses."""
        other = type(self)(self._every, count, self._answer, self._learned, 0)
        other.weight = self.weight
        other._marked, other._marker = self._marked, self._marker
        return other.train(self.training)  # in training, pauses before answers are drawn

    def vectors(self) -> Tensor:
        """[C, D], in float32."""
        weight_VD = self.weight.view(self._learned, -1)
        return weight_VD.expand(self._count, -1) if self._learned == 1 else weight_VD[: self._count]

    def longest(self, tokens: Any) -> Any:
        """The most places that so many tokens take with their pauses, an int or a mean."""
        return tokens + self._count * (tokens // self._every)

    def length(self, tokens: Any) -> Any:
        """The places that a text of so many tokens takes in evaluation, where it has no answer."""
        return tokens if self._answer else self.longest(tokens)

    def stretch(self, layout: Layout, tokens_BL: Tensor) -> Stretched | None:
        """The rows with room for the pauses; None: there are none."""
        if not self._answer:
            return self._after_every(layout, tokens_BL)
        if not self.training:
            return self._before_answers(layout, tokens_BL)
        return (self._before_marker if self._marked else self._at_random)(layout, tokens_BL)

    def _after_every(self, layout: Layout, tokens_BL: Tensor) -> Stretched:
        """Pauses after every so many tokens of a sequence."""
        positions_BL = layout.positions
        if isinstance(positions_BL, slice):
            begin, end = positions_BL.start or 0, positions_BL.stop
            positions_BL = torch.arange(begin, end, device=tokens_BL.device)[None]
        inserted_BL = ((positions_BL + 1) % self._every == 0) * self._count
        # So long are rows of one sequence; of documents, which count their tokens anew, this is the most.
        length = self.longest(tokens_BL.shape[1]) if layout.in_rows else None
        return layout.stretch(inserted_BL, length)

    def _at_random(self, layout: Layout, tokens_BL: Tensor) -> Stretched | None:
        """Pauses after tokens of each row that are drawn: one of `every`."""
        B, L = tokens_BL.shape
        if L < self._every:
            return None
        index_BN = torch.rand(B, L, device=tokens_BL.device).topk(L // self._every, dim=1).indices
        inserted_BL = torch.zeros_like(tokens_BL).scatter(1, index_BN, self._count)
        return layout.stretch(inserted_BL, self.longest(L))

    def _before_marker(self, layout: Layout, tokens_BL: Tensor) -> Stretched | None:
        """Pauses after the token before each marker of a row, at the most as many as are drawn otherwise."""
        assert self._marker is not None, "training begins with prepare"
        L = tokens_BL.shape[1]
        if L < self._every:
            return None
        here_BL = before_marker(tokens_BL, self._marker)
        here_BL &= here_BL.cumsum(dim=1) <= L // self._every
        return layout.stretch(here_BL * self._count, self.longest(L))

    def _before_answers(self, layout: Layout, tokens_BL: Tensor) -> Stretched | None:
        """Pauses after the token before each row's answer."""
        L = tokens_BL.shape[1]
        if layout.answers is None:
            # What follows the pauses that a cache holds stands as many places further on.
            return None if layout.in_rows else layout.stretch(torch.zeros_like(tokens_BL))
        last_BL = torch.arange(L, device=tokens_BL.device) == layout.answers[:, None]
        return layout.stretch(last_BL * self._count, L + self._count)


def before_marker(tokens_BL: Tensor, marker: tuple[int, ...]) -> Tensor:
    """Whether each token comes right before a marker [B, L]; a marker that the end of a row cuts is none."""
    B, L = tokens_BL.shape
    begins = max(0, L - len(marker))
    found_BX = torch.ones(B, begins, dtype=torch.bool, device=tokens_BL.device)
    for place, token in enumerate(marker, start=1):
        found_BX &= tokens_BL[:, place : place + begins] == token
    return F.pad(found_BX, (0, L - begins), value=False)
