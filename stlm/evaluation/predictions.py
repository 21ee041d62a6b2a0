"""items.parquet says by itself what is in it: a JSON in its Parquet metadata, under the key `stlm`.

Written by `stlm evaluate`, read by `stlm report` and `stlm compare`, which refuse to hold predictions against
each other that were not made alike. (No heavy import here.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError

from stlm.errors import UserError
from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.evaluation.benchmarks.items import TextBenchmark

KEY = b"stlm"
# What `code` of a record says.
_CODE = ("stlm", "git", "torch")


class BenchmarkFacts(BaseModel):
    """One benchmark: its version and split, its files' SHA-256, and the metrics of each mode."""

    version: str
    split: str
    sha256: list[str]
    metrics: dict[str, list[str]]


class ItemCounts(BaseModel):
    """Items scored of those there are, and the limit that was asked for (None: none)."""

    items: int
    items_total: int
    limit: int | None = None


class CheckpointFacts(BaseModel):
    """One checkpoint, and how much of each benchmark it was scored on."""

    step: int
    tokens: int | None = None
    weights_sha256: str
    benchmarks: dict[str, ItemCounts]


class TokenizerFacts(BaseModel):
    """A tokenizer's name and the SHA-256 of its description, which has those of its files."""

    name: str
    sha256: str


class TrainedFacts(BaseModel):
    """What trained the weights, as train.json has it; None where it does not say."""

    device: str | None = None
    processor: str | None = None
    precision: str | None = None
    compiled: bool | None = None
    kernels: bool | None = None
    code: dict[str, str | None] = {}


class Facts(BaseModel):
    """What the predictions of a file are of, and all that they depend on."""

    study: str
    run: str
    label: str
    variant: str | None = None
    seed: int | None = None
    corpus: str | None = None
    # Of a published model: the token that starts a text. Our own models have the end of text for it.
    prefix: str | None = Field(None, exclude_if=lambda prefix: prefix is None)
    tokenizer: TokenizerFacts
    tokens_sha256: str  # of the test text's meta.json, which has those of its shards
    benchmarks: dict[str, BenchmarkFacts]
    modes: list[str]
    limit_seed: int
    harness: dict[str, str]
    scoring_version: int
    code: dict[str, str | None]
    device: str
    processor: str | None = None  # the CPU's model; None: written by an earlier version of STLM, as below
    precision: str
    settings: dict[str, Any] | None = None  # the study's `evaluation`
    trained: TrainedFacts | None = None
    checkpoints: dict[str, CheckpointFacts]

    def without_checkpoints(self) -> dict[str, Any]:
        """All but the checkpoints, as JSON holds it."""
        return self.model_dump(mode="json", exclude={"checkpoints"})


def benchmark_facts(result: dict[str, Any], sha256: list[str]) -> BenchmarkFacts:
    """The facts of a benchmark from its part of `evaluation.json`, and its files' digests."""
    metrics = {
        mode: [metric for metric in ("acc", "acc_norm") if metric in of_mode]
        for mode, of_mode in result["modes"].items()
    }
    return BenchmarkFacts(version=result["version"], split=result["split"], sha256=sha256, metrics=metrics)


def write_predictions(path: Path, table: pa.Table, facts: Facts) -> None:
    """Write the rows with their facts to `path`, which should be an atomic writer's temporary file."""
    described = table.replace_schema_metadata({KEY: facts.model_dump_json().encode()})
    pq.write_table(described, path, compression="zstd")


def read_facts(path: Path) -> Facts | None:
    """The facts of an items.parquet; None where it has none, being of an earlier version of STLM.

    Raises UserError where the file is missing, is no Parquet file, or its facts are not as written here.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `stlm evaluate` writes it") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
    if KEY not in metadata:
        return None
    try:
        return Facts.model_validate_json(metadata[KEY])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(
            f"{path}: its metadata `{KEY.decode()}` is not what `stlm evaluate` of this version writes "
            f"({key}: {first['msg']}); evaluate again"
        ) from None


def unlike(a: Facts, b: Facts) -> tuple[list[str], list[str]]:
    """Why predictions of `a` and `b` cannot be held against each other, and what may disturb the comparison.

    Each reason names both values; of the benchmarks, those that both have count.
    """
    refusals, warnings = unlike_items(a, b)
    made = [
        *(("scored on " + key, getattr(a, key), getattr(b, key)) for key in ("device", "processor")),
        ("scored in precision", a.precision, b.precision),
        *((f"scored by {key}", a.code.get(key), b.code.get(key)) for key in _CODE),
    ]
    trained = a.trained or TrainedFacts(), b.trained or TrainedFacts()
    for key in ("device", "processor", "precision", "compiled", "kernels"):
        made.append((f"trained with {key}", *(getattr(own, key) for own in trained)))
    made += [(f"trained by {key}", *(own.code.get(key) for own in trained)) for key in _CODE]
    warnings += [f"{what} {_shown(own)} against {_shown(other)}" for what, own, other in made if own != other]
    return refusals, warnings


def unlike_items(a: Facts, b: Facts) -> tuple[list[str], list[str]]:
    """As `unlike`, but for the arithmetic, the code and the processors."""
    refusals, warnings = [], []
    if a.scoring_version != b.scoring_version:
        refusals.append(f"scoring version {a.scoring_version} against {b.scoring_version}")
    for name in [name for name in a.benchmarks if name in b.benchmarks]:
        own, other = a.benchmarks[name], b.benchmarks[name]
        if own.version != other.version:
            refusals.append(f"{name}: version {own.version} against {other.version}")
        if own.split != other.split:
            refusals.append(f"{name}: split {own.split} against {other.split}")
        elif own.sha256 != other.sha256 and isinstance(BENCHMARKS.get(name), TextBenchmark):
            # Its items are made of a corpus: those that both have are the same.
            warnings.append(f"{name}: passages of other text, or another number of them")
        elif own.sha256 != other.sha256:
            shown = [", ".join(digest[:12] for digest in facts.sha256) for facts in (own, other)]
            refusals.append(f"{name}: files of SHA-256 {shown[0]} against {shown[1]}")
    if a.harness != b.harness:
        warnings.append(f"harness {' '.join(a.harness.values())} against {' '.join(b.harness.values())}")
    return refusals, warnings


def _shown(value: object) -> str:
    return "not recorded" if value is None else str(value)
