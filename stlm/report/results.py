"""What a run left behind, read and checked: {train,evaluation}.json, {curve,watch}.csv, items.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stlm.errors import UserError
from stlm.evaluation.predictions import Facts, read_facts
from stlm.files import Record, read_record
from stlm.integrity import check_beside
from stlm.report.asked import check_published, check_scored, check_trained
from stlm.report.items import read_outcomes
from stlm.report.rows import read_curve, read_watch
from stlm.study.runs import Run, Study
from stlm.tokens.config import DataConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """A part of a record: no text for a number, no NaN, no infinity."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ParameterCounts(Strict):
    total: Count
    embedding: Count
    non_embedding: Count


class CheckpointReference(Strict):
    step: Count
    tokens: Count
    weights_sha256: str


class LossSpike(Strict):
    """A loss (nats) far above the level of the steps before, `level`; `rise`: its height at the worst step.

    `recovered_after`: steps until the loss was back at the level; None where it never was.
    """

    step: int
    loss: float
    level: float
    rise: float
    grad_norm: float
    recovered_after: int | None


class Truncation(Strict):
    """What cutting matrices to lower ranks lost, of all their Frobenius norm together."""

    relative_error: float


class DependencyRecord(Strict):
    """A run whose last weights another needed, and what its training had cost.

    `depends`: role -> what it depended on itself. `truncation`: of weights that a run started from.
    """

    run: str
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
    """How much held-out text a figure is of, of how much there is; `text_sha256` is equal for equal text.

    What earlier versions did not write is None.
    """

    documents: Count | None = None
    documents_total: Count | None = None
    bytes: Count | None = None
    bytes_total: Count | None = None
    tokens: Count | None = None
    text_sha256: str | None = None

    def same_text(self, other: TextRecord) -> bool:
        """Whether both are of the same text; of earlier versions' of as many bytes. Of one corpus."""
        if self.text_sha256 is not None and other.text_sha256 is not None:
            return self.text_sha256 == other.text_sha256
        return self.bytes is not None and self.bytes == other.bytes


class TrainRecord(Strict):
    """train.json: what was trained, with which settings, and how long it took.

    `loss_spikes` of runs of earlier versions is None: no one looked. `parts`: what it was computed by, one
    after the other, where it went on elsewhere or by other code than it began. `validation`: the text that
    the curve is of, None of earlier versions. `depends`: role -> the run that the training depended on.
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


class Proportion(Strict):
    """An accuracy as a fraction 0..1, its 95% interval, and the number of items."""

    value: Fraction
    low: float
    high: float
    n: Count


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
    """Figures of the test text. `interval` is None for one document, and of earlier versions."""

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
    """evaluation.json: every evaluated checkpoint by name, and by what and how it was scored.

    Nothing of the latter in files of earlier versions. `readouts`: of the last checkpoint, by name.
    """

    device: str | None = None
    processor: str | None = None
    precision: str | None = None
    code: dict[str, str | None] = {}
    settings: dict[str, Any] | None = None
    checkpoints: dict[str, CheckpointResult]
    readouts: dict[str, ReadoutResult] = {}


class PublishedRecord(EvaluationRecord):
    """evaluation.json of a published model, with its size, how it was loaded, the token that starts texts.

    Files of earlier versions of STLM name neither.
    """

    parameters: Count
    prefix: str | None = None
    published: dict[str, Any] | None = None


@dataclass(frozen=True)
class PublishedResult:
    """A published model's scores, got as the runs' are; `items_path` has a row a scored option.

    `parameters_shown`: its size in the study's own words, where it has any. `prefix`: the token that starts a
    text; None where the file does not say.
    """

    name: str
    label: str
    parameters: int
    parameters_shown: str | None
    evaluation: EvaluationRecord
    prefix: str | None
    checkpoint: CheckpointResult
    items_path: Path
    evaluate_command: str


@dataclass(frozen=True)
class RunResult:
    """One run's files. `checkpoints` are sorted by step; `items` is read on demand, being the large one.

    `watch`: the rows of watch.csv; None where no layer was looked at, or by an earlier version.
    """

    name: str
    train: TrainRecord
    curve: pd.DataFrame
    watch: pd.DataFrame | None
    evaluation: EvaluationRecord
    checkpoints: dict[str, CheckpointResult]
    items_path: Path
    evaluate_command: str

    @property
    def last(self) -> CheckpointResult:
        """The last checkpoint: the one that the tables quote."""
        return list(self.checkpoints.values())[-1]

    def outcomes(self, checkpoint: str | None = None) -> pd.DataFrame:
        """The outcome of each item at `checkpoint` (None: the last): see `read_outcomes`.

        Raises UserError for a missing or corrupt file, naming the command that makes it.
        """
        chosen = checkpoint or list(self.checkpoints)[-1]
        try:
            outcomes = read_outcomes(self.items_path, chosen)
        except UserError as error:
            raise UserError(f"{error}: run `{self.evaluate_command}`") from error
        if outcomes.empty and self.checkpoints[chosen].benchmarks:
            raise _broken(self.items_path, f"has no rows of {chosen}", self.evaluate_command)
        return outcomes

    def facts(self) -> Facts | None:
        """What items.parquet says of itself; None where an earlier version of STLM wrote it."""
        try:
            return read_facts(self.items_path)
        except UserError as error:
            raise UserError(f"{error}: run `{self.evaluate_command}`") from error


def run_label(result: RunResult, results: Mapping[str, RunResult]) -> str:
    """The variant's label, with the seed where the variant has several runs."""
    several = sum(other.train.variant == result.train.variant for other in results.values()) > 1
    return f"{result.train.label} (seed {result.train.seed})" if several else result.train.label


