"""What a study would run, as a table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stlm.errors import UserError
from stlm.study.runs import PublishedModel, Run, Study


def _scaled(value: float, units: tuple[str, ...] = ("", "K", "M", "G", "T", "P", "E")) -> str:
    """A number with three significant digits and its decimal prefix: 49851392 -> 49.9M."""
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            return f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def _row(run: Run) -> tuple[str, ...]:
    return (
        run.name,
        run.label,
        f"{run.parameters.total:,}",
        f"{run.parameters.non_embedding:,}",
        f"{run.training.steps:,}",
        _scaled(run.tokens),
        f"{run.flops:.2e}",
        f"{run.corpus}, {run.tokenizer}",
    )


def runs_table(study: Study) -> str:
    """The runs of ``study``: parameters, tokens, estimated floating-point operations of the training."""
    header = (
        "run",
        "label",
        "parameters",
        "without embeddings",
        "steps",
        "tokens",
        "FLOPs",
        "corpus, tokenizer",
    )
    lines = _columns([header, *(_row(run) for run in study.runs.values())], {2, 3, 4, 5, 6})
    total = sum(run.flops for run in study.runs.values())
    return "\n".join(
        [
            f"study {study.name}: {study.description.strip()}",
            "",
            *lines,
            "",
            f"{len(study.runs)} runs, baseline: {study.baseline}; training takes {total:.2e} FLOPs in all "
            "(estimated, forward and backward)",
            f"benchmarks: {', '.join(study.benchmarks) or 'none'}",
            *(["", *_published_table(study)] if study.published else []),
        ]
    )


def _published_table(study: Study) -> list[str]:
    """The published models of ``study``: parameters, folder, and whether the folder can be read."""
    header = ("published", "label", "parameters", "folder", "")
    return _columns([header, *(_published_row(model) for model in study.published.values())], {2})


def _published_row(model: PublishedModel) -> tuple[str, ...]:
    from stlm.evaluation.hf_folder import check_files, loading, stored_numbers

    try:
        with loading(Path(model.folder), "the folder"):
            check_files(Path(model.folder))
        state = "there"
    except UserError as error:
        state = "not there" if not os.path.isdir(model.folder) else f"cannot be read: {error}"
    # By the weights' headers, which may hold a matrix of two uses twice.
    stored = stored_numbers(Path(model.folder)) if state == "there" else None
    parameters = model.parameters or ("?" if stored is None else f"~{_scaled(stored)}")
    return model.name, model.label, parameters, model.folder, state


def _columns(rows: Sequence[tuple[str, ...]], numbers: set[int]) -> list[str]:
    """Lines of aligned cells, those of the columns ``numbers`` at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
