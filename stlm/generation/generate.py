"""`stlm generate`: a model continues a prompt and prints the text while it is drawn."""

from __future__ import annotations

import codecs
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from stlm.errors import Interrupted, UserError, shortened
from stlm.evaluation.readouts import find_readout
from stlm.generation.bytes import ByteGenerator
from stlm.generation.interface import TextGenerator
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.study.load import load_study
from stlm.study.names import study_names
from stlm.study.runs import PublishedModel
from stlm.techniques.base import refuse
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoint_names import RESULTS, find_checkpoint, is_folder, split_step
from stlm.training.checkpoints import check_fits, load_checkpoint

# Printed between samples.
_RULE = "---"
# The number of seeds that torch's generator accepts.
_SEEDS = 2**64


def load_generator(
    checkpoint: Path, device: torch.device, cached: bool = True, readout: str | None = None
) -> TextGenerator:
    """The generator for a checkpoint folder, with the tokenizer next to it; in float32.

    With `readout`, the model's readout of that name writes. Raises UserError if a file is missing or damaged,
    or if there is no such readout.
    """
    model, _ = load_checkpoint(checkpoint, device)
    if cached:
        refuse(
            model.techniques, "cache", lambda message: UserError(f"{checkpoint}: {message}; give --no-cache")
        )
    kind = TokenGenerator if model.config.bytes is None else ByteGenerator
    tokenizer = load_tokenizer(checkpoint.parent / "tokenizer")
    check_fits(model, tokenizer, checkpoint)
    if readout is not None:
        try:
            model = find_readout(model, readout)
        except UserError as error:
            raise UserError(f"--readout: {checkpoint}: {error}") from None
    return kind(model, tokenizer, cached)


def find_generator(
    name: str, device: torch.device, cached: bool = True, readout: str | None = None
) -> TextGenerator:
    """The generator for a checkpoint (see `find_checkpoint`) or a published model, by name.

    A published model is named by its folder's path or by STUDY/NAME, as in params/STUDY.yaml, unless a run
    has that name. `readout`: see `load_generator`. Raises UserError if it does not exist or is damaged.
    """
    from stlm.generation.published import is_published, load_published

    folder = Path(name) if is_published(Path(name)) else None
    published = {} if folder else _published(name)
    if readout is not None and (folder or name in published):
        raise UserError(f"--readout: {shortened(name)!r}: a published model has no readouts")
    if folder:
        return load_published(folder, device, cached)
    if name in published:
        model = published[name]
        return load_published(Path(model.folder), device, cached, context=model.context, prefix=model.prefix)
    return load_generator(find_checkpoint(name, published), device, cached, readout)


def _published(name: str) -> dict[str, PublishedModel]:
    """The published models of the study in `name`, by STUDY/NAME; none if `name` is a run's."""
    study, _, run = name.partition("/")
    if is_folder(RESULTS / study / "runs" / split_step(run)[0]) or study not in study_names():
        return {}
    return {f"{study}/{key}": model for key, model in load_study(study).published.items()}


def continuation(
    generator: TextGenerator, prompt: str, length: int, sampling: Sampling, seed: int
) -> Iterator[str]:
    """Yield the text after `prompt` in pieces as they are drawn, up to the end of text or `length` symbols.

    Symbols without text do not count. The bytes of a character come together, once all are drawn; invalid
    UTF-8 becomes U+FFFD. The seed determines the text. The prompt has been read when this function returns;
    raises UserError as `TextGenerator.start` does.
    """
    return _pieces(generator, generator.start(prompt), length, sampling, torch.Generator().manual_seed(seed))


def _pieces(
    generator: TextGenerator, logits_V: Tensor, length: int, sampling: Sampling, numbers: torch.Generator
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while length:
        symbol = int(sampling.choose(logits_V, numbers))
        if symbol == generator.eot:
            break
        piece = generator.piece(symbol)
        length -= bool(piece)
        yield decoder.decode(piece)
        if length:
            logits_V = generator.next(symbol)
    yield decoder.decode(b"", final=True)


def choose_device(name: str | None) -> torch.device:
    """The device `name`; None: CUDA if available. Raises UserError if the device is missing."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def generate(
    run: str,
    prompt: str,
    sampling: Sampling,
    length: int,
    seed: int = 0,
    samples: int = 1,
    cached: bool = True,
    device: str | None = None,
    readout: str | None = None,
) -> None:
    """Print `prompt` and its continuations by a model (see `find_generator`) while they are drawn.

    Sample i uses the seed `seed` + i. A message on stderr says how much of the prompt exceeds the context.
    Raises UserError for a seed that is too large and for a missing checkpoint or device; Interrupted at
    ctrl-C.
    """
    if samples > _SEEDS:
        raise UserError(f"--samples: {samples}: expected at most {_SEEDS}, each with a seed of its own")
    if seed + samples > _SEEDS:
        raise UserError(f"--seed: {seed}: expected at most {_SEEDS - samples}, with --samples {samples}")
    try:
        generator = find_generator(run, choose_device(device), cached, readout)
        for number in range(samples):
            pieces = continuation(generator, prompt, length, sampling, seed + number)
            if number:
                print(_RULE)
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
    except KeyboardInterrupt:
        raise Interrupted("\ninterrupted", signal.SIGINT) from None
