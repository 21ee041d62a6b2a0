"""How a model is trained. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Keys that change what is recorded and when, not the weights: a run resumes with others than it began with.
RECORD_KEYS = frozenset({"log_every", "save_every", "validate_every", "validation_tokens", "wandb"})


class TrainingConfig(BaseModel):
    """A training recipe (paper, Table 1). Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(25000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(24, ge=1, description="Sequences of `model.context` tokens in a micro-batch.")
    accumulation: int = Field(20, ge=1, description="Micro-batches whose gradients make one step.")
    optimizer: Literal["adamw"] = Field("adamw", description="Optimizer.")
    learning_rate: float = Field(6e-4, gt=0, description="Peak learning rate.")
    min_learning_rate: float = Field(6e-5, ge=0, description="Learning rate at the last step.")
    warmup_steps: int = Field(5000, ge=0, description="Steps of linear warm-up from zero. At most `steps`.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: cosine decay to the minimum, or constant."
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, on matrices alone.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the products: bfloat16 autocast, float32, or `auto`: bfloat16 where the "
        "device multiplies it natively (recorded in train.json).",
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile; `auto`: on CUDA, not on a CPU."
    )
    checkpoints: tuple[int, ...] = Field(
        (), description="Steps at which the weights are kept and evaluated; the last step always is."
    )
    validate_every: int = Field(
        500, ge=1, description="Steps between validations; the last step always is one."
    )
    validation_tokens: int = Field(
        200_000, ge=1, description="Tokens of the validation split that a validation reads, whole documents."
    )
    log_every: int = Field(10, ge=1, description="Steps between rows of curve.csv.")
    save_every: int = Field(
        500, ge=1, description="Steps between saves of the state that a killed run resumes from."
    )
    wandb: bool = Field(
        False, description="Also log to Weights & Biases (needs the extra `wandb`; WANDB_MODE=offline works)."
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> TrainingConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} is longer than training, steps: {self.steps} "
                f"(largest valid: {self.steps})"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate} is above learning_rate: {self.learning_rate}"
            )
        late = [step for step in self.checkpoints if not 1 <= step <= self.steps]
        if late:
            raise ValueError(f"checkpoints: {late[0]} is outside training, 1 to steps: {self.steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must lie in 0 <= beta < 1")
        return self

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps whose weights are kept, in order, the last step among them."""
        return tuple(sorted({*self.checkpoints, self.steps}))

    def tokens_per_step(self, context: int) -> int:
        """Tokens one optimizer step trains on."""
        return self.batch_size * self.accumulation * context
