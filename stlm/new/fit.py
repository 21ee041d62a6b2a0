"""Chooses the vocabulary, model and training length that fit a text, a machine and a time.

The rules are simple, so that the study file can explain each choice in a line:

- *Vocabulary*: a power of two, at most one token for each `BYTES_A_TOKEN` bytes of training text, at most as
  many as there are distinct words, and at most half of the model's parameters.
- *Context*: a power of two that holds three documents in four, from 64 tokens to about the model's width, as
  in `smoke`, `desk` and the paper, or 128: small models make little use of longer rows, which cost more.
- *Tokens*: at most `EPOCHS` passes over the text.
- *Model*: the largest of `SHAPES` that gets enough training tokens for each parameter: `TOKENS_A_PARAMETER`
  if time is the limit, `TOKENS_OF_TEXT` if text is, because a larger model then costs only time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, training_flops_per_token

BYTES_A_TOKEN = 1000
# Repeating text up to four times is nearly as good as new text (Muennighoff et al. 2023).
EPOCHS = 4
# Hoffmann et al. 2022 find 20 best at equal training cost; fewer make small models better at equal time.
TOKENS_A_PARAMETER, TOKENS_OF_TEXT = 10, 3
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LEAST_CONTEXT, MOST_CONTEXT = 64, 512
LEAST_STEPS, MOST_STEPS = 50, 50_000
LEAST_BYTES = 10_000  # below this, the held-out parts are a few sentences
FEW_BYTES = 1_000_000  # below this, differences between techniques are hardly larger than chance


@dataclass(frozen=True)
class Shape:
    """A model size, with the proportions of the paper's models; four layers at width 256 as in `desk`."""

    width: int
    layers: int
    heads: int
    kv_heads: int

    def config(self, vocabulary: int, context: int) -> ModelConfig:
        """The baseline's model of this shape."""
        return ModelConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            ffn_width=3 * self.width,
            context=context,
            vocab_size=vocabulary,
            dropout=0.1,
        )


SHAPES = (
    Shape(64, 2, 4, 1),
    Shape(96, 3, 6, 2),
    Shape(128, 4, 8, 2),
    Shape(192, 4, 6, 2),
    Shape(256, 4, 8, 2),
    Shape(256, 6, 8, 2),
    Shape(384, 6, 12, 3),
    Shape(512, 8, 16, 4),
    Shape(640, 10, 20, 5),
    Shape(768, 12, 24, 6),
)


@dataclass(frozen=True)
class TextSize:
    """The properties of a text that the choices depend on.

    `train_bytes`: UTF-8 bytes of the training split; `words`: distinct ones in the sample; `document_bytes`:
    the length that three documents in four do not exceed. `bytes_a_token(V)`: mean bytes of a token of a
    vocabulary of V; None if the text has too few pairs for it.
    """

    train_bytes: int
    words: int
    document_bytes: int
    bytes_a_token: Callable[[int], float | None]


@dataclass(frozen=True)
class Fit:
    """The choices. `limit`: what limits the length of training: `text`, `time` or `least`."""

    shape: Shape
    vocabulary: int
    bytes_a_token: float
    context: int
    train_tokens: int
    tokens_a_step: int
    steps: int
    seeds: int
    limit: str

    @cached_property
    def model(self) -> ModelConfig:
        """The baseline's model."""
        return self.shape.config(self.vocabulary, self.context)

    @property
    def tokens(self) -> int:
        """Tokens that a run trains on."""
        return self.steps * self.tokens_a_step

    @property
    def epochs(self) -> float:
        """Number of passes of a run over the training text."""
        return self.tokens / self.train_tokens

    @property
    def parameters(self) -> int:
        """Parameters of the baseline."""
        return parameter_counts(self.model).total

    @property
    def flops(self) -> float:
        """Floating-point operations of one training run."""
        return self.tokens * training_flops_per_token(self.model)


def _vocabulary(text: TextSize) -> int:
    """The largest vocabulary for which the text suffices."""
    most = max(VOCABULARIES[0], min(text.train_bytes // BYTES_A_TOKEN, max(text.words, VOCABULARIES[0])))
    for size in reversed([size for size in VOCABULARIES if size <= most]):
        if text.bytes_a_token(size) is not None:
            return size
    # A text with hardly any pairs: the bytes and a few tokens.
    return next((size for size in (384, 320, 288, 264) if text.bytes_a_token(size) is not None), 258)


def _context(text: TextSize, shape: Shape, bytes_a_token: float, train_tokens: int) -> int:
    """A power of two that holds three documents in four, with at least 20 rows in an epoch."""
    tokens = max(text.document_bytes / bytes_a_token, 1)
    most = min(MOST_CONTEXT, max(128, 2 ** int(math.log2(shape.width))))
    wanted = min(most, max(LEAST_CONTEXT, 2 ** math.ceil(math.log2(tokens))))
    while wanted > 32 and train_tokens < 20 * wanted:
        wanted //= 2
    return wanted


def _tokens_a_step(tokens: float) -> int:
    """Batches grow with the length of training: 2,048 tokens as in `desk`, larger ones for billions."""
    for least, batch in ((4e9, 131_072), (1e9, 65_536), (2e8, 16_384), (4e7, 4_096)):
        if tokens >= least:
            return batch
    return 2_048 if tokens >= 300 * 2_048 else 1_024


def fit(text: TextSize, run_flops: float) -> Fit:
    """The choices for `text`, if each run may take `run_flops` floating-point operations.

    If the time is too short even for the smallest model, it trains for `LEAST_STEPS` and `limit` is `least`.
    """
    largest = _vocabulary(text)
    chosen = None
    for shape in SHAPES:
        vocabulary = largest
        inner = parameter_counts(shape.config(largest, 64)).non_embedding
        while vocabulary > VOCABULARIES[0] and vocabulary * shape.width > inner:
            vocabulary //= 2
        candidate = _of_shape(text, shape, vocabulary, run_flops)
        wanted = TOKENS_OF_TEXT if candidate.limit == "text" else TOKENS_A_PARAMETER
        if chosen is None or candidate.tokens >= wanted * candidate.parameters:
            chosen = candidate
        else:
            break
    assert chosen is not None
    return chosen


def _of_shape(text: TextSize, shape: Shape, vocabulary: int, run_flops: float) -> Fit:
    ratio = text.bytes_a_token(vocabulary) or 1.0
    train_tokens = max(1, round(text.train_bytes / ratio))
    context = _context(text, shape, ratio, train_tokens)
    model = shape.config(vocabulary, context)
    in_time = run_flops / training_flops_per_token(model)
    tokens, limit = min((EPOCHS * train_tokens, "text"), (in_time, "time"))
    batch = max(_tokens_a_step(tokens), context)
    steps = round(tokens / batch)
    if steps < LEAST_STEPS:
        steps, limit = LEAST_STEPS, "least"
    if steps > 1000:
        steps = round(steps, -2)
    return Fit(
        shape=shape,
        vocabulary=vocabulary,
        bytes_a_token=ratio,
        context=context,
        train_tokens=train_tokens,
        tokens_a_step=batch,
        steps=min(steps, MOST_STEPS),
        seeds=1,
        limit=limit,
    )
