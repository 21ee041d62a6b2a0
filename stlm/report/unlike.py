"""Which rows of a table differ in more than their settings: in precision, code or processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stlm.report.names import some
from stlm.report.results import EvaluationRecord, PublishedResult, RunResult, TrainRecord

# Property of a row -> its value, as words after "trained" or "scored".
_Values = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """A row of a table, with the records of its training (None for published models) and its evaluation."""

    variant: str
    label: str
    train: TrainRecord | None
    scored: EvaluationRecord

    @property
    def values(self) -> _Values:
        """The properties that should be equal in all rows."""
        own = {f"scored {key}": value for key, value in _scored(self.scored).items()}
        return own if self.train is None else _trained(self.train) | own

    @property
    def codes(self) -> list[Mapping[str, str | None]]:
        """The versions of the code that trained and scored it."""
        trained = [] if self.train is None else [*_parts(self.train)]
        return [self.scored.code, *(part["code"] for part in trained)]


def rows_of(
    results: Mapping[str, RunResult], published: Mapping[str, PublishedResult] | None = None
) -> list[Row]:
    """A row a run, the baseline's first, then published models."""
    rows = [
        Row(result.train.variant, result.train.label, result.train, result.evaluation)
        for result in results.values()
    ]
    for name, model in (published or {}).items():
        rows.append(Row(name, model.label, None, model.evaluation))
    return rows


def unlike_variants(rows: Sequence[Row]) -> set[str]:
    """The variants with a row whose properties differ from those of the first row."""
    base = rows[0].values
    return {
        row.variant for row in rows if any(base.get(key, value) != value for key, value in row.values.items())
    }


def unlike_note(rows: Sequence[Row], scored: bool = True) -> str | None:
    """One sentence naming the rows that were not made as the first was; None where all were made alike.

    `scored`: the table has scores; without them only training matters. It also names rows trained in parts
    by different code or processors, code with uncommitted changes, and processors that are not recorded.
    """
    base = rows[0].values
    # What holds for both training and scoring is said once.
    verbs: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row.values):
        if key.startswith("scored ") and not scored:
            continue
        have = [row for row in rows if key in row.values]
        for value in dict.fromkeys(row.values[key] for row in have):
            if key in base and value != base[key]:
                named = _named(have, lambda row, key=key, value=value: row.values[key] == value)
                verb, _, what = value.partition(" ")
                verbs.setdefault(f"{what}, not {base[key].partition(' ')[2]}: {named}", []).append(verb)
    parts = [f"{' and '.join(done)} {what}" for what, done in verbs.items()]
    pieces = [row for row in rows if row.train is not None and len(row.train.parts) > 1]
    if pieces:
        named = _named(rows, lambda row: row in pieces)
        parts.append(f"trained in parts, by other code or on another machine: {named}")
    dirty = [row for row in rows if any((code.get("git") or "").endswith("-dirty") for code in row.codes)]
    if dirty:
        named = _named(rows, lambda row: row in dirty)
        parts.append(f"by code with uncommitted changes, which may differ from row to row: {named}")
    unknown = [row for row in rows if _place(row.scored) is None or (row.train and _place(row.train) is None)]
    if unknown:
        parts.append(f"on a processor that is not recorded: {_named(rows, lambda row: row in unknown)}")
    return f"Not known to be made alike: {'; '.join(parts)}." if parts else None


def _trained(train: TrainRecord) -> dict[str, str]:
    return {
        "precision": f"trained in {train.precision}",
        "compiled": f"trained {'with' if train.compiled else 'without'} torch.compile",
        "kernels": f"trained {'with' if train.kernels else 'without'} kernels in C",
        **_made("trained", _place(train), train.code),
    }


def _scored(record: EvaluationRecord) -> dict[str, str]:
    precision = {} if record.precision is None else {"precision": f"scored in {record.precision}"}
    return precision | _made("scored", _place(record), record.code)


def _made(done: str, place: str | None, code: Mapping[str, str | None]) -> dict[str, str]:
    """Processor and code in words, as far as the record has them."""
    found = {} if place is None else {"place": f"{done} on {place}"}
    if code:
        commit = code.get("git") or "no commit"
        found["code"] = f"{done} by STLM {code.get('stlm')} ({commit})"
        found["torch"] = f"{done} by torch {code.get('torch')}"
    return found


def _place(record: TrainRecord | EvaluationRecord) -> str | None:
    """The GPU, or the CPU's model; None where it is not recorded."""
    device = record.device
    if device is not None and not device.startswith("cpu"):
        return device
    return record.processor


def _parts(train: TrainRecord) -> Iterable[Mapping[str, Mapping[str, str | None]]]:
    return train.parts or [{"code": train.code}]


def _named(rows: Sequence[Row], chosen: Callable[[Row], bool]) -> str:
    """The labels of the chosen rows, the seeds of a variant as one; or all rows, or all but a few."""
    inside = [row for row in rows if chosen(row)]
    if len(inside) == len(rows):
        return "all rows"
    outside = [row for row in rows if not chosen(row)]
    if len(outside) * 2 < len(rows):
        return f"all rows but {_listed(rows, outside)}"
    return _listed(rows, inside)


def _listed(rows: Sequence[Row], chosen: Sequence[Row]) -> str:
    names = []
    for row in chosen:
        whole = all(other in chosen for other in rows if other.variant == row.variant)
        seed = "" if whole or row.train is None else f" (seed {row.train.seed})"
        names.append(row.label + seed)
    names = list(dict.fromkeys(names))
    return some(names, most=len(names))
