"""Table 1, the hyper-parameters as run, and the table of variants: the settings in which each differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stlm.model.config import ModelConfig
from stlm.report.names import count
from stlm.report.results import RunResult, TrainRecord
from stlm.report.table import Cell, Section, Table
from stlm.study.runs import Study
from stlm.tokens.config import DataConfig
from stlm.training.config import RECORD_KEYS, TrainingConfig

# Keys about how a run is logged and saved, not about what is trained.
_HOUSEKEEPING = {"checkpoints", *RECORD_KEYS}
# Keys that have their own rows elsewhere, with the value that was used.
_ELSEWHERE = {"steps", "precision"}
# Keys that matter only with certain values of another key: left out of tables otherwise.
_ONLY_WITH = {
    "rope_theta": ("positions", {"rope"}),
    "momentum": ("optimizer", {"muon"}),
    "decay_share": ("schedule", {"wsd"}),
    "dropout_ends": ("dropout_schedule", {"linear"}),
    "dropout_share": ("dropout_schedule", {"early", "late"}),
    "dropout_cycles": ("dropout_schedule", {"triangular"}),
    "direction": ("order", {"length", "difficulty"}),
    "competence_start": ("pacing", {"competence"}),
    "competence_share": ("pacing", {"competence"}),
}
# Roles of other runs (`Run.depends`), whose training FLOPs have a row each.
_DEPENDENCIES = {"start": "of the run it starts from"}
# Defaults that mean that a technique is not used; a technique that no variant uses has no row.
_OFF = (None, False, 0, 0.0, "none", "constant", "auto")
_LABELS = {
    "kv_heads": "key/value heads",
    "ffn": "feed-forward",
    "ffn_width": "feed-forward width",
    "norm_eps": "norm epsilon",
    "rope_theta": "RoPE base",
    "qk_norm": "QK-norm",
    "qkv_shift": "QKV shift",
    "zero_init": "zero-initialized projections",
    "logit_softcap": "logit soft cap",
    "tied": "tied embedding and head",
    "lora": "LoRA",
    "vocab_size": "vocabulary",
    "batch_size": "micro-batch (sequences)",
    "accumulation": "accumulation (micro-batches)",
    "matrix_learning_rate": "learning rate of matrices",
    "min_learning_rate": "final learning rate",
    "warmup_steps": "warm-up steps",
    "betas": "betas",
    "eps": "epsilon",
    "clip": "gradient clip",
}
_NAMES = {
    "swiglu": "SwiGLU",
    "gelu": "GELU",
    "rope": "RoPE",
    "rmsnorm": "RMSNorm",
    "layernorm": "LayerNorm",
    "adamw": "AdamW",
    "muon": "Muon",
    "relu2": "squared ReLU",
    "wsd": "WSD",
    "one_cycle": "one-cycle",
    "inverse_sqrt": "inverse square root",
    "gpt2": "GPT-2",
    True: "yes",
    False: "no",
}


def table1(study: Study, results: Mapping[str, RunResult]) -> Table:
    """Rows are hyper-parameters, columns are variants; the seeds of a variant share a column."""
    variants = _variants(results)
    columns = _columns(results)
    sections: dict[str, dict[str, None]] = {}
    for column in columns.values():
        for section, values in column.items():
            sections.setdefault(section, {}).update(dict.fromkeys(values))
    rows: list[list[Cell] | Section] = []
    records = []
    for section, keys in sections.items():
        rows.append(Section(section))
        for key in keys:
            values = [column.get(section, {}).get(key, "–") for column in columns.values()]
            others = [Cell("") if value == values[0] else Cell(value, bold=True) for value in values[1:]]
            rows.append([Cell(key), Cell(values[0]), *others])
            records.append(
                {"section": section, "hyper_parameter": key} | dict(zip(columns, values, strict=True))
            )
    return Table(
        name="table1",
        title=f"Table 1. Hyper-parameters as run, study {study.name}",
        header=["", *(train.label for train in variants.values())],
        rows=rows,
        notes=[
            f"First column: {next(iter(variants.values())).label}, the baseline. Bold: what differs from it; "
            "an empty cell is the baseline's value; techniques that no variant uses have no row. Embedding "
            "parameters include learned positions and an untied head; FLOPs are estimates for the whole "
            "training."
        ],
        records=records,
    )


def variants_table(study: Study, results: Mapping[str, RunResult]) -> Table | None:
    """A row per variant: the settings in which it differs from the baseline; None for a single variant."""
    variants, columns = _variants(results), _columns(results)
    if len(variants) < 2:
        return None
    base_name, base = next(iter(columns.items()))
    rows, records = [], []
    for name, column in columns.items():
        differs = []
        for section in ("Model", "Data", "Recipe", "Techniques"):
            for key, value in column.get(section, {}).items():  # a missing key is of an unused part
                reference = base.get(section, {}).get(key)
                if value != reference:
                    differs.append(f"{key}: {value}" + (f" (baseline: {reference})" if reference else ""))
                    records.append(
                        {"variant": name, "hyper_parameter": key, "baseline": reference, "value": value}
                    )
        rows.append([Cell(variants[name].label), Cell("\n".join(differs) or _same(name == base_name))])
    return Table(
        name="variants",
        title=f"What differs from {variants[base_name].label}, study {study.name}",
        header=["", "settings that differ"],
        rows=rows,
        texts=2,
        notes=["Sizes follow from these; all other settings are the baseline's (Table 1)."],
        records=records,
    )


def _same(baseline: bool) -> str:
    return "the baseline" if baseline else "nothing"


def _variants(results: Mapping[str, RunResult]) -> dict[str, TrainRecord]:
    """The first run's record of each variant, the baseline first."""
    variants: dict[str, TrainRecord] = {}
    for result in results.values():
        variants.setdefault(result.train.variant, result.train)
    return variants


