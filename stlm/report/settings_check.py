"""Whether a record was made with the settings in params/: all of them must agree, in both directions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from stlm.errors import UserError
from stlm.evaluation.config import BATCH_KEYS, EvaluationConfig
from stlm.model.config import ModelConfig
from stlm.study.runs import PublishedModel, Run, Study
from stlm.study.strict import validate
from stlm.training.config import RECORD_KEYS, TrainingConfig

if TYPE_CHECKING:
    from stlm.report.schema import TrainRecord

_SHOWN = 4


def check_trained(run: Run, train: TrainRecord, path: Path, command: str) -> None:
    """Refuse a train.json that differs from params/: tables would show it under the run's name.

    A key that is in the record alone comes from another version, or is a mistake; one that is in the run
    alone did not exist when the record was made, and nobody knows what its value would have been. Keys that
    are omitted when they change nothing (`exclude_if` of the config) are equal to null.
    """
    record = _Record(path, command, "trained")
    identity = {"run": run.name, **run.model_dump(include={"variant", "seed", "corpus", "tokenizer"})}
    expected: dict[str, Any] = dict(identity)
    found: dict[str, Any] = {key: getattr(train, key) for key in identity}
    for section, kind in (("model", ModelConfig), ("training", TrainingConfig)):
        settings = record.read(kind, getattr(train, section), section, RECORD_KEYS)
        expected[section], found[section] = _dump(getattr(run, section)), _dump(settings)
    if "data" in train.model_fields_set:  # a record without it is from before there was a choice
        record.check_complete(train.data, "data")
    # The limit may refuse a training, but changes none.
    expected["data"], found["data"] = (_dump(one.data.unlimited) for one in (run, train))
    expected["techniques"], found["techniques"] = list(run.techniques), list(train.techniques)
    expected |= {f"techniques.{name}": _dump(technique) for name, technique in run.techniques.items()}
    found |= {f"techniques.{name}": keys for name, keys in train.techniques.items()}
    recorded = {role: one.run for role, one in train.depends.items()}
    # Earlier versions recorded the role `start` alone.
    for role in {"start", *recorded, *(run.depends if "depends" in train.model_fields_set else ())}:
        key = f"depends.{role}.run"
        expected[key], found[key] = run.depends.get(role), recorded.get(role)
    record.compare(found, expected, ignored={f"training.{key}" for key in RECORD_KEYS})


def check_dependencies(study: Study, trained: Mapping[str, TrainRecord]) -> None:
    """Refuse runs that read other weights of a run they depend on than that run has now.

    `trained`: the study's runs by name. Raises UserError, a line for each.
    """
    problems = []
    for name, train in trained.items():
        for role, other in train.depends.items():
            if other.weights_sha256 is None or other.run not in trained:
                continue  # earlier versions did not record it
            if other.weights_sha256 != trained[other.run].checkpoints[-1].weights_sha256:
                path = study.runs[name].folder / "train.json"
                problems.append(
                    f"{path}: depends.{role}: {other.run} has been trained again since: run "
                    f"`stlm train {study.name} {name}`"
                )
    if problems:
        raise UserError("\n".join(problems))


def check_scored(
    expected: EvaluationConfig, settings: Mapping[str, Any] | None, path: Path, command: str
) -> None:
    """Refuse an evaluation.json whose `settings` are missing or differ from the study's `evaluation`."""
    record = _Record(path, command, "scored")
    if settings is None:
        raise record.error("does not say with which settings it was scored (written by an earlier version)")
    found = record.read(EvaluationConfig, settings, "evaluation", BATCH_KEYS)
    ignored = {f"evaluation.{key}" for key in BATCH_KEYS}
    record.compare({"evaluation": _dump(found)}, {"evaluation": _dump(expected)}, ignored)


def check_published(model: PublishedModel, found: Mapping[str, Any] | None, path: Path, command: str) -> None:
    """Refuse scores of a published model that was not loaded as the study says."""
    record, key = _Record(path, command, "scored"), f"published.{model.name}"
    if found is None:
        raise record.error("does not say how the model was loaded (written by an earlier version)")
    record.compare({key: dict(found)}, {key: model.settings})


class _Record(NamedTuple):
    """A record, the command that makes it anew, and what was done with its settings (for messages)."""

    path: Path
    command: str
    done: str

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path} {what}: run `{self.command}`")

    def read(
        self, kind: type[BaseModel], content: Mapping[str, Any], section: str, ignored: Collection[str]
    ) -> BaseModel:
        """A section of the record, parsed; UserError for unknown or missing keys, but for those `ignored`."""
        kept = {k: value for k, value in content.items() if k not in ignored or k in kind.model_fields}
        try:
            settings = validate(kind, kept, str(self.path), section)
        except UserError as error:
            raise UserError(f"{error}: run `{self.command}`") from None
        self.check_complete(settings, section, ignored)
        return settings

    def check_complete(self, settings: BaseModel, section: str, ignored: Collection[str] = ()) -> None:
        missing = [
            key for key in _missing(settings, section) if key.removeprefix(f"{section}.") not in ignored
        ]
        if missing:
            listed = ", ".join(missing[:_SHOWN])
            raise self.error(f"does not say what it had as {listed} (written by another version of STLM)")

    def compare(
        self, found: Mapping[str, Any], expected: Mapping[str, Any], ignored: Collection[str] = ()
    ) -> None:
        """Refuse any difference between the two, nested keys included."""
        own, other = _flat(found), _flat(expected)
        differing = [
            f"{key}: {_shown(own, key)}, the study asks for {_shown(other, key)}"
            for key in dict.fromkeys((*other, *own))
            if key not in ignored and (key not in own or key not in other or own[key] != other[key])
        ]
        if differing:
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise UserError(
                f"{self.path} was {self.done} with {'; '.join(differing[:_SHOWN])}{more}: run "
                f"`{self.command}`, or give the --set that it was {self.done} with"
            )


def _missing(settings: BaseModel, prefix: str) -> Iterator[str]:
    """The keys that the content lacked, except those that are omitted when they change nothing."""
    for name, field in type(settings).model_fields.items():
        if name not in settings.model_fields_set:
            if field.exclude_if is None:
                yield f"{prefix}.{name}"
            continue
        value = getattr(settings, name)
        for key, nested in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(nested, BaseModel):
                yield from _missing(nested, f"{prefix}.{name}" + (f".{key}" if key else ""))


def _dump(settings: BaseModel) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one, joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(content: Mapping[str, Any], key: str) -> str:
    if key not in content:
        return "not set"
    return "null" if content[key] is None else str(content[key])
