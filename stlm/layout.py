"""The files that stages write to results/, and who keeps them: git or DVC.

Git keeps what a reader of the repository looks at and what `dvc metrics diff` and `dvc plots diff` compare:
metrics, tables, plots, a curve and a record a run. The rest is larger or can be made again; DVC keeps it.
Both engines, the checks before a stage and the writers take their lists from here; .gitignore is tested
against it.
"""

from __future__ import annotations

from typing import NamedTuple


class Output(NamedTuple):
    """A file or folder that a stage writes to its folder in results/."""

    name: str
    in_git: bool = False
    is_folder: bool = False


# Of a run, results/STUDY/runs/RUN.
TRAINING = (
    Output("checkpoints", is_folder=True),
    Output("curve.csv", in_git=True),
    Output("watch.csv"),
    Output("train.json"),
)
# Of a run, or of a published model, results/STUDY/published/NAME.
EVALUATION = (Output("items.parquet"), Output("documents.parquet"), Output("evaluation.json"))
# Of a study, results/STUDY.
CONTAMINATION = (Output("contaminated-items.parquet"), Output("contamination.json", in_git=True))
REPORT = (
    Output("tables", in_git=True, is_folder=True),
    Output("plots", in_git=True, is_folder=True),
    Output("records", in_git=True, is_folder=True),
    Output("typeset", is_folder=True),
    Output("training", is_folder=True),
    Output("cards", is_folder=True),
)
METRICS = Output("metrics.json", in_git=True)


def names(outputs: tuple[Output, ...]) -> tuple[str, ...]:
    """The names of a stage's outputs."""
    return tuple(output.name for output in outputs)
