"""What git keeps of a study's runs, read without their large files, for pages that show committed results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stlm.files import read_json, read_record
from stlm.report.documents import Documents, checkpoint_documents
from stlm.report.results import CheckpointResult, EvaluationRecord, TrainRecord


def read_committed(folder: Path) -> Iterator[tuple[str, TrainRecord, CheckpointResult, EvaluationRecord]]:
    """Each run of a study's folder in `results/`: name, train.json, last checkpoint, and its evaluation.json.

    In the order of metrics.json, the baseline's first. Raises UserError naming a file that is missing or
    broken.
    """
    for run in read_json(folder / "metrics.json"):
        train = read_record(folder / "runs" / run / "train.json", TrainRecord)
        scored = read_record(folder / "runs" / run / "evaluation.json", EvaluationRecord)
        yield run, train, max(scored.checkpoints.values(), key=lambda checkpoint: checkpoint.step), scored


def committed_documents(folder: Path, run: str, last: CheckpointResult) -> Documents | None:
    """The documents of a run's last checkpoint, which git keeps too; None of an earlier version of STLM.

    Raises UserError where they are missing or not what evaluation.json says.
    """
    return checkpoint_documents(folder / "runs" / run, last, f"stlm evaluate {folder.name} {run}")
