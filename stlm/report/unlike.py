"""Which rows of a table differ in more than their settings: in precision, code or processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stlm.report.names import some
from stlm.report.results import Results
from stlm.report.schema import EvaluationRecord, TrainRecord


@dataclass(frozen=True)
class Row:
    """A row of a table, with the records of its training (None for published models) and its evaluation."""

    variant: str
    label: str
    train: TrainRecord | None
    scored: EvaluationRecord

    @property
    def properties(self) -> dict[tuple[str, str], str]:
        """What should be equal in all rows, in words: ("trained" or "scored", property) -> in float32."""
        words = {}
        if self.train is not None:
            words["trained", "precision"] = f"in {self.train.precision}"
            words["trained", "compiled"] = f"{'with' if self.train.compiled else 'without'} torch.compile"
            words["trained", "kernels"] = f"{'with' if self.train.kernels else 'without'} kernels in C"
            words |= _provenance("trained", self.train)
        if self.scored.precision is not None:
            words["scored", "precision"] = f"in {self.scored.precision}"
        return words | _provenance("scored", self.scored)

    @property
    def dirty(self) -> bool:
        """Whether code with uncommitted changes trained or scored it."""
        trained = [] if self.train is None else self.train.parts or [{"code": self.train.code}]
        codes = [self.scored.code, *(part["code"] for part in trained)]
        return any((code.get("git") or "").endswith("-dirty") for code in codes)


def _provenance(verb: str, record: TrainRecord | EvaluationRecord) -> dict[tuple[str, str], str]:
    """Processor and code in words, as far as the record has them."""
    processor, code = _processor(record), record.code
    words = {} if processor is None else {(verb, "processor"): f"on {processor}"}
    if code:
        words[verb, "code"] = f"by STLM {code.get('stlm')} ({code.get('git') or 'no commit'})"
        words[verb, "torch"] = f"by torch {code.get('torch')}"
    return words


def _processor(record: TrainRecord | EvaluationRecord) -> str | None:
    """The GPU, or the CPU's model; None where it is not recorded."""
    on_cpu = record.device is None or record.device.startswith("cpu")
    return record.processor if on_cpu else record.device


def rows_of(results: Results, published: bool = False) -> list[Row]:
    """A row a run, the baseline's first, then, if asked for, the published models."""
    rows = [Row(run.train.variant, run.train.label, run.train, run.evaluation) for run in results.values()]
    models = results.published.items() if published else ()
    return rows + [Row(name, model.label, None, model.evaluation) for name, model in models]


def unlike_variants(rows: Sequence[Row]) -> set[str]:
    """The variants with a row whose properties differ from those of the first row."""
    base = rows[0].properties
    differing = [row for row in rows if any(base.get(k, text) != text for k, text in row.properties.items())]
    return {row.variant for row in differing}


def unlike_note(rows: Sequence[Row], scored: bool = True) -> str | None:
    """One sentence naming the rows that were not made as the first was; None where all were made alike.

    `scored`: the table has scores; without them only training matters. It also names rows trained in parts
    by different code or processors, code with uncommitted changes, and processors that are not recorded.
    """
    base = rows[0].properties
    verbs: dict[str, list[str]] = {}  # what holds for both training and scoring is said once
    for key in dict.fromkeys(key for row in rows for key in row.properties):
        if key not in base or (key[0] == "scored" and not scored):
            continue
        having = [(row, row.properties[key]) for row in rows if key in row.properties]
        for text in dict.fromkeys(text for _, text in having if text != base[key]):
            named = _named([row for row, _ in having], [row for row, words in having if words == text])
            verbs.setdefault(f"{text}, not {base[key]}: {named}", []).append(key[0])
    sentences = [f"{' and '.join(together)} {text}" for text, together in verbs.items()]
    for sentence, chosen in (
        (
            "trained in parts, by other code or on another machine",
            [row for row in rows if row.train is not None and len(row.train.parts) > 1],
        ),
        (
            "by code with uncommitted changes, which may differ from row to row",
            [row for row in rows if row.dirty],
        ),
        (
            "on a processor that is not recorded",
            [row for row in rows if any(_processor(one) is None for one in (row.scored, row.train) if one)],
        ),
    ):
        if chosen:
            sentences.append(f"{sentence}: {_named(rows, chosen)}")
    return f"Not known to be made alike: {'; '.join(sentences)}." if sentences else None


def _named(rows: Sequence[Row], chosen: Sequence[Row]) -> str:
    """The labels of the chosen rows, the seeds of a variant as one; or all rows, or all but a few."""
    if len(chosen) == len(rows):
        return "all rows"
    others = [row for row in rows if row not in chosen]
    few = len(others) * 2 < len(rows)
    listed, names = others if few else chosen, []
    for row in listed:
        complete = all(other in listed for other in rows if other.variant == row.variant)
        names.append(row.label if complete or row.train is None else f"{row.label} (seed {row.train.seed})")
    names = list(dict.fromkeys(names))
    return ("all rows but " if few else "") + some(names, most=len(names))
