"""The records of a run, train.json and evaluation.json: their keys, as training and evaluation write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stlm.evaluation.statistics import Interval
from stlm.tokens.config import DataConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """A part of a record: no text for a number, no NaN, no infinity.

    Keys that are not known here are kept (`model_extra`): a newer stage may write more.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class ParameterCounts(Strict):
    """`active`: those that a token uses; None: all."""

    total: Count
    embedding: Count
    non_embedding: Count
    active: Count | None = None


class CheckpointReference(Strict):
    step: Count
    tokens: Count
    weights_sha256: str


class LossSpike(Strict):
    """A loss (nats) far above the `level` of the steps before; `rise`: its height at the worst step.

    `recovered_after`: steps until the loss was back at the level; None where it never was.
    """

    step: int
    loss: float
    level: float
    rise: float
    grad_norm: float
    recovered_after: int | None


class Truncation(Strict):
    """What truncating matrices to lower ranks lost, as a share of their total Frobenius norm."""

    relative_error: float


class DependencyRecord(Strict):
    """A run whose last weights another needed, and what its training had cost.

    `depends`: role -> what it depended on itself. `truncation`: of weights that a run started from.
    """

    run: str
    weights_sha256: str | None = None
    tokens: int
    flops: float
    truncation: Truncation | None = None
    depends: dict[str, DependencyRecord] = {}

    @property
    def costs(self) -> dict[str, float]:
        """Run -> FLOPs of its training: this one and all that it depended on."""
        return {self.run: self.flops} | _costs(self.depends)


def _costs(depends: Mapping[str, DependencyRecord]) -> dict[str, float]:
    return {run: flops for one in depends.values() for run, flops in one.costs.items()}


class TextRecord(Strict):
    """The amount of held-out text behind a figure, and in all; `text_sha256` is equal for equal text.

    Keys that earlier versions did not write are None.
    """

    documents: Count | None = None
    documents_total: Count | None = None
    bytes: Count | None = None
    bytes_total: Count | None = None
    tokens: Count | None = None
    text_sha256: str | None = None

    def same_text(self, other: TextRecord) -> bool:
        """Whether both are of the same text of one corpus; without digests, as far as sizes tell."""
        if self.text_sha256 is not None and other.text_sha256 is not None:
            return self.text_sha256 == other.text_sha256
        return self.bytes is not None and self.bytes == other.bytes


class TrainRecord(Strict):
    """train.json: what was trained, with which settings, and how long it took.

    `loss_spikes` is None for runs of earlier versions, which did not look for any. `parts`: the machines and
    code versions that computed it, in order, where there were several. `validation`: the text behind the
    curve, None for earlier versions. `techniques`: the settings of each that was used. `depends`: role -> the
    run that the training depended on. `remarks`: sentences about the trained model, such as parts never used.
    """

    run: str
    variant: str
    label: str
    seed: int
    parameters: ParameterCounts
    steps: Count
    tokens: Count
    seconds: Annotated[float, Field(ge=0)]
    flops: Positive
    device: str
    processor: str | None = None
    parts: list[dict[str, Any]] = []
    precision: str
    compiled: bool = False
    kernels: bool = False
    threads: int | None = None
    processes: int = 1
    model: dict[str, Any]
    training: dict[str, Any]
    data: DataConfig = DataConfig()
    techniques: dict[str, dict[str, Any]] = {}
    validation: TextRecord | None = None
    loss_spikes: list[LossSpike] | None = None
    remarks: list[str] = []
    depends: dict[str, DependencyRecord] = {}
    corpus: str
    tokenizer: str
    checkpoints: list[CheckpointReference]
    code: dict[str, str | None] = {}

    @model_validator(mode="before")
    @classmethod
    def _former_start(cls, content: Any) -> Any:
        """Earlier versions recorded the role `start` alone, by a key of that name."""
        if isinstance(content, dict) and content.get("start") is not None and "depends" not in content:
            return {**content, "depends": {"start": content["start"]}}
        return content

    @property
    def start(self) -> DependencyRecord | None:
        """The run whose last weights the training began from."""
        return self.depends.get("start")

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the run and of all runs that it depended on, each counted once."""
        return self.flops + sum(_costs(self.depends).values())

    @property
    def further(self) -> dict[str, Any]:
        """What else the record holds, from a newer version or a technique."""
        return {key: value for key, value in (self.model_extra or {}).items() if key not in _NOT_READ}


# Keys of train.json that nothing here reads.
_NOT_READ = frozenset({"study", "tokens_per_second", "final", "versions", "checksum", "start"})


class Proportion(Strict):
    """An accuracy as a fraction 0..1, its 95% interval, and the number of items."""

    value: Fraction
    low: float
    high: float
    n: Count

    @property
    def interval(self) -> Interval:
        """Its bounds."""
        return Interval(self.low, self.high)


class ModeResult(Strict):
    acc: Proportion
    acc_norm: Proportion | None = None
    word_perplexity: Positive | None = None
    truncated: Count = 0
    groups: dict[str, dict[str, Proportion]] = {}


class BenchmarkResult(Strict):
    version: str | int | float
    items: Count
    items_total: Count
    limit: int | None = None
    modes: dict[str, ModeResult]


class DocumentInterval(Strict):
    """The 95% interval of bits per byte over documents; `few_documents`: so few that it is too narrow."""

    low: float
    high: float
    few_documents: bool


class Perplexity(TextRecord):
    """Figures of the test text. `interval` is None for a single document, and for earlier versions."""

    bits_per_byte: Annotated[float, Field(ge=0)]
    char_perplexity: Positive
    interval: DocumentInterval | None = None
    components: dict[str, Perplexity] = {}


class CheckpointResult(Strict):
    step: Count
    tokens: Count
    weights_sha256: str
    perplexity: Perplexity
    benchmarks: dict[str, BenchmarkResult]


class ReadoutResult(CheckpointResult):
    """A language model within the last checkpoint's (an exit, say); FLOPs are of a forward pass."""

    parameters: Count
    flops_per_token: Positive


class EvaluationRecord(Strict):
    """evaluation.json: every evaluated checkpoint by name; on what machine, by what code and settings.

    Earlier versions wrote the checkpoints alone. `readouts`: of the last checkpoint, by name.
    """

    device: str | None = None
    processor: str | None = None
    precision: str | None = None
    code: dict[str, str | None] = {}
    settings: dict[str, Any] | None = None
    checkpoints: dict[str, CheckpointResult]
    readouts: dict[str, ReadoutResult] = {}


class PublishedRecord(EvaluationRecord):
    """evaluation.json of a published model: its size, the token that starts texts, how it was loaded.

    Earlier versions wrote neither of the last two.
    """

    parameters: Count
    prefix: str | None = None
    published: dict[str, Any] | None = None
