"""One model on both sides: scored by us and by the reference harness, request by request."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lm_eval
import numpy as np
import pyarrow.parquet as pq
from harness_tasks import HARNESS_TASKS, read_rows, sample_rows, task_manager, write_tasks
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from stlm.evaluation import scoring
from stlm.evaluation.accuracy import credit, is_tie, standard_error
from stlm.evaluation.benchmarks import BENCHMARKS, Benchmark, Item
from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.interface import Score
from stlm.evaluation.token_model import TokenModel

BATCH = 16  # sequences in a forward pass of lm_eval's
# Nats by which sums of log-probabilities may differ: float32, other batches, another order of operations.
TOLERANCE = 1e-3


class RecordingHFLM(HFLM):
    """lm_eval's own model for `transformers` folders, which also keeps the token ids of what it is asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(pretrained=str(folder), device="cpu", dtype="float32", batch_size=BATCH)
        self.tokens: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=None):
        self.tokens |= {text: (context, continuation) for text, context, continuation in requests}
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)


class Sample(NamedTuple):
    """The items compared, with what our side encodes of them, and the files of both sides in `folder`."""

    benchmark: Benchmark
    items: list[Item]
    encoded: list[list[Encoded]]
    tasks: dict[str, list[int]]
    folder: Path
    left_out: int


def prepare(
    benchmark: str, raw: Path, folder: Path, encoder: RequestEncoder, context: int, share: float, seed: int
) -> Sample:
    """A random `share` of the items in `raw`, a folder with the benchmark's files, for both sides."""
    chosen = BENCHMARKS[benchmark]
    split, files = chosen.files(raw)
    rows = sample_rows(read_rows(files), share, seed, HARNESS_TASKS[benchmark].column)
    items = _load(chosen, rows, folder / "rows" / f"{split}.parquet")
    encoded = [encoder([option.request("harness") for option in item.options]) for item in items]
    fits = [all(len(e.tokens) - e.n_context <= context for e in of_item) for of_item in encoded]
    kept = [number for number, fit in enumerate(fits) if fit]
    return Sample(
        chosen,
        [items[number] for number in kept],
        [encoded[number] for number in kept],
        write_tasks(benchmark, rows.take(kept), folder / "tasks"),
        folder / "tasks",
        len(items) - len(kept),
    )


def _load(benchmark: Benchmark, rows, path: Path) -> list[Item]:
    """The rows as our own reader sees them."""
    path.parent.mkdir(parents=True)
    pq.write_table(rows, path)
    return benchmark.load(path.parent)[1]


class Side(NamedTuple):
    """What the harness says: of each item's options text and log-probability, and its accuracies."""

    texts: list[list[tuple[str, str]]]
    logprobs: list[list[float]]
    right: dict[str, list[float]]
    results: dict[str, Any]
    weighted: bool
    seconds: float


def run_harness(lm: LM, sample: Sample) -> Side:
    """Run lm_eval on the sample's tasks."""
    name = HARNESS_TASKS[sample.benchmark.name].name
    manager = task_manager(sample.folder)
    begin = time.perf_counter()
    found = lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=manager)
    seconds = time.perf_counter() - begin
    n = len(sample.items)
    texts: list[list[tuple[str, str]]] = [[] for _ in range(n)]
    logprobs: list[list[float]] = [[] for _ in range(n)]
    right: defaultdict[str, list[float]] = defaultdict(lambda: [math.nan] * n)
    for task, numbers in sample.tasks.items():
        for document in found["samples"][task]:
            number = numbers[document["doc_id"]]
            texts[number] = [tuple(arguments) for arguments in document["arguments"]]
            logprobs[number] = [logprob for logprob, _ in document["filtered_resps"]]
            for metric in document["metrics"]:
                right[metric][number] = document[metric]
    group = manager.load([name]).get("groups", {}).get(name)
    weighted = group is None or all(metric.weight_by_size for metric in group.aggregate_metric_list)
    return Side(texts, logprobs, dict(right), found["results"][name], weighted, seconds)


def aggregate(
    values: Sequence[float], groups: Sequence[Sequence[int]], weighted: bool
) -> dict[str, float | None]:
    """Accuracy and standard error as lm_eval has them for a group of tasks (its `api/metrics.py`).

    `groups` are the items of each task. `weighted`: every item counts the same, pooled standard error;
    otherwise every task does, with the root of the summed squares. None where a task has one item.
    """
    parts = [[values[number] for number in group] for group in groups]
    errors = [standard_error(part) for part in parts]
    accuracy = fmean(values) if weighted else fmean(map(fmean, parts))
    if None in errors:
        return {"value": accuracy, "stderr": None}
    if not weighted:
        return {"value": accuracy, "stderr": math.hypot(*errors) / len(errors)}
    squares = sum((len(p) - 1) * len(p) * e**2 for p, e in zip(parts, errors, strict=True))
    return {"value": accuracy, "stderr": math.sqrt(squares / (len(values) - len(parts)) / len(values))}


