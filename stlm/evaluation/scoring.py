"""A benchmark's items through a language model: a row for every option, and the accuracies of each mode."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from stlm.errors import UserError
from stlm.evaluation.accuracy import credit, is_tie, proportion
from stlm.evaluation.benchmarks import Benchmark, Item
from stlm.evaluation.config import Mode
from stlm.evaluation.interface import LanguageModel, Progress, Score, no_progress

_NAMES = pa.dictionary(pa.int32(), pa.string())
# One row a scored option; `group` is the finest one (a paradigm, a subject), `logprob` in nats, `n_bytes` and
# `n_chars` the length of the option's own words, `n_tokens` the tokens that the log-probability sums;
# `greedy`, of items of one option, whether each of these is the model's first choice.
ITEMS_SCHEMA = pa.schema(
    [
        ("checkpoint", _NAMES),
        ("step", pa.int64()),
        ("benchmark", _NAMES),
        ("mode", _NAMES),
        ("item", pa.string()),
        ("group", _NAMES),
        ("option", pa.int8()),
        ("gold", pa.bool_()),
        ("logprob", pa.float64()),
        ("n_tokens", pa.int32()),
        ("n_bytes", pa.int32()),
        ("n_chars", pa.int32()),
        ("truncated", pa.bool_()),
        ("greedy", pa.bool_()),
    ]
)

ItemScores = list[list[Score]]

# Nats by which bfloat16 may move an option, for each square root of a token: about five times the root mean
# square found with models of 4M and 50M parameters (docs/evaluation.md).
_BFLOAT16_ERROR = 0.01


def score(
    model: LanguageModel, items: Sequence[Item], modes: Sequence[Mode], progress: Progress = no_progress
) -> dict[Mode, ItemScores]:
    """Each mode's scores, by item and option. UserError where one is not a finite number."""
    # All modes at once: their forward passes are largely the same.
    requests = [
        option.request(mode)._replace(item=number)
        for mode in modes
        for number, item in enumerate(items)
        for option in item.options
    ]
    greedy = any(len(item.options) == 1 for item in items)
    if greedy:
        # The most probable of all tokens is too often a near tie itself.
        model = model.precise
    scores = model.loglikelihoods(requests, progress, greedy=greedy)
    if model.precise is not model:
        again = _near_ties(items, modes, scores)
        for number, found in zip(
            again, model.precise.loglikelihoods([requests[n] for n in again]), strict=True
        ):
            scores[number] = found
    for request, found in zip(requests, scores, strict=True):
        if not math.isfinite(found.logprob):
            raise UserError(
                f"the log-probability of {request.continuation[:60]!r} is {found.logprob}: the checkpoint's "
                "weights give no finite numbers (did its training diverge?)"
            )
    remaining = iter(scores)
    return {mode: [list(islice(remaining, len(item.options))) for item in items] for mode in modes}


def _near_ties(items: Sequence[Item], modes: Sequence[Mode], scores: Sequence[Score]) -> list[int]:
    """Which scores, numbered as requests are, belong to items whose best options bfloat16 may confuse."""
    numbers, begin = [], 0
    for _ in modes:
        for item in items:
            own = range(begin, begin + len(item.options))
            begin = own.stop
            logprobs = np.array([scores[n].logprob for n in own])
            lengths = np.array([max(len(option.words), 1) for option in item.options])
            # Of a whole string, the tokens that options have in common have their errors in common too.
            tokens = np.minimum([scores[n].n_tokens for n in own], lengths)
            errors = _BFLOAT16_ERROR * np.sqrt(tokens)
            if any(_confusable(logprobs / by, errors / by) for by in (1, lengths)):
                numbers += own
    return numbers


def _confusable(values: np.ndarray, errors: np.ndarray) -> bool:
    best = int(values.argmax())
    return int((values + errors >= values[best] - errors[best]).sum()) > 1


def rows(labels: Mapping[str, Any], items: Sequence[Item], scores: Mapping[Mode, ItemScores]) -> pa.Table:
    """The table of ITEMS_SCHEMA; `labels` gives the columns checkpoint, step and benchmark."""
    columns: dict[str, list] = {name: [] for name in ITEMS_SCHEMA.names if name not in labels}
    for mode, of_items in scores.items():
        for item, of_options in zip(items, of_items, strict=True):
            for number, (option, found) in enumerate(zip(item.options, of_options, strict=True)):
                columns["mode"].append(mode)
                columns["item"].append(item.id)
                columns["group"].append(item.groups[-1] if item.groups else "")
                columns["option"].append(number)
                columns["gold"].append(number == item.gold)
                columns["logprob"].append(found.logprob)
                columns["n_tokens"].append(found.n_tokens)
                columns["n_bytes"].append(len(option.words.encode()))
                columns["n_chars"].append(len(option.words))
                columns["truncated"].append(found.truncated)
                columns["greedy"].append(found.greedy)
    length = len(columns["item"])
    columns |= {name: [value] * length for name, value in labels.items()}
    arrays = [pa.array(columns[field.name], field.type) for field in ITEMS_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=ITEMS_SCHEMA)


def _credit(scores: Sequence[Score], item: Item) -> float:
    """An item's share of the accuracy; one without alternatives is right if the model itself would say it."""
    if len(scores) == 1:
        assert scores[0].greedy is not None
        return float(scores[0].greedy)
    return credit([found.logprob for found in scores], item.gold)


def summarize(benchmark: Benchmark, mode: Mode, items: Sequence[Item], scores: ItemScores) -> dict[str, Any]:
    """Accuracy with its interval, ties, truncated items, and the accuracy of every group.

    `acc_norm` divides each log-probability by the characters of the option's words, in the harness mode of
    the benchmarks where the reference harness does. Where every item has one option, a word, there is also
    `word_perplexity`: exp of the mean negative log-probability (nats) of a word, whatever its tokens.
    """
    logprobs = [[found.logprob for found in of_options] for of_options in scores]
    credits = [_credit(of_options, item) for of_options, item in zip(scores, items, strict=True)]
    result: dict[str, Any] = {"acc": proportion(credits)}
    if benchmark.normalized and mode == "harness":
        # An option without a word would divide by zero.
        lengths = [[max(len(option.words), 1) for option in item.options] for item in items]
        normalized = [
            [logprob / n for logprob, n in zip(*pair, strict=True)]
            for pair in zip(logprobs, lengths, strict=True)
        ]
        result["acc_norm"] = proportion(
            [credit(of_options, item.gold) for of_options, item in zip(normalized, items, strict=True)]
        )
    if all(len(item.options) == 1 for item in items):
        result["word_perplexity"] = math.exp(-math.fsum(only for (only,) in logprobs) / len(items))
    result["ties"] = sum(is_tie(of_options) for of_options in logprobs)
    result["truncated"] = sum(any(found.truncated for found in of_options) for of_options in scores)
    groups: dict[str, dict[str, list[float]]] = {}
    for index, kind in enumerate(benchmark.group_kinds):
        by_name: defaultdict[str, list[float]] = defaultdict(list)
        for item, own in zip(items, credits, strict=True):
            by_name[item.groups[index]].append(own)
        groups[kind] = {name: proportion(by_name[name]) for name in sorted(by_name)}
    return result | ({"groups": groups} if groups else {})
