"""What a study must fulfil beyond the types of its keys: names that are there, data that fit together.

Each raises ``UserError``, which names the file, the key, what was found and the nearest valid choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stlm.corpora.config import CorpusEntry
from stlm.errors import UserError, nearest
from stlm.evaluation.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from stlm.study import Run, StudyFile


def check_names(file: str, parsed: StudyFile, corpora: Mapping[str, CorpusEntry]) -> None:
    """Corpora and benchmarks must be there, and a benchmark have one of the modes asked for."""
    named = {"corpus": parsed.corpus}
    named |= {f"variants.{key}.corpus": own.corpus for key, own in parsed.variants.items() if own.corpus}
    for key, corpus in named.items():
        if corpus not in corpora:
            raise UserError(f"{file}: {key}: unknown corpus {corpus!r}{nearest(corpus, corpora)}")
    for name in parsed.evaluation.benchmarks:
        if name not in BENCHMARKS:
            raise UserError(
                f"{file}: evaluation.benchmarks: unknown benchmark {name!r}{nearest(name, BENCHMARKS)}"
            )
        modes = BENCHMARKS[name].modes
        if not set(modes) & set(parsed.evaluation.modes):
            raise UserError(
                f"{file}: evaluation.modes: {', '.join(parsed.evaluation.modes)}, but {name} has "
                f"{', '.join(modes)} only; add it, or leave {name} out of evaluation.benchmarks"
            )


def check_data(file: str, run: Run, runs: Mapping[str, Run], corpora: Mapping[str, CorpusEntry]) -> None:
    """Names in `data` must be there, and a reference must be able to read the run's text."""
    where, data = f"{file}: run {run.name}: data", run.data
    mix = corpora[run.corpus].mix or {run.corpus: 1.0}
    for key, names in (("weights", data.weights), ("sequence", data.sequence)):
        for name in names:
            if name not in mix:
                raise UserError(f"{where}.{key}: {run.corpus} has no component {name!r}{nearest(name, mix)}")
    trained = data.weights or mix
    if data.sequence and sorted(data.sequence) != sorted(trained):
        raise UserError(
            f"{where}.sequence: {', '.join(data.sequence)} is not each component trained on once: "
            f"{', '.join(trained)}"
        )
    if run.reference is None:
        return
    key = f"{where}.reference: {data.reference!r}"
    variants = {other.variant for other in runs.values() if other.data.reference is None}
    if data.reference not in variants:
        raise UserError(
            f"{key} is no variant without a reference of its own{nearest(data.reference, variants)}"
        )
    reference = runs[run.reference]
    if reference.tokenizer != run.tokenizer:
        raise UserError(
            f"{key} has the tokenizer {reference.tokenizer}, the run {run.tokenizer}; they must be the same"
        )
    if reference.corpus != run.corpus and run.tokenizer.startswith("bpe-"):
        raise UserError(
            f"{key} was trained on {reference.corpus}, with another vocabulary of the name {run.tokenizer}; "
            f"choose a variant on {run.corpus}"
        )
    if reference.model.context < run.model.context:
        raise UserError(
            f"{key} has a context of {reference.model.context}, shorter than the run's {run.model.context}"
        )
