"""The `data` section of a study: what a run reads, in which order, and how documents share a row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SelectConfig(BaseModel):
    """Which chunks are trained on, chosen by a model. Frozen; unknown keys are rejected.

    Perplexity: Ankner et al. 2024; difference: Mindermann et al. 2022.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    by: Literal["perplexity", "difference"] = Field(
        description="`perplexity`: the mean loss of a chunk's tokens under `data.reference`. `difference`: "
        "that under `smaller` minus that under the reference, high where there is something to learn."
    )
    share: float = Field(
        gt=0,
        lt=1,
        description="Share of a component's chunks that is kept. They are chosen from a random part of the "
        "component, so large that the run needs what is kept of it. Reading it costs a model of the run's "
        "size a third of training on it.",
    )
    side: Literal["low", "middle", "high"] | None = Field(
        None,
        description="Which end of the order, or its middle, is kept. null: low of `perplexity`, high of "
        "`difference`.",
    )
    smaller: str | None = Field(
        None,
        description="For `difference`: a variant, or a model in params/models.yaml, that knows less than the "
        "reference.",
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> SelectConfig:
        if (self.by == "difference") != (self.smaller is not None):
            raise ValueError(
                "by: difference needs smaller: a variant, or a model in params/models.yaml"
                if self.by == "difference"
                else f"smaller: {self.smaller} is used by difference alone; found by: {self.by}"
            )
        return self

    @property
    def kept_side(self) -> str:
        """`side`, with its default."""
        return self.side or {"perplexity": "low", "difference": "high"}[self.by]


class DataConfig(BaseModel):
    """Mix, order, repetition and packing of the training text. Frozen; unknown keys are rejected.

    It does not affect validation and test text, which are those of the whole corpus, so that runs compare.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="For a mix: component -> its share of the training tokens, in place of the shares in "
        "params/corpora.yaml; components left out are not trained on. Shares are relative.",
    )
    sequence: tuple[str, ...] = Field(
        (),
        description="All components to train on, one after the other in this order, each for its share of "
        "the training. Empty: they alternate in every batch.",
    )
    attention: Literal["across", "within"] = Field(
        "across",
        description="Whether a token sees earlier documents of its row. `within`: only its own document, "
        "whose positions begin at 0.",
    )
    order: Literal["shuffled", "source", "length", "difficulty"] = Field(
        "shuffled",
        description="Order of a component's chunks in an epoch: random, as in the raw files, by the length "
        "of their documents, or by their loss under a reference model. All orders read the same chunks.",
    )
    direction: Literal["easy_first", "hard_first"] = Field(
        "easy_first",
        description="For `length` and `difficulty`: short or easy chunks first (a curriculum), or last.",
    )
    pacing: Literal["sorted", "competence"] = Field(
        "sorted",
        description="For `length` and `difficulty`. `sorted`: each chunk once an epoch, in order. "
        "`competence`: drawn, with replacement, from a first part of the order that grows with the square "
        "root of the time (Platanios et al. 2019).",
    )
    competence_start: float = Field(
        0.01, gt=0, le=1, description="For pacing `competence`: the part of the order at the beginning."
    )
    competence_share: float = Field(
        0.5, gt=0, le=1, description="For pacing `competence`: share of the training until it is all."
    )
    reference: str | None = Field(
        None,
        description="For order `difficulty` and for `select`: what measures the chunks' loss, a variant of "
        "this study, which is trained first, or a model in params/models.yaml.",
    )
    # Omitted from records when null, so that records of earlier runs, without this key, compare equal.
    select: SelectConfig | None = Field(
        None,
        description="Train on a part of the chunks, chosen by the reference: see `data.select`. null: all.",
        exclude_if=lambda select: select is None,
    )
    unique_tokens: int | None = Field(
        None,
        gt=0,
        description="Train on a random part of this many tokens, repeated as often as needed; a mix's "
        "components give their shares. null: the whole train split.",
    )
    max_epochs: float | None = Field(
        None,
        gt=0,
        description="If training would repeat a component more often, it is rejected before it starts. "
        "null: no limit.",
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> DataConfig:
        needs = "order: difficulty" if self.order == "difficulty" else "select" if self.select else None
        if (needs is not None) != (self.reference is not None):
            raise ValueError(
                f"{needs} needs reference: a variant of the study, or a model in params/models.yaml"
                if needs
                else f"reference: {self.reference} is used by order: difficulty and by select alone; found "
                f"order: {self.order}"
            )
        if self.order not in ("length", "difficulty"):
            for key, plain in (("direction", "easy_first"), ("pacing", "sorted")):
                if getattr(self, key) != plain:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} needs order: length or difficulty; found {self.order}"
                    )
        return self

    @property
    def unlimited(self) -> DataConfig:
        """The same without `max_epochs`, which may reject a training run but changes none."""
        return self.model_copy(update={"max_epochs": None})

    @property
    def plain(self) -> bool:
        """Whether this is the default, which changes nothing."""
        return self == DataConfig()
