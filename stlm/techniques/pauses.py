"""Pauses: learned vectors after every few tokens, which give a model more computation for its next token.

Goyal et al. (2024), "Think before you speak: Training language models with pause tokens", arXiv 2310.02226.

Shapes: C pauses after a token, D width, V learned vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stlm.model.layout import Insertion
from stlm.model.projection import INITIAL_STD
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run

# Pauses after a token, at most.
_MOST = 1000


class Pauses(Technique):
    """Learned vectors, pauses, that follow every `every`-th token of a sequence, in training, scoring and
    generation; the next token is predicted after the last of them (Goyal et al. 2024). They are within the
    model: no pause is a token of the text, a target, or counted by the context or in bits per byte."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "cache", "compile", "packing", "sharing"}
    )

    every: int = Field(
        8,
        ge=1,
        description="Pauses follow every so many tokens, counted from a sequence's first: that of a row, or "
        "of a document where attention is within documents.",
    )
    count: int = Field(1, ge=0, le=_MOST, description="Pauses after such a token; 0: the plain model.")
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

    @model_validator(mode="after")
    def _keys_fit(self) -> Pauses:
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
            model.insert(PauseEmbeddings(Insertion(self.every, self.count), vectors, model.config.width))

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """See `Technique.readouts`."""
        return {f"pauses-{count}": self.with_pauses(model, count) for count in self.scored}

    def readout(self, model: Transformer, name: str) -> nn.Module | None:
        """See `Technique.readout`: any number of pauses that there are vectors and positions for."""
        found = re.fullmatch("pauses-(0|[1-9][0-9]{0,3})", name)
        most = self.count if model.config.positions == "learned" else self.most
        return None if found is None or int(found[1]) > most else self.with_pauses(model, int(found[1]))

    def with_pauses(self, model: Transformer, count: int) -> Transformer:
        """The model with another number of pauses after a token, and the same weights."""
        other = model.view()
        if count == 0:
            other.inserted_embeddings = None
        else:
            other.inserted_embeddings = model.inserted_embeddings.times(count)
            if count > self.count:
                other.make_positions(other.row_length(model.config.context))
        return other


class PauseEmbeddings(nn.Module):
    """The pauses' vectors: V learned ones, one for all pauses or one for each."""

    parameter_group = "pauses"

    def __init__(self, insertion: Insertion, vectors: int, width: int) -> None:
        super().__init__()
        self.insertion, self._learned = insertion, vectors
        # Flat, V D numbers: optimizers treat vectors as gains, without weight decay.
        self.weight = nn.Parameter(torch.empty(vectors * width))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def times(self, count: int) -> PauseEmbeddings:
        """The same vectors for another number of pauses."""
        other = type(self)(self.insertion._replace(count=count), self._learned, 0)
        other.weight = self.weight
        return other

    def vectors(self) -> Tensor:
        """[C, D], in float32."""
        weight_VD, count = self.weight.view(self._learned, -1), self.insertion.count
        return weight_VD.expand(count, -1) if self._learned == 1 else weight_VD[:count]
