"""Scores a benchmark's items with a language model: a row for every option, and each mode's accuracies."""

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
# One row for each scored option. `group` is the finest one (a paradigm, a subject), `logprob` is in nats,
# `n_bytes` and `n_chars` are the length of the option's words, `n_tokens` is the number of tokens in the sum;
# `greedy`, for items with a single option, says whether each token is the model's first choice.
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

# Nats by which bfloat16 may change an option's score, times the square root of its tokens: about five times
# the root mean square measured with models of 4M and 50M parameters (docs/evaluation.md).
_BFLOAT16_ERROR = 0.01


def score(
    model: LanguageModel, items: Sequence[Item], modes: Sequence[Mode], progress: Progress = no_progress
) -> dict[Mode, ItemScores]:
    """The scores of each mode, by item and option. Raises UserError if one is not a finite number."""
    # All modes at once, as their forward passes largely coincide.
    requests = [
        option.request(mode)._replace(item=number)
        for mode in modes
        for number, item in enumerate(items)
        for option in item.options
    ]
    greedy = any(len(item.options) == 1 for item in items)
    if greedy:
        # Greedy choices need full precision: the most probable of all tokens is often a near tie.
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
    """The numbers of the requests that belong to items whose best options bfloat16 may confuse."""
    numbers, begin = [], 0
    for _ in modes:
        for item in items:
            candidates = range(begin, begin + len(item.options))
            begin = candidates.stop
            logprobs = np.array([scores[n].logprob for n in candidates])
            lengths = np.array([max(len(option.words), 1) for option in item.options])
            # In whole strings, tokens that the options share have the same errors.
            tokens = np.minimum([scores[n].n_tokens for n in candidates], lengths)
            errors = _BFLOAT16_ERROR * np.sqrt(tokens)
            if any(_confusable(logprobs / by, errors / by) for by in (1, lengths)):
                numbers += candidates
    return numbers


def _confusable(values: np.ndarray, errors: np.ndarray) -> bool:
    best = int(values.argmax())
    return int((values + errors >= values[best] - errors[best]).sum()) > 1


def rows(labels: Mapping[str, Any], items: Sequence[Item], scores: Mapping[Mode, ItemScores]) -> pa.Table:
    """The table of ITEMS_SCHEMA; `labels` gives the columns checkpoint, step and benchmark."""
    columns: dict[str, list] = {name: [] for name in ITEMS_SCHEMA.names if name not in labels}
    for mode, item_scores in scores.items():
        for item, option_scores in zip(items, item_scores, strict=True):
            for number, (option, found) in enumerate(zip(item.options, option_scores, strict=True)):
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
    """An item's credit; an item with a single option is right if the model itself would choose it."""
    if len(scores) == 1:
        assert scores[0].greedy is not None
        return float(scores[0].greedy)
    return credit([found.logprob for found in scores], item.gold)


def summarize(benchmark: Benchmark, mode: Mode, items: Sequence[Item], scores: ItemScores) -> dict[str, Any]:
    """Accuracy with its interval, ties, truncated items, and the accuracy of every group.

    `acc_norm` divides each log-probability by the number of characters of the option's words, in the harness
    mode of the benchmarks for which the reference harness does so. If every item has a single option, a word,
    the result also has `word_perplexity`: exp of a word's mean negative log-probability (nats), whatever its
    tokens.
    """
    logprobs = [[found.logprob for found in option_scores] for option_scores in scores]
    credits = [_credit(option_scores, item) for option_scores, item in zip(scores, items, strict=True)]
    result: dict[str, Any] = {"acc": proportion(credits)}
    if benchmark.normalized and mode == "harness":
        # An option without words would divide by zero.
        lengths = [[max(len(option.words), 1) for option in item.options] for item in items]
        normalized = [
            [logprob / n for logprob, n in zip(*pair, strict=True)]
            for pair in zip(logprobs, lengths, strict=True)
        ]
        result["acc_norm"] = proportion(
            [credit(option_scores, item.gold) for option_scores, item in zip(normalized, items, strict=True)]
        )
    if all(len(item.options) == 1 for item in items):
        result["word_perplexity"] = math.exp(-math.fsum(only for (only,) in logprobs) / len(items))
    result["ties"] = sum(is_tie(option_scores) for option_scores in logprobs)
    result["truncated"] = sum(any(found.truncated for found in option_scores) for option_scores in scores)
    groups: dict[str, dict[str, list[float]]] = {}
    for index, kind in enumerate(benchmark.group_kinds):
        by_name: defaultdict[str, list[float]] = defaultdict(list)
        for item, value in zip(items, credits, strict=True):
            by_name[item.groups[index]].append(value)
        groups[kind] = {name: proportion(by_name[name]) for name in sorted(by_name)}
    return result | ({"groups": groups} if groups else {})
