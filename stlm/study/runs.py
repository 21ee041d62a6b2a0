"""A run, a published model and a study, everything resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from stlm.errors import UserError, nearest, shortened
from stlm.evaluation.config import EvaluationConfig
from stlm.files import read_json
from stlm.model.config import CHUNK_BYTES, ModelConfig, ParameterCounts
from stlm.study.schema import Published
from stlm.techniques.base import Technique
from stlm.tokens.config import DataConfig
from stlm.training.config import TrainingConfig


class NamedVariant(NamedTuple):
    """A variant of the study that a run depends on, and the key of params/ that names it."""

    key: str
    variant: str


class Run(BaseModel):
    """One training: model variant x corpus x tokenizer x recipe x seed, everything resolved."""

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
    # Left out of records where it changes nothing: earlier runs, made without this section, are equal.
    data: DataConfig = Field(default=DataConfig(), exclude_if=lambda data: data.plain)
    # Likewise.
    techniques: dict[str, SerializeAsAny[Technique]] = Field(
        default={}, exclude_if=lambda techniques: not techniques
    )

    @property
    def folder(self) -> Path:
        """Where results of the run go."""
        return Path("results") / self.study / "runs" / self.name

    @property
    def state_folder(self) -> Path:
        """Where the rolling state lives: outside every declared output, which engines delete at will."""
        return Path(".state") / self.study / self.name

    @property
    def tokens_folder(self) -> Path:
        """The token shards that the run reads."""
        return Path("data") / "tokens" / self.corpus / self.tokenizer

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.training.steps * self.training.tokens_per_step(self.model.context)

    @property
    def depends(self) -> dict[str, str]:
        """Role -> the run of the study whose last weights this one reads.

        It has the same seed, where seeds have runs. Roles: `reference` measures the difficulty of the data,
        `start` is what training begins from; others are those of techniques.
        """
        seed = self.name.removeprefix(self.variant)
        return {role: named.variant + seed for role, named in self.dependencies.items()}

    @property
    def dependencies(self) -> dict[str, NamedVariant]:
        """Role -> the variant whose run of the same seed this one depends on, as params/ names it."""
        found: dict[str, NamedVariant] = {}
        if self.data.reference is not None:
            found["reference"] = NamedVariant("data.reference", self.data.reference)
        if self.training.start_from is not None:
            found["start"] = NamedVariant("training.start_from", self.training.start_from)
        for name, technique in self.techniques.items():
            for role, variant in technique.depends().items():
                key = f"techniques.{name}.{role}"
                if role in found:
                    raise UserError(
                        f"run {self.name}: {key}: {found[role].key} has the role {role!r} already"
                    )
                found[role] = NamedVariant(key, variant)
        return found

    @property
    def _techniques(self) -> tuple[Technique, ...]:
        return tuple(self.techniques.values())

    @property
    def parameters(self) -> ParameterCounts:
        """The model's parameters, counted on its modules: imports torch."""
        from stlm.model.counts import parameter_counts

        return parameter_counts(self.model, self._techniques)

    @property
    def flops(self) -> float:
        """Estimated floating-point operations of the whole training."""
        return self.tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token; of a chunk of bytes, by the mean length once the corpus is tokenized.

        Counted on the model's modules: imports torch.
        """
        from stlm.model.counts import training_flops_per_token

        extra = sum(technique.extra_flops_per_token(self) for technique in self._techniques)
        if self.model.bytes is None:
            return training_flops_per_token(self.model, techniques=self._techniques) + extra
        kind = self.tokenizer.partition("-")[0]
        ends = kind not in ("spaces", "stride")
        return training_flops_per_token(self.model, self._chunk_bytes, ends, self._techniques) + extra

    @property
    def _chunk_bytes(self) -> float:
        """Mean bytes of a chunk of the train split, ends of text left out; a guess before tokenizing."""
        path = self.tokens_folder / "meta.json"
        if not path.is_file():
            return CHUNK_BYTES
        splits = [component["splits"]["train"] for component in read_json(path)["components"].values()]
        chunks = sum(split["tokens"] - split["documents"] for split in splits)
        return sum(split["bytes"] for split in splits) / chunks


class PublishedModel(Published):
    """A published model of a study, everything resolved. `tokens_folder`: the text that it is measured on."""

    study: str
    name: str
    label: str
    tokens_folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its scores: where it is and how it is loaded, not how it is called."""
        names = Published.model_fields.keys() - {"label", "parameters"}
        return self.model_dump(mode="json", include=names)

    @property
    def results_folder(self) -> Path:
        """Where its results go."""
        return Path("results") / self.study / "published" / self.name

    @property
    def state_folder(self) -> Path:
        """Where finished parts of its evaluation are kept; no run has its name."""
        return Path(".state") / self.study / self.name


class Study(BaseModel):
    """The runs that one report compares, and published models beside them."""

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
        """Where the study's tables, plots and runs go."""
        return Path("results") / self.name

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks scored, in the order of the study file."""
        return list(self.evaluation.benchmarks)

    @property
    def training_texts(self) -> dict[str, Path]:
        """Corpus -> a folder of its tokens: one is enough, any tokenizer's decode to the same text."""
        folders: dict[str, Path] = {}
        for run in self.runs.values():
            folders.setdefault(run.corpus, run.tokens_folder)
        return folders

    def run(self, name: str) -> Run:
        """The run of that name; a ``UserError`` with the nearest one otherwise."""
        if name not in self.runs:
            raise UserError(f"study {self.name!r} has no run {shortened(name)!r}{nearest(name, self.runs)}")
        return self.runs[name]
