"""A study's files as the stages write them, with made-up models: answers drawn from stated skills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.predictions import CheckpointFacts, Facts, benchmark_facts, read_facts, write_predictions
from stlm.evaluation.scoring import ITEMS_SCHEMA
from stlm.evaluation.text_items import text_item_settings
from stlm.model.config import ModelConfig
from stlm.report import training
from stlm.study.runs import Run, Study
from stlm.training.config import TrainingConfig

OPTIONS = {"blimp": 2, "synthetic_pairs": 2, "winogrande": 2}
LONG = "filler-gap dependencies island effects"
VARIANTS = {
    "baseline": ("Baseline", {}),
    "sincos": ("SinCos PE", {"positions": "sinusoidal", "ffn_width": 60}),
    "learned": ("Learned PE", {"positions": "learned"}),
    "simple-ffn": ("Simple FFN", {"ffn": "gelu", "ffn_width": 96}),
    "dropout-free": ("DropoutFree", {"dropout": 0.0}),
}


def interval(value: float, n: int) -> dict:
    """An interval of about the right width: the reader must pass it on, whatever its method."""
    half = 1.96 * (0.25 / n) ** 0.5
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def make_items(benchmark: str, n: int, skill: float, seed: int) -> pd.DataFrame:
    """Option rows whose right option wins with probability `skill` (else one of the others does)."""
    rng = np.random.default_rng([seed, len(benchmark), n])
    k = OPTIONS.get(benchmark, 4)
    phenomena = ["agreement", "anaphora", "island_effects", "npi_licensing", LONG.replace(" ", "_")]
    gold = np.random.default_rng(n).integers(k, size=n)
    right = rng.random(n) < skill
    chosen = np.where(right, gold, (gold + 1 + rng.integers(k - 1, size=n)) % k)
    option = np.tile(np.arange(k), n)
    item = np.repeat(np.arange(n), k)
    return pd.DataFrame(
        {
            "benchmark": benchmark,
            "item": [f"{benchmark}-{i}" for i in item],
            "group": [phenomena[i % len(phenomena)] for i in item],
            "option": option,
            "gold": option == gold[item],
            "logprob": np.where(option == chosen[item], -10.0, -20.0 - rng.random(n * k)),
            "n_tokens": 5,
            "n_bytes": 20,
            "n_chars": 20,
            "truncated": False,
            "greedy": None,
        }
    )


def summarize(items: pd.DataFrame, total: int, normalized: bool) -> dict:
    """The entry of one mode in evaluation.json, counted item by item."""
    k = OPTIONS.get(items.benchmark.iloc[0], 4)
    score, gold = (items[column].to_numpy().reshape(-1, k) for column in ("logprob", "gold"))
    best = score == score.max(axis=1, keepdims=True)
    right: dict[str, list[float]] = {}
    for group, won in zip(items.group[::k], (best & gold).sum(axis=1) / best.sum(axis=1), strict=True):
        right.setdefault(group, []).append(float(won))
    scores = [score for group in right.values() for score in group]
    mode = {"acc": interval(float(np.mean(scores)), len(scores)), "ties": 0, "truncated": 0}
    mode["groups"] = {"phenomenon": {g: interval(float(np.mean(s)), len(s)) for g, s in right.items()}}
    if normalized:
        mode["acc_norm"] = mode["acc"]
        mode["groups"] = {}
    return mode


def write_run(
    root: Path, run: Run, benchmarks: dict[str, int], steps: list[int], skill: float, total: int
) -> None:
    """Write {train,evaluation}.json, {curve,watch}.csv and items.parquet of one run under `root`."""
    folder = root / run.folder
    folder.mkdir(parents=True)
    per_step = run.training.tokens_per_step(run.model.context)
    rng = np.random.default_rng(run.seed)
    rows = []
    for step in range(10, steps[-1] + 1, 10):
        validated = step % (steps[-1] // 10 or 10) == 0 or step == steps[-1]
        perplexity = 2.2 + 30 * (step + 5) ** -0.7 + (1 - skill) / 3 + 0.005 * rng.standard_normal()
        rows.append(
            {"step": step, "tokens": step * per_step, "seconds": step / 7, "learning_rate": 1e-3}
            | {"train_loss": 3.0, "grad_norm": 1.0, "tokens_per_second": 9000.0}
            | ({"val_loss": 3.0, "val_bits_per_byte": np.log2(perplexity)} if validated else {})
            | ({"val_char_perplexity": perplexity, "val_token_perplexity": 30.0} if validated else {})
        )
    pd.DataFrame(rows).to_csv(folder / "curve.csv", index=False)

    layers = ["embedding", *(f"block {n + 1}" for n in range(run.model.layers)), "head"]
    outer = {"residual_rms": 1.0, "weight_rms": 0.02, "grad_norm": 0.5, "update_ratio": 1e-3}
    inner = {"attention_rms": 0.3, "ffn_rms": 0.4, "attention_logit_max": 9.0, "attention_entropy": 2.0}
    pd.DataFrame(
        {"step": step, "layer": layer} | outer | (inner if layer.startswith("block") else {})
        for step in (1, *range(50, steps[-1] + 1, 50))
        for layer in layers
    ).to_csv(folder / "watch.csv", index=False)

    parameters = run.parameters
    checkpoints = [
        {"step": s, "tokens": s * per_step, "folder": f"step-{s:06d}", "weights_sha256": f"{run.name}{s}"}
        for s in steps
    ]
    train = {
        "study": run.study, "run": run.name, "variant": run.variant, "label": run.label, "seed": run.seed,
        "parameters": parameters.record(), "steps": steps[-1], "tokens": run.tokens, "seconds": 60.5,
        "tokens_per_second": 9000.0, "flops": run.flops, "device": "cpu", "precision": "float32",
        "compiled": False, "threads": 2, "model": run.model.model_dump(mode="json"),
        "training": run.training.model_dump(mode="json"), "corpus": run.corpus, "tokenizer": run.tokenizer,
        "final": {}, "checkpoints": checkpoints, "versions": {}, "loss_spikes": [],
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(train))

    frames, evaluated = [], {}
    for place, checkpoint in enumerate(checkpoints, start=1):
        name = checkpoint["folder"]
        scored = {}
        for benchmark, n in benchmarks.items():
            chance = 1 / OPTIONS.get(benchmark, 4)
            learned = chance + (skill - chance) * place / len(steps)
            modes = {}
            for mode in ("harness", "paper"):
                items = make_items(benchmark, n, learned, 1000 * run.seed + len(run.name) + place)
                items.insert(0, "mode", mode)
                items.insert(0, "step", checkpoint["step"])
                items.insert(0, "checkpoint", name)
                frames.append(items)
                modes[mode] = summarize(items, total, mode == "harness" and benchmark == "hellaswag")
            limit = {"limit": n if n < total else None, "items": n, "items_total": total}
            scored[benchmark] = {"version": "1.0", "split": "test", **limit, "modes": modes}
        evaluated[name] = {
            "step": checkpoint["step"],
            "tokens": checkpoint["tokens"],
            "weights_sha256": checkpoint["weights_sha256"],
            "perplexity": {"bits_per_byte": 1.9 - skill / 5, "char_perplexity": 3.7, "split": "test"},
            "benchmarks": scored,
        }
    facts = Facts(
        study=run.study, run=run.name, label=run.label, variant=run.variant, seed=run.seed, corpus=run.corpus,
        tokenizer={"name": run.tokenizer, "sha256": "t"}, tokens_sha256="s", modes=["harness", "paper"],
        benchmarks={name: benchmark_facts(own, [f"{name}-file"]) for name, own in scored.items()},
        limit_seed=0, harness={"package": "lm_eval", "version": "0.4.13"}, scoring_version=2,
        code={"stlm": "0.1.0", "torch": "2", "git": None}, device="cpu", precision="float32",
        settings=EvaluationConfig(benchmarks=list(benchmarks)).model_dump(mode="json"),
        checkpoints={name: CheckpointFacts.model_validate(own) for name, own in evaluated.items()},
    )  # fmt: skip
    record = facts.without_checkpoints() | {"checkpoints": evaluated}
    (folder / "evaluation.json").write_text(json.dumps(record))
    items = pd.concat(frames) if frames else pd.DataFrame(columns=ITEMS_SCHEMA.names)
    columns = [pa.array(items[field.name], field.type) for field in ITEMS_SCHEMA]
    table = pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)
    write_predictions(folder / "items.parquet", table, facts)


@pytest.fixture
def blank_training_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training pages without their figures, which take most of a report's time."""

    def blank(folder: Path, name: str, *_: object) -> None:
        (folder / f"{name}.svg").write_text("<svg/>")

    monkeypatch.setattr(training, "_curve", blank)
    monkeypatch.setattr(training, "_layers", blank)


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch, blank_training_pages: None) -> None:
    """Figures that nobody looks at: not laid out, which takes half of their time."""
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)


