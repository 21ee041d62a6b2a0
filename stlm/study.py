"""Studies and their runs: the only reader of params/.

A study file ``params/<study>.yaml`` states a baseline (corpus, tokenizer, model, training, evaluation) and
its variants as differences from it, as the paper's Table 1 does. Everything is checked before any work
starts; an error names the file, the key, what was found, what was expected and the nearest valid choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from stlm.checks import check_benchmarks, check_data, check_names, check_start
from stlm.corpora.config import BenchmarkEntry, CorpusEntry, VocabularyEntry
from stlm.errors import UserError, nearest, shortened
from stlm.evaluation.config import EvaluationConfig
from stlm.files import read_json
from stlm.model.config import (
    CHUNK_BYTES,
    ModelConfig,
    ParameterCounts,
    parameter_counts,
    training_flops_per_token,
)
from stlm.project import where_to_stand
from stlm.study_file import Published, StudyFile
from stlm.tokens.chunks import SYMBOLS, cuts_chunks, make_chunker
from stlm.tokens.config import DataConfig
from stlm.tokens.names import bpe_size
from stlm.training.config import TrainingConfig
from stlm.validation import parse_yaml, read_yaml, validate

PARAMS = Path("params")
NAME = re.compile(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)*")
LONGEST_NAME = 100
"""Characters of a name: files, folders and stages have more in theirs, and file systems take 255 bytes."""
_DEEPEST = 20
NOT_STUDIES = {"corpora", "benchmarks", "vocabularies", "active"}
_Model = TypeVar("_Model", bound=BaseModel)


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
    def reference(self) -> str | None:
        """The run that measures the difficulty of this one's data: of the same seed, if seeds have runs."""
        if self.data.reference is None:
            return None
        return self.data.reference + self.name.removeprefix(self.variant)

    @property
    def origin(self) -> str | None:
        """The run whose last weights this one starts from: of the same seed, if seeds have runs."""
        if self.training.start_from is None:
            return None
        return self.training.start_from + self.name.removeprefix(self.variant)

    @property
    def parameters(self) -> ParameterCounts:
        """The model's parameters."""
        return parameter_counts(self.model)

    @property
    def flops(self) -> float:
        """Estimated floating-point operations of the whole training."""
        return self.tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token; of a chunk of bytes, by the mean length once the corpus is tokenized."""
        if self.model.bytes is None:
            return training_flops_per_token(self.model)
        kind = self.tokenizer.partition("-")[0]
        return training_flops_per_token(self.model, self._chunk_bytes, kind not in ("spaces", "stride"))

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


def _catalogue(root: Path, name: str, model: type[_Model]) -> dict[str, _Model]:
    path = root / PARAMS / f"{name}.yaml"
    content = read_yaml(path)
    spelled: dict[str, str] = {}
    for key in map(str, content):
        other = spelled.setdefault(key.casefold(), key)
        if other != key:
            raise UserError(
                f"{PARAMS}/{name}.yaml: {other} and {key} differ only in capital letters, but on many disks "
                "their folders would be one; rename one of them"
            )
    return {
        key: validate(
            model, {"name": key, **value} if isinstance(value, dict) else value, f"{PARAMS}/{name}.yaml", key
        )
        for key, value in content.items()
    }


def load_corpora(root: Path = Path()) -> dict[str, CorpusEntry]:
    """The corpora and mixes by name, from params/corpora.yaml."""
    corpora = _catalogue(root, "corpora", CorpusEntry)
    for name, entry in corpora.items():
        for component in entry.mix or {}:
            if component not in corpora or corpora[component].mix:
                plain = [key for key, other in corpora.items() if not other.mix]
                raise UserError(
                    f"params/corpora.yaml: {name}.mix.{component}: no such corpus{nearest(component, plain)}"
                )
    return corpora


def load_benchmarks(root: Path = Path()) -> dict[str, BenchmarkEntry]:
    """The benchmarks by name, from params/benchmarks.yaml."""
    return _catalogue(root, "benchmarks", BenchmarkEntry)


def load_vocabularies(root: Path = Path()) -> dict[str, VocabularyEntry]:
    """The published vocabularies by name, from params/vocabularies.yaml."""
    return _catalogue(root, "vocabularies", VocabularyEntry)


def is_name(text: str) -> bool:
    """Whether a study, a variant or a published model may have this name."""
    return len(text) <= LONGEST_NAME and NAME.fullmatch(text) is not None


def _check_study_name(name: str, root: Path) -> None:
    """A study is a name, never a path; it must have a file in params/."""
    if not is_name(name):
        hint = nearest(Path(name).stem, study_names(root)) if len(name) <= LONGEST_NAME else ""
        raise UserError(
            f"{shortened(name)!r} is no study's name: lower-case letters, digits, _ and - between them, at "
            f"most {LONGEST_NAME}; without folder and suffix{hint}"
        )
    if name in NOT_STUDIES or not (root / PARAMS / f"{name}.yaml").exists():
        hint = where_to_stand(root) or nearest(name, study_names(root))
        raise UserError(f"{PARAMS}/{name}.yaml: no such study{hint}")


def study_names(root: Path = Path()) -> list[str]:
    """The studies that params/ has."""
    return sorted(path.stem for path in (root / PARAMS).glob("*.yaml") if path.stem not in NOT_STUDIES)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _override(content: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    flag = f"--set {shortened(override)}"
    if not separator or not all(key.split(".")):
        raise UserError(f"{flag}: expected key.path=value, for example model.layers=2")
    value = parse_yaml(text, flag)
    parts = key.split(".")
    if len(parts) > _DEEPEST:
        raise UserError(f"{flag}: no parameter is so deep; expected key.path=value")
    below: Any = content
    for depth, part in enumerate(parts[:-1], start=1):
        below = below.get(part)
        if below is None:
            break
        if not isinstance(below, Mapping):
            raise UserError(f"{flag}: {'.'.join(parts[:depth])} is a value, it has no keys")
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    return _merge(content, nested)


def vocabulary_size(tokenizer: str) -> int:
    """Tokens in the vocabulary of a tokenizer, by its name, the end-of-text token included.

    Of `words`, `spaces` and `stride-N`, which cut chunks of bytes: the symbols that chunks are written in.
    """
    if tokenizer == "gpt2":
        return 50257
    if tokenizer == "bytes":
        return 257
    if cuts_chunks(tokenizer):
        make_chunker(tokenizer)
        return SYMBOLS
    size = bpe_size(tokenizer)
    if size is None:
        raise UserError(
            f"tokenizer: {shortened(tokenizer)!r} is none of gpt2, bytes, bpe-N (for example bpe-4096), "
            "words, spaces, stride-N (for example stride-4)"
        )
    return size


def _ids(tokenizer: str, byte_level: bool) -> int:
    """The `vocab_size` of a model on a tokenizer; a ``UserError`` where the two do not fit."""
    size = vocabulary_size(tokenizer)
    if byte_level and tokenizer == "bytes":
        raise UserError(
            "tokenizer: 'bytes' cuts no chunks, which a byte-level model (model.bytes) needs; choose "
            "stride-N, spaces, words, bpe-N or gpt2"
        )
    if not byte_level and cuts_chunks(tokenizer):
        raise UserError(
            f"tokenizer: {tokenizer!r} cuts chunks for byte-level models; set model.bytes ({{}} for its "
            "defaults), or choose gpt2, bytes or bpe-N"
        )
    return SYMBOLS if byte_level else size


def _resolve(study: str, file: str, parsed: StudyFile, name: str, seed: int, raw: Mapping[str, Any]) -> Run:
    variant = parsed.variants[name]
    where = f"variants.{name}"
    tokenizer = variant.tokenizer or parsed.tokenizer
    sections: dict[str, Any] = {}
    for section, model in (("model", ModelConfig), ("training", TrainingConfig), ("data", DataConfig)):
        base, own = raw.get(section) or {}, getattr(variant, section)
        # The baseline first: its mistakes are not the variant's.
        validate(model, base, file, section)
        sections[section] = validate(model, _merge(base, own), file, f"{where}.{section}" if own else section)
    try:
        vocab_size = _ids(tokenizer, sections["model"].bytes is not None)
    except UserError as error:
        raise UserError(f"{file}: {where + '.' if variant.tokenizer else ''}{error}") from None
    if sections["model"].vocab_size not in (None, vocab_size):
        raise UserError(
            f"{file}: model.vocab_size: the tokenizer {tokenizer} has {vocab_size} tokens; leave the key out"
        )
    # Again, as some of its checks need the vocabulary.
    known = _merge(raw.get("model") or {}, variant.model) | {"vocab_size": vocab_size}
    model = validate(ModelConfig, known, file, f"{where}.model" if variant.model else "model")
    stride = parsed.evaluation.perplexity.stride
    if stride is not None and stride > sections["model"].context:
        raise UserError(
            f"{file}: evaluation.perplexity.stride: {stride} is above model.context: "
            f"{sections['model'].context}; text between windows would be left out"
        )
    return Run(
        study=study,
        name=name if len(parsed.seeds) == 1 else f"{name}-s{seed}",
        variant=name,
        label=variant.label or name,
        paper_row=variant.paper_row,
        seed=seed,
        corpus=variant.corpus or parsed.corpus,
        tokenizer=tokenizer,
        model=model,
        training=sections["training"],
        data=sections["data"],
    )


def load_study(name: str, overrides: Sequence[str] = (), root: Path = Path()) -> Study:
    """Read, override, check and resolve the study ``params/<name>.yaml``.

    ``overrides`` are ``key.path=value`` texts, the value in YAML, as after ``--set``. Raises ``UserError``
    with every problem found.
    """
    _check_study_name(name, root)
    path = root / PARAMS / f"{name}.yaml"
    file = f"{PARAMS}/{name}.yaml"
    raw = read_yaml(path)
    for override in overrides:
        raw = _override(raw, override)
    if overrides:
        file += f" (with --set {shortened(' '.join(overrides), 200)})"
    parsed = validate(StudyFile, raw, file)
    if parsed.baseline not in parsed.variants:
        raise UserError(
            f"{file}: baseline: {parsed.baseline!r} is not among the variants"
            f"{nearest(parsed.baseline, parsed.variants)}"
        )
    for key in ("variants", "published"):
        for own in getattr(parsed, key):
            if not is_name(own):
                raise UserError(
                    f"{file}: {key}: {shortened(own)!r}: a name is lower-case letters, digits, _ and -, and "
                    f"begins with a letter; at most {LONGEST_NAME}"
                )
    if len(set(parsed.seeds)) < len(parsed.seeds):
        raise UserError(f"{file}: seeds: a seed is given twice: {list(parsed.seeds)}")
    corpora = load_corpora(root)
    check_names(file, parsed, corpora)
    runs = [
        _resolve(name, file, parsed, variant, seed, raw)
        for variant in parsed.variants
        for seed in parsed.seeds
    ]
    by_name = {run.name: run for run in runs}
    for run in runs:
        check_benchmarks(file, run, parsed.evaluation.benchmarks, corpora)
        check_data(file, run, by_name, corpora)
        check_start(file, run, by_name)
    for key in by_name.keys() & parsed.published.keys():
        raise UserError(f"{file}: published.{key}: a run has this name; choose another")
    first_seed = "" if len(parsed.seeds) == 1 else f"-s{parsed.seeds[0]}"
    baseline = parsed.baseline + first_seed
    return Study(
        name=name,
        description=parsed.description,
        baseline=baseline,
        runs=by_name,
        evaluation=parsed.evaluation,
        corpora=list(dict.fromkeys(run.corpus for run in runs)),
        published={
            key: PublishedModel(
                **own.model_dump(exclude={"label"}),
                study=name,
                name=key,
                label=own.label or key,
                tokens_folder=by_name[baseline].tokens_folder,
            )
            for key, own in parsed.published.items()
        },
        overrides=list(overrides),
    )