def compare(model: TokenModel, lm: RecordingHFLM, sample: Sample) -> dict[str, Any]:
    """Score the sample on both sides and say how they differ; see the keys of the result."""
    begin = time.perf_counter()
    scores: list[list[Score]] = scoring.score(model, sample.items, ["harness"])["harness"]
    seconds = time.perf_counter() - begin
    theirs = run_harness(lm, sample)
    other_text, other_tokens, differences = 0, 0, [0.0]
    for item, encoded, scored, texts, logprobs in zip(
        sample.items, sample.encoded, scores, theirs.texts, theirs.logprobs, strict=True
    ):
        expected = [(option.context, option.continuation) for option in item.options]
        other_text += abs(len(expected) - len(texts))
        for own, text, tokens, score, logprob in zip(
            expected, texts, encoded, scored, logprobs, strict=False
        ):
            other_text += own != text
            context, continuation = lm.tokens[text]
            split = (tokens.tokens[: tokens.n_context].tolist(), tokens.tokens[tokens.n_context :].tolist())
            other_tokens += split != (context, continuation)
            differences.append(abs(score.logprob - logprob))
    logprobs = [[score.logprob for score in scored] for scored in scores]
    metrics = {"acc": _metric("acc", sample, logprobs, theirs.logprobs, theirs)}
    if sample.benchmark.normalized:
        lengths = [[max(len(option.words), 1) for option in item.options] for item in sample.items]
        normalized = [
            [[score / n for score, n in zip(*pair, strict=True)] for pair in zip(side, lengths, strict=True)]
            for side in (logprobs, theirs.logprobs)
        ]
        metrics["acc_norm"] = _metric("acc_norm", sample, *normalized, theirs)
    return {
        "harness_task": HARNESS_TASKS[sample.benchmark.name].name,
        "version": sample.benchmark.version,
        "items": len(sample.items),
        "items_left_out": sample.left_out,
        "items_truncated": sum(any(score.truncated for score in scored) for scored in scores),
        "requests": len(differences) - 1,
        "requests_text_differs": other_text,
        "requests_tokens_differ": other_tokens,
        "logprob_max_difference": max(differences),
        "metrics": metrics,
        "seconds": {"stlm": round(seconds, 2), "lm_eval": round(theirs.seconds, 2)},
    }


def _metric(
    name: str, sample: Sample, ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]], theirs: Side
) -> dict[str, Any]:
    """A metric of both sides from the scores that options are chosen by.

    `stlm`: ties count 1/k; `stlm_first_of_ties`: lm_eval's rule on our scores; `lm_eval`: what it reports.
    `picks_differ`: items where the sides choose another option by that rule; `picks_differ_by`: the most that
    the harness's scores of the two options differ there (rounding, or not).
    """
    groups, golds = list(sample.tasks.values()), [item.gold for item in sample.items]
    credits = [credit(scores, gold) for scores, gold in zip(ours, golds, strict=True)]
    picks = [(int(np.argmax(own)), int(np.argmax(their))) for own, their in zip(ours, other, strict=True)]
    first = [float(own == gold) for (own, _), gold in zip(picks, golds, strict=True)]
    gaps = [their[b] - their[a] for (a, b), their in zip(picks, other, strict=True) if a != b]
    # Groups quote one metric, and only that of their first filter.
    reported = aggregate(theirs.right[name], groups, theirs.weighted)
    if f"{name},none" in theirs.results:
        stderr = theirs.results[f"{name}_stderr,none"]
        reported = {
            "value": float(theirs.results[f"{name},none"]),
            "stderr": None if stderr == "N/A" else float(stderr),
        }
    own = aggregate(credits, groups, theirs.weighted)
    return {
        "stlm": own,
        "stlm_first_of_ties": aggregate(first, groups, theirs.weighted),
        "lm_eval": reported,
        "difference": own["value"] - reported["value"],
        "items_tied": sum(map(is_tie, ours)),
        "items_credited_otherwise": sum(
            own != their for own, their in zip(credits, theirs.right[name], strict=True)
        ),
        "picks_differ": len(gaps),
        "picks_differ_by": max(gaps, default=0.0),
    }


def agrees(result: dict[str, Any]) -> bool:
    """Whether nothing but rounding and the rule for ties tells the sides apart."""
    close = result["logprob_max_difference"] <= TOLERANCE
    same = result["requests_text_differs"] == result["requests_tokens_differ"] == 0
    for metric in result["metrics"].values():
        own, their = metric["stlm_first_of_ties"], metric["lm_eval"]
        if metric["picks_differ"]:
            # Of two options as good as equal, rounding chooses.
            same &= metric["picks_differ_by"] <= 2 * result["logprob_max_difference"]
        else:
            same &= math.isclose(own["value"], their["value"], rel_tol=1e-12)
            same &= (own["stderr"] is None) == (their["stderr"] is None)
            same &= own["stderr"] is None or math.isclose(
                own["stderr"], their["stderr"], rel_tol=1e-9, abs_tol=1e-12
            )
    return close and same