@pytest.fixture
def change_facts() -> Callable[..., None]:
    """Change what an items.parquet says of itself; without a change, take all of it away."""

    def change(path: Path, **changes: object) -> None:
        facts, table = read_facts(path), pq.read_table(path)
        if changes:
            write_predictions(path, table, Facts.model_validate(facts.model_dump() | changes))
        else:
            pq.write_table(table.replace_schema_metadata(None), path)

    return change


@pytest.fixture
def write_contamination() -> Callable[..., None]:
    """Write a study's contamination.json."""

    def write(study: Study, benchmarks: dict[str, int], found: int = 0) -> None:
        """`found` items of each benchmark share 13 words with the training text."""
        example = {"item": "toy-1", "words": "the hen ran " * 8, "component": "toy", "document": 1234}
        counted = {
            name: {
                "version": BENCHMARKS[name].version, "split": "test", "items": n,
                "whole": found // 2, "contaminated": found,
                "long_enough": {"8": n, "13": n - 10}, "shared": {"8": 2 * found, "13": found},
                "examples": [example] if found else [],
            }
            for name, n in benchmarks.items()
        }  # fmt: skip
        corpora = {
            corpus: {
                "split": "train", "documents": 5000, "bytes": 12_345_678, "benchmarks": counted,
                "held_out": {
                    "words": 13, "one_in": 1,
                    "val": {"documents": 40, "ngrams": 9000, "share": 0.0004,
                            "above_half": 0, "above_fifth": 0, "worst": 0.06},
                    "test": {"documents": 50, "ngrams": 0, "share": None,
                             "above_half": 1, "above_fifth": 2, "worst": None},
                },
            }
            for corpus in study.corpora
        }  # fmt: skip
        made = text_item_settings(study.evaluation)
        record = {"study": study.name, "sizes": [8, 13], "made": made, "corpora": corpora}
        (study.folder / "contamination.json").write_text(json.dumps(record))

    return write


