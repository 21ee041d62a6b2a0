"""Text that a model writes itself before the options of an item are scored: its chain of thought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from stlm.errors import UserError
from stlm.evaluation.benchmarks.items import Item, Writing
from stlm.evaluation.token_model import TokenModel
from stlm.generation.bytes import ByteGenerator
from stlm.generation.interface import TextGenerator
from stlm.generation.sampling import Sampling, one_by_one
from stlm.generation.tokens import TokenGenerator
from stlm.model.byte_transformer import ByteTransformer
from stlm.model.transformer import Transformer
from stlm.tokens.interface import Tokenizer


class Written(NamedTuple):
    """Items after whose contexts a model has written: the symbols in all, and the items without a marker."""

    items: list[Item]
    symbols: int
    unfinished: int

    @property
    def record(self) -> dict[str, float | int]:
        """Its entry in the result of a benchmark: `symbols`, the mean of an item, and `unfinished`."""
        return {"symbols": self.symbols / len(self.items), "unfinished": self.unfinished}


def write_before(model: TokenModel, items: Sequence[Item], writing: Writing) -> Written:
    """The items, with the text that the model writes greedily after each context before the continuations.

    The text ends before the marker, which the continuations begin with. If the model ends its text without a
    marker, or writes `writing.most` symbols, what it has written is taken, and the item counts as unfinished.
    All options of an item share the text, so it does not favour one; their scores contain its probability.

    Each item is read once, with a cache of keys and values where the model has such. Raises UserError for a
    model of another library.
    """
    generator = _generator(model)
    found, symbols, unfinished = [], 0, 0
    for item in items:
        text, count, has_marker = _write(generator, item.options[0].context, writing)
        symbols += count
        unfinished += not has_marker
        options = tuple(one._replace(continuation=text + one.continuation) for one in item.options)
        found.append(item._replace(options=options))
    return Written(found, symbols, unfinished)


def _generator(model: TokenModel) -> TextGenerator:
    """The generator of a model, in full precision."""
    transformer, tokenizer = model.precise.transformer, model.encoder.tokenizer
    if not (isinstance(transformer, Transformer) and isinstance(tokenizer, Tokenizer)):
        raise UserError(
            f"{type(transformer).__name__} writes no text in an evaluation; expected a model of this program "
            "with a tokenizer of its own: leave the benchmark out"
        )
    cached = all("cache" in technique.supported for technique in transformer.techniques)
    kind = ByteGenerator if isinstance(transformer, ByteTransformer) else TokenGenerator
    return kind(transformer, tokenizer, cached)


def _write(generator: TextGenerator, context: str, writing: Writing) -> tuple[str, int, bool]:
    """What is written after the context, the number of symbols read and drawn for it, and whether a marker
    came."""
    text, count, marker = b"", 0, writing.marker.encode()
    logits_V = generator.start(context)
    for symbol in one_by_one(generator, logits_V, Sampling(temperature=0.0), torch.Generator()):
        if symbol == generator.eot:
            break
        count += 1
        text += generator.piece(symbol)
        if marker in text:
            return text[: text.index(marker)].decode(errors="replace"), count, True
        if count == writing.most:
            break
    return text.decode(errors="replace"), count, False
