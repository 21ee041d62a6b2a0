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

_SHOWN = 4  # differences in a message
_UNSET = object()


def check_trained(run: Run, train: TrainRecord, path: Path, command: str) -> None:
    """Refuse a train.json that differs from params/: tables would show it under the run's name.

    A key that is in the record alone comes from another version, or is a mistake; one that is in the run
    alone did not exist when the record was made, and nobody knows what its value would have been. Keys that
    are omitted when they change nothing (`exclude_if` of the config) are equal to null.
    """
    record = _Record(path, command, "trained")
    identity = {"run": run.name, **run.model_dump(include={"variant", "seed", "corpus", "tokenizer"})}
    expected: dict[str, Any] = dict(identity)
    recorded: dict[str, Any] = {key: getattr(train, key) for key in identity}
    for section, kind in (("model", ModelConfig), ("training", TrainingConfig)):
        expected[section] = getattr(run, section)
        recorded[section] = record.read(kind, getattr(train, section), section, RECORD_KEYS)
    if "data" in train.model_fields_set:  # a record without it is from before there was a choice
        record.check_complete(train.data, "data")
    # The limit may refuse a training, but changes none.
    expected["data"], recorded["data"] = run.data.unlimited, train.data.unlimited
    expected["techniques"], recorded["techniques"] = list(run.techniques), list(train.techniques)
    expected |= {f"techniques.{name}": technique for name, technique in run.techniques.items()}
    recorded |= {f"techniques.{name}": keys for name, keys in train.techniques.items()}
    roles = {role: dependency.run for role, dependency in train.depends.items()}
    # Earlier versions recorded the role `start` alone.
    for role in {"start", *roles, *(run.dependencies if "depends" in train.model_fields_set else ())}:
        key = f"depends.{role}"
        expected[f"{key}.run"], recorded[f"{key}.run"] = run.depends.get(role), roles.get(role)
        source = train.depends[role].source if role in train.depends else None
        expected[f"{key}.source"], recorded[f"{key}.source"] = run.sources.get(role), source
    record.compare(recorded, expected, ignored={f"training.{key}" for key in RECORD_KEYS})


def check_dependencies(study: Study, trained: Mapping[str, TrainRecord]) -> None:
    """Refuse runs that read other weights of a run they depend on than that run has now.

    `trained`: the study's runs by name. Raises UserError, a line for each.
    """
    problems = [
        f"{study.runs[name].folder / 'train.json'}: depends.{role}: {other.run} has been trained again "
        f"since: run `stlm train {study.name} {name}`"
        for name, train in trained.items()
        for role, other in train.depends.items()
        if other.weights_sha256 is not None and other.run in trained  # earlier versions did not record it
        if other.weights_sha256 != trained[other.run].checkpoints[-1].weights_sha256
    ]
    if problems:
        raise UserError("\n".join(problems))


def check_scored(
    expected: EvaluationConfig, settings: Mapping[str, Any] | None, path: Path, command: str
) -> None:
    """Refuse an evaluation.json whose `settings` are missing or differ from the study's `evaluation`."""
    record = _Record(path, command, "scored")
    if settings is None:
        raise record.error("does not say with which settings it was scored (written by an earlier version)")
    recorded = record.read(EvaluationConfig, settings, "evaluation", BATCH_KEYS)
    ignored = {f"evaluation.{key}" for key in BATCH_KEYS}
    record.compare({"evaluation": recorded}, {"evaluation": expected}, ignored)


def check_published(
    model: PublishedModel, recorded: Mapping[str, Any] | None, path: Path, command: str
) -> None:
    """Refuse scores of a published model that was not loaded as the study says."""
    record, key = _Record(path, command, "scored"), f"published.{model.name}"
    if recorded is None:
        raise record.error("does not say how the model was loaded (written by an earlier version)")
    record.compare({key: dict(recorded)}, {key: model.settings})


class _Record(NamedTuple):
    """A record, the command that makes it anew, and what was made with its settings: "trained", "scored"."""

    path: Path
    command: str
    verb: str

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path} {what}: run `{self.command}`")

    def read(
        self, kind: type[BaseModel], content: Mapping[str, Any], section: str, ignored: Collection[str]
    ) -> BaseModel:
        """A section of the record, parsed; UserError for unknown or missing keys, but for those `ignored`."""
        known = {k: value for k, value in content.items() if k not in ignored or k in kind.model_fields}
        try:
            settings = validate(kind, known, str(self.path), section)
        except UserError as error:
            raise UserError(f"{error}: run `{self.command}`") from None
        self.check_complete(settings, section, ignored)
        return settings

    def check_complete(self, settings: BaseModel, section: str, ignored: Collection[str] = ()) -> None:
        keys = _missing(settings, section)
        if missing := [key for key in keys if key.removeprefix(f"{section}.") not in ignored]:
            listed = ", ".join(missing[:_SHOWN])
            raise self.error(f"does not say what it had as {listed} (written by another version of STLM)")

    def compare(
        self, recorded: Mapping[str, Any], expected: Mapping[str, Any], ignored: Collection[str] = ()
    ) -> None:
        """Refuse any difference between the two, nested keys included."""
        recorded, asked = _flat(recorded), _flat(expected)
        differing = [
            f"{key}: {_shown(recorded, key)}, the study asks for {_shown(asked, key)}"
            for key in dict.fromkeys((*asked, *recorded))
            if key not in ignored and recorded.get(key, _UNSET) != asked.get(key, _UNSET)
        ]
        if differing:
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise UserError(
                f"{self.path} was {self.verb} with {'; '.join(differing[:_SHOWN])}{more}: run "
                f"`{self.command}`, or give the --set that it was {self.verb} with"
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


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one, joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(content: Mapping[str, Any], key: str) -> str:
    value = content.get(key, "not set")
    return "null" if value is None else str(value)
