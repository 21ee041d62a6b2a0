"""The reference harness's own tasks (package `lm_eval`), on local rows instead of the hub's.

Prompts, choices, answers, metrics and groups come from the YAML files inside the package; what is replaced is
the data set alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from stlm.files import write_text

_PACKAGE = Path(lm_eval.__file__).parent / "tasks"


class HarnessTask(NamedTuple):
    """A benchmark's task or group of tasks in the harness.

    `files`: its YAML files, in the package's folder of tasks. `column`: what tells the tasks of a group apart
    in our rows, which hold them all; the tasks' `dataset_name` in the harness. None: it is one task.
    `data`: the folder in data/raw, where it is that of another benchmark.
    """

    name: str
    files: str
    column: str | None = None
    data: str | None = None


# By our name of the benchmark.
HARNESS_TASKS = {
    "blimp": HarnessTask("blimp", "blimp/*.yaml", "UID"),
    "hellaswag": HarnessTask("hellaswag", "hellaswag/hellaswag.yaml"),
    "arc_easy": HarnessTask("arc_easy", "arc/arc_easy.yaml"),
    "arc_challenge": HarnessTask("arc_challenge", "arc/arc_challenge.yaml"),
    "winogrande": HarnessTask("winogrande", "winogrande/default.yaml"),
    "mmlu": HarnessTask("mmlu", "mmlu/default/*.yaml", "subject"),
    "mmlu_cloze": HarnessTask("mmlu_continuation", "mmlu/continuation/*.yaml", "subject", "mmlu"),
}


def write_tasks(benchmark: str, rows: pa.Table, folder: Path) -> dict[str, list[int]]:
    """Write the harness's tasks of `benchmark` over `rows` (the hub's columns) to `folder`.

    `lm_eval --include_path FOLDER` finds them under their usual names. A group gets the tasks that have rows.
    Returns the tasks' names with the numbers of their rows, in the order of the task's documents. ValueError
    where rows belong to no task.
    """
    harness = HARNESS_TASKS[benchmark]
    groups, tasks = {}, {}
    for file in sorted(_PACKAGE.glob(harness.files)):
        config = load_yaml(file, resolve_func=False)
        if "group" in config:
            groups[config["group"]] = file
        else:
            tasks[config["task"]] = (file, config)
    folder.mkdir(parents=True, exist_ok=True)
    values = rows[harness.column].to_pylist() if harness.column else None
    numbers: dict[str, list[int]] = {}
    for name, (file, config) in tasks.items():
        wanted = config.get("dataset_name")
        own = [i for i in range(len(rows)) if values is None or values[i] == wanted]
        if own:
            numbers[name] = own
            data = folder / f"{name}.parquet"
            pq.write_table(rows.take(own), data)
            _write_yaml(folder / f"{name}.yaml", {"include": str(file), **_local_data(config, data, folder)})
    if sum(map(len, numbers.values())) != len(rows):
        raise ValueError(
            f"{benchmark}: {sum(map(len, numbers.values()))} of {len(rows)} rows belong to a task"
        )
    if harness.name in groups:
        group = {"include": str(groups[harness.name]), "task": list(numbers)}
        _write_yaml(folder / f"{harness.name}-group.yaml", group)
    return numbers


def _local_data(config: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """The keys of a task that name its data: the split that is evaluated, and no other."""
    split = config.get("test_split") or config["validation_split"]
    return {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "fewshot_split": None,
        "fewshot_config": None,
        # The groups are written by `write_tasks`.
        "tag": None,
    }


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def task_manager(folder: Path) -> TaskManager:
    """The harness's catalogue with the tasks in `folder` alone."""
    return TaskManager(include_path=str(folder), include_defaults=False)


def sample_rows(rows: pa.Table, share: float, seed: int, column: str | None) -> pa.Table:
    """A random `share` of the rows, of each value of `column` (two at least), in their own order."""
    if share >= 1:
        return rows
    values = np.array(rows[column].to_pylist()) if column else np.zeros(len(rows))
    rng = np.random.default_rng(seed)
    taken: list[int] = []
    for value in np.unique(values):
        own = np.flatnonzero(values == value)
        taken += rng.permutation(own)[: max(2, round(share * len(own)))].tolist()
    return rows.take(sorted(taken))


def read_rows(files: Iterable[Path]) -> pa.Table:
    """The rows of parquet files that belong to one split."""
    return pa.concat_tables([pq.read_table(file) for file in files])
