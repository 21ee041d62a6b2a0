"""The keys of `techniques.distillation.taught`: what is kept of a teacher's answers. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Layer = Annotated[int, Field(ge=1)]


class StatesConfig(BaseModel):
    """A loss on hidden states: the student's residual stream after some layers imitates the teacher's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: tuple[tuple[_Layer, _Layer], ...] = Field(
        min_length=1,
        description="Pairs of layers, numbered from 1: the teacher's, and the student's that imitates its "
        "residual stream, for example `[[15, 6], [30, 12]]`.",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="The teacher's width, where it differs from the student's: a learned matrix for each of "
        "the student's layers then maps the one to the other. Training alone has them: they do not count as "
        "the model's parameters, and export leaves them out.",
    )
    loss: Literal["cosine", "mse"] = Field(
        "cosine",
        description="`cosine`: one minus the cosine of the two vectors (DistilBERT). `mse`: the squared "
        "distance, divided by the squared length of the teacher's vector. Means over positions and layers.",
    )
    weight: float = Field(1.0, gt=0, description="Weight of this loss, in addition to the others.")

    @property
    def teachers(self) -> tuple[int, ...]:
        """The teacher's layers, each once, in order."""
        return tuple(sorted({teacher for teacher, _ in self.layers}))

    @property
    def students(self) -> tuple[int, ...]:
        """The student's layers, likewise."""
        return tuple(sorted({student for _, student in self.layers}))


class TaughtConfig(BaseModel):
    """What `stlm teach` keeps of each position: sampled tokens, or the most likely and the rest's mass."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Tokens sampled from the teacher's distribution at each position, with their "
        "probabilities. They estimate the loss and its gradient without bias. 4 bytes each (6 with more than "
        "65,536 tokens).",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="The so many most likely tokens instead, with the mass of the rest. The loss is then a "
        "lower bound: it ignores how the teacher divides the rest.",
    )
    context: int | None = Field(
        None,
        ge=2,
        description="Tokens that the teacher reads at once, a multiple of the run's context: a row is then "
        "read after the text before it. null: the run's context.",
    )
    states: StatesConfig | None = Field(
        None, description="Hidden states to keep in float16, and the loss on them: 2 bytes a number."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> TaughtConfig:
        if (self.tokens is None) == (self.top_k is None):
            raise ValueError(
                f"tokens: {self.tokens} and top_k: {self.top_k}: expected one of them, and the other null"
            )
        return self

    @property
    def kept(self) -> int:
        """The number of tokens that are kept at each position."""
        return self.tokens or self.top_k

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's layers, from 1, whose states are kept, in order."""
        return () if self.states is None else self.states.teachers
