"""What a study's runs and published models left, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from stlm.errors import UserError
from stlm.evaluation.predictions import Facts, read_facts
from stlm.files import Record, read_record
from stlm.integrity import check_listed
from stlm.report.documents import Documents, documents_of
from stlm.report.run_files import read_curve, read_outcomes, read_watch
from stlm.report.schema import CheckpointResult, EvaluationRecord, Perplexity, PublishedRecord, TrainRecord
from stlm.report.settings_check import check_dependencies, check_published, check_scored, check_trained
from stlm.study.runs import PublishedModel, Run, Study

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """The scores of a run or of a published model. `checkpoints` are sorted by step.

    `label`: its name in tables and plots, with the seed where the variant has several runs. items.parquet
    and documents.parquet, which are large, are read on demand; errors name the command that writes them.
    """

    name: str
    label: str
    evaluation: EvaluationRecord
    checkpoints: dict[str, CheckpointResult]
    items_path: Path
    evaluate_command: str

    @property
    def last(self) -> CheckpointResult:
        """The last checkpoint: the one that the tables quote."""
        return list(self.checkpoints.values())[-1]

    @property
    def perplexity(self) -> Perplexity:
        """Figures of the test text at the last checkpoint."""
        return self.last.perplexity

    def word_perplexity(self, benchmark: str, mode: str) -> float | None:
        """The perplexity of a word at the last checkpoint; None for a benchmark that measures none."""
        scored = self.last.benchmarks.get(benchmark)
        return scored.modes[mode].word_perplexity if scored and mode in scored.modes else None

    def outcomes(self, checkpoint: str | None = None) -> pd.DataFrame:
        """The outcome of each item at `checkpoint` (None: the last): see `read_outcomes`.

        Raises UserError for a missing or corrupt file.
        """
        name = checkpoint or list(self.checkpoints)[-1]
        outcomes = _with_command(self.evaluate_command, read_outcomes, self.items_path, name)
        if outcomes.empty and self.checkpoints[name].benchmarks:
            raise _broken(self.items_path, f"has no rows of {name}", self.evaluate_command)
        return outcomes

    def facts(self) -> Facts | None:
        """The metadata of items.parquet; None where an earlier version of STLM wrote it."""
        return _with_command(self.evaluate_command, read_facts, self.items_path)

    def documents(self) -> Documents | None:
        """The documents of the last checkpoint: see `documents_of`."""
        path = self.items_path.with_name("documents.parquet")
        return documents_of(path.with_name("evaluation.json"), path, self.last, self.evaluate_command)


@dataclass(frozen=True, kw_only=True)
class RunResult(ScoredModel):
    """A run's files. `watch`: the rows of watch.csv; None where no layer was watched."""

    train: TrainRecord
    curve: pd.DataFrame
    watch: pd.DataFrame | None


@dataclass(frozen=True, kw_only=True)
class PublishedResult(ScoredModel):
    """A published model, evaluated as the runs were."""

    parameters: int
    parameters_shown: str | None  # its size as the study writes it, if it does
    prefix: str | None  # the token that starts a text; None where the file does not say


class Results(dict[str, RunResult]):
    """The runs of a study by name, the baseline first, and its `published` models by name."""

    def __init__(self, study: Study, runs: dict[str, RunResult], published: dict[str, PublishedResult]):
        super().__init__(runs)
        self.study, self.published = study, published
        self.base = runs[study.baseline]
        # The runs of each variant, one for each seed; the baseline's first.
        self.variants: dict[str, list[RunResult]] = {}
        for run in runs.values():
            self.variants.setdefault(run.train.variant, []).append(run)
        # The label of each run, and the test text that it was last measured on.
        self.texts = [(run.label, run.perplexity) for run in runs.values()]
        # The benchmarks that any run was last scored on.
        self.benchmarks = list(dict.fromkeys(name for run in runs.values() for name in run.last.benchmarks))
        # The mode that plots and metrics quote: harness, or paper where that is the only one scored.
        modes = {mode for run in runs.values() for _, mode, _ in run.last.scores}
        self.mode = "harness" if "harness" in modes or not modes else "paper"


