"""The keys of ``params/<study>.yaml``, with types and descriptions; only stlm.study reads them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stlm.evaluation.config import EvaluationConfig


class Variant(BaseModel):
    """A model variant, given by its differences from the study's baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: str | None = Field(None, description="Name in tables and plots; default: the variant's key.")
    paper_row: str | None = Field(
        None, description="The row of the paper's tables that this variant reproduces."
    )
    corpus: str | None = Field(None, description="Corpus, where it differs.")
    tokenizer: str | None = Field(None, description="Tokenizer, where it differs.")
    seeds: list[int] | None = Field(
        None, min_length=1, description="Those of the study's seeds that it is run with; default: all."
    )
    model: dict[str, Any] = Field(default_factory=dict, description="Keys of `model` that differ.")
    training: dict[str, Any] = Field(default_factory=dict, description="Keys of `training` that differ.")
    data: dict[str, Any] = Field(default_factory=dict, description="Keys of `data` that differ.")
    techniques: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="Techniques that differ: name -> the keys that differ, `{}` to add one with its "
        "defaults, null to leave one out.",
    )


class Published(BaseModel):
    """A published model, scored like the study's runs and shown with them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folder: str | None = Field(
        None,
        min_length=1,
        exclude_if=lambda folder: folder is None,
        description="Local folder in the format of transformers: config.json, *.safetensors, the tokenizer.",
    )
    model: str | None = Field(
        None,
        exclude_if=lambda model: model is None,
        description="Instead of `folder`: a model in params/models.yaml, which is fetched like the data.",
    )
    label: str | None = Field(None, description="Name in tables; default: the entry's key.")
    parameters: str | None = Field(
        None, description="Size as tables show it, for example 1.1B; default: the parameters counted."
    )
    context: int | None = Field(
        None, ge=2, description="Longest sequence given to it, in tokens; default: the model's context."
    )
    # Omitted from records when null: models evaluated before this key existed are not evaluated again.
    prefix: str | None = Field(
        None,
        min_length=1,
        exclude_if=lambda prefix: prefix is None,
        description="The token that starts a text, as its tokenizer spells it, for example `<|endoftext|>`; "
        "default: for a `model`, the one in params/models.yaml; for a `folder`, the declared bos or else "
        "eos, as lm_eval has it. Recorded, and shown in tables.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.folder is None) == (self.model is None):
            raise ValueError("give either `folder` or `model`, a name in params/models.yaml")
        return self


class StudyFile(BaseModel):
    """The keys of ``params/<study>.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    description: str = Field(description="The purpose of the study, in a line or two.")
    corpus: str = Field(description="Name of a corpus or mix in params/corpora.yaml.")
    tokenizer: str = Field(
        description="`gpt2`, `bytes`, or `bpe-N`: a byte-pair vocabulary of N tokens, trained on the corpus. "
        "`hf:NAME`: that of a published model in params/models.yaml, `hf:NAME:N`: the N of its tokens that "
        "the corpus needs; see docs/vocabulary.md. "
        "Of byte-level models (`model.bytes`): where chunks are cut, at the tokens of `gpt2` or `bpe-N`, or "
        "`words`, `spaces` or `stride-N`, every N bytes; see docs/bytes.md."
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (0,), min_length=1, description="Each variant is run once for each seed."
    )
    baseline: str = Field("baseline", description="The variant that the others are compared with.")
    model: dict[str, Any] = Field(default_factory=dict, description="The baseline's model; see `model`.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="The baseline's recipe; see `training`."
    )
    data: dict[str, Any] = Field(
        default_factory=dict,
        description="Mix, order, repetition and packing of the baseline's training text; see `data`.",
    )
    techniques: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="The baseline's techniques: name -> keys, `{}` for its defaults; see `techniques`.",
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="What is scored and how; see `evaluation`."
    )
    variants: dict[str, Variant] = Field(
        min_length=1, description="The runs: name -> differences from the baseline; see `variants`."
    )
    published: dict[str, Published] = Field(
        default_factory=dict,
        description="Published models, scored on the same benchmarks and on the baseline's test text: name "
        "-> folder and settings; see `published`.",
    )

    @field_validator("variants", mode="before")
    @classmethod
    def _empty_is_no_difference(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: {} if settings is None else settings for name, settings in value.items()}
        return value
