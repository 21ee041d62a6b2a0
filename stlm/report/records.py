"""A study's records for git: results/STUDY/records/ holds a record a run, and its scores of documents.

train.json, evaluation.json and documents.parquet of every run are DVC's. What pages of documentation read of
them is here in two files a study, so that a clone without DVC's cache can show and compare every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stlm.files import atomic_path, read_json, write_record
from stlm.report.schema import EvaluationRecord, Strict, TrainRecord

RUNS, DOCUMENTS = "runs.json", "documents.parquet"
# Of documents.parquet of a run, what comparisons read.
_SCHEMA = pa.schema(
    {
        "run": pa.dictionary(pa.int32(), pa.string()),
        "step": pa.int64(),
        "component": pa.dictionary(pa.int32(), pa.string()),
        "text": pa.uint64(),
        "nats": pa.float64(),
        "n_bytes": pa.int64(),
    }
)


class RunRecord(Strict):
    """What train.json and evaluation.json of a run say; the latter without accuracies by group."""

    train: TrainRecord
    evaluation: EvaluationRecord


class StudyRecords(Strict):
    """records/runs.json: run -> record, the baseline's first."""

    runs: dict[str, RunRecord]


def write_records(folder: Path, runs: Mapping[str, Path]) -> None:
    """Write `folder`/runs.json and `folder`/documents.parquet.

    `runs`: name -> folder of its train.json, evaluation.json and documents.parquet. Accuracies by group are
    left out: tables/groups.csv has those of the last checkpoint. Of documents, the last checkpoint's are
    kept; a run evaluated by a version of STLM that scored none has none. Raises UserError for a damaged file.
    """
    records, tables = {}, [_SCHEMA.empty_table()]
    for run, path in runs.items():
        evaluation = read_json(path / "evaluation.json")
        last = max(checkpoint["step"] for checkpoint in evaluation["checkpoints"].values())
        for scored in (*evaluation["checkpoints"].values(), *evaluation.get("readouts", {}).values()):
            for benchmark in scored["benchmarks"].values():
                for mode in benchmark["modes"].values():
                    mode.pop("groups", None)  # most of the record's size
        records[run] = {"train": read_json(path / "train.json"), "evaluation": evaluation}
        if (path / DOCUMENTS).is_file():
            rows = pq.read_table(path / DOCUMENTS, columns=_SCHEMA.names[1:], filters=[("step", "==", last)])
            tables.append(rows.add_column(0, "run", pa.array([run] * len(rows))).cast(_SCHEMA))
    with atomic_path(folder / DOCUMENTS) as temporary:
        pq.write_table(pa.concat_tables(tables).unify_dictionaries(), temporary, compression="zstd")
    write_record(folder / RUNS, {"runs": records}, lists=[DOCUMENTS])