def read_results(study: Study) -> Results:
    """Every run and published model of the study, in its order, the baseline first.

    Raises UserError naming each missing or broken file and the command that makes it.
    """
    names = sorted(study.runs, key=lambda name: name != study.baseline)
    runs = _read_all(names, lambda name: _read_run(study, study.runs[name]))
    check_dependencies(study, {name: result.train for name, result in runs.items()})
    published = _read_all(study.published, lambda name: _read_published(study, study.published[name]))
    return Results(study, runs, published)


def _read_all(names: Iterable[str], read: Callable[[str], Read]) -> dict[str, Read]:
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


def _broken(path: Path, problem: str, command: str) -> UserError:
    return UserError(f"{path} {problem}: run `{command}`")


def _with_command(command: str, read: Callable[..., Read], *arguments: object) -> Read:
    """`read(*arguments)`; its error names the command that makes the file again, unless it does already."""
    try:
        return read(*arguments)
    except UserError as error:
        if "run: stlm" in str(error):
            raise
        raise UserError(f"{error}: run `{command}`") from error


def _read_record(path: Path, kind: type[Record], command: str) -> Record:
    if not path.is_file():
        raise _broken(path, "is missing", command)
    return _with_command(command, read_record, path, kind)


def _read_scores(
    study: Study, folder: Path, kind: type[EvaluationRecord], name: str, label: str
) -> dict[str, Any]:
    """The fields of a `ScoredModel`, scored as the study asks, with its items.parquet there and undamaged."""
    path, items = folder / "evaluation.json", folder / "items.parquet"
    command = f"stlm evaluate {study.name} {name}"
    record = _read_record(path, kind, command)
    check_scored(study.evaluation, record.settings, path, command)
    if not record.checkpoints:
        raise _broken(path, "holds no checkpoint", command)
    if not items.is_file():
        raise _broken(items, "is missing", command)
    check_listed(path, items.name)
    checkpoints = dict(sorted(record.checkpoints.items(), key=lambda item: item[1].step))
    read = {"name": name, "label": label, "evaluation": record, "checkpoints": checkpoints}
    return read | {"items_path": items, "evaluate_command": command}


def _read_published(study: Study, model: PublishedModel) -> PublishedResult:
    path = model.results_folder / "evaluation.json"
    scores = _read_scores(study, path.parent, PublishedRecord, model.name, model.label)
    record, command = scores["evaluation"], scores["evaluate_command"]
    if list(record.checkpoints) != ["published"]:
        raise _broken(path, "is not of a published model", command)
    check_published(model, record.published, path, command)
    sizes = {"parameters": record.parameters, "parameters_shown": model.parameters}
    return PublishedResult(**scores, **sizes, prefix=record.prefix)


def expected_readouts(run: Run) -> set[str]:
    """The names of the language models within a run's model that evaluation scores besides it."""
    if not run.techniques:
        return set()
    from stlm.model.counts import build_on_meta

    techniques = tuple(run.techniques.values())
    model = build_on_meta(run.model, techniques)
    return {name for technique in techniques for name in technique.readouts(model)}


def _read_run(study: Study, run: Run) -> RunResult:
    command, folder = f"stlm train {study.name} {run.name}", run.folder
    train = _read_record(folder / "train.json", TrainRecord, command)
    check_trained(run, train, folder / "train.json", command)
    curve = _with_command(command, read_curve, folder / "curve.csv")
    watch = _with_command(command, read_watch, folder / "watch.csv")
    check_listed(folder / "train.json", "curve.csv", "watch.csv")
    several = sum(other.variant == run.variant for other in study.runs.values()) > 1
    label = f"{train.label} (seed {train.seed})" if several else train.label
    scores = _read_scores(study, folder, EvaluationRecord, run.name, label)
    trained = {checkpoint.step: checkpoint.weights_sha256 for checkpoint in train.checkpoints}
    for name, checkpoint in scores["checkpoints"].items():
        # Numbers of weights that are no longer there would be published under this run's name.
        if trained.get(checkpoint.step) != checkpoint.weights_sha256:
            problem = f"scored other weights for {name} than train.json lists"
            raise _broken(folder / "evaluation.json", problem, scores["evaluate_command"])
    if missing := expected_readouts(run) - scores["evaluation"].readouts.keys():
        problem = f"has no scores of {', '.join(sorted(missing))}"
        raise _broken(folder / "evaluation.json", problem, scores["evaluate_command"])
    return RunResult(**scores, train=train, curve=curve, watch=watch)
