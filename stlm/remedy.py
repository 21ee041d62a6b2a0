"""The command that makes a missing or damaged file of STLM again, derived from its path."""

from __future__ import annotations

from pathlib import Path


def remedy(path: Path) -> str:
    """The advice at the end of an error message about a damaged `path`."""
    return next_command(path) or "delete it and run its stage again, or restore it from a copy"


def next_command(path: Path) -> str | None:
    """The command that makes `path` again; None if the path is not part of a project's layout."""
    parts = Path(path).parts
    return next(filter(None, (_command(*parts[place:]) for place in reversed(range(len(parts))))), None)


def _command(first: str, *rest: str) -> str | None:
    """The remedy for a path of a project, given by its parts; None for any other path."""
    match (first, *rest):
        case ("data", "raw", name, *_) if rest[2:]:
            return f"run: stlm fetch {name}"
        case ("data", "tokens", corpus, tokenizer, *_) if rest[3:]:
            return f"run: stlm tokenize {corpus} {tokenizer}"
        case ("results", study, "runs", run, "evaluation.json" | "items.parquet" | "documents.parquet"):
            return f"run: stlm evaluate {study} {run}"
        case ("results", study, "published", model, _):
            return f"run: stlm evaluate {study} {model}"
        case ("results", study, "runs", run, "checkpoints", *_):
            return f"run: stlm train {study} {run} (or dvc pull --force, where DVC has it)"
        case ("results", study, "runs", run, file):
            restore = f"git restore results/{study}/runs/{run}/{file}"
            return f"run: stlm train {study} {run} (or {restore}, where git has it)"
        case ("results", study, "contamination.json" | "contaminated-items.parquet"):
            return f"run: stlm contamination {study}"
        case ("results", study, "metrics.json") | ("results", study, "tables", _):
            return f"run: stlm report {study}"
        case (".state", study, run, *_) if rest[2:]:
            return f"delete .state/{study}/{run} and run the same command again, which starts anew"
    return None