@pytest.fixture
def make_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_contamination: Callable[..., None]
) -> Callable[..., Study]:
    """Build a study's files in a temporary project, and go there."""
    monkeypatch.chdir(tmp_path)

    def build(
        variants: dict[str, tuple[str, dict]] | None = None,
        seeds: tuple[int, ...] = (0,),
        benchmarks: dict[str, int] | None = None,
        steps: tuple[int, ...] = (50, 100, 200),
        total: int = 200,
        skills: dict[str, float] | None = None,
    ) -> Study:
        variants = variants or VARIANTS
        benchmarks = {"blimp": 200, "hellaswag": 100} if benchmarks is None else benchmarks
        base = ModelConfig(layers=2, width=48, heads=4, kv_heads=2, ffn_width=64, context=64, dropout=0.1)
        training = TrainingConfig(steps=steps[-1], batch_size=8, accumulation=2, warmup_steps=10)
        runs = {}
        for variant, (label, differs) in variants.items():
            for seed in seeds:
                name = variant if len(seeds) == 1 else f"{variant}-s{seed}"
                runs[name] = Run(
                    study="toy", name=name, variant=variant, label=label, paper_row=None, seed=seed,
                    corpus="synthetic", tokenizer="bpe-512", training=training,
                    model=base.model_copy(update={"vocab_size": 512, **differs}),
                )  # fmt: skip
        study = Study(
            name="toy",
            description="A toy.",
            baseline=next(iter(runs)),
            runs=runs,
            evaluation=EvaluationConfig(benchmarks=list(benchmarks)),
            corpora=["synthetic"],
            overrides=[],
        )
        for place, run in enumerate(runs.values()):
            skill = (skills or {}).get(run.name, 0.7 - 0.02 * (place % 7))
            write_run(tmp_path, run, benchmarks, list(steps), skill, total)
        write_contamination(study, benchmarks)
        return study

    return build
