"""What a run left, read and checked: train.json, evaluation.json, curve.csv, watch.csv, items.parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd

from stlm.errors import UserError
from stlm.evaluation.predictions import Facts, read_facts
from stlm.files import Record, read_record
from stlm.integrity import check_listed
from stlm.report.run_files import read_curve, read_outcomes, read_watch
from stlm.report.schema import (
    BenchmarkResult,
    CheckpointResult,
    EvaluationRecord,
    LossSpike,
    Perplexity,
    Proportion,
    PublishedRecord,
    TextRecord,
    TrainRecord,
)
from stlm.report.settings_check import check_dependencies, check_published, check_scored, check_trained
from stlm.study.runs import PublishedModel, Run, Study

__all__ = [
    "BenchmarkResult",
    "CheckpointResult",
    "EvaluationRecord",
    "LossSpike",
    "Perplexity",
    "Proportion",
    "PublishedRecord",
    "PublishedResult",
    "RunResult",
    "TextRecord",
    "TrainRecord",
    "read_published",
    "read_results",
    "run_label",
]
Result = TypeVar("Result")


@dataclass(frozen=True)
class PublishedResult:
    """The scores of a published model, evaluated as the runs were; `items_path` has a row a scored option.

    `parameters_shown`: its size as the study writes it, if it does. `prefix`: the token that starts a text;
    None where the file does not say.
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
    """One run's files. `checkpoints` are sorted by step; items.parquet, which is large, is read on demand.

    `watch`: the rows of watch.csv; None where no layer was watched, or by an earlier version.
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

    def word_perplexity(self, benchmark: str, mode: str) -> float | None:
        """The perplexity of a word at the last checkpoint; None for a benchmark that measures none."""
        scored = self.last.benchmarks.get(benchmark)
        return scored.modes[mode].word_perplexity if scored and mode in scored.modes else None

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
        """The metadata of items.parquet; None where an earlier version of STLM wrote it."""
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
    names = sorted(study.runs, key=lambda name: name != study.baseline)
    results = _read_all(names, lambda name: _read_run(study, study.runs[name]))
    check_dependencies(study, {name: result.train for name, result in results.items()})
    return results


def read_published(study: Study) -> dict[str, PublishedResult]:
    """Every published model of the study by name, in the study's order.

    Raises UserError naming each missing or broken file and the command that makes it.
    """
    return _read_all(study.published, lambda name: _read_published(study, study.published[name]))


def _read_all(names: Iterable[str], read: Callable[[str], Result]) -> dict[str, Result]:
    """What `read` gives for each name; what is wrong with any of them, all at once."""
    results, problems = {}, []
    for name in names:
        try:
            results[name] = read(name)
        except UserError as error:
            problems.append(str(error))
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


def _read_scores(study: Study, folder: Path, kind: type[Record], command: str) -> Record:
    """The evaluation.json of `folder`, scored as the study asks, with its items.parquet there and whole."""
    path, items = folder / "evaluation.json", folder / "items.parquet"
    record = _read_record(path, kind, command)
    check_scored(study.evaluation, record.settings, path, command)
    if not record.checkpoints:
        raise _broken(path, "holds no checkpoint", command)
    if not items.is_file():
        raise _broken(items, "is missing", command)
    check_listed(path, items.name)
    return record


def _read_published(study: Study, model: PublishedModel) -> PublishedResult:
    command, folder = f"stlm evaluate {study.name} {model.name}", model.results_folder
    record = _read_scores(study, folder, PublishedRecord, command)
    if list(record.checkpoints) != ["published"]:
        raise _broken(folder / "evaluation.json", "is not of a published model", command)
    check_published(model, record.published, folder / "evaluation.json", command)
    return PublishedResult(
        name=model.name,
        label=model.label,
        parameters=record.parameters,
        parameters_shown=model.parameters,
        evaluation=record,
        prefix=record.prefix,
        checkpoint=record.checkpoints["published"],
        items_path=folder / "items.parquet",
        evaluate_command=command,
    )


def expected_readouts(run: Run) -> set[str]:
    """The names of the language models within a run's model that evaluation scores besides it."""
    if not run.techniques:
        return set()
    from stlm.model.counts import build_on_meta

    techniques = tuple(run.techniques.values())
    model = build_on_meta(run.model, techniques)
    return {name for technique in techniques for name in technique.readouts(model)}


def _read_run(study: Study, run: Run) -> RunResult:
    train_command = f"stlm train {study.name} {run.name}"
    evaluate_command = f"stlm evaluate {study.name} {run.name}"
    train = _read_record(run.folder / "train.json", TrainRecord, train_command)
    check_trained(run, train, run.folder / "train.json", train_command)
    try:
        curve, watch = read_curve(run.folder / "curve.csv"), read_watch(run.folder / "watch.csv")
    except UserError as error:
        raise UserError(f"{error}: run `{train_command}`") from None
    check_listed(run.folder / "train.json", "curve.csv", "watch.csv")
    evaluation = _read_scores(study, run.folder, EvaluationRecord, evaluate_command)
    checkpoints = dict(sorted(evaluation.checkpoints.items(), key=lambda item: item[1].step))
    trained = {checkpoint.step: checkpoint.weights_sha256 for checkpoint in train.checkpoints}
    for name, checkpoint in checkpoints.items():
        # Numbers of weights that are no longer there would be published under this run's name.
        if trained.get(checkpoint.step) != checkpoint.weights_sha256:
            what = f"scored other weights for {name} than train.json lists"
            raise _broken(run.folder / "evaluation.json", what, evaluate_command)
    missing = expected_readouts(run) - evaluation.readouts.keys()
    if missing:
        what = f"has no scores of {', '.join(sorted(missing))}"
        raise _broken(run.folder / "evaluation.json", what, evaluate_command)
    items = run.folder / "items.parquet"
    return RunResult(run.name, train, curve, watch, evaluation, checkpoints, items, evaluate_command)
