"""Evaluates the kept checkpoints of a run: perplexity on the test split, and the study's benchmarks."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from pydantic import BaseModel
from torch import nn
from tqdm import tqdm

from stlm.errors import UserError
from stlm.evaluation import perplexity, scoring
from stlm.evaluation.benchmarks import Benchmark, Item, TextBenchmark, benchmark, subset
from stlm.evaluation.byte_model import ByteModel, ChunkRequests
from stlm.evaluation.config import EvaluationConfig, Mode
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.fidelity import compare_with_start
from stlm.evaluation.interface import LanguageModel, Progress
from stlm.evaluation.part_store import BenchmarkFailed, Failures, Part, PartStore
from stlm.evaluation.perplexity import TestText
from stlm.evaluation.predictions import (
    CheckpointFacts,
    Facts,
    TrainedFacts,
    benchmark_facts,
    write_predictions,
)
from stlm.evaluation.readouts import score_readouts
from stlm.evaluation.text_items import items_from_text
from stlm.evaluation.token_model import TokenModel
from stlm.evaluation.writing import write_before
from stlm.files import atomic_path, read_json, read_record, remove_leftovers, sha256, write_record
from stlm.model.transformer import Transformer
from stlm.outputs import EVALUATION, names
from stlm.provenance import code_version, processor_name, source_digest
from stlm.study.runs import Run
from stlm.tokens.tokenizer import DESCRIPTION, load_tokenizer
from stlm.training.checkpoint_names import checkpoints_by_step
from stlm.training.checkpoints import check_fits, load_checkpoint, read_description
from stlm.training.devices import cpu_multiplies_bfloat16

# The reference of the harness mode: the package and version of its prompts and rules.
HARNESS = {"package": "lm_eval", "version": "0.4.13"}
# Increases whenever the same weights, text and settings would get other numbers.
SCORING_VERSION = 3
RAW = Path("data/raw")
# The schema of each kind of rows, by file name.
_SCHEMAS = {"items": scoring.ITEMS_SCHEMA, "documents": perplexity.DOCUMENTS_SCHEMA}
_FILES = [f"{name}.parquet" for name in _SCHEMAS]


class CheckpointSummary(BaseModel):
    """The part of a checkpoint's config.json that its results repeat."""

    step: int
    tokens: int
    weights_sha256: str


class Subject(NamedTuple):
    """A checkpoint to score: its name, the facts that its results repeat, whether it is the run's last, its
    label in progress bars, and how it is loaded, if that changes scores."""

    name: str
    checkpoint: CheckpointSummary
    last: bool
    label: str
    settings: Mapping[str, Any] = MappingProxyType({})


class Material(NamedTuple):
    """The data and settings with which every checkpoint of a run is scored."""

    config: EvaluationConfig
    device: str
    precision: Literal["float32", "bfloat16"]
    text: TestText | None  # None: no perplexity is measured
    benchmarks: list[tuple[Benchmark, str, list[Item]]]  # each with the split of its items
    encoder: RequestEncoder | ChunkRequests
    digests: dict[str, Any]
    unreadable: dict[str, str]  # benchmarks that could not be read, and why

    @property
    def device_name(self) -> str:
        """The model of the processor, or the name of the GPU."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def read_by(self, readout: nn.Module) -> Material:
        """What a readout is scored on: one with a `language_model` of its own on its `benchmarks` alone."""
        if not hasattr(readout, "language_model"):
            return self
        benchmarks = [entry for entry in self.benchmarks if entry[0].name in readout.benchmarks]
        return self._replace(text=None, benchmarks=benchmarks)


class Scored(NamedTuple):
    """A checkpoint's part of `evaluation.json`, the rows of its options, and the rows of its documents."""

    result: dict[str, Any]
    items: pa.Table
    documents: pa.Table


