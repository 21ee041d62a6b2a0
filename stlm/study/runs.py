"""Runs, published models and studies, with all settings resolved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from stlm.errors import UserError, nearest, shortened
from stlm.evaluation.config import EvaluationConfig
from stlm.files import read_json
from stlm.model.config import CHUNK_BYTES, ModelConfig, ParameterCounts
from stlm.study.schema import Published
from stlm.techniques.base import Technique
from stlm.tokens.config import DataConfig
from stlm.tokens.names import hf_name
from stlm.training.config import TrainingConfig


class NamedVariant(NamedTuple):
    """A variant, or a published model, that a run depends on, and the key of params/ that names it."""

    key: str
    name: str


class SourceModel(BaseModel):
    """A published model of params/models.yaml that a run depends on: what checks ask of it as of a run."""

    model_config = ConfigDict(frozen=True)

    name: str
    model: ModelConfig

    # As of a run: it has no techniques, depends on nothing, and its vocabulary is that of no corpus.
    corpus: ClassVar[None] = None
    techniques: ClassVar[Mapping[str, Technique]] = {}
    depends: ClassVar[Mapping[str, str]] = {}

    @property
    def tokenizer(self) -> str:
        """The name of its own tokenizer."""
        return f"hf:{self.name}"

    @property
    def parameters(self) -> ParameterCounts:
        """Its parameters, counted on the modules (this imports torch)."""
        from stlm.model.counts import parameter_counts

        return parameter_counts(self.model)


class Run(BaseModel):
    """One training: model variant x corpus x tokenizer x recipe x seed, with all settings resolved."""

    model_config = ConfigDict(frozen=True)

    study: str
    name: str
    variant: str
    label: str
    paper_row: str | None
    seed: int
    corpus: str
    tokenizer: str
    model: ModelConfig
    training: TrainingConfig
    # Omitted from records when plain, so that records of earlier runs, without this section, compare equal.
    data: DataConfig = Field(default=DataConfig(), exclude_if=lambda data: data.plain)
    # Likewise.
    techniques: dict[str, SerializeAsAny[Technique]] = Field(
        default={}, exclude_if=lambda techniques: not techniques
    )
    # Role -> the published model in params/models.yaml that it names. Likewise.
    sources: dict[str, str] = Field(default={}, exclude_if=lambda sources: not sources)

    @property
    def folder(self) -> Path:
        """The folder of the run's results."""
        return Path("results") / self.study / "runs" / self.name

    @property
    def state_folder(self) -> Path:
        """The folder of the rolling state; it is no declared output, since engines delete those at will."""
        return Path(".state") / self.study / self.name

    @property
    def tokens_folder(self) -> Path:
        """The token shards that the run reads."""
        return Path("data") / "tokens" / self.corpus / self.tokenizer

    @property
    def tokens(self) -> int:
        """The number of tokens trained on."""
        return self.training.steps * self.training.tokens_per_step(self.model.context)

    @property
    def depends(self) -> dict[str, str]:
        """Map each role to the run of the study whose last weights this run reads.

        With several seeds, it is the run with the same seed. Roles: `reference` and `smaller` measure the
        data, training begins from `start`, and techniques have others. Roles of published models are in
        `sources` instead.
        """
        seed = self.name.removeprefix(self.variant)
        return {
            role: named.name + seed for role, named in self.dependencies.items() if role not in self.sources
        }

    @property
    def dependencies(self) -> dict[str, NamedVariant]:
        """Map each role to the variant whose run, with the same seed, this run depends on, or to a published
        model (`sources` says which)."""
        found: dict[str, NamedVariant] = {}
        if self.data.reference is not None:
            found["reference"] = NamedVariant("data.reference", self.data.reference)
        if self.data.select is not None and self.data.select.smaller is not None:
            found["smaller"] = NamedVariant("data.select.smaller", self.data.select.smaller)
        if self.training.start_from is not None:
            found["start"] = NamedVariant("training.start_from", self.training.start_from)
        for name, technique in self.techniques.items():
            for role, variant in technique.depends().items():
                key = f"techniques.{name}.{technique.role_keys.get(role, role)}"
                if role in found:
                    raise UserError(
                        f"params/{self.study}.yaml: run {self.name}: {key}: {found[role].key} has the role "
                        f"{role!r} already"
                    )
                found[role] = NamedVariant(key, variant)
        return found

    @property
    def _techniques(self) -> tuple[Technique, ...]:
        return tuple(self.techniques.values())

    @property
    def parameters(self) -> ParameterCounts:
        """The model's parameters, counted on its modules (this imports torch)."""
        from stlm.model.counts import parameter_counts

        return parameter_counts(self.model, self._techniques)

    @property
    def flops(self) -> float:
        """The estimated floating-point operations of the whole training."""
        return self.tokens * self.flops_per_token if self.tokens else 0.0

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token; for chunks of bytes, at their mean length in the tokenized corpus.

        They are counted on the model's modules (this imports torch).
        """
        from stlm.model.counts import training_flops_per_token

        # A technique's own are a mean over the steps.
        steps = self.training.steps
        extra = sum(technique.extra_flops_per_token(self) for technique in self._techniques) if steps else 0.0
        if self.model.bytes is None:
            return training_flops_per_token(self.model, techniques=self._techniques) + extra
        kind = self.tokenizer.partition("-")[0]
        ends = kind not in ("spaces", "stride")
        return training_flops_per_token(self.model, self._chunk_bytes, ends, self._techniques) + extra

    @property
    def _chunk_bytes(self) -> float:
        """Mean bytes of a chunk in the train split, without ends of text; a guess before tokenizing."""
        path = self.tokens_folder / "meta.json"
        if not path.is_file():
            return CHUNK_BYTES
        splits = [component["splits"]["train"] for component in read_json(path)["components"].values()]
        chunks = sum(split["tokens"] - split["documents"] for split in splits)
        return sum(split["bytes"] for split in splits) / chunks


class PublishedModel(Published):
    """A published model of a study, with all settings resolved; `tokens_folder` has its test text."""

    study: str
    name: str
    label: str
    tokens_folder: Path

    @property
    def place(self) -> Path:
        """The folder with its files: its own, or where a model of params/models.yaml is fetched to."""
        return Path(self.folder) if self.model is None else Path("data/raw") / self.model

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine its scores: where it is and how it is loaded, not its names."""
        names = Published.model_fields.keys() - {"label", "parameters"}
        return self.model_dump(mode="json", include=names)

    @property
    def results_folder(self) -> Path:
        """The folder of its results."""
        return Path("results") / self.study / "published" / self.name

    @property
    def state_folder(self) -> Path:
        """The folder of its evaluation's finished parts; no run has its name."""
        return Path(".state") / self.study / self.name


