"""Training of byte-pair vocabularies with the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from stlm.errors import UserError
from stlm.tokens.tokenizer import EOT, Tokenizer, bpe_vocab_size, trained_tokenizer


def train_bpe(name: str, texts: Iterable[str]) -> Tokenizer:
    """Train `bpe-N` (N ids: 256 bytes, N - 257 merges, the end of text) on `texts`, which may be a stream.

    Memory grows with the number of distinct words alone. Equal texts in equal order give equal bits.
    Pairs seen only once are not merged; texts with too few pairs for N are a `UserError`.
    """
    size = bpe_vocab_size(name)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size() + 1
    if found < size:
        raise UserError(
            f"tokenizer {name!r}: the corpus has pairs for a vocabulary of {found} only; "
            f"choose bpe-{found} or smaller, or a larger corpus"
        )
    # Last, so that the merges' ids do not depend on it; it makes tokenizer.json usable by other libraries.
    tokenizer.add_special_tokens([EOT])
    return trained_tokenizer(name, tokenizer.to_str(pretty=True).encode())
