"""Evaluate the kept checkpoints of a run: perplexity of the test split, and the study's benchmarks."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel
from torch import nn
from tqdm import tqdm

from stlm.errors import UserError
from stlm.evaluation import perplexity, scoring
from stlm.evaluation.benchmarks import Benchmark, Item, TextBenchmark, benchmark, subset
from stlm.evaluation.byte_model import ByteModel, ChunkRequests
from stlm.evaluation.config import BATCH_KEYS, EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Progress
from stlm.evaluation.made import made_items
from stlm.evaluation.perplexity import TestText
from stlm.evaluation.predictions import (
    CheckpointFacts,
    Facts,
    TrainedFacts,
    benchmark_facts,
    write_predictions,
)
from stlm.evaluation.token_model import TokenModel
from stlm.files import (
    atomic_directory,
    atomic_path,
    read_json,
    read_record,
    remove_leftovers,
    sha256,
    write_record,
)
from stlm.integrity import check_beside
from stlm.provenance import code_version, processor_name
from stlm.study import Run
from stlm.tokens.tokenizer import DESCRIPTION, load_tokenizer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.devices import cpu_multiplies_bfloat16

# The reference of the harness mode: its package and the version that prompts and rules were taken from.
HARNESS = {"package": "lm_eval", "version": "0.4.13"}
# Goes up whenever the same weights, text and settings would get other numbers.
SCORING_VERSION = 3
RAW = Path("data/raw")
# A table of each kind of thing scored, by the name of its file.
_SCHEMAS = {"items": scoring.ITEMS_SCHEMA, "documents": perplexity.DOCUMENTS_SCHEMA}
_FILES = [f"{name}.parquet" for name in _SCHEMAS]
_STEP = re.compile(r"step-[0-9]+")


class _Weights(BaseModel):
    weights_sha256: str


class Material(NamedTuple):
    """What every checkpoint of a run is scored on, and how."""

    config: EvaluationConfig
    device: str
    precision: Literal["float32", "bfloat16"]
    text: TestText
    benchmarks: list[tuple[Benchmark, str, list[Item]]]  # with the split that the items come from
    encoder: RequestEncoder | ChunkRequests
    digests: dict[str, Any]

    @property
    def device_name(self) -> str:
        """The processor's kind, or the GPU's name."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"


class Scored(NamedTuple):
    """A checkpoint's part of `evaluation.json`, the rows of its options, and those of its documents."""

    result: dict[str, Any]
    items: pa.Table
    documents: pa.Table


def evaluate_run(run: Run, config: EvaluationConfig, raw: Path = RAW) -> None:
    """Score the checkpoints of `run`; write evaluation.json and {items,documents}.parquet to its folder.

    `raw` holds a folder for each benchmark. Each finished checkpoint is kept in the run's state folder until
    all are: killed, a second call goes on with the next. Raises UserError for missing or damaged files.
    """
    folders = checkpoint_folders(run, config)
    material = load_material(run, config, raw)
    state = run.state_folder / "evaluation"
    scored: dict[str, Scored] = {}
    for number, folder in enumerate(folders, 1):
        last = number == len(folders)
        kept = state / f"{folder.name}-{fingerprint(material, folder, last)[:16]}"
        if not _is_whole(kept):
            label = f"{run.name} {folder.name} ({number}/{len(folders)})"
            found = evaluate_checkpoint(material, folder, last, label)
            with atomic_directory(kept) as temporary:
                for name in _SCHEMAS:
                    pq.write_table(getattr(found, name), temporary / f"{name}.parquet", compression="zstd")
                write_record(temporary / "result.json", found.result, beside=_FILES)
        tables = {
            name: pq.read_table(kept / f"{name}.parquet", schema=schema) for name, schema in _SCHEMAS.items()
        }
        scored[folder.name] = Scored(read_json(kept / "result.json"), **tables)
    about = {**run.model_dump(include={"study", "label", "variant", "seed", "corpus"}), "run": run.name}
    record = run.folder / "train.json"
    about["trained"] = read_record(record, TrainedFacts) if record.is_file() else None
    write_results(run.folder, about, material, scored)
    shutil.rmtree(state, ignore_errors=True)


def _is_whole(kept: Path) -> bool:
    """Whether a checkpoint's results are kept there; damaged ones are not, and said to be."""
    if not kept.is_dir():
        return False
    try:
        read_json(kept / "result.json")
        check_beside(kept / "result.json", *_FILES)
    except UserError as error:
        print(f"{error}\n(scoring {kept.name} again)", file=sys.stderr)
        return False
    return True