class Study(BaseModel):
    """The runs that one report compares, and published models compared with them."""

    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    baseline: str
    runs: dict[str, Run]
    evaluation: EvaluationConfig
    corpora: list[str]
    published: dict[str, PublishedModel] = {}
    overrides: list[str]

    @property
    def folder(self) -> Path:
        """The folder of the study's tables, plots and runs."""
        return Path("results") / self.name

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks to score, in the order of the study file."""
        return list(self.evaluation.benchmarks)

    @property
    def models(self) -> list[str]:
        """The models of params/models.yaml that the study reads: it scores them, a run depends on them, or
        tokenizes with their vocabulary."""
        scored = [published.model for published in self.published.values()]
        read = [name for run in self.runs.values() for name in run.sources.values()]
        tokenizers = [hf_name(run.tokenizer) for run in self.runs.values()]
        names = (*scored, *read, *(name.model for name in tokenizers if name is not None))
        return [name for name in dict.fromkeys(names) if name is not None]

    @property
    def training_texts(self) -> dict[str, Path]:
        """Map each corpus to one folder of its tokens, as all tokenizers decode to the same text."""
        folders: dict[str, Path] = {}
        for run in self.runs.values():
            folders.setdefault(run.corpus, run.tokens_folder)
        return folders

    def run(self, name: str) -> Run:
        """The run `name`; raises ``UserError`` naming the nearest one if there is none."""
        if name not in self.runs:
            raise UserError(f"study {self.name!r} has no run {shortened(name)!r}{nearest(name, self.runs)}")
        return self.runs[name]
