"""The `evaluation` section of a study: what `stlm evaluate` scores and how (without heavy imports)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Mode = Literal["harness", "paper"]
# Keys that change how fast an evaluation is, but not its results: a record may have other values.
BATCH_KEYS = frozenset({"batch_tokens"})


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BenchmarkConfig(_Strict):
    """The settings of one benchmark."""

    limit: int | None = Field(
        default=None,
        gt=0,
        description="items to score, a seeded random subset; null: the study's `limit` or, if that is null, "
        "too, all items (for `last_word`, which makes its items: 2,000)",
    )


class PerplexityConfig(_Strict):
    """Test bits per byte, character and token perplexity."""

    stride: int | None = Field(
        default=None,
        gt=0,
        description="tokens by which overlapping windows advance; null: half of the model's context",
    )
    max_documents: int | None = Field(
        default=None,
        gt=0,
        description="documents of the test split, a seeded random subset; null: all of them",
    )
    max_bytes: int | None = Field(
        default=None,
        gt=0,
        description="UTF-8 bytes of text after which no further document of the test split is taken; the "
        "documents are the same for every tokenizer; null: no bound",
    )


class EvaluationConfig(_Strict):
    """Benchmarks, modes, limits and numerical settings of an evaluation.

    `benchmarks` may be a list of names, or a mapping from names to their settings.
    """

    benchmarks: dict[str, BenchmarkConfig] = Field(
        default_factory=dict,
        description="names, as params/benchmarks.yaml lists them: a list, or a mapping name -> {limit}",
    )
    limit: int | None = Field(
        default=None, gt=0, description="items of each benchmark, a seeded random subset; null: all items"
    )
    intermediate_limit: int | None = Field(
        default=None,
        gt=0,
        description="items of each benchmark at all checkpoints but the last, if lower than its limit, so "
        "that curves cost little; null: as at the last",
    )
    limit_seed: int = Field(default=0, ge=0, description="seed of the random subsets")
    modes: tuple[Mode, ...] = Field(
        default=("harness", "paper"),
        min_length=1,
        description="scoring modes: harness, paper or both; `last_word` has harness only",
    )
    perplexity: PerplexityConfig = Field(
        default_factory=PerplexityConfig, description="how perplexity is measured on the test split"
    )
    batch_tokens: int | None = Field(
        default=None,
        gt=0,
        description="tokens in one forward pass, padding included; null: 4,096 on a CPU, 65,536 on a GPU",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32",
        description="precision of the products; auto: bfloat16 if the hardware multiplies it, with scores "
        "that vary slightly between machines. In bfloat16, near ties are scored again in float32",
    )
    checkpoints: Literal["all", "last"] = Field(
        default="all", description="which of the run's kept checkpoints are evaluated"
    )

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _names_to_mapping(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            if not all(isinstance(name, str) for name in value):
                raise ValueError("expected names")
            if len(set(value)) < len(value):
                raise ValueError("a benchmark is listed twice")
            return {name: {} for name in value}
        if isinstance(value, dict):
            return {name: {} if settings is None else settings for name, settings in value.items()}
        return value

    @field_validator("modes")
    @classmethod
    def _modes_once(cls, value: tuple[Mode, ...]) -> tuple[Mode, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a mode is listed twice")
        return value

    def limit_of(self, benchmark: str, last: bool) -> int | None:
        """Items of `benchmark` scored at the last checkpoint (`last`) or at another one; None: all items."""
        benchmark_limit = self.benchmarks[benchmark].limit if benchmark in self.benchmarks else None
        limit = benchmark_limit if benchmark_limit is not None else self.limit
        if last or self.intermediate_limit is None:
            return limit
        return self.intermediate_limit if limit is None else min(limit, self.intermediate_limit)
