"""What git keeps of a study's results, read without their large files, for pages that show committed results.

`records/` has what runs say of themselves. `tables/checksum.json` lists the tables that such pages show;
reports of earlier versions have none, and then nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stlm.errors import UserError
from stlm.files import content_sha256, read_json, read_record, write_record
from stlm.integrity import check_beside
from stlm.remedy import remedy
from stlm.report.documents import Documents, read_documents
from stlm.report.records import DOCUMENTS, RUNS, StudyRecords
from stlm.report.results import CheckpointResult, EvaluationRecord, TrainRecord

_LIST = "checksum.json"
_READ = (".csv", ".md")  # of a table, what is read again


def write_checksums(tables: Path) -> None:
    """Write the list of the files in `tables`."""
    files = {path.name: content_sha256(path) for path in sorted(tables.iterdir()) if path.suffix in _READ}
    write_record(tables / _LIST, {}, files=files)


def read_table(path: Path) -> str:
    """The text of a file of `tables/`; UserError where it is not as the report wrote it."""
    check_beside(path.with_name(_LIST), path.name)
    return path.read_text(encoding="utf-8")


def read_committed(folder: Path) -> Iterator[tuple[str, TrainRecord, CheckpointResult, EvaluationRecord]]:
    """Each run of a study's folder in `results/`: name, train.json, last checkpoint, and its evaluation.json.

    In the order of metrics.json, the baseline's first. Raises UserError naming a file that is missing or
    broken.
    """
    records = read_record(folder / "records" / RUNS, StudyRecords).runs
    _check_metrics(folder / "metrics.json", list(records))
    for run, own in records.items():
        train, scored = own.train, own.evaluation
        yield run, train, max(scored.checkpoints.values(), key=lambda checkpoint: checkpoint.step), scored


def _check_metrics(path: Path, expected: list[str]) -> None:
    """Compare the runs of metrics.json, which cannot have a checksum of its own: `dvc metrics` reads it."""
    if (found := list(read_json(path))) != expected:
        raise UserError(
            f"{path}: damaged, or changed by hand: found the runs {', '.join(found)}, expected "
            f"{', '.join(expected)}; {remedy(path)}"
        )


def committed_documents(folder: Path, run: str, last: CheckpointResult) -> Documents | None:
    """The documents of a run's last checkpoint; None of an earlier version of STLM.

    Raises UserError where they are missing or not what the run's record says.
    """
    if last.perplexity.text_sha256 is None:
        return None
    records = folder / "records"
    check_beside(records / RUNS, DOCUMENTS)
    try:
        return read_documents(records / DOCUMENTS, last.step, last.perplexity, run)
    except UserError as error:
        raise UserError(f"{error}: run `stlm report {folder.name}`") from None