def read_results(study: Study) -> dict[str, RunResult]:
    """Every run of the study by name, in the study's order, baseline first.

    Raises UserError naming each missing or broken file and the command that makes it.
    """
    results, problems = {}, []
    for name in sorted(study.runs, key=lambda name: name != study.baseline):
        try:
            results[name] = _read_run(study, study.runs[name])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return results


def read_published(study: Study) -> dict[str, PublishedResult]:
    """Every published model of the study by name, in the study's order.

    Raises UserError naming each missing or broken file and the command that makes it.
    """
    results, problems = {}, []
    for name, published in study.published.items():
        command = f"stlm evaluate {study.name} {name}"
        folder = published.results_folder
        try:
            record = _read_record(folder / "evaluation.json", PublishedRecord, command)
            if list(record.checkpoints) != ["published"]:
                raise _broken(folder / "evaluation.json", "is not of a published model", command)
            check_scored(study.evaluation, record.settings, folder / "evaluation.json", command)
            check_published(published, record.published, folder / "evaluation.json", command)
            if not (folder / "items.parquet").is_file():
                raise _broken(folder / "items.parquet", "is missing", command)
            check_beside(folder / "evaluation.json", "items.parquet")
        except UserError as error:
            problems.append(str(error))
            continue
        results[name] = PublishedResult(
            name,
            published.label,
            record.parameters,
            published.parameters,
            record,
            record.prefix,
            record.checkpoints["published"],
            folder / "items.parquet",
            command,
        )
    if problems:
        raise UserError("\n".join(problems))
    return results


def _broken(path: Path, what: str, command: str) -> UserError:
    return UserError(f"{path} {what}: run `{command}`")


def _read_record(path: Path, kind: type[Record], command: str) -> Record:
    if not path.is_file():
        raise _broken(path, "is missing", command)
    try:
        return read_record(path, kind)
    except UserError as error:
        if "run: stlm" in str(error):
            raise
        raise UserError(f"{error}: run `{command}`") from None


def _read_run(study: Study, run: Run) -> RunResult:
    train_command = f"stlm train {study.name} {run.name}"
    evaluate_command = f"stlm evaluate {study.name} {run.name}"
    train = _read_record(run.folder / "train.json", TrainRecord, train_command)
    check_trained(run, train, run.folder / "train.json", train_command)
    try:
        curve, watch = read_curve(run.folder / "curve.csv"), read_watch(run.folder / "watch.csv")
    except UserError as error:
        raise UserError(f"{error}: run `{train_command}`") from None
    check_beside(run.folder / "train.json", "curve.csv", "watch.csv")
    evaluation_path, items_path = run.folder / "evaluation.json", run.folder / "items.parquet"
    evaluation = _read_record(evaluation_path, EvaluationRecord, evaluate_command)
    check_scored(study.evaluation, evaluation.settings, evaluation_path, evaluate_command)
    if not evaluation.checkpoints:
        raise _broken(evaluation_path, "holds no checkpoint", evaluate_command)
    if not items_path.is_file():
        raise _broken(items_path, "is missing", evaluate_command)
    check_beside(evaluation_path, "items.parquet")
    checkpoints = dict(sorted(evaluation.checkpoints.items(), key=lambda item: item[1].step))
    trained = {checkpoint.step: checkpoint.weights_sha256 for checkpoint in train.checkpoints}
    for name, checkpoint in checkpoints.items():
        # Numbers of weights that are no longer there would be published under this run's name.
        if trained.get(checkpoint.step) != checkpoint.weights_sha256:
            raise _broken(
                evaluation_path, f"scored other weights for {name} than train.json lists", evaluate_command
            )
    return RunResult(run.name, train, curve, watch, evaluation, checkpoints, items_path, evaluate_command)