def evaluate_run(run: Run, config: EvaluationConfig, raw: Path = RAW) -> None:
    """Score the checkpoints of `run`; write evaluation.json and {items,documents}.parquet to its folder.

    `raw` holds a folder for each benchmark. Finished parts, perplexity and each benchmark of each checkpoint,
    are kept in the run's state folder until all are finished: a second call computes only what is missing.
    Raises UserError for missing or damaged files; for a benchmark's files, once everything else is scored.
    """
    folders = checkpoint_folders(run, config)
    material = load_material(run, config, raw)
    store = PartStore(run.state_folder / "evaluation")
    failures = Failures(f"{run.study} {run.name}", material.unreadable)
    scored: dict[str, Scored] = {}
    for number, folder in enumerate(folders, 1):
        checkpoint = CheckpointSummary.model_validate(read_description(folder)[1])
        label = f"{run.name} {folder.name} ({number}/{len(folders)})"
        subject = Subject(folder.name, checkpoint, number == len(folders), label)
        load = partial(load_run, material, folder)
        scored[folder.name] = score_model(material, subject, load, store, failures)

    def score_readout(name: str, load_readout: Callable[[], nn.Module]) -> dict[str, Any]:
        part = subject._replace(name=f"{subject.name}-{name}", label=f"{subject.label} {name}")
        own = material.read_by(load_readout())
        return score_model(own, part, load_readout, store, failures).result

    readouts = score_readouts(folders[-1], load, score_readout)
    failures.raise_if_any(store)
    more = {"readouts": readouts} if readouts else {}
    fidelity = compare_with_start(run, material.text, material.encoder.tokenizer.eot, material.device)
    if fidelity is not None:
        more["fidelity"] = fidelity
    about = {**run.model_dump(include={"study", "label", "variant", "seed", "corpus"}), "run": run.name}
    record = run.folder / "train.json"
    about["trained"] = read_record(record, TrainedFacts) if record.is_file() else None
    write_results(run.folder, about, material, scored, more)
    store.forget()


