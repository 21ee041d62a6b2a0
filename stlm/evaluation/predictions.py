"""items.parquet describes itself: its Parquet metadata has a JSON object under the key `stlm`.

`stlm evaluate` writes it; `stlm report` and `stlm compare` read it, and refuse to compare predictions that
were not made alike. (Without heavy imports.)
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
# The keys of a record's `code`.
_CODE = ("stlm", "git", "torch")


class BenchmarkFacts(BaseModel):
    """One benchmark: its version and split, its files' SHA-256, and the metrics of each mode."""

    version: str
    split: str
    sha256: list[str]
    metrics: dict[str, list[str]]


class ItemCounts(BaseModel):
    """The number of scored items, of all items, and the requested limit (None: no limit)."""

    items: int
    items_total: int
    limit: int | None = None


class CheckpointFacts(BaseModel):
    """One checkpoint, and how many items of each benchmark it was scored on."""

    step: int
    tokens: int | None = None
    weights_sha256: str
    benchmarks: dict[str, ItemCounts]


class TokenizerFacts(BaseModel):
    """A tokenizer's name and the SHA-256 of its description, which has the digests of its files."""

    name: str
    sha256: str


class TrainedFacts(BaseModel):
    """How the weights were trained, according to train.json; None if it does not say."""

    device: str | None = None
    processor: str | None = None
    precision: str | None = None
    compiled: bool | None = None
    kernels: bool | None = None
    code: dict[str, str | None] = {}


class Facts(BaseModel):
    """What the predictions in a file belong to, and everything that they depend on."""

    study: str
    run: str
    label: str
    variant: str | None = None
    seed: int | None = None
    corpus: str | None = None
    # The token that starts a text, for published models. Our own models use the end of text.
    prefix: str | None = Field(None, exclude_if=lambda prefix: prefix is None)
    tokenizer: TokenizerFacts
    tokens_sha256: str  # digest of the test text's meta.json, which has the digests of its shards
    benchmarks: dict[str, BenchmarkFacts]
    modes: list[str]
    limit_seed: int
    harness: dict[str, str]
    scoring_version: int
    code: dict[str, str | None]
    device: str
    processor: str | None = None  # the CPU's model; None (also below): written by an earlier version of STLM
    precision: str
    settings: dict[str, Any] | None = None  # the study's `evaluation`
    trained: TrainedFacts | None = None
    checkpoints: dict[str, CheckpointFacts]

    def without_checkpoints(self) -> dict[str, Any]:
        """Everything except the checkpoints, as JSON values."""
        return self.model_dump(mode="json", exclude={"checkpoints"})


def benchmark_facts(result: dict[str, Any], sha256: list[str]) -> BenchmarkFacts:
    """The facts about a benchmark from its part of `evaluation.json`, with the digests of its files."""
    metrics = {
        mode: [metric for metric in ("acc", "acc_norm") if metric in results]
        for mode, results in result["modes"].items()
    }
    return BenchmarkFacts(version=result["version"], split=result["split"], sha256=sha256, metrics=metrics)


def write_predictions(path: Path, table: pa.Table, facts: Facts) -> None:
    """Write the rows with their facts to `path`, which should be an atomic writer's temporary file."""
    described = table.replace_schema_metadata({KEY: facts.model_dump_json().encode()})
    pq.write_table(described, path, compression="zstd")


def read_facts(path: Path) -> Facts | None:
    """The facts in an items.parquet; None if it has none, as an earlier version of STLM wrote it.

    Raises UserError if the file is missing, is not a Parquet file, or has malformed facts.
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
    """Why predictions of `a` and `b` cannot be compared, and what may disturb the comparison.

    Each reason names both values; only benchmarks that both have are considered.
    """
    refusals, warnings = unlike_items(a, b)
    made = [
        *(("scored on " + key, getattr(a, key), getattr(b, key)) for key in ("device", "processor")),
        ("scored in precision", a.precision, b.precision),
        *((f"scored by {key}", a.code.get(key), b.code.get(key)) for key in _CODE),
    ]
    trained = a.trained or TrainedFacts(), b.trained or TrainedFacts()
    for key in ("device", "processor", "precision", "compiled", "kernels"):
        made.append((f"trained with {key}", *(getattr(first, key) for first in trained)))
    made += [(f"trained by {key}", *(first.code.get(key) for first in trained)) for key in _CODE]
    warnings += [
        f"{what} {_shown(first)} against {_shown(second)}" for what, first, second in made if first != second
    ]
    return refusals, warnings


def unlike_items(a: Facts, b: Facts) -> tuple[list[str], list[str]]:
    """As `unlike`, but without precision, code and processors."""
    refusals, warnings = [], []
    if a.scoring_version != b.scoring_version:
        refusals.append(f"scoring version {a.scoring_version} against {b.scoring_version}")
    for name in [name for name in a.benchmarks if name in b.benchmarks]:
        first, second = a.benchmarks[name], b.benchmarks[name]
        if first.version != second.version:
            refusals.append(f"{name}: version {first.version} against {second.version}")
        if first.split != second.split:
            refusals.append(f"{name}: split {first.split} against {second.split}")
        elif first.sha256 != second.sha256 and isinstance(BENCHMARKS.get(name), TextBenchmark):
            # Its items are made from a corpus: those that both have are the same.
            warnings.append(f"{name}: passages of other text, or another number of them")
        elif first.sha256 != second.sha256:
            shown = [", ".join(digest[:12] for digest in facts.sha256) for facts in (first, second)]
            refusals.append(f"{name}: files of SHA-256 {shown[0]} against {shown[1]}")
    if a.harness != b.harness:
        warnings.append(f"harness {' '.join(a.harness.values())} against {' '.join(b.harness.values())}")
    return refusals, warnings


def _shown(value: object) -> str:
    return "not recorded" if value is None else str(value)
