"""A table, for the terminal, of the runs of a study."""

from __future__ import annotations

import os

from stlm.errors import UserError
from stlm.study.runs import PublishedModel, Run, Study
from stlm.text_table import text_table
from stlm.units import count


def _row(run: Run, active: bool) -> tuple[str, ...]:
    parameters = run.parameters
    return (
        run.name,
        run.label,
        f"{parameters.total:,}",
        *([f"{parameters.active or parameters.total:,}"] if active else []),
        f"{parameters.non_embedding:,}",
        f"{run.training.steps:,}",
        count(run.tokens, digits=3),
        f"{run.flops:.2e}",
        f"{run.corpus}, {run.tokenizer}",
    )


def runs_table(study: Study) -> str:
    """The runs of ``study``: parameters, tokens, and estimated floating-point operations of training."""
    active = any(run.parameters.active is not None for run in study.runs.values())
    header = (
        "run",
        "label",
        "parameters",
        *(["active for a token"] if active else []),
        "without embeddings",
        "steps",
        "tokens",
        "FLOPs",
        "corpus, tokenizer",
    )
    rows = [_row(run, active) for run in study.runs.values()]
    lines = text_table([header, *rows], left={0, 1, len(header) - 1})
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
            *([f"models of params/models.yaml: {', '.join(study.models)}"] if study.models else []),
            *(["", *_published_table(study)] if study.published else []),
        ]
    )


def _published_table(study: Study) -> list[str]:
    """The published models of ``study``: parameters, folder, and whether the folder can be read.

    One of params/models.yaml that is not there is fetched with the data.
    """
    header = ("published", "label", "parameters", "folder", "")
    return text_table([header, *map(_published_row, study.published.values())], left={0, 1, 3, 4})


def _published_row(model: PublishedModel) -> tuple[str, ...]:
    from stlm.evaluation.hf_folder import check_files, loading, stored_numbers

    try:
        with loading(model.place, "the folder"):
            check_files(model.place)
        state = "there"
    except UserError as error:
        absent = "not there" if model.model is None else "to be fetched"
        state = absent if not os.path.isdir(model.place) else f"cannot be read: {error}"
    # Counted in the weights' headers, which may hold a matrix with two uses twice.
    stored = stored_numbers(model.place) if state == "there" else None
    parameters = model.parameters or ("?" if stored is None else f"~{count(stored, digits=3)}")
    # As it was written: a path may be relative.
    return model.name, model.label, parameters, model.folder or str(model.place), state
