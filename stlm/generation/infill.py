"""`stlm generate --prefix --suffix`: a model writes what stands between two texts."""

from __future__ import annotations

import signal

import torch

from stlm.errors import Interrupted, UserError
from stlm.generation.find import choose_device, find_generator
from stlm.generation.generate import RULE, check_seeds, decoded
from stlm.generation.interface import TextGenerator
from stlm.generation.sampling import Sampling, one_by_one
from stlm.generation.tokens import TokenGenerator
from stlm.terminal import tell


def infill(
    run: str,
    prefix: str,
    suffix: str,
    sampling: Sampling,
    length: int,
    seed: int = 0,
    samples: int = 1,
    cached: bool = True,
    device: str | None = None,
) -> None:
    """Print `prefix`, what a model (see `find_generator`) writes between the two while it is drawn, `suffix`.

    It ends with the end-of-text token, after `length` tokens, or where the context is full; stderr says so of
    the last. Sample i uses the seed `seed` + i. Raises UserError as `generate` does, for a model that was not
    trained to infill, and for texts that do not fit the context; Interrupted at ctrl-C.
    """
    check_seeds(seed, samples)
    try:
        generator = find_generator(run, choose_device(device), cached)
        tokens = infill_tokens(generator, run, prefix, suffix)
        # The window does not move on: what it lost would say what is to be written. The last token drawn is
        # not read.
        room = generator.transformer.config.context - len(tokens) + 1
        for number in range(samples):
            if number:
                print(RULE)
            print(prefix, end="", flush=True)
            generator.restart(tokens)
            numbers = torch.Generator().manual_seed(seed + number)
            symbols = one_by_one(generator, generator.read([], last=1)[0], sampling, numbers)
            written = -1  # the last piece, at the end of the text, is that of no token
            for piece in decoded(generator, symbols, min(length, room)):
                print(piece, end="", flush=True)
                written += 1
            print(suffix, flush=True)
            if written == room < length:
                tell(f"the model's context of {generator.transformer.config.context:,} tokens is full")
    except KeyboardInterrupt:
        raise Interrupted("\ninterrupted", signal.SIGINT) from None


def infill_tokens(generator: TextGenerator, run: str, prefix: str, suffix: str) -> list[int]:
    """The tokens after which the model `run` writes what stands between the two texts.

    Raises UserError for a model that was not trained to, and for texts that leave no room for what it writes.
    """
    tokens = None
    if isinstance(generator, TokenGenerator):
        texts = [generator.tokenizer.encode(text) for text in (prefix, suffix)]
        for technique in generator.transformer.techniques:
            tokens = tokens or technique.infilled(generator.transformer.config, generator.eot, *texts)
    if tokens is None:
        raise UserError(
            f"--prefix, --suffix: {run} was not trained to write what stands between two texts; expected a "
            "run with an entry `task: infill` in techniques.denoising.mixture"
        )
    context = generator.transformer.config.context
    if len(tokens) > context:
        raise UserError(
            f"--prefix, --suffix: with markers {len(tokens):,} tokens; expected at most {context:,}, the "
            "model's context"
        )
    return tokens
