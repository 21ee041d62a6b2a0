"""What a run left behind, read and checked: {train,evaluation}.json, {curve,watch}.csv, items.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from stlm.errors import UserError
from stlm.evaluation.predictions import Facts, read_facts
from stlm.files import Record, read_record
from stlm.integrity import check_beside
from stlm.report.asked import check_published, check_scored, check_trained
from stlm.study import Run, Study
from stlm.tokens.config import DataConfig

ITEM_COLUMNS = ["benchmark", "mode", "item", "option", "gold", "logprob", "n_chars", "greedy"]
CURVE_COLUMNS = [
    *("step", "tokens", "seconds", "learning_rate", "train_loss", "grad_norm", "tokens_per_second"),
    *("val_loss", "val_bits_per_byte", "val_char_perplexity"),
]
WATCH_COLUMNS = ["step", "layer"]  # those of the figures may come and go


class ParameterCounts(BaseModel):
    total: int
    embedding: int
    non_embedding: int


class CheckpointReference(BaseModel):
    step: int
    tokens: int
    weights_sha256: str


class LossSpike(BaseModel):
    """A loss (nats) far above the level of the steps before, `level`; `rise`: its height at the worst step.

    `recovered_after`: steps until the loss was back at the level; None where it never was.
    """

    step: int
    loss: float
    level: float
    rise: float
    grad_norm: float
    recovered_after: int | None


class Truncation(BaseModel):
    """What cutting matrices to lower ranks lost, of all their Frobenius norm together."""

    relative_error: float


class StartRecord(BaseModel):
    """The run whose last weights a run started from, and what they had cost."""

    run: str
    tokens: int
    flops: float
    truncation: Truncation | None = None


class TextRecord(BaseModel):
    """How much held-out text a figure is of, of how much there is; `text_sha256` is equal for equal text.

    What earlier versions did not write is None.
    """

    documents: int | None = None
    documents_total: int | None = None
    bytes: int | None = None
    bytes_total: int | None = None
    tokens: int | None = None
    text_sha256: str | None = None

    def same_text(self, other: TextRecord) -> bool:
        """Whether both are of the same text; of earlier versions' of as many bytes. Of one corpus."""
        if self.text_sha256 is not None and other.text_sha256 is not None:
            return self.text_sha256 == other.text_sha256
        return self.bytes is not None and self.bytes == other.bytes


class TrainRecord(BaseModel):
    """train.json: what was trained, with which settings, and how long it took.

    `loss_spikes` of runs of earlier versions is None: no one looked. `parts`: what it was computed by, one
    after the other, where it went on elsewhere or by other code than it began. `validation`: the text that
    the curve is of, None of earlier versions.
    """

    run: str
    variant: str
    label: str
    seed: int
    parameters: ParameterCounts
    steps: int
    tokens: int
    seconds: float
    flops: float
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
    validation: TextRecord | None = None
    loss_spikes: list[LossSpike] | None = None
    start: StartRecord | None = None
    corpus: str
    tokenizer: str
    checkpoints: list[CheckpointReference]
    code: dict[str, str | None] = {}


class Proportion(BaseModel):
    """An accuracy as a fraction 0..1, its 95% interval, and the number of items."""

    value: float
    low: float
    high: float
    n: int


class ModeResult(BaseModel):
    acc: Proportion
    acc_norm: Proportion | None = None
    word_perplexity: float | None = None
    truncated: int = 0
    groups: dict[str, dict[str, Proportion]] = {}


class BenchmarkResult(BaseModel):
    version: str | int | float
    items: int
    items_total: int
    limit: int | None = None
    modes: dict[str, ModeResult]


class DocumentInterval(BaseModel):
    """The 95% interval of bits per byte over documents; `few_documents`: so few that it is too narrow."""

    low: float
    high: float
    few_documents: bool


class Perplexity(TextRecord):
    """Figures of the test text. `interval` is None for one document, and of earlier versions."""

    bits_per_byte: float
    char_perplexity: float
    interval: DocumentInterval | None = None
    components: dict[str, Perplexity] = {}


class CheckpointResult(BaseModel):
    step: int
    tokens: int
    weights_sha256: str
    perplexity: Perplexity
    benchmarks: dict[str, BenchmarkResult]


class EvaluationRecord(BaseModel):
    """evaluation.json: every evaluated checkpoint by name, and by what and how it was scored.

    Nothing of the latter in files of earlier versions.
    """

    device: str | None = None
    processor: str | None = None
    precision: str | None = None
    code: dict[str, str | None] = {}
    settings: dict[str, Any] | None = None
    checkpoints: dict[str, CheckpointResult]


class PublishedRecord(EvaluationRecord):
    """evaluation.json of a published model, with the number of its parameters, and how it was loaded."""

    parameters: int
    published: dict[str, Any] | None = None


