"""What git keeps of a study's results, read without their large files, for pages that show committed results.

`tables/checksum.json` lists the tables that such pages show, and has the runs of metrics.json. Reports of
earlier versions have none; then nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from stlm.errors import UserError
from stlm.files import content_sha256, read_json, read_record, write_record
from stlm.integrity import check_beside
from stlm.remedy import remedy
from stlm.report.documents import Documents, checkpoint_documents
from stlm.report.results import CheckpointResult, EvaluationRecord, TrainRecord

_LIST = "checksum.json"
_READ = (".csv", ".md")  # of a table, what is read again


def write_checksums(tables: Path, runs: Iterable[str]) -> None:
    """Write the list of the files in `tables`, and of the study's `runs` in the order of the report."""
    files = {path.name: content_sha256(path) for path in sorted(tables.iterdir()) if path.suffix in _READ}
    write_record(tables / _LIST, {"runs": list(runs)}, files=files)


def read_table(path: Path) -> str:
    """The text of a file of `tables/`; UserError where it is not as the report wrote it."""
    check_beside(path.with_name(_LIST), path.name)
    return path.read_text(encoding="utf-8")


def read_committed(folder: Path) -> Iterator[tuple[str, TrainRecord, CheckpointResult, EvaluationRecord]]:
    """Each run of a study's folder in `results/`: name, train.json, last checkpoint, and its evaluation.json.

    In the order of metrics.json, the baseline's first. Raises UserError naming a file that is missing or
    broken.
    """
    for run in _runs(folder):
        train = read_record(folder / "runs" / run / "train.json", TrainRecord)
        scored = read_record(folder / "runs" / run / "evaluation.json", EvaluationRecord)
        yield run, train, max(scored.checkpoints.values(), key=lambda checkpoint: checkpoint.step), scored


def _runs(folder: Path) -> list[str]:
    """The runs of metrics.json, which cannot have a checksum of its own: `dvc metrics` reads it."""
    path, listed = folder / "metrics.json", folder / "tables" / _LIST
    runs = list(read_json(path))
    if listed.is_file() and (expected := read_json(listed)["runs"]) != runs:
        raise UserError(
            f"{path}: damaged, or changed by hand: found the runs {', '.join(runs)}, expected "
            f"{', '.join(expected)}; {remedy(path)}"
        )
    return runs


def committed_documents(folder: Path, run: str, last: CheckpointResult) -> Documents | None:
    """The documents of a run's last checkpoint, which git keeps too; None of an earlier version of STLM.

    Raises UserError where they are missing or not what evaluation.json says.
    """
    return checkpoint_documents(folder / "runs" / run, last, f"stlm evaluate {folder.name} {run}")