def write_results(
    folder: Path,
    about: Mapping[str, Any],
    material: Material,
    scored: Mapping[str, Scored],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write `items.parquet`, the scores of every option, `documents.parquet`, those of every document of the
    test text, and `evaluation.json`, each with its facts.

    `about` are the facts of the model, `more` what only `evaluation.json` says of it. That lists the SHA-256
    of the two others.
    """
    results = {name: own.result for name, own in scored.items()}
    found = facts(about, material, results)
    for name in ("items.parquet", "documents.parquet", "evaluation.json"):
        remove_leftovers(folder, name)
    for name in _SCHEMAS:
        table = pa.concat_tables(getattr(own, name) for own in scored.values()).unify_dictionaries()
        with atomic_path(folder / f"{name}.parquet") as temporary:
            write_predictions(temporary, table, found)
    summary = {**found.without_checkpoints(), **(more or {}), "checkpoints": results}
    write_record(folder / "evaluation.json", summary, beside=_FILES)


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
    """The checkpoints to evaluate, by step. UserError where the run has none."""
    parent = run.folder / "checkpoints"
    found = [folder for folder in parent.glob("step-*") if _STEP.fullmatch(folder.name)]
    found.sort(key=lambda folder: int(folder.name.removeprefix("step-")))
    if not found:
        raise UserError(f"{parent}: no checkpoint; run: stlm train {run.study} {run.name}")
    return found if config.checkpoints == "all" else found[-1:]


def load_material(run: Run, config: EvaluationConfig, raw: Path) -> Material:
    """What the run's checkpoints are scored on. UserError: missing, damaged, another tokenizer."""
    own, shards = run.folder / "checkpoints" / "tokenizer", run.tokens_folder / "tokenizer"
    if read_json(own / DESCRIPTION) != read_json(shards / DESCRIPTION):
        raise UserError(
            f"{shards}: another tokenizer than {own}, with which the run was trained; "
            f"run: stlm train {run.study} {run.name}"
        )
    encoder = (RequestEncoder if run.model.bytes is None else ChunkRequests)(load_tokenizer(own))
    return gather_material(config, run.tokens_folder, raw, encoder, sha256(own / DESCRIPTION))


def gather_material(
    config: EvaluationConfig,
    tokens_folder: Path,
    raw: Path,
    encoder: RequestEncoder | ChunkRequests,
    tokenizer_sha256: str,
) -> Material:
    """Test documents and benchmark items, with what encodes requests. UserError: missing or damaged files.

    A byte-level model is scored in float32: how far bfloat16 moves its options has not been measured.
    """
    text = perplexity.load_documents(tokens_folder, config.perplexity, config.limit_seed)
    benchmarks, digests = [], {}
    for name in config.benchmarks:
        chosen = benchmark(name)
        if isinstance(chosen, TextBenchmark):
            split, items = "test", made_items(chosen, tokens_folder, config)
            contents = [hashlib.sha256("".join(item.id for item in items).encode()).hexdigest()]
        else:
            split, items = chosen.load(raw / chosen.data_name)
            contents = [sha256(file) for file in chosen.files(raw / chosen.data_name)[1]]
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
    )


def arithmetic(config: EvaluationConfig, device: str) -> Literal["float32", "bfloat16"]:
    """The precision of the forward pass on `device` ("cpu" or "cuda"), auto decided."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def evaluate_checkpoint(material: Material, folder: Path, last: bool, label: str) -> Scored:
    """What a checkpoint scored; `label` names it in bars."""
    transformer, description = load_checkpoint(folder)
    tokenizer = material.encoder.tokenizer
    if transformer.config.bytes is None and transformer.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{folder}: the model has {transformer.config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}; delete the run's results and train again"
        )
    about = {key: description[key] for key in ("step", "tokens", "weights_sha256")}
    return score_model(material, transformer, folder.name, about, last, label)


def score_model(
    material: Material, transformer: nn.Module, name: str, about: dict[str, Any], last: bool, label: str
) -> Scored:
    """Perplexity and benchmarks of a model, after `about` (with its step).

    `name` is the checkpoint's, `label` stands in progress bars.
    """
    config = material.config
    encoder = material.encoder
    if isinstance(encoder, ChunkRequests):
        model = ByteModel(transformer, encoder, material.device, config.batch_tokens)
    else:
        model = TokenModel(transformer, encoder, material.device, material.precision, config.batch_tokens)
    stride = config.perplexity.stride or max(1, model.context // 2)
    lengths = [len(document.tokens) for document in material.text.documents]
    windows = sum(1 + max(0, math.ceil((length - model.context) / stride)) for length in lengths)
    with _bar(f"{label} perplexity", "window", windows) as progress:
        measured, nats = perplexity.measure(model, material.text, stride, progress)
    documents = perplexity.document_rows(name, about["step"], material.text, nats)
    benchmarks: dict[str, Any] = {}
    tables = []
    for chosen, split, items in material.benchmarks:
        limit = config.limit_of(chosen.name, last)
        taken = subset(items, limit, config.limit_seed, chosen.name)
        modes = [mode for mode in config.modes if mode in chosen.modes]
        requests = len(modes) * sum(len(item.options) for item in taken)
        with _bar(f"{label} {chosen.name}", "option", requests) as progress:
            try:
                scores = scoring.score(model, taken, modes, progress)
            except UserError as error:
                raise UserError(f"{label}, {chosen.name}, {material.precision}: {error}") from None
        labels = {"checkpoint": name, "step": about["step"], "benchmark": chosen.name}
        tables.append(scoring.rows(labels, taken, scores))
        benchmarks[chosen.name] = {
            "version": chosen.version,
            "split": split,
            "items": len(taken),
            "items_total": len(items),
            "limit": limit,
            "modes": {mode: scoring.summarize(chosen, mode, taken, scores[mode]) for mode in modes},
        }
    result = {
        **about,
        "perplexity": measured,
        "benchmarks": benchmarks,
    }
    items = pa.concat_tables(tables).unify_dictionaries() if tables else scoring.ITEMS_SCHEMA.empty_table()
    return Scored(result, items, documents)


def fingerprint(material: Material, folder: Path, last: bool) -> str:
    """Changes with anything that the checkpoint's scores depend on."""
    depends = {
        "version": SCORING_VERSION,
        "files": list(_SCHEMAS),
        "code": code_version(),
        "weights": read_record(folder / "config.json", _Weights).weights_sha256,
        "config": material.config.model_dump(mode="json", exclude={"checkpoints", *BATCH_KEYS}),
        "last": last,
        "precision": material.precision,
        # Checkpoints of one file are scored on one device and processor, which the file names.
        "device": material.device_name,
        "processor": processor_name(),
        **material.digests,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


@contextmanager
def _bar(description: str, unit: str, total: int) -> Iterator[Progress]:
    """A progress bar; where no one watches (a log file), a line now and then."""
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