def write_results(
    folder: Path,
    about: Mapping[str, Any],
    material: Material,
    scored: Mapping[str, Scored],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write `items.parquet`, the scores of every option, `documents.parquet`, those of every document of the
    test text, and `evaluation.json`, each with its facts.

    `about` are the facts about the model; `more` goes to `evaluation.json` only, which lists the SHA-256 of
    the two other files.
    """
    results = {name: outcome.result for name, outcome in scored.items()}
    found = facts(about, material, results)
    for name in names(EVALUATION):
        remove_leftovers(folder, name)
    for name in _SCHEMAS:
        table = pa.concat_tables(getattr(outcome, name) for outcome in scored.values()).unify_dictionaries()
        with atomic_path(folder / f"{name}.parquet") as temporary:
            write_predictions(temporary, table, found)
    summary = {**found.without_checkpoints(), **(more or {}), "checkpoints": results}
    write_record(folder / "evaluation.json", summary, lists=_FILES)


def facts(about: Mapping[str, Any], material: Material, results: Mapping[str, Mapping[str, Any]]) -> Facts:
    """What a model's predictions depend on; `results` are its checkpoints' parts of `evaluation.json`."""
    last = list(results.values())[-1]["benchmarks"]
    digests = material.digests["benchmarks"]
    return Facts(
        **about,
        tokenizer={"name": material.encoder.tokenizer.name, "sha256": material.digests["tokenizer"]},
        tokens_sha256=material.digests["tokens"],
        benchmarks={name: benchmark_facts(result, digests[name][1:]) for name, result in last.items()},
        modes=list(material.config.modes),
        limit_seed=material.config.limit_seed,
        harness=HARNESS,
        scoring_version=SCORING_VERSION,
        code=code_version(),
        device=material.device_name,
        processor=processor_name(),
        precision=material.precision,
        settings=material.config.model_dump(mode="json"),
        checkpoints={name: CheckpointFacts.model_validate(result) for name, result in results.items()},
    )


def checkpoint_folders(run: Run, config: EvaluationConfig) -> list[Path]:
    """The checkpoints to evaluate, by step. Raises UserError if the run has none."""
    found = list(checkpoints_by_step(run.folder).values())
    if not found:
        raise UserError(
            f"{run.folder / 'checkpoints'}: no checkpoint; run: stlm train {run.study} {run.name}"
        )
    return found if config.checkpoints == "all" else found[-1:]


def load_material(run: Run, config: EvaluationConfig, raw: Path) -> Material:
    """The material for the run's checkpoints. UserError: missing or damaged files, another tokenizer."""
    run_tokenizer, shards = run.folder / "checkpoints" / "tokenizer", run.tokens_folder / "tokenizer"
    if read_json(run_tokenizer / DESCRIPTION) != read_json(shards / DESCRIPTION):
        raise UserError(
            f"{shards}: another tokenizer than {run_tokenizer}, with which the run was trained; "
            f"run: stlm train {run.study} {run.name}"
        )
    encoder = (RequestEncoder if run.model.bytes is None else ChunkRequests)(load_tokenizer(run_tokenizer))
    return gather_material(config, run.tokens_folder, raw, encoder, sha256(run_tokenizer / DESCRIPTION))


def gather_material(
    config: EvaluationConfig,
    tokens_folder: Path,
    raw: Path,
    encoder: RequestEncoder | ChunkRequests,
    tokenizer_sha256: str,
) -> Material:
    """Test documents, benchmark items and the request encoder.

    Raises UserError if files of the text are missing or damaged; a benchmark with such files is listed as
    unreadable, and the others are loaded.

    Byte-level models are scored in float32: how far bfloat16 changes their scores has not been measured.
    """
    text = perplexity.load_documents(tokens_folder, config.perplexity, config.limit_seed)
    benchmarks, digests, unreadable = [], {}, {}
    for name in config.benchmarks:
        chosen = benchmark(name)
        try:
            if isinstance(chosen, TextBenchmark):
                split, items = "test", items_from_text(chosen, tokens_folder, config)
                contents = [hashlib.sha256("".join(item.id for item in items).encode()).hexdigest()]
            else:
                split, items = chosen.load(raw / chosen.data_name)
                contents = [sha256(file) for file in chosen.files(raw / chosen.data_name)[1]]
        except UserError as error:
            unreadable[name] = str(error)
            continue
        benchmarks.append((chosen, split, items))
        digests[name] = [chosen.version, *contents]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Material(
        config=config,
        device=device,
        precision="float32" if isinstance(encoder, ChunkRequests) else arithmetic(config, device),
        text=text,
        benchmarks=benchmarks,
        encoder=encoder,
        digests={
            "tokens": sha256(tokens_folder / "meta.json"),
            "tokenizer": tokenizer_sha256,
            "benchmarks": digests,
        },
        unreadable=unreadable,
    )


def arithmetic(config: EvaluationConfig, device: str) -> Literal["float32", "bfloat16"]:
    """The precision of the forward pass on `device` ("cpu" or "cuda"), with auto resolved."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def load_run(material: Material, folder: Path) -> Transformer:
    """The model of a run's checkpoint. UserError if it is damaged, or does not fit the run's tokenizer."""
    transformer, _ = load_checkpoint(folder)
    check_fits(transformer, material.encoder.tokenizer, folder)
    return transformer


def score_model(
    material: Material, subject: Subject, load: Callable[[], nn.Module], store: PartStore, failures: Failures
) -> Scored:
    """Measure a model's perplexity, if the material has a text, and benchmarks.

    `load` returns the model; it is called once, if a part is missing in `store`. If a benchmark fails, it is
    added to `failures`, and the others are scored.
    """
    config = material.config
    model = cache(lambda: _language_model(material, load()))
    depends = {
        "version": SCORING_VERSION,
        "files": list(_SCHEMAS),
        "code": {**code_version(), "source": source_digest()},
        "weights": subject.checkpoint.weights_sha256,
        "settings": dict(subject.settings),
        "precision": material.precision,
        # The checkpoints in one file are scored on one device and processor, which the file names.
        "device": material.device_name,
        "processor": processor_name(),
        "limit_seed": config.limit_seed,
        "tokens": material.digests["tokens"],
        "tokenizer": material.digests["tokenizer"],
    }
    measured, documents = None, perplexity.DOCUMENTS_SCHEMA.empty_table()
    if material.text is not None:
        measured, documents = store.part(
            f"{subject.name}-perplexity",
            {**depends, "perplexity": config.perplexity.model_dump(mode="json")},
            lambda: _perplexity(material, subject, model()),
            perplexity.DOCUMENTS_SCHEMA,
        )
    benchmarks: dict[str, Any] = {}
    tables = []
    for entry in material.benchmarks:
        chosen = entry[0]
        limit = config.limit_of(chosen.name, subject.last)
        modes = [mode for mode in config.modes if mode in chosen.modes]
        digests = material.digests["benchmarks"][chosen.name]
        try:
            benchmarks[chosen.name], rows = store.part(
                f"{subject.name}-{chosen.name}",
                {**depends, "benchmark": digests, "limit": limit, "modes": modes},
                partial(_score_benchmark, material, subject, entry, model, limit, modes),
                scoring.ITEMS_SCHEMA,
            )
        except BenchmarkFailed as error:
            failures.add(chosen.name, error)
            continue
        tables.append(rows)
    result = {**subject.checkpoint.model_dump(), "perplexity": measured, "benchmarks": benchmarks}
    items = pa.concat_tables(tables).unify_dictionaries() if tables else scoring.ITEMS_SCHEMA.empty_table()
    return Scored(result, items, documents)


def _language_model(material: Material, transformer: nn.Module) -> LanguageModel:
    encoder, batch_tokens = material.encoder, material.config.batch_tokens
    if hasattr(transformer, "language_model"):
        return transformer.language_model(encoder, material.device, material.precision, batch_tokens)
    if isinstance(encoder, ChunkRequests):
        return ByteModel(transformer, encoder, material.device, batch_tokens)
    return TokenModel(transformer, encoder, material.device, material.precision, batch_tokens)


def _perplexity(material: Material, subject: Subject, model: TokenModel) -> Part:
    """The perplexity of the test text, and the rows of its documents."""
    stride = material.config.perplexity.stride or max(1, model.context // 2)
    lengths = [len(document.tokens) for document in material.text.documents]
    windows = sum(1 + max(0, math.ceil((length - model.context) / stride)) for length in lengths)
    with _bar(f"{subject.label} perplexity", "window", windows) as progress:
        measured, nats = perplexity.measure(model, material.text, stride, progress)
    return Part(
        measured, perplexity.document_rows(subject.name, subject.checkpoint.step, material.text, nats)
    )


def _score_benchmark(
    material: Material,
    subject: Subject,
    entry: tuple[Benchmark, str, list[Item]],
    load: Callable[[], LanguageModel],
    limit: int | None,
    modes: list[Mode],
) -> Part:
    """The accuracies on one of the benchmarks, and its rows; raises BenchmarkFailed if scoring fails."""
    model = load()
    chosen, split, items = entry
    taken = subset(items, limit, material.config.limit_seed, chosen.name)
    requests = len(modes) * sum(len(item.options) for item in taken)
    written = {}
    with _bar(f"{subject.label} {chosen.name}", "option", requests) as progress:
        try:
            if chosen.writing is not None:
                first = write_before(model, taken, chosen.writing)
                taken, written = first.items, {"written": first.record}
            scores = scoring.score(model, taken, modes, progress)
        except UserError as error:
            raise BenchmarkFailed(f"{subject.label}, {material.precision}: {error}") from None
    labels = {"checkpoint": subject.name, "step": subject.checkpoint.step, "benchmark": chosen.name}
    result = {
        "version": chosen.version,
        "split": split,
        "items": len(taken),
        "items_total": len(items),
        "limit": limit,
        **written,
        "modes": {mode: scoring.summarize(chosen, mode, taken, scores[mode]) for mode in modes},
    }
    return Part(result, scoring.rows(labels, taken, scores))


@contextmanager
def _bar(description: str, unit: str, total: int) -> Iterator[Progress]:
    """A progress bar; without a terminal (a log file), a line from time to time."""
    watched = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        mininterval=0.5 if watched else 10.0,
        maxinterval=10.0 if watched else 30.0,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update
