"""Reads what git keeps of a study's results, without their large files, for pages that show them.

`records/` holds the runs' records. `tables/checksum.json` lists the tables that pages show; reports of
earlier versions have none, and then nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stlm.errors import UserError
from stlm.files import read_json, read_record
from stlm.remedy import remedy
from stlm.report.documents import TextScores, documents_of
from stlm.report.records import DOCUMENTS, RUNS, StudyRecords
from stlm.report.schema import CheckpointResult, EvaluationRecord, TrainRecord


def read_committed(folder: Path) -> Iterator[tuple[TrainRecord, CheckpointResult, EvaluationRecord]]:
    """Each run of a study's folder in `results/`: train.json, last checkpoint, and its evaluation.json.

    In the order of metrics.json, the baseline's first. Raises UserError naming a file that is missing or
    broken.
    """
    records = read_record(folder / "records" / RUNS, StudyRecords).runs
    _check_metrics(folder / "metrics.json", list(records))
    for record in records.values():
        last = max(record.evaluation.checkpoints.values(), key=lambda checkpoint: checkpoint.step)
        yield record.train, last, record.evaluation


def _check_metrics(path: Path, expected: list[str]) -> None:
    """Compare the runs of metrics.json, which cannot have a checksum of its own: `dvc metrics` reads it."""
    if (found := list(read_json(path))) != expected:
        raise UserError(
            f"{path}: damaged, or changed by hand: found the runs {', '.join(found)}, expected "
            f"{', '.join(expected)}; {remedy(path)}"
        )


@dataclass
class CommittedVariant(TextScores):
    """A variant's runs by seed: their records and last checkpoints, and documents, if git keeps them."""

    trains: dict[int, TrainRecord] = field(default_factory=dict)

    @property
    def train(self) -> TrainRecord:
        """The first run's record."""
        return next(iter(self.trains.values()))


def read_variants(folder: Path) -> dict[str, CommittedVariant]:
    """The variants of a study's folder in `results/`, in the order of its report, the baseline first.

    Raises UserError where a file is missing or broken, or disagrees with another.
    """
    variants: dict[str, CommittedVariant] = {}
    records, command = folder / "records", f"stlm report {folder.name}"
    for train, last, _ in read_committed(folder):
        variant = variants.setdefault(train.variant, CommittedVariant(train.label))
        variant.trains[train.seed], variant.last[train.seed] = train, last
        documents = documents_of(records / RUNS, records / DOCUMENTS, last, command, train.run)
        variant.documents[train.seed] = documents
    return variants


def differences(values: dict[int, float], base: dict[int, float]) -> list[float]:
    """`values` minus those of the baseline, for the seeds that both have."""
    return [value - base[seed] for seed, value in values.items() if seed in base]
