"""README.md: what came of a model that inherits from a larger one, beside its parent and one from scratch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from stlm.docs_pages.committed import read_committed
from stlm.report.names import benchmark_label
from stlm.report.schema import TrainRecord
from stlm.report.table import Table, markdown, read_table

# Benchmarks with the metric by which the paper and its peers report them.
_SHOWN = (("blimp", "acc"), ("hellaswag", "acc_norm"), ("arc_easy", "acc"))
_TABLES = {"acc": "table2.csv", "acc_norm": "table2-acc-norm.csv"}


def inherited_block(folder: Path) -> str:
    """A table of the runs and published models of the study whose results are in `folder`, as Markdown.

    Raises UserError where a file is missing, or was changed by hand.
    """
    return markdown(inherited_table(folder))


def inherited_table(folder: Path) -> Table:
    """A row a run, then a row a published model: processor time, bits per byte and accuracies."""
    scores = {metric: _scores(folder / "tables" / name) for metric, name in _TABLES.items()}
    trains = {train.run: train for train, _, _ in read_committed(folder)}
    return Table.of_columns(
        "inherited",
        f"Study {folder.name}: bits per byte, and accuracies in %",
        [
            _columns(trains.get(name), {metric: rows[name] for metric, rows in scores.items()})
            for name in scores["acc"]
        ],
    )


def _columns(train: TrainRecord | None, scores: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """The cells of a model; its row of the table of each metric is in `scores`."""
    row = scores["acc"]
    yield "", row["label"].removesuffix(f" (seed {row['seed']})") if train else row["label"]
    minutes = train and f"{train.seconds * (train.threads or 1) * train.processes / 60:.0f}"
    yield "minutes of a core", minutes or "–"
    yield "bits per byte", f"{float(row['test_bits_per_byte']):.3f}"
    for name, metric in _SHOWN:
        if found := scores[metric].get(f"{name}_percent"):  # else the study does not score it
            yield benchmark_label(name), f"{float(found):.1f}"


def _scores(path: Path) -> dict[str, dict[str, str]]:
    """The rows of single runs and of published models in a table of accuracies, by run."""
    rows = csv.DictReader(io.StringIO(read_table(path)))
    return {row["run"] or row["label"]: row for row in rows if row["kind"] in {"run", "published"}}
