"""Table 1, the hyper-parameters as run, and the table of variants: the settings in which each differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stlm.model.config import ModelConfig
from stlm.report.names import count
from stlm.report.results import Results
from stlm.report.schema import DependencyRecord, TrainRecord
from stlm.report.table import Cell, Section, Table
from stlm.tokens.config import DataConfig
from stlm.training.config import RECORD_KEYS, TrainingConfig

# Keys about how a run is logged and saved; and those with rows of their own, with the value that was used.
_LEFT_OUT = {"checkpoints", *RECORD_KEYS, "steps", "precision"}
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


def _settings_by_variant(results: Results) -> dict[str, dict[str, dict[str, str]]]:
    return settings_of({name: [run.train for run in runs] for name, runs in results.variants.items()})


def table1(results: Results) -> Table:
    """Rows are hyper-parameters, columns are variants; the seeds of a variant share a column."""
    settings = _settings_by_variant(results)
    labels = {name: runs[0].train.label for name, runs in results.variants.items()}
    sections: dict[str, dict[str, None]] = {}
    for of_variant in settings.values():
        for section, values in of_variant.items():
            sections.setdefault(section, {}).update(dict.fromkeys(values))

    def columns(section: str, key: str) -> Iterator[tuple]:
        yield "", key, {"section": section, "hyper_parameter": key}
        values = {name: of_variant.get(section, {}).get(key, "–") for name, of_variant in settings.items()}
        base, *others = values.items()
        yield labels[base[0]], base[1], dict([base])
        for name, value in others:
            yield labels[name], "" if value == base[1] else Cell(value, bold=True), {name: value}

    rows: list[Section | Iterator[tuple]] = []
    for section, keys in sections.items():
        rows += [Section(section), *(columns(section, key) for key in keys)]
    return Table.of_columns(
        "table1",
        f"Table 1. Hyper-parameters as run, study {results.study.name}",
        rows,
        [
            f"First column: {results.base.train.label}, the baseline. Bold: what differs from it; "
            "an empty cell is the baseline's value; techniques that no variant uses have no row. Embedding "
            "parameters include learned positions and an untied head; FLOPs are estimates for the whole "
            "training."
        ],
    )


def variants_table(results: Results) -> Table | None:
    """A row per variant: the settings in which it differs from the baseline; None for a single variant."""
    if len(results.variants) < 2:
        return None
    settings = _settings_by_variant(results)
    base_name, base = next(iter(settings.items()))
    rows, records = [], []
    for name, of_variant in settings.items():
        differing = [
            (key, value, base.get(section, {}).get(key))
            for section in ("Model", "Data", "Recipe", "Techniques")
            for key, value in of_variant.get(section, {}).items()  # a missing key is of an unused part
            if value != base.get(section, {}).get(key)
        ]
        lines = [f"{key}: {value}" + (f" (baseline: {old})" if old else "") for key, value, old in differing]
        lines = lines or ["the baseline" if name == base_name else "nothing"]
        rows.append([results.variants[name][0].train.label, "\n".join(lines)])
        records += [
            {"variant": name, "hyper_parameter": key, "baseline": old, "value": value}
            for key, value, old in differing
        ]
    return Table(
        name="variants",
        title=f"What differs from {results.base.train.label}, study {results.study.name}",
        header=["", "settings that differ"],
        rows=rows,
        texts=2,
        notes=["Sizes follow from these; all other settings are the baseline's (Table 1)."],
        records=records,
    )


def settings_of(runs: Mapping[str, Sequence[TrainRecord]]) -> dict[str, dict[str, dict[str, str]]]:
    """Settings as in Table 1, of all keys that any variant uses; `runs`: variant -> its seeds' records.

    Variant -> section (Size, Model, Data, Recipe, ...) -> label -> value.
    """
    trains = [records[0] for records in runs.values()]
    used = {
        "model": _used([train.model for train in trains], ModelConfig),
        "training": _used([train.training for train in trains], TrainingConfig),
        "data": [key for key, value in DataConfig() if any(getattr(t.data, key) != value for t in trains)],
    }
    return {name: _settings(records, used) for name, records in runs.items()}


def _used(settings: Sequence[Mapping[str, Any]], schema: type[BaseModel]) -> list[str]:
    """The keys that say what was trained: all but those of techniques that no variant uses."""
    used = []
    for key in dict.fromkeys(key for section in settings for key in section if key not in _LEFT_OUT):
        field = schema.model_fields.get(key)
        values = [section[key] for section in settings if key in section]
        if field is None or field.default not in _OFF or any(value != field.default for value in values):
            used.append(key)
    return used


def _settings(records: Sequence[TrainRecord], used: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    train, seeds = records[0], [str(record.seed) for record in records]
    size = {
        "parameters": f"{train.parameters.total:,}",
        "of these embedding": f"{train.parameters.embedding:,}",
        "of these the rest": f"{train.parameters.non_embedding:,}",
        "training FLOPs": f"{train.flops:.2e}",
    }
    for role, dependency in train.depends.items():
        if dependency.source is not None:
            size["starts from" if role == "start" else role] = dependency.source
            continue
        label = "of the run it starts from" if role == "start" else f"of the run that is its {role}"
        size[label] = f"{sum(dependency.costs.values()):.2e}"
    data = {
        "corpus": train.corpus,
        "tokenizer": _NAMES.get(train.tokenizer, train.tokenizer),
        "steps": f"{train.steps:,}",
        "tokens a step": f"{round(train.tokens / max(train.steps, 1)):,}",
        "tokens": count(train.tokens),
    }
    sections = {
        "Size": size,
        "Model": _labelled(train.model, used["model"]),
        "Data": data | _labelled(train.data.model_dump(), used["data"]),
        "Recipe": _labelled(train.training, used["training"])
        | {"precision": train.precision, "seeds" if len(seeds) > 1 else "seed": ", ".join(seeds)},
        "Inherited": _inherited(train.start),
        "Techniques": {name.replace("_", " "): _value(keys) for name, keys in train.techniques.items()},
        "Recorded": _recorded(train.further),
    }
    return {section: values for section, values in sections.items() if values}


def _values(content: Mapping[str, object]) -> dict[str, str]:
    return {_LABELS.get(key, key.replace("_", " ")): _value(value) for key, value in content.items()}


def _inherited(start: DependencyRecord | None) -> dict[str, str]:
    """What a run kept of a larger model; scores are left to the record."""
    kept = (start and start.inherited) or {}
    rows = {}
    if "layers" in kept:
        rows["layers kept, from 0"] = _value(kept["layers"]["kept"])
    if "ffn" in kept:
        shares = kept["ffn"]["share_of_scores_by_layer"]
        rows["hidden units by"] = kept["ffn"]["measure"]
        rows["of their scores, mean of layers"] = f"{sum(shares) / len(shares):.1%}"
    if "width" in kept:
        rows["heads by"] = kept["width"]["measure"]
        rows["stream by"] = "components" if "components" in kept["width"] else "importance"
        rows["of its squares"] = f"{kept['width']['share_of_squares']:.1%}"
    return rows


def _recorded(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Further facts of a record, a row each, nested keys joined; lists are left to the record."""
    rows: dict[str, str] = {}
    for key, value in content.items():
        label = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows |= _recorded(value, f"{label}, ")
        elif value is not None and not isinstance(value, list):
            rows[label] = _value(value)
    return rows


def _labelled(settings: Mapping[str, object], used: Sequence[str]) -> dict[str, str]:
    def matters(key: str) -> bool:
        other, values = _ONLY_WITH.get(key, (key, None))
        return key in settings and (values is None or settings.get(other) in values)

    return _values({key: settings[key] for key in used if matters(key)})


def _value(value: object) -> str:
    if isinstance(value, bool | str):
        return _NAMES.get(value, str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(v)}" for key, v in value.items() if v is not None) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "–"
    return "–" if value is None else str(value)
