"""Finds the models that write texts, and their drafts, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from stlm.errors import UserError, nearest, shortened
from stlm.evaluation.readouts import find_readout, readouts_of
from stlm.generation.ahead import AheadSpeculator, ahead_drafts
from stlm.generation.bytes import ByteGenerator
from stlm.generation.interface import TextGenerator
from stlm.generation.speculation import Speculator
from stlm.generation.speculators import ExitSpeculator, SiblingSpeculator
from stlm.generation.tokens import TokenGenerator
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.study.names import study_names
from stlm.study.runs import PublishedModel
from stlm.techniques.base import refuse
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoint_names import RESULTS, find_checkpoint, is_folder, split_step
from stlm.training.checkpoints import check_fits, load_checkpoint, read_description


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
        if not isinstance(model, Transformer):
            raise UserError(f"--readout {readout}: {checkpoint}: it scores texts and writes none")
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
        return load_published(model.place, device, cached, context=model.context, prefix=model.prefix)
    return load_generator(find_checkpoint(name, published), device, cached, readout)


def _published(name: str) -> dict[str, PublishedModel]:
    """The published models of the study in `name`, by STUDY/NAME; none if `name` is a run's."""
    study, _, run = name.partition("/")
    if is_folder(RESULTS / study / "runs" / split_step(run)[0]) or study not in study_names():
        return {}
    return {f"{study}/{key}": model for key, model in load_study(study).published.items()}


def find_weights(name: str) -> str | None:
    """The SHA-256 of the weights of a checkpoint, by name; None for a published model. Errors as above."""
    from stlm.generation.published import is_published

    published = _published(name)
    if is_published(Path(name)) or name in published:
        return None
    return read_description(find_checkpoint(name, published))[1]["weights_sha256"]


def find_speculator(name: str, draft: str, device: torch.device) -> Speculator:
    """The model `name` with a draft: one of its exits, such as `exit-2`, its further heads (`ahead-3`), or
    another model by name.

    Raises UserError as `find_generator` does, for models that cannot be used so, for an exit or heads that
    the model does not have, and for a draft with another tokenizer.
    """
    model = find_generator(name, device)
    _check_drafts(model, name)
    own = _own_drafts(model)
    if draft in own:
        return own[draft]()
    if "/" not in draft and not is_folder(Path(draft)):
        what = f"{name} has no such draft{nearest(draft, own)}" if own else without_drafts(name)
        raise UserError(
            f"--draft {shortened(draft)}: {what}; expected an exit (exit-N) or further heads (ahead-N) of "
            "the model, or the STUDY/RUN or folder of another one"
        )
    sibling = find_generator(draft, device)
    _check_drafts(sibling, draft)
    try:
        return SiblingSpeculator(model, sibling)
    except UserError as error:
        raise UserError(f"--draft {draft}: {error}") from None


def own_drafts(name: str) -> list[str]:
    """The drafts that a model makes itself, by name; a published model has none."""
    return list(_own_drafts(find_generator(name, torch.device("cpu"))))


def without_drafts(name: str) -> str:
    """What is said of a model that makes no drafts itself."""
    return f"{name} has neither exits nor further heads to draft with"


def _check_drafts(generator: TextGenerator, name: str) -> None:
    """Raise UserError if a model can neither draft nor verify drafts."""
    if isinstance(generator, ByteGenerator):
        raise UserError(
            f"--draft: {name} is a byte-level model (model.bytes); expected models of tokens: its core "
            "reads chunks whose ends its decoder draws, byte by byte"
        )
    if isinstance(generator, TokenGenerator):
        refuse(generator.transformer.techniques, "drafts", lambda message: UserError(f"{name}: {message}"))
    elif reason := generator.cannot_crop():
        raise UserError(f"--draft: {name}: {reason}: drafts that are rejected could not be taken out of it")


def _own_drafts(model: TextGenerator) -> dict[str, Callable[[], Speculator]]:
    """A model with each draft that it makes itself, by name: of its first blocks, or of its further heads."""
    if not isinstance(model, TokenGenerator):
        return {}
    parts = model.transformer, model.tokenizer
    exits = {
        name: partial(ExitSpeculator, *parts, first) for name, first in _exits(model.transformer).items()
    }
    return exits | {
        name: partial(AheadSpeculator, *parts, last) for name, last in ahead_drafts(parts[0]).items()
    }


def _exits(whole: Transformer) -> dict[str, Transformer]:
    """The readouts that are a model's first blocks, with its norm and its head."""
    return {
        name: readout
        for name, readout in readouts_of(whole).items()
        if isinstance(readout, Transformer)
        and all(one is other for one, other in zip(readout.blocks, whole.blocks, strict=False))
        and readout.norm is whole.norm
        and readout.output is whole.output
        and readout.inserted_embeddings is whole.inserted_embeddings
    }
