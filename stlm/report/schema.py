"""The records of a run, train.json and evaluation.json: their keys, as training and evaluation write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stlm.evaluation.statistics import Interval
from stlm.tokens.config import DataConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
# (benchmark, mode, metric): metric is "acc" or "acc_norm".
Score = tuple[str, str, str]


class Strict(BaseModel):
    """A part of a record: no text for a number, no NaN, no infinity. Keys of newer stages are kept."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class ParameterCounts(Strict):
    """`active`: those that a token uses; None: all. `training_only`: what training has besides."""

    total: Count
    embedding: Count
    non_embedding: Count
    active: Count | None = None
    training_only: Count | None = None


class CheckpointReference(Strict):
    step: Count
    tokens: Count
    weights_sha256: str
    bytes: Count | None = None  # of the file of weights; None for earlier versions


class LossSpike(Strict):
    """A loss (nats) far above the `level` of the steps before; `rise`: its height at the worst step."""

    step: int
    loss: float
    level: float
    rise: float
    grad_norm: float
    recovered_after: int | None  # steps until the loss was back at the level; None where it never was


class Truncation(Strict):
    """What truncating matrices to lower ranks lost, as a share of their total Frobenius norm."""

    relative_error: float


class DependencyRecord(Strict):
    """A run whose last weights another needed, and what its training had cost; or a published model.

    `run` is None for a published model, and `source` for a run. What the training of a published model had
    cost is not known; `training_tokens` is what its makers trained it on.
    """

    run: str | None = None
    source: str | None = None
    licence: str | None = None
    origin: str | None = None
    training_tokens: int | None = None
    weights_sha256: str | None = None
    tokens: int
    flops: float
    truncation: Truncation | None = None  # of weights that a run started from
    inherited: dict[str, Any] | None = None  # what was kept of a larger model, and how it was chosen
    depends: dict[str, DependencyRecord] = {}  # role -> what it depended on itself

    @property
    def published(self) -> dict[str, DependencyRecord]:
        """Name -> the published models that it is or descends from, directly or through runs."""
        own = {} if self.source is None else {self.source: self}
        return own | published_in(self.depends)

    @property
    def tokens_in_all(self) -> int:
        """Tokens that its weights were trained on here, by runs that it started from as well."""
        start = self.depends.get("start")
        return self.tokens + (start.tokens_in_all if start else 0)

    @property
    def costs(self) -> dict[str, float]:
        """Run -> FLOPs of its training: this one and all that it depended on."""
        own = {} if self.run is None else {self.run: self.flops}
        return own | _costs(self.depends)


def published_in(depends: Mapping[str, DependencyRecord]) -> dict[str, DependencyRecord]:
    """Name -> the published models in what a run depended on, directly or through runs."""
    return {name: model for record in depends.values() for name, model in record.published.items()}


def _costs(depends: Mapping[str, DependencyRecord]) -> dict[str, float]:
    return {run: flops for dependency in depends.values() for run, flops in dependency.costs.items()}


class TextRecord(Strict):
    """The amount of held-out text behind a figure, and in all; None where an earlier version wrote none."""

    documents: Count | None = None
    documents_total: Count | None = None
    bytes: Count | None = None
    bytes_total: Count | None = None
    tokens: Count | None = None
    text_sha256: str | None = None  # equal for equal text

    def same_text(self, other: TextRecord) -> bool:
        """Whether both are of the same text of one corpus; without digests, as far as sizes tell."""
        if self.text_sha256 is not None and other.text_sha256 is not None:
            return self.text_sha256 == other.text_sha256
        return self.bytes is not None and self.bytes == other.bytes


class SparsityRecord(Strict):
    """The shares of weights that are zero: of the pruned matrices, of the model, and by layer and matrix."""

    matrices: Fraction
    model: Fraction
    by_layer: dict[str, dict[str, Fraction]]


