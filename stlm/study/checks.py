"""Checks of a study beyond the types of its keys: names that exist, data that fit together.

Each check raises ``UserError``, which names the file, the key, what was found and the nearest valid choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from stlm.corpora.config import CorpusEntry
from stlm.corpora.language import WITHOUT_SPACES
from stlm.errors import UserError, nearest
from stlm.evaluation.benchmarks import BENCHMARKS, TextBenchmark
from stlm.study.reading import check_reader
from stlm.study.runs import Run, SourceModel
from stlm.techniques.base import refuse

if TYPE_CHECKING:
    from stlm.study.schema import StudyFile


def check_names(file: str, parsed: StudyFile, corpora: Mapping[str, CorpusEntry]) -> None:
    """Corpora and benchmarks must exist, and each benchmark must have one of the requested modes."""
    named = {"corpus": parsed.corpus}
    named |= {
        f"variants.{key}.corpus": variant.corpus for key, variant in parsed.variants.items() if variant.corpus
    }
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


def check_benchmarks(
    file: str, run: Run, benchmarks: Iterable[str], corpora: Mapping[str, CorpusEntry]
) -> None:
    """A benchmark made from a corpus's words needs a language with spaces between words."""
    mix = corpora[run.corpus].mix or {run.corpus: 1.0}
    languages = {corpora[name].language for name in mix}
    unspaced = sorted(tag for tag in languages if tag and tag.partition("-")[0].lower() in WITHOUT_SPACES)
    # Another component of a mix may have passages; training checks that (`stlm.evaluation.text_items`).
    if len(unspaced) < len(languages):
        return
    for name in benchmarks:
        if isinstance(BENCHMARKS[name], TextBenchmark):
            raise UserError(
                f"{file}: evaluation.benchmarks: {name} asks for words, and the corpus {run.corpus} is text "
                f"without spaces between them (language: {', '.join(unspaced)} in params/corpora.yaml); "
                "leave it out"
            )


def check_data(
    file: str,
    run: Run,
    runs: Mapping[str, Run],
    corpora: Mapping[str, CorpusEntry],
    models: Mapping[str, SourceModel] | None = None,
) -> None:
    """Names in `data` must exist, and a reference must be able to read the run's text."""
    location, data = f"{file}: run {run.name}: data", run.data
    mix = corpora[run.corpus].mix or {run.corpus: 1.0}
    for key, names in (("weights", data.weights), ("sequence", data.sequence)):
        for name in names:
            if name not in mix:
                raise UserError(
                    f"{location}.{key}: {run.corpus} has no component {name!r}{nearest(name, mix)}"
                )
    trained = data.weights or mix
    if data.sequence and sorted(data.sequence) != sorted(trained):
        raise UserError(
            f"{location}.sequence: {', '.join(data.sequence)} is not each component trained on once: "
            f"{', '.join(trained)}"
        )
    for role, key in (("reference", "reference"), ("smaller", "select.smaller")):
        if role in run.dependencies:
            try:
                check_reader(run.dependencies[role].name, dependency(run, role, runs, models or {}), run)
            except ValueError as error:
                raise UserError(f"{location}.{key}: {error}") from None


def check_dependencies(file: str, run: Run, runs: Mapping[str, Run], models: Collection[str] = ()) -> None:
    """Every run that a run depends on must be one of the study's, or a published model (`models`)."""
    variants = {other.variant for other in runs.values()}
    for role, (key, name) in run.dependencies.items():
        if name not in variants and role not in run.sources:
            also = " and no model in params/models.yaml" if models else ""
            raise UserError(
                f"{file}: run {run.name}: {key}: {name!r} is no variant of this study{also}"
                f"{nearest(name, [*variants, *models])}"
            )
        if role not in run.sources and run.depends[role] not in runs:
            raise UserError(
                f"{file}: run {run.name}: {key}: {name!r} has no run with seed {run.seed} "
                f"(variants.{name}.seeds); add the seed there, or leave it out of "
                f"variants.{run.variant}.seeds"
            )


def dependency(
    run: Run, role: str, runs: Mapping[str, Run], models: Mapping[str, SourceModel]
) -> Run | SourceModel:
    """What a run depends on in a role: one of the study's runs, or a published model."""
    return models[run.sources[role]] if role in run.sources else runs[run.depends[role]]


def check_cycles(file: str, runs: Mapping[str, Run]) -> None:
    """No run may depend on itself, directly or through others."""
    sorter = TopologicalSorter({name: dict.fromkeys(run.depends.values()) for name, run in runs.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1][::-1]  # each depends on the next
        first, second = runs[cycle[0]], cycle[1]
        role = next(role for role, name in first.depends.items() if name == second)
        key, variant = first.dependencies[role]
        raise UserError(
            f"{file}: run {first.name}: {key}: {variant!r}: a run cannot depend on itself: "
            f"{' -> '.join(cycle)}"
        ) from None


def check_techniques(
    file: str,
    run: Run,
    runs: Mapping[str, Run],
    models: Mapping[str, SourceModel],
    benchmarks: Collection[str],
) -> None:
    """Refuse, by name, everything that a run's techniques do not support. `benchmarks`: the study's."""
    key = f"{file}: run {run.name}"

    def make_error(message: str) -> UserError:
        return UserError(f"{key}: {message}")

    techniques = list(run.techniques.values())
    for technique in techniques:
        technique.set_others({role: dependency(run, role, runs, models) for role in technique.depends()})
    for condition, capability in (
        (run.model.bytes is not None, "bytes"),
        (run.model.sharing is not None, "sharing"),
        (run.data.attention == "within", "attention_within"),
        (run.training.compile is True, "compile"),
        (run.training.start_from is not None, "start_from"),
    ):
        if condition:
            refuse(techniques, capability, make_error)
    for number, technique in enumerate(techniques):
        for other in techniques[:number]:
            together = other.key() in technique.combines_with or technique.key() in other.combines_with
            if not together or (technique.replaces_next_token and other.replaces_next_token):
                raise make_error(
                    f"techniques.{other.key()} and techniques.{technique.key()} cannot be combined"
                )
    for technique in techniques:
        try:
            technique.check(run, runs)
            technique.check_scoring(benchmarks)
        except ValueError as error:
            raise make_error(f"techniques.{technique.key()}.{error}") from None
