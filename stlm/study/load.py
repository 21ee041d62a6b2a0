"""Turns a study file into runs: reads, overrides, checks and resolves it.

A study file ``params/<study>.yaml`` states a baseline (corpus, tokenizer, model, training, evaluation), and
variants as differences from it, as in the paper's Table 1. Everything is checked before any work starts; an
error names the file, the key, what was found, what was expected and the nearest valid choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stlm.errors import UserError, nearest, shortened
from stlm.model.config import ModelConfig
from stlm.study.catalogues import PARAMS, load_corpora, load_models
from stlm.study.checks import (
    check_benchmarks,
    check_cycles,
    check_data,
    check_dependencies,
    check_names,
    check_techniques,
)
from stlm.study.names import LONGEST_NAME, check_study_name, is_name
from stlm.study.runs import PublishedModel, Run, SourceModel, Study
from stlm.study.schema import Published, StudyFile, Variant
from stlm.study.start import check_start
from stlm.study.strict import parse_yaml, read_yaml, validate
from stlm.techniques.base import Technique
from stlm.techniques.registry import load_techniques
from stlm.tokens.chunks import SYMBOLS, cuts_chunks
from stlm.tokens.config import DataConfig
from stlm.tokens.names import hf_name, vocabulary_size
from stlm.training.config import TrainingConfig

_DEEPEST = 20


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _override(content: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    flag = f"--set {shortened(override)}"
    if not separator or not all(key.split(".")):
        raise UserError(f"{flag}: expected key.path=value, for example model.layers=2")
    value = parse_yaml(text, flag)
    parts = key.split(".")
    if len(parts) > _DEEPEST:
        raise UserError(f"{flag}: no parameter is so deep; expected key.path=value")
    below: Any = content
    for depth, part in enumerate(parts[:-1], start=1):
        below = below.get(part)
        if below is None:
            break
        if not isinstance(below, Mapping):
            raise UserError(f"{flag}: {'.'.join(parts[:depth])} is a value, it has no keys")
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    return _merge(content, nested)


def _ids(tokenizer: str, byte_level: bool, root: Path) -> int:
    """The `vocab_size` of a model on a tokenizer; raises ``UserError`` if they do not fit."""
    size = vocabulary_size(tokenizer, root)
    if byte_level and tokenizer == "bytes":
        raise UserError(
            "tokenizer: 'bytes' cuts no chunks, which a byte-level model (model.bytes) needs; choose "
            "stride-N, spaces, words, bpe-N or gpt2"
        )
    if byte_level and hf_name(tokenizer) is not None:
        raise UserError(
            f"tokenizer: {tokenizer!r} cuts no chunks for byte-level models (model.bytes); choose stride-N, "
            "spaces, words, bpe-N or gpt2"
        )
    if not byte_level and cuts_chunks(tokenizer):
        raise UserError(
            f"tokenizer: {tokenizer!r} cuts chunks for byte-level models; set model.bytes ({{}} for its "
            "defaults), or choose gpt2, bytes or bpe-N"
        )
    return SYMBOLS if byte_level else size


def _resolve(
    study: str, file: str, parsed: StudyFile, name: str, seed: int, raw: Mapping[str, Any], root: Path
) -> Run:
    variant = parsed.variants[name]
    key_path = f"variants.{name}"
    tokenizer = variant.tokenizer or parsed.tokenizer
    sections: dict[str, Any] = {}
    for section, model in (("model", ModelConfig), ("training", TrainingConfig), ("data", DataConfig)):
        base, differences = raw.get(section) or {}, getattr(variant, section)
        # Check the baseline first, so that its mistakes are not attributed to the variant.
        validate(model, base, file, section)
        sections[section] = validate(
            model, _merge(base, differences), file, f"{key_path}.{section}" if differences else section
        )
    try:
        vocab_size = _ids(tokenizer, sections["model"].bytes is not None, root)
    except UserError as error:
        raise UserError(f"{file}: {key_path + '.' if variant.tokenizer else ''}{error}") from None
    if sections["model"].vocab_size not in (None, vocab_size):
        raise UserError(
            f"{file}: model.vocab_size: the tokenizer {tokenizer} has {vocab_size} tokens; leave the key out"
        )
    # Validate again, as some checks need the vocabulary.
    known = _merge(raw.get("model") or {}, variant.model) | {"vocab_size": vocab_size}
    model = validate(ModelConfig, known, file, f"{key_path}.model" if variant.model else "model")
    stride = parsed.evaluation.perplexity.stride
    if stride is not None and stride > sections["model"].context:
        raise UserError(
            f"{file}: evaluation.perplexity.stride: {stride} is above model.context: "
            f"{sections['model'].context}; text between windows would be left out"
        )
    return Run(
        study=study,
        name=name if len(parsed.seeds) == 1 else f"{name}-s{seed}",
        variant=name,
        label=variant.label or name,
        paper_row=variant.paper_row,
        seed=seed,
        corpus=variant.corpus or parsed.corpus,
        tokenizer=tokenizer,
        model=model,
        training=sections["training"],
        data=sections["data"],
        techniques=_techniques(file, parsed, variant, key_path),
    )


def _techniques(file: str, parsed: StudyFile, variant: Variant, key_path: str) -> dict[str, Technique]:
    """The techniques of a variant's run: the baseline's with its differences, as objects of this run only."""
    load_techniques(parsed.techniques, file, "techniques")
    merged = _merge(parsed.techniques, variant.techniques)
    prefix = f"{key_path}.techniques" if variant.techniques else "techniques"
    return load_techniques(merged, file, prefix)


def _check_file(file: str, parsed: StudyFile) -> None:
    """The baseline is a variant, names are names, and no seed comes twice."""
    if parsed.baseline not in parsed.variants:
        raise UserError(
            f"{file}: baseline: {parsed.baseline!r} is not among the variants"
            f"{nearest(parsed.baseline, parsed.variants)}"
        )
    for key in ("variants", "published"):
        for item in getattr(parsed, key):
            if not is_name(item):
                raise UserError(
                    f"{file}: {key}: {shortened(item)!r}: a name is lower-case letters, digits, _ and -, and "
                    f"begins with a letter; at most {LONGEST_NAME}"
                )
    if len(set(parsed.seeds)) < len(parsed.seeds):
        raise UserError(f"{file}: seeds: a seed is given twice: {list(parsed.seeds)}")
    for name, variant in parsed.variants.items():
        _check_seeds(f"{file}: variants.{name}.seeds", parsed, name, variant.seeds)


def _check_seeds(key: str, parsed: StudyFile, name: str, seeds: Sequence[int] | None) -> None:
    """A variant's seeds are some of the study's; the baseline, with which all are paired, has all."""
    if seeds is None:
        return
    others = sorted(set(seeds) - set(parsed.seeds))
    if others or len(set(seeds)) < len(seeds):
        found = f"{others[0]} is none of them" if others else f"found {list(seeds)}"
        raise UserError(f"{key}: expected some of the study's seeds {list(parsed.seeds)}, each once; {found}")
    if name == parsed.baseline and len(seeds) < len(parsed.seeds):
        raise UserError(
            f"{key}: the baseline needs a run with every seed of the study, for the others are compared with "
            f"the run of their seed; found {list(seeds)}, expected {list(parsed.seeds)}, or leave the key out"
        )


def _source_models(file: str, parsed: StudyFile, root: Path) -> dict[str, SourceModel]:
    """The models in params/models.yaml, whose names no variant may have: a run could depend on either."""
    models = load_models(root)
    for name in parsed.variants.keys() & models.keys():
        raise UserError(
            f"{file}: variants.{name}: a model in params/models.yaml has this name; choose another"
        )
    return {name: SourceModel(name=name, model=entry.model.config) for name, entry in models.items()}


def _with_sources(run: Run, models: Mapping[str, SourceModel]) -> Run:
    """The run, which knows which of the names that it depends on are published models."""
    sources = {role: name for role, (_, name) in run.dependencies.items() if name in models}
    return run.model_copy(update={"sources": sources}) if sources else run


def _with_prefix(key: str, item: Published, root: Path) -> Published:
    """A published model of the study; one of params/models.yaml has its prefix there."""
    if item.model is None:
        return item
    models = load_models(root)
    if item.model not in models:
        raise UserError(
            f"{key}.model: no model {shortened(item.model)!r} in params/models.yaml"
            f"{nearest(item.model, models)}"
        )
    entry = models[item.model]
    if item.context is not None and item.context > entry.model.context:
        raise UserError(
            f"{key}.context: {item.context} is longer than the {entry.model.context} of {item.model}"
        )
    return item.model_copy(update={"prefix": item.prefix or entry.prefix})


def load_study(name: str, overrides: Sequence[str] = (), root: Path = Path()) -> Study:
    """Read, override, check and resolve the study ``params/<name>.yaml``.

    ``overrides`` are texts ``key.path=value`` with a value in YAML, as after ``--set``. Raises ``UserError``
    with every problem found.
    """
    check_study_name(name, root)
    path = root / PARAMS / f"{name}.yaml"
    file = f"{PARAMS}/{name}.yaml"
    raw = read_yaml(path)
    for override in overrides:
        raw = _override(raw, override)
    if overrides:
        file += f" (with --set {shortened(' '.join(overrides), 200)})"
    parsed = validate(StudyFile, raw, file)
    _check_file(file, parsed)
    corpora = load_corpora(root)
    check_names(file, parsed, corpora)
    runs = [
        _resolve(name, file, parsed, variant, seed, raw, root)
        for variant, settings in parsed.variants.items()
        for seed in settings.seeds or parsed.seeds
    ]
    models = _source_models(file, parsed, root)
    runs = [_with_sources(run, models) for run in runs]
    by_name = {run.name: run for run in runs}
    for run in runs:
        check_dependencies(file, run, by_name, models)
    check_cycles(file, by_name)
    for run in runs:
        check_benchmarks(file, run, parsed.evaluation.benchmarks, corpora)
        check_data(file, run, by_name, corpora, models)
        check_start(file, run, by_name, models)
        check_techniques(file, run, by_name, models, parsed.evaluation.benchmarks)
    for key in by_name.keys() & parsed.published.keys():
        raise UserError(f"{file}: published.{key}: a run has this name; choose another")
    first_seed = "" if len(parsed.seeds) == 1 else f"-s{parsed.seeds[0]}"
    baseline = parsed.baseline + first_seed
    return Study(
        name=name,
        description=parsed.description,
        baseline=baseline,
        runs=by_name,
        evaluation=parsed.evaluation,
        corpora=list(dict.fromkeys(run.corpus for run in runs)),
        published={
            key: PublishedModel(
                **_with_prefix(f"{file}: published.{key}", item, root).model_dump(exclude={"label"}),
                study=name,
                name=key,
                label=item.label or key,
                tokens_folder=by_name[baseline].tokens_folder,
            )
            for key, item in parsed.published.items()
        },
        overrides=list(overrides),
    )