class TrainRecord(Strict):
    """train.json: what was trained, with which settings, and how long it took."""

    run: str
    variant: str
    label: str
    seed: int
    parameters: ParameterCounts
    steps: Count
    tokens: Count
    seconds: Annotated[float, Field(ge=0)]
    flops: Annotated[float, Field(ge=0)]  # 0: of no steps
    device: str
    processor: str | None = None
    parts: list[dict[str, Any]] = []  # the machines and code that computed it in order, if several
    precision: str
    compiled: bool = False
    kernels: bool = False
    threads: int | None = None
    processes: int = 1
    model: dict[str, Any]
    training: dict[str, Any]
    data: DataConfig = DataConfig()
    techniques: dict[str, dict[str, Any]] = {}  # the settings of each that was used
    validation: TextRecord | None = None  # the text behind the curve; None for earlier versions
    loss_spikes: list[LossSpike] | None = None  # None for earlier versions
    remarks: list[str] = []  # sentences about the trained model, such as parts never used
    sparsity: SparsityRecord | None = None  # of a pruned model
    depends: dict[str, DependencyRecord] = {}  # role -> the run that the training depended on
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
    def tokens_in_all(self) -> int:
        """Tokens that the weights were trained on, by the runs that the training began from as well."""
        return self.tokens + (self.start.tokens_in_all if self.start else 0)

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the run and of all runs that it depended on, each counted once."""
        return self.flops + sum(_costs(self.depends).values())

    @property
    def further(self) -> dict[str, Any]:
        """What else the record holds, from a newer version or a technique."""
        unread = {"study", "tokens_per_second", "final", "versions", "checksum", "start"}
        return {key: value for key, value in (self.model_extra or {}).items() if key not in unread}


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

    @property
    def over_documents(self) -> Interval | None:
        """The interval of bits per byte over documents."""
        return None if self.interval is None else Interval(self.interval.low, self.interval.high)

    @property
    def few_documents(self) -> bool:
        """Whether it has an interval that is too narrow, of too few documents."""
        return self.interval is not None and self.interval.few_documents


class CheckpointResult(Strict):
    step: Count
    tokens: Count
    weights_sha256: str
    perplexity: Perplexity
    benchmarks: dict[str, BenchmarkResult]

    @property
    def scores(self) -> Iterator[Score]:
        """The accuracies that there are."""
        for benchmark, scored in self.benchmarks.items():
            for mode, result in scored.modes.items():
                yield benchmark, mode, "acc"
                if result.acc_norm is not None:
                    yield benchmark, mode, "acc_norm"

    def accuracy(self, benchmark: str, mode: str, metric: str = "acc") -> Proportion | None:
        """The accuracy in `mode` by `metric` (acc or acc_norm); None where it was not scored."""
        modes = self.benchmarks[benchmark].modes if benchmark in self.benchmarks else {}
        return getattr(modes[mode], metric) if mode in modes else None


class ReadoutResult(CheckpointResult):
    """A language model within the last checkpoint's (an exit, say); FLOPs are of a forward pass.

    `perplexity` is None for one whose scores are no probabilities of texts.
    """

    perplexity: Perplexity | None
    parameters: Count
    flops_per_token: Positive


class Fidelity(Strict):
    """How near the last checkpoint is to what the run started from, `of`, on so many tokens of test text."""

    of: str
    weights_sha256: str
    kl_divergence: Annotated[float, Field(ge=0)]
    agreement: Fraction
    tokens: Count


class EvaluationRecord(Strict):
    """evaluation.json: every evaluated checkpoint and the last one's readouts, by name, and their origin."""

    device: str | None = None
    processor: str | None = None
    precision: str | None = None
    code: dict[str, str | None] = {}
    settings: dict[str, Any] | None = None
    checkpoints: dict[str, CheckpointResult]
    readouts: dict[str, ReadoutResult] = {}
    fidelity: Fidelity | None = None


class PublishedRecord(EvaluationRecord):
    """evaluation.json of a published model: its size, the token that starts texts, how it was loaded."""

    parameters: Count
    prefix: str | None = None
    published: dict[str, Any] | None = None
