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
from stlm.integrity import check_listed
from stlm.remedy import remedy
from stlm.report.documents import Difference, Documents, compare_seeds, read_documents
from stlm.report.records import DOCUMENTS, RUNS, StudyRecords
from stlm.report.results import CheckpointResult, EvaluationRecord, TextRecord, TrainRecord


def read_committed(folder: Path) -> Iterator[tuple[str, TrainRecord, CheckpointResult, EvaluationRecord]]:
    """Each run of a study's folder in `results/`: name, train.json, last checkpoint, and its evaluation.json.

    In the order of metrics.json, the baseline's first. Raises UserError naming a file that is missing or
    broken.
    """
    records = read_record(folder / "records" / RUNS, StudyRecords).runs
    _check_metrics(folder / "metrics.json", list(records))
    for run, record in records.items():
        train, scored = record.train, record.evaluation
        yield run, train, max(scored.checkpoints.values(), key=lambda checkpoint: checkpoint.step), scored


def _check_metrics(path: Path, expected: list[str]) -> None:
    """Compare the runs of metrics.json, which cannot have a checksum of its own: `dvc metrics` reads it."""
    if (found := list(read_json(path))) != expected:
        raise UserError(
            f"{path}: damaged, or changed by hand: found the runs {', '.join(found)}, expected "
            f"{', '.join(expected)}; {remedy(path)}"
        )


def committed_documents(folder: Path, run: str, last: CheckpointResult) -> Documents | None:
    """The documents of a run's last checkpoint; None if an earlier version kept none.

    Raises UserError where they are missing or disagree with the run's record.
    """
    if last.perplexity.text_sha256 is None:
        return None
    records = folder / "records"
    check_listed(records / RUNS, DOCUMENTS)
    try:
        return read_documents(records / DOCUMENTS, last.step, last.perplexity, run)
    except UserError as error:
        raise UserError(f"{error}: run `stlm report {folder.name}`") from None


@dataclass
class CommittedVariant:
    """The runs of a variant by name, their last checkpoints, and by seed the documents, if git keeps them."""

    trains: dict[str, TrainRecord] = field(default_factory=dict)
    last: dict[str, CheckpointResult] = field(default_factory=dict)
    documents: dict[int, Documents | None] = field(default_factory=dict)

    @property
    def train(self) -> TrainRecord:
        """The first run's record."""
        return next(iter(self.trains.values()))

    @property
    def text(self) -> TextRecord:
        """How much test text bits per byte are measured on."""
        return next(iter(self.last.values())).perplexity

    @property
    def bits(self) -> dict[int, float]:
        """Bits per byte of test text by seed."""
        return {train.seed: self.last[run].perplexity.bits_per_byte for run, train in self.trains.items()}

    def over_documents(self, base: CommittedVariant) -> Difference | None:
        """The paired difference from `base` over documents; None where that cannot be told."""
        return compare_seeds(self.documents, base.documents)


def read_variants(folder: Path) -> dict[str, CommittedVariant]:
    """The variants of a study's folder in `results/`, in the order of its report, the baseline first.

    Raises UserError where a file is missing or broken, or disagrees with another.
    """
    variants: dict[str, CommittedVariant] = {}
    for run, train, last, _ in read_committed(folder):
        own = variants.setdefault(train.variant, CommittedVariant())
        own.trains[run], own.last[run] = train, last
        own.documents[train.seed] = committed_documents(folder, run, last)
    return variants


def differences(own: dict[int, float], base: dict[int, float]) -> list[float]:
    """`own` less `base`, for the seeds that both have."""
    return [value - base[seed] for seed, value in own.items() if seed in base]