@dataclass(frozen=True)
class PublishedResult:
    """A published model's scores, got as the runs' are; `items_path` has a row a scored option.

    `parameters_shown`: its size in the study's own words, where it has any.
    """

    name: str
    label: str
    parameters: int
    parameters_shown: str | None
    evaluation: EvaluationRecord
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


def read_outcomes(path: Path, checkpoint: str) -> pd.DataFrame:
    """The outcome of each item of an items.parquet at `checkpoint`, indexed by (benchmark, mode, item).

    Columns: those of `score_items`, and group (the item's finest, "" where it has none). Raises UserError
    where the file is missing or unreadable.
    """
    try:
        # Files from before there were items of one option lack the column that says what these need.
        held = pq.read_schema(path).names
        columns = [name for name in (*ITEM_COLUMNS, "group") if name in held or name != "greedy"]
        table = pq.read_table(path, columns=columns, filters=[("checkpoint", "==", checkpoint)])
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    options = table.to_pandas()
    keys = ["benchmark", "mode", "item"]
    groups = options.drop_duplicates(keys).set_index(keys)["group"]
    return score_items(options).join(groups)


def score_items(options: pd.DataFrame) -> pd.DataFrame:
    """Outcomes by item, indexed by (benchmark, mode, item), from one row an option (columns ITEM_COLUMNS).

    Columns: acc and acc_norm (1 right, 0 wrong, 1/k where the right option ties with k-1 others for the
    best; of an item of one option, whether it is what the model itself would say), chance (the expected score
    of a blind choice, 0 where there is one option).
    """
    keys = ["benchmark", "mode", "item"]
    scored = options[keys].copy()
    gold = options["gold"].to_numpy(bool)
    scores = {"acc": options["logprob"], "acc_norm": options["logprob"] / options["n_chars"].clip(lower=1)}
    by_item = scored.groupby(keys, sort=False, observed=True)
    item = by_item.ngroup().to_numpy()
    best = {name: score.groupby(item).transform("max") == score for name, score in scores.items()}
    columns = {"chance": gold.astype(float)}
    columns |= {f"{name}_best": is_best.astype(float) for name, is_best in best.items()}
    columns |= {f"{name}_right": (is_best & gold).astype(float) for name, is_best in best.items()}
    columns["greedy"] = options["greedy"].eq(True).astype(float) if "greedy" in options else 0.0
    sums = scored.assign(**columns, options=1.0).groupby(keys, sort=False, observed=True).sum()
    outcomes = pd.DataFrame(
        {
            "acc": sums["acc_right"] / sums["acc_best"],
            "acc_norm": sums["acc_norm_right"] / sums["acc_norm_best"],
            "chance": sums["chance"] / sums["options"],
        }
    )
    # There is nothing to choose from where there is one option: the model says it unasked or does not.
    alone = sums["options"] == 1
    outcomes.loc[alone, ["acc", "acc_norm"]] = sums.loc[alone, ["greedy", "greedy"]].to_numpy()
    outcomes.loc[alone, "chance"] = 0.0
    return outcomes


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
        raise UserError(f"{error}\nTo make it again, delete it and run `{command}`") from None


def _read_rows(path: Path, columns: list[str], command: str, texts: tuple[str, ...] = ()) -> pd.DataFrame:
    """A CSV file with at least `columns`, numbers all but `texts`."""
    if not path.is_file():
        raise _broken(path, "is missing", command)
    try:
        rows = pd.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' parser and decoding errors are ValueErrors
        raise _broken(path, f"cannot be read ({error})", command) from None
    missing = [column for column in columns if column not in rows]
    if missing:
        found = ", ".join(rows.columns)
        raise _broken(path, f"has no column {', '.join(missing)} (found: {found})", command)
    numbers = [column for column in columns if column not in texts]
    text = [column for column in numbers if len(rows) and not pd.api.types.is_numeric_dtype(rows[column])]
    if text:
        raise _broken(path, f"has values that are not numbers in column {', '.join(text)}", command)
    return rows


def _read_watch(path: Path, command: str) -> pd.DataFrame | None:
    if not path.is_file():  # of an earlier version
        return None
    rows = _read_rows(path, WATCH_COLUMNS, command, texts=("layer",))
    return rows if len(rows) else None


def _read_run(study: Study, run: Run) -> RunResult:
    train_command = f"stlm train {study.name} {run.name}"
    evaluate_command = f"stlm evaluate {study.name} {run.name}"
    train = _read_record(run.folder / "train.json", TrainRecord, train_command)
    check_trained(run, train, run.folder / "train.json", train_command)
    curve = _read_rows(run.folder / "curve.csv", CURVE_COLUMNS, train_command)
    watch = _read_watch(run.folder / "watch.csv", train_command)
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
