"""Estimates the memory of loading and cutting what a run starts from (`stlm.training.inherited`).

The parent may be many times as large as the run's model, so a cut can take more than any training step. It
happens on the CPU, whatever trains. As in `stlm.training.memory`, one estimate is a lower bound and the other
about the peak; tests compare both with measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stlm.model.activations import block_activations
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts
from stlm.model.importance import TOKENS, TOKENS_WITH_GRADIENTS
from stlm.study.runs import Run
from stlm.study.start import is_cut
from stlm.training.memory import PROCESS

# Bytes of a number, of weights and of second moments.
_WEIGHT, _MOMENT = 4, 8
# Without gradients a pass holds about this multiple of what one block would keep for them.
_OVER_BLOCK = 1.5


class CutMemory(NamedTuple):
    """Bytes that the process holds at the worst moment: a lower bound, and about the peak."""

    least: int
    likely: int


def cut_memory(run: Run, origin: ModelConfig, on_cpu: bool = True) -> CutMemory:
    """The memory of giving `run` the weights of a model of `origin`.

    `on_cpu`: whether the run's model is on the CPU, too. Where nothing is to be cut, it is that of loading.
    """
    own = _WEIGHT * run.parameters.in_training if on_cpu else 0
    whole = _weights(origin)
    # Of a file's weights there are two copies, and of the largest matrix what checks of its values make.
    least, likely = [whole], [2 * whole + 2 * _table(origin)]
    for held, measured in _cuts(run, origin):
        least.append(held)
        # A tied head exists for a moment when a model is made. The second copy of the file's weights is freed
        # by then, but the process rarely gives it back.
        likely.append(whole + held + max(measured, _table(origin)))
    return CutMemory(own + max(least), PROCESS + own + max(likely))


def _cuts(run: Run, origin: ModelConfig) -> Iterator[tuple[int, int]]:
    """For each cut the bytes of models and second moments that exist together, and of what measuring adds."""
    how, sizes = run.training.inherit, run.model
    if sizes.vocab_size == origin.vocab_size and not is_cut(sizes, origin):
        return
    read = _sized(origin, vocab_size=sizes.vocab_size, context=min(sizes.context, origin.context))
    if read != origin:
        yield _weights(origin) + _weights(read), 0
    left, first = read, _weights(read)  # the parent with the run's tokens is kept until all is done
    if sizes.layers < left.layers:
        left = _sized(left, layers=sizes.layers)
        yield first + _weights(left), _passes(run, read, how.layers == "loss")
    if sizes.ffn_width < left.ffn_width:
        smaller = _sized(left, ffn_width=sizes.ffn_width)
        moments = _MOMENT * left.layers * left.ffn_width**2
        held = first + (_weights(left) if left is not read else 0) + moments
        measured = _passes(run, left, how.ffn == "taylor") + _product(left.ffn_width)
        yield held + _weights(smaller), measured
        left = smaller
    if sizes.width < left.width:
        smaller = _sized(left, width=sizes.width, heads=sizes.heads, kv_heads=sizes.kv_heads, tied=sizes.tied)
        moments = _MOMENT * (3 * left.layers + 1) * left.width**2  # heads, and the stream before all norms
        masked = _weights(left)
        held = first + (_weights(left) if left is not read else 0) + masked + moments
        measured = _passes(run, left, how.heads == "taylor") + _product(left.width)
        yield held + _weights(smaller), measured


def _sized(config: ModelConfig, **sizes: object) -> ModelConfig:
    return config.model_copy(update=sizes)


def _weights(config: ModelConfig) -> int:
    return _WEIGHT * parameter_counts(config).total


def _table(config: ModelConfig) -> int:
    """Bytes of the embedding."""
    return _WEIGHT * config.vocab_size * config.width


def _product(size: int) -> int:
    """Bytes of a sum of products x x^T while it is added to, in float32 and float64."""
    return (_WEIGHT + _MOMENT) * size**2


def _passes(run: Run, config: ModelConfig, loss: bool) -> int:
    """Bytes of passes of `config` over the text; `loss`: one with the loss, and what its gradient needs."""
    tokens, block = min(TOKENS, run.training.inherit.bytes), block_activations(config, _WEIGHT)
    plain = _OVER_BLOCK * tokens * block
    if not loss:
        return int(plain)
    tokens = min(TOKENS_WITH_GRADIENTS, tokens)
    return int(max(plain, tokens * (config.layers * block + _WEIGHT * min(config.vocab_size, 2**15))))
