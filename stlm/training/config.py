"""The config of training. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stlm.model.inherit_config import InheritConfig

# Keys of earlier versions that old records still have; none of them changed the weights.
FORMER_KEYS = frozenset({"validation_documents", "validation_tokens"})
# Keys that change what is recorded and when, but not the weights: a resumed run may have other values.
RECORD_KEYS = FORMER_KEYS | {
    "log_every",
    "save_every",
    "validate_every",
    "validation_bytes",
    "wandb",
    "watch_every",
}


class TrainingConfig(BaseModel):
    """A training recipe (paper, Table 1). Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Omitted from records when null, so that older configs compare equal.
    start_from: str | None = Field(
        None,
        description="What training starts from: a variant of this study, which is trained first, or a model "
        "in params/models.yaml. The run's model may be smaller, see `training.inherit`; its tokenizer may be "
        "a part of the other's (`hf:NAME:N`). `low_rank` and `embedding_rank` cut dense matrices by their "
        "singular values. `steps` counts further steps, on the text that follows where text, tokens and "
        "context are the same, otherwise from its beginning. null: new weights.",
        exclude_if=lambda value: value is None,
    )
    inherit: InheritConfig = Field(
        InheritConfig(),
        description="How what is kept is chosen where the model is smaller than what it starts from; see "
        "`training.inherit`.",
        # Likewise where it changes nothing.
        exclude_if=lambda value: value == InheritConfig(),
    )
    steps: int = Field(
        25000,
        ge=0,
        description="Optimizer steps. 0, with `start_from` only: the weights that the run starts from, "
        "changed as its other keys say, are kept and evaluated without training.",
    )
    batch_size: int = Field(24, ge=1, description="Sequences of `model.context` tokens in a micro-batch.")
    accumulation: int = Field(20, ge=1, description="Micro-batches whose gradients make one step.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="Optimizer: AdamW, or Muon for the blocks' matrices with AdamW for embeddings, head and "
        "gains.",
    )
    learning_rate: float = Field(6e-4, gt=0, description="Peak learning rate.")
    matrix_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the blocks' matrices; default: `learning_rate`. Both follow one "
        "schedule. Muon's updates are as large as AdamW's at the same rate.",
    )
    min_learning_rate: float = Field(
        6e-5, ge=0, description="Learning rate at the last step, may be 0; not used by `constant`."
    )
    warmup_steps: int = Field(
        5000, ge=0, description="Steps of linear warm-up from zero. At most `steps`, unless these are 0."
    )
    schedule: Literal["constant", "cosine", "linear", "wsd", "inverse_sqrt", "one_cycle"] = Field(
        "cosine",
        description="Learning rate after the warm-up, down to the minimum: `cosine`, `linear`, `wsd` "
        "(stable, then a linear decay), `inverse_sqrt`, `one_cycle`; or `constant`. See docs/schedules.md.",
    )
    decay_share: float = Field(
        0.2, gt=0, le=1, description="Final share of all steps, in which `wsd` decays."
    )
    dropout_schedule: Literal["constant", "linear", "early", "late", "triangular"] = Field(
        "constant",
        description="Schedule of a factor of `model.dropout` and `model.attention_dropout`. See "
        "docs/schedules.md.",
    )
    dropout_ends: tuple[float, float] = Field(
        (1.0, 0.0), description="Factors at the first and the last step of the dropout schedule `linear`."
    )
    dropout_share: float = Field(
        0.5, ge=0, le=1, description="Share of the steps after which `early` ends or `late` begins to drop."
    )
    dropout_cycles: int = Field(
        1, ge=1, description="How often `triangular` rises from 0 to 1 and falls back."
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (Nesterov's).")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, on matrices only.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the products: bfloat16 autocast, float32, or `auto`: bfloat16 if the "
        "device multiplies it natively (recorded in train.json).",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Whether to use torch.compile; `auto`: on CUDA, not on a CPU. If it fails, training "
        "warns and continues without it.",
    )
    checkpoints: tuple[int, ...] = Field(
        (), description="Steps at which the weights are kept and evaluated; the last step always is."
    )
    validate_every: int = Field(
        500, ge=1, description="Steps between validations; the last step is always validated."
    )
    validation_bytes: int = Field(
        700_000,
        ge=1,
        description="UTF-8 bytes of the validation split that a validation reads, in whole documents, which "
        "are the same for every tokenizer.",
    )
    log_every: int = Field(10, ge=1, description="Steps between rows of curve.csv.")
    watch_every: int = Field(
        50,
        ge=0,
        description="Steps between rows of watch.csv: norms of activations, weights and gradients by layer; "
        "0: none.",
    )
    save_every: int = Field(
        500, ge=1, description="Steps between saves of the state that a killed run resumes from."
    )
    wandb: bool = Field(
        False, description="Also log to Weights & Biases (needs the extra `wandb`; WANDB_MODE=offline works)."
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> TrainingConfig:
        if not self.steps and self.start_from is None:
            raise ValueError(
                "steps: 0 keeps the weights that a run starts from, and start_from names none; name a "
                "variant or a published model there, or take at least 1 step"
            )
        if self.steps and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} is longer than training, steps: {self.steps} "
                f"(largest valid: {self.steps})"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate} is above learning_rate: {self.learning_rate}"
            )
        if not all(0 <= factor <= 1 for factor in self.dropout_ends):
            raise ValueError(f"dropout_ends: {list(self.dropout_ends)} must lie in 0 <= factor <= 1")
        late = [step for step in self.checkpoints if not 1 <= step <= self.steps]
        if late and not self.steps:
            raise ValueError(f"checkpoints: {late[0]}: with steps: 0 the one of step 0 is all (valid: [])")
        if late:
            raise ValueError(f"checkpoints: {late[0]} is outside training, 1 to steps: {self.steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must lie in 0 <= beta < 1")
        return self

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps whose weights are kept, in order, including the last step."""
        return tuple(sorted({*self.checkpoints, self.steps}))

    def tokens_per_step(self, context: int) -> int:
        """Tokens in one optimizer step."""
        return self.batch_size * self.accumulation * context
