"""What a study would run, as a table for the terminal."""

from __future__ import annotations

from stlm.study import Run, Study


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
    rows = [header, *(_row(run) for run in study.runs.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    numbers = {2, 3, 4, 5, 6}
    lines = [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
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
        ]
    )
