"""Table 1: the hyper-parameters as run, the baseline in full and what differs in each variant."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.report.names import count
from stlm.report.results import RunResult, TrainRecord
from stlm.report.table import Cell, Section, Table
from stlm.study import Study
from stlm.tokens.config import DataConfig

# Keys that tell how a run was logged and saved, not what was trained.
_HOUSEKEEPING = {"checkpoints", "validate_every", "validation_tokens", "log_every", "save_every", "wandb"}
# Keys that say nothing in a table: they belong to a part that another key names and that is not in use.
_ONLY_WITH = {"rope_theta": ("positions", "rope")}
_LABELS = {
    "kv_heads": "key/value heads",
    "ffn": "feed-forward",
    "ffn_width": "feed-forward width",
    "norm_eps": "norm epsilon",
    "rope_theta": "RoPE base",
    "tied": "tied embedding and head",
    "vocab_size": "vocabulary",
    "batch_size": "micro-batch (sequences)",
    "accumulation": "accumulation (micro-batches)",
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
    "gpt2": "GPT-2",
    True: "yes",
    False: "no",
}


def table1(study: Study, results: Mapping[str, RunResult]) -> Table:
    """Rows are hyper-parameters, columns variants (a variant's seeds share one, being equal in all else)."""
    variants: dict[str, TrainRecord] = {}
    seeds: dict[str, list[int]] = {}
    for result in results.values():
        variants.setdefault(result.train.variant, result.train)
        seeds.setdefault(result.train.variant, []).append(result.train.seed)
    # Of the keys of `data`, those that the study uses.
    used = [
        key for key, value in DataConfig() if any(getattr(t.data, key) != value for t in variants.values())
    ]
    columns = {name: _settings(train, seeds[name], used) for name, train in variants.items()}
    base = next(iter(columns.values()))
    sections = {
        section: list(dict.fromkeys(k for c in columns.values() for k in c[section])) for section in base
    }

    rows: list[list[Cell] | Section] = []
    records = []
    for section, keys in sections.items():
        rows.append(Section(section))
        for key in keys:
            values = [column[section].get(key, "–") for column in columns.values()]
            own = [Cell("") if value == values[0] else Cell(value, bold=True) for value in values[1:]]
            rows.append([Cell(key), Cell(values[0]), *own])
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
            "an empty cell is the baseline's value. Embedding parameters include learned positions and an "
            "untied head; FLOPs are estimates for the whole training."
        ],
        records=records,
    )


def _settings(train: TrainRecord, seeds: list[int], data: list[str]) -> dict[str, dict[str, str]]:
    """Section -> label -> value, as a reader sees them."""
    model, training = train.model, train.training
    recipe = {
        key: value
        for key, value in training.items()
        if key not in _HOUSEKEEPING | {"steps", "precision", "compile"}
    }
    return {
        "Size": {
            "parameters": f"{train.parameters.total:,}",
            "of these embedding": f"{train.parameters.embedding:,}",
            "of these the rest": f"{train.parameters.non_embedding:,}",
            "training FLOPs": f"{train.flops:.2e}",
        },
        "Model": _labelled(model),
        "Data": {
            "corpus": train.corpus,
            "tokenizer": _NAMES.get(train.tokenizer, train.tokenizer),
            "steps": f"{train.steps:,}",
            "tokens a step": f"{round(train.tokens / max(train.steps, 1)):,}",
            "tokens": count(train.tokens),
            **_labelled({key: getattr(train.data, key) for key in data}),
        },
        "Recipe": {
            **_labelled(recipe),
            "precision": train.precision,
            "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
        },
    }


def _labelled(settings: Mapping[str, object]) -> dict[str, str]:
    shown = {}
    for key, value in settings.items():
        needs = _ONLY_WITH.get(key)
        if needs is None or settings.get(needs[0]) == needs[1]:
            shown[_LABELS.get(key, key.replace("_", " "))] = _value(value)
    return shown


def _value(value: object) -> str:
    if isinstance(value, bool | str):
        return _NAMES.get(value, str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(own)}" for key, own in value.items()) or "–"
    if isinstance(value, list | tuple) and not value:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return "–" if value is None else str(value)
