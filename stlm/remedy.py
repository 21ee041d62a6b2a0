"""The command that makes a missing or damaged file of STLM again, derived from its path."""

from __future__ import annotations

from pathlib import Path

from stlm.outputs import CONTAMINATION, EVALUATION, METRICS, REPORT, TRAINING, names


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
        case ("data", "taught", corpus, tokenizer, folder, *_) if rest[4:]:
            return "run: stlm teach STUDY RUN, for a run that reads these answers"
        case ("results", study, "runs", run, file) if file in names(EVALUATION):
            return f"run: stlm evaluate {study} {run}"
        case ("results", study, "published", model, _):
            return f"run: stlm evaluate {study} {model}"
        case ("results", study, "runs", run, "checkpoints", *_):
            return f"run: stlm train {study} {run} (or dvc pull --force, where DVC has it)"
        case ("results", study, "runs", run, file):
            path = f"results/{study}/runs/{run}/{file}"
            in_git = any(output.in_git for output in TRAINING if output.name == file)
            restore = (
                f"git restore {path}, where git has it" if in_git else "dvc pull --force, where DVC has it"
            )
            return f"run: stlm train {study} {run} (or {restore})"
        case ("results", study, file) if file in names(CONTAMINATION):
            return f"run: stlm contamination {study}"
        case ("results", study, METRICS.name):
            return f"run: stlm report {study}"
        case ("results", study, folder, _, *_) if folder in names(REPORT):
            return f"run: stlm report {study}"
        case (".state", study, run, *_) if rest[2:]:
            return f"delete .state/{study}/{run} and run the same command again, which starts anew"
    return None
