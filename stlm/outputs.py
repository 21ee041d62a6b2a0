"""The files that stages write to results/, and who keeps them: git or DVC.

Git keeps what readers of the repository look at and what `dvc metrics diff` and `dvc plots diff` compare:
metrics, tables, plots, and a curve and a record for each run. DVC keeps the rest, which is larger or can be
made again. Both engines, the checks before a stage, and the writers take their lists from here; a test
compares .gitignore with it.
"""

from __future__ import annotations

from typing import NamedTuple


class Output(NamedTuple):
    """A file or folder that a stage writes to its folder in results/."""

    name: str
    in_git: bool = False
    is_folder: bool = False


# The outputs for a run, in results/STUDY/runs/RUN.
TRAINING = (
    Output("checkpoints", is_folder=True),
    Output("curve.csv", in_git=True),
    Output("watch.csv"),
    Output("train.json"),
)
# The outputs for a run, or for a published model, in results/STUDY/published/NAME.
EVALUATION = (Output("items.parquet"), Output("documents.parquet"), Output("evaluation.json"))
# The outputs for a study, in results/STUDY.
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