def _columns(results: Mapping[str, RunResult]) -> dict[str, dict[str, dict[str, str]]]:
    """Variant -> section -> label -> value, of all keys that any variant uses."""
    variants = _variants(results)
    seeds: dict[str, list[int]] = {name: [] for name in variants}
    for result in results.values():
        seeds[result.train.variant].append(result.train.seed)
    used = _used_by(list(variants.values()))
    return {name: _settings(train, seeds[name], used) for name, train in variants.items()}


def settings(train: TrainRecord) -> dict[str, dict[str, str]]:
    """A run's own settings, as in Table 1: section (Size, Model, Data, Recipe) -> label -> value."""
    return _settings(train, [train.seed], _used_by([train]))


def _used_by(trains: Sequence[TrainRecord]) -> dict[str, list[str]]:
    """Section of a record -> the keys that say what was trained."""
    return {
        "model": _used([train.model for train in trains], ModelConfig),
        "training": _used([train.training for train in trains], TrainingConfig),
        "data": [key for key, value in DataConfig() if any(getattr(t.data, key) != value for t in trains)],
    }


def _used(settings: Sequence[Mapping[str, Any]], schema: type[BaseModel]) -> list[str]:
    """The keys that say what was trained: all but those of techniques that no variant uses."""
    used = []
    for key in dict.fromkeys(key for section in settings for key in section):
        if key in _HOUSEKEEPING | _ELSEWHERE:
            continue
        field = schema.model_fields.get(key)
        values = [section[key] for section in settings if key in section]
        if field is None or field.default not in _OFF or any(value != field.default for value in values):
            used.append(key)
    return used


def _settings(
    train: TrainRecord, seeds: list[int], used: Mapping[str, list[str]]
) -> dict[str, dict[str, str]]:
    """Section -> label -> value, as a reader sees them."""
    return {
        "Size": {
            "parameters": f"{train.parameters.total:,}",
            "of these embedding": f"{train.parameters.embedding:,}",
            "of these the rest": f"{train.parameters.non_embedding:,}",
            "training FLOPs": f"{train.flops:.2e}",
            **{
                _DEPENDENCIES.get(role, f"of the run that is its {role}"): f"{sum(one.costs.values()):.2e}"
                for role, one in train.depends.items()
            },
        },
        "Model": _labelled(train.model, used["model"]),
        "Data": {
            "corpus": train.corpus,
            "tokenizer": _NAMES.get(train.tokenizer, train.tokenizer),
            "steps": f"{train.steps:,}",
            "tokens a step": f"{round(train.tokens / max(train.steps, 1)):,}",
            "tokens": count(train.tokens),
            **_labelled(train.data.model_dump(), used["data"]),
        },
        "Recipe": {
            **_labelled(train.training, used["training"]),
            "precision": train.precision,
            "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
        },
        **({"Techniques": techniques} if (techniques := _techniques(train)) else {}),
        **({"Recorded": recorded} if (recorded := _recorded(train.further)) else {}),
    }


def _techniques(train: TrainRecord) -> dict[str, str]:
    return {name.replace("_", " "): _value(keys) for name, keys in train.techniques.items()}


def _recorded(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Further facts of a record, a row each, nested keys joined; lists are left to the record."""
    found: dict[str, str] = {}
    for key, value in content.items():
        label = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            found |= _recorded(value, f"{label}, ")
        elif value is not None and not isinstance(value, list):
            found[label] = _value(value)
    return found


def _labelled(settings: Mapping[str, object], used: Sequence[str]) -> dict[str, str]:
    shown = {}
    for key in used:
        needs = _ONLY_WITH.get(key)
        idle = needs is not None and settings.get(needs[0]) not in needs[1]
        if key in settings and not idle:
            shown[_LABELS.get(key, key.replace("_", " "))] = _value(settings[key])
    return shown


def _value(value: object) -> str:
    if isinstance(value, bool | str):
        return _NAMES.get(value, str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(v)}" for key, v in value.items() if v is not None) or "–"
    if isinstance(value, list | tuple) and not value:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return "–" if value is None else str(value)
