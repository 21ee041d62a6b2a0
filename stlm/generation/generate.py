"""`stlm generate`: a model continues a prompt and prints the text while it is drawn."""

from __future__ import annotations

import codecs
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from stlm.errors import Interrupted, UserError, shortened
from stlm.generation.drafts import AUTO, best_draft
from stlm.generation.find import choose_device, find_generator, find_speculator
from stlm.generation.interface import TextGenerator
from stlm.generation.sampling import Sampling, one_by_one
from stlm.generation.speculation import LENGTH, Drafting, Speculation, Speculator, Statistics
from stlm.terminal import tell

# Printed between samples.
RULE = "---"
# The number of seeds that torch's generator accepts.
_SEEDS = 2**64


@dataclass(frozen=True)
class Draft:
    """The options of `stlm generate` about drafts. `name`: a readout, a model or `AUTO`; None: no drafts.

    The others, None where they are not given, are those of `Drafting`.
    """

    name: str | None = None
    length: int | None = None
    fallback: float | None = None
    rollback: float | None = None

    def __post_init__(self) -> None:
        flags = {"--draft-length": self.length, "--fallback": self.fallback, "--rollback": self.rollback}
        given = [flag for flag, value in flags.items() if value is not None]
        if given and self.name is None:
            raise UserError(f"{given[0]}: expected together with --draft")
        if self.name == AUTO and self.length is not None:
            raise UserError(f"--draft-length: --draft {AUTO} chooses the length, too; name a draft")

    def drafting(self) -> Drafting:
        """How tokens are drafted; raises UserError for a value out of its range."""
        length = LENGTH if self.length is None else self.length
        return Drafting(length, self.fallback or 0.0, self.rollback)


def continuation(
    generator: TextGenerator | Speculator,
    prompt: str,
    length: int,
    sampling: Sampling,
    seed: int,
    drafting: Drafting | None = None,
    statistics: Statistics | None = None,
) -> Iterator[str]:
    """Yield the text after `prompt` in pieces as they are drawn, up to the end of text or `length` symbols.

    Symbols without text do not count. The bytes of a character come together, once all are drawn; invalid
    UTF-8 becomes U+FFFD. The seed determines the text. The prompt has been read when this function returns;
    raises UserError as `TextGenerator.start` does. With `drafting`, which needs a `Speculator`, the pieces
    come in groups, and what becomes of the drafts is added to `statistics`.
    """
    logits_V = generator.start(prompt)
    numbers = torch.Generator().manual_seed(seed)
    if drafting is None:
        symbols = one_by_one(generator, logits_V, sampling, numbers)
    else:
        speculation = Speculation(generator, drafting, sampling, numbers, statistics or Statistics())
        symbols = speculation.symbols(logits_V, length)
    return decoded(generator, symbols, length)


def decoded(generator: TextGenerator, symbols: Iterable[int], length: int) -> Iterator[str]:
    """The text of symbols in pieces, up to the end of text or `length` of them: see `continuation`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for symbol in symbols:
        if symbol == generator.eot:
            break
        piece = generator.piece(symbol)
        length -= bool(piece)
        yield decoder.decode(piece)
        if not length:
            break
    yield decoder.decode(b"", final=True)


def _measured(run: str, draft: Draft) -> tuple[Draft, Drafting]:
    """The draft that is fastest by the run's measured table, and its length; says so on stderr."""
    best = best_draft(run)
    if best.draft is None:
        tell(f"--draft {AUTO}: none, as no draft that was measured is faster than the model alone")
    else:
        tell(f"--draft {AUTO}: {best.draft}, {best.length} tokens")
    return replace(draft, name=best.draft), replace(draft.drafting(), length=best.length or LENGTH)


class Opened(NamedTuple):
    """A model that was found, and how it drafts: None and no name if it does not."""

    generator: TextGenerator | Speculator
    drafting: Drafting | None
    draft: str | None

    def report(self, statistics: Statistics) -> None:
        """Say on stderr what became of the drafts, if there were any."""
        if self.drafting is not None:
            tell(f"draft {self.draft}, {self.drafting.length} tokens: {statistics}")


def open_model(
    run: str, cached: bool, device: str | None, draft: Draft, readout: str | None = None
) -> Opened:
    """Find the model `run`, or its readout, and its draft.

    Says on stderr which draft `AUTO` is, and if texts will not be the model's own.

    Raises UserError as `find_generator` and `find_speculator` do.
    """
    if draft.name is not None and not cached:
        raise UserError("--no-cache: expected without --draft, which needs the cache")
    if draft.name is not None and readout is not None:
        raise UserError(
            f"--readout {shortened(readout)}: expected without --draft, which the whole model verifies"
        )
    drafting = draft.drafting()
    if draft.name == AUTO:
        draft, drafting = _measured(run, draft)
    if draft.name is None:
        return Opened(find_generator(run, choose_device(device), cached, readout), None, None)
    speculator = find_speculator(run, draft.name, choose_device(device))
    if not drafting.exact:
        tell(
            f"--rollback {drafting.rollback:g}: the text is not {run}'s own: tokens of {draft.name} stay "
            f"where they surprise {run} by at most {drafting.rollback:g} nats"
        )
    return Opened(speculator, drafting, draft.name)


def check_seeds(seed: int, samples: int) -> None:
    """Raise UserError if a sample's seed would be too large."""
    if samples > _SEEDS:
        raise UserError(f"--samples: {samples}: expected at most {_SEEDS}, each with a seed of its own")
    if seed + samples > _SEEDS:
        raise UserError(f"--seed: {seed}: expected at most {_SEEDS - samples}, with --samples {samples}")


def generate(
    run: str,
    prompt: str,
    sampling: Sampling,
    length: int,
    seed: int = 0,
    samples: int = 1,
    cached: bool = True,
    device: str | None = None,
    draft: Draft = Draft(),
    readout: str | None = None,
) -> None:
    """Print `prompt` and its continuations by a model (see `find_generator`) while they are drawn.

    Sample i uses the seed `seed` + i. Messages on stderr say how much of the prompt exceeds the context, and
    what became of the drafts. Raises UserError for a seed that is too large, for a missing checkpoint or
    device, and for a draft that does not fit; Interrupted at ctrl-C.
    """
    check_seeds(seed, samples)
    statistics = Statistics()
    try:
        opened = open_model(run, cached, device, draft, readout)
        generator = opened.generator
        for number in range(samples):
            pieces = continuation(
                generator, prompt, length, sampling, seed + number, opened.drafting, statistics
            )
            if number:
                print(RULE)
            elif generator.dropped:
                print(
                    f"the prompt is longer than the model's context: its first {generator.dropped:,} "
                    f"{generator.unit} are not read",
                    file=sys.stderr,
                )
            print(prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
        opened.report(statistics)
    except KeyboardInterrupt:
        raise Interrupted("\ninterrupted", signal.SIGINT) from None
