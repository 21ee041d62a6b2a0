"""Whether a record was made with the settings that params/ has: all of them, on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from stlm.errors import UserError
from stlm.evaluation.config import BATCH_KEYS, EvaluationConfig
from stlm.model.config import ModelConfig
from stlm.study.runs import PublishedModel, Run
from stlm.study.strict import validate
from stlm.training.config import RECORD_KEYS, TrainingConfig

if TYPE_CHECKING:
    from stlm.report.results import TrainRecord

_SHOWN = 4


def check_trained(run: Run, train: TrainRecord, path: Path, command: str) -> None:
    """Refuse a train.json that params/ does not describe: tables would show it under the run's name.

    A key that only the record has is one of another version, or a mistake; one that only the run has was not
    there when the record was made, so that nobody knows what it would have said. Keys that are left out where
    they change nothing (`exclude_if` of the config) are equal to null.
    """
    identity = {"run": run.name, **run.model_dump(include={"variant", "seed", "corpus", "tokenizer"})}
    asked: dict[str, Any] = dict(identity)
    found: dict[str, Any] = {key: getattr(train, key) for key in identity}
    for section, kind in (("model", ModelConfig), ("training", TrainingConfig)):
        settings = _read(kind, getattr(train, section), path, section, command, RECORD_KEYS)
        asked[section], found[section] = _dump(getattr(run, section)), _dump(settings)
    if "data" in train.model_fields_set:  # a record without it is from before there was a choice
        _check_whole(train.data, path, "data", command, set())
    # The limit may refuse a training, but changes none.
    asked["data"], found["data"] = (_dump(one.data.unlimited) for one in (run, train))
    asked["techniques"], found["techniques"] = list(run.techniques), list(train.techniques)
    asked |= {f"techniques.{name}": _dump(technique) for name, technique in run.techniques.items()}
    found |= {f"techniques.{name}": keys for name, keys in train.techniques.items()}
    recorded = {role: one.run for role, one in train.depends.items()}
    # Earlier versions recorded the role `start` alone.
    for role in {"start", *recorded, *(run.depends if "depends" in train.model_fields_set else ())}:
        key = f"depends.{role}.run"
        asked[key], found[key] = run.depends.get(role), recorded.get(role)
    without = {f"training.{key}" for key in RECORD_KEYS}
    _compare(found, asked, without, path, "trained", command)


def check_scored(
    asked: EvaluationConfig, settings: Mapping[str, Any] | None, path: Path, command: str
) -> None:
    """Refuse an evaluation.json whose `settings` are not the study's `evaluation`, or are not there."""
    if settings is None:
        raise UserError(
            f"{path} does not say with which settings it was scored (written by an earlier version of STLM): "
            f"run `{command}`"
        )
    found = _read(EvaluationConfig, settings, path, "evaluation", command, BATCH_KEYS)
    without = {f"evaluation.{key}" for key in BATCH_KEYS}
    _compare({"evaluation": _dump(found)}, {"evaluation": _dump(asked)}, without, path, "scored", command)


def check_published(asked: PublishedModel, found: Mapping[str, Any] | None, path: Path, command: str) -> None:
    """Refuse scores of a published model that was loaded otherwise than the study says."""
    own = {f"published.{asked.name}": asked.settings}
    if found is None:
        raise UserError(
            f"{path} does not say how the model was loaded (written by an earlier version of STLM): "
            f"run `{command}`"
        )
    _compare({f"published.{asked.name}": dict(found)}, own, set(), path, "scored", command)


def _read(
    kind: type[BaseModel],
    content: Mapping[str, Any],
    path: Path,
    section: str,
    command: str,
    without: frozenset[str],
) -> BaseModel:
    """A section of a record as the settings that it is; UserError for keys too many or too few.

    Keys of `without`, which are not compared, may come and go.
    """
    content = {key: own for key, own in content.items() if key not in without or key in kind.model_fields}
    try:
        settings = validate(kind, content, str(path), section)
    except UserError as error:
        raise UserError(f"{error}: run `{command}`") from None
    _check_whole(settings, path, section, command, without)
    return settings


def _check_whole(
    settings: BaseModel, path: Path, section: str, command: str, without: frozenset[str] | set[str]
) -> None:
    unsaid = [key for key in _unsaid(settings, section) if key.removeprefix(f"{section}.") not in without]
    if unsaid:
        raise UserError(
            f"{path} does not say what it had as {', '.join(unsaid[:_SHOWN])} (written by another version of "
            f"STLM): run `{command}`"
        )


def _unsaid(settings: BaseModel, prefix: str) -> Iterator[str]:
    """The keys that the content had not, but for those that are left out where they change nothing."""
    for name, field in type(settings).model_fields.items():
        if name not in settings.model_fields_set:
            if field.exclude_if is None:
                yield f"{prefix}.{name}"
            continue
        value = getattr(settings, name)
        below = value.items() if isinstance(value, dict) else [(None, value)]
        for key, own in below:
            if isinstance(own, BaseModel):
                yield from _unsaid(own, f"{prefix}.{name}" + (f".{key}" if key else ""))


def _dump(settings: BaseModel) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one, joined by points."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _compare(
    found: Mapping[str, Any], asked: Mapping[str, Any], without: set[str], path: Path, done: str, command: str
) -> None:
    own, other = _flat(found), _flat(asked)
    differing = [
        f"{key}: {_shown(own, key)}, the study asks for {_shown(other, key)}"
        for key in dict.fromkeys((*other, *own))
        if key not in without and (key not in own or key not in other or own[key] != other[key])
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"{path} was {done} with {'; '.join(differing[:_SHOWN])}{more}: run `{command}`, or give the "
            f"--set that it was {done} with"
        )


def _shown(content: Mapping[str, Any], key: str) -> str:
    if key not in content:
        return "not set"
    return "null" if content[key] is None else str(content[key])
