"""Counts the parameters and FLOPs of a model on its modules.

The model is built on torch's `meta` device, where tensors have shapes but no values, so no second description
of it is needed. Each module says which group its parameters belong to:

- ``parameter_group``, an attribute of a module, is the group of all parameters within it.
- ``parameter_groups``, a mapping, gives the groups of parameters or child modules by their names in it.
- A child's ``parameter_group`` overrides its parent's ``parameter_groups``, and these override the parent's
  ``parameter_group``. With ``one_group = True`` a module overrides all modules within it, except for the
  entries of its own ``parameter_groups``.
- ``active_shares``, a mapping, gives the shares, from 0 to 1, of the parameters or child modules that a token
  uses, by their names in a module. A token uses all of what is not named.
- ``training_only = True`` says that training alone reads a module. It is not of the model that is scored,
  exported or started from, so it counts only in ``ParameterCounts.training_only``.

FLOPs are in `stlm.model.flops`. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stlm.errors import UserError
from stlm.model.build import Builder, build_model
from stlm.model.config import CHUNK_BYTES, ModelConfig, ParameterCounts
from stlm.model.flops import forward_flops

# In the order in which a token passes them; groups that are not listed come before the norms.
GROUPS = (
    "token embedding",
    "byte embedding",
    "byte encoder",
    "positions",
    "value embeddings",
    "attention",
    "FFN",
    "adapters",
    "shifts",
    "norms",
    "byte decoder",
    "head",
)

# Embedding parameters grow with the vocabulary or the context, or belong to a replacement of the embedding.
EMBEDDING_GROUPS = (
    "token embedding",
    "added tokens",
    "byte embedding",
    "byte encoder",
    "positions",
    "value embeddings",
    "byte decoder",
    "head",
)

# Training FLOPs divided by forward FLOPs: the backward pass computes gradients of inputs and of weights.
TRAINING_PASSES = 3

_RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "trunc_normal_"})


class _NoInitialization(TorchFunctionMode):
    """Skips the initialization of tensors, which have no values on the meta device.

    Random numbers and arithmetic there make torch import its compiler, which takes a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# A study asks for the same counts repeatedly. The cache is small, as the modules of a deep model are large.
@lru_cache(maxsize=4)
def build_on_meta(config: ModelConfig, techniques: tuple[Builder, ...] = ()) -> nn.Module:
    """The model of `config` with its `techniques`, on the meta device. It is cached: do not change it.

    Raises ``UserError`` if a tensor has more elements than torch can number.
    """
    try:
        with torch.device("meta"), _NoInitialization():
            return build_model(config, techniques)
    except (RuntimeError, TypeError, OverflowError) as error:
        if not isinstance(error, OverflowError) and "overflow" not in str(error).lower():
            raise
        raise UserError(
            f"model: width: {config.width}, ffn_width: {config.ffn_width}, context: {config.context}: its "
            "matrices have more weights than can be counted, over 10^18"
        ) from None


def parameter_groups(model: nn.Module) -> dict[str, int]:
    """The number of parameters in each group of `model`; shared parameters count once, at their first place.

    Groups are in the order of `GROUPS`, without empty ones; together they hold all parameters of the model
    that is scored. Parameters without a stated group form a group that is named after their top-level module.
    """
    groups: dict[str, int] = {}
    seen: set[int] = set()
    for parameter, group in grouped_parameters(model):
        if id(parameter) not in seen and parameter.numel():
            seen.add(id(parameter))
            groups[group] = groups.get(group, 0) + parameter.numel()
    order = {name: number for number, name in enumerate(GROUPS)}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], order["norms"] - 0.5)))


def grouped_parameters(
    module: nn.Module, group: str | None = None, overruled: bool = False
) -> Iterator[tuple[nn.Parameter, str]]:
    """Yield each parameter within `module` with its group, but for those of training alone.

    `group` is the default. `overruled`: ignore what the module states. Shared parameters are yielded at each
    of their places.
    """
    names: dict[str, str] = {}
    if not overruled:
        group = getattr(module, "parameter_group", group)
        names = getattr(module, "parameter_groups", names)
        overruled = getattr(module, "one_group", False)
    for name, parameter in module.named_parameters(recurse=False):
        yield parameter, names.get(name) or group or name
    for name, child in module._modules.items():
        if child is not None and not is_training_only(child):
            stated = names.get(name)
            yield from grouped_parameters(child, stated or group or name, overruled and stated is None)


def is_training_only(module: nn.Module) -> bool:
    """Whether training alone reads `module`."""
    return getattr(module, "training_only", False)


def _training_only_parameters(model: nn.Module) -> int:
    """The number of parameters that training alone has."""
    modules = [module for module in model.modules() if is_training_only(module)]
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def active_parameters(model: nn.Module) -> int:
    """The number of parameters that a token uses, on average: each times the share that its modules state.

    A parameter with several places counts with the sum of their shares, at most 1: an upper bound.
    """
    shares: dict[nn.Parameter, float] = {}

    def visit(module: nn.Module, share: float) -> None:
        stated = getattr(module, "active_shares", {})
        for name, parameter in module.named_parameters(recurse=False):
            shares[parameter] = shares.get(parameter, 0.0) + share * stated.get(name, 1.0)
        for name, child in module._modules.items():
            if child is not None and not is_training_only(child):
                visit(child, share * stated.get(name, 1.0))

    visit(model, 1.0)
    return round(sum(parameter.numel() * min(1.0, share) for parameter, share in shares.items()))


def total_counts(groups: dict[str, int]) -> ParameterCounts:
    """Sum up `parameter_groups`: all of them, embeddings with an untied head, and the rest."""
    embedding = sum(groups.get(name, 0) for name in EMBEDDING_GROUPS)
    total = sum(groups.values())
    return ParameterCounts(total, embedding, total - embedding)


@lru_cache(maxsize=1024)
def parameter_counts(config: ModelConfig, techniques: tuple[Builder, ...] = ()) -> ParameterCounts:
    """The parameters of the model of `config`, which has its `vocab_size`, with its `techniques`."""
    model = build_on_meta(config, techniques)
    counts, active = total_counts(parameter_groups(model)), active_parameters(model)
    return counts._replace(
        active=None if active == counts.total else active,
        training_only=_training_only_parameters(model) or None,
    )


def training_flops(
    model: nn.Module, length: float, chunk_bytes: float = CHUNK_BYTES, ends_written: bool = True
) -> float:
    """Floating-point operations of training on one sequence of `length` tokens, forward and backward.

    Each multiplication of a token with a weight counts six, so a shared weight counts as often as it is used.
    The head's matrix is included, embedding look-ups are not. Attention adds its two products, over half the
    length on average (Kaplan et al. 2020, appendix B; only the causal half counts). The optimizer's work is
    left out. A token of a byte-level model is a chunk, which is read and written, with an end symbol where
    the bytes do not determine the end. All chunks are taken to have the mean length `chunk_bytes`; this
    underestimates attention within chunks of different lengths, which grows with the mean of their squares.
    """
    if model.config.bytes is not None:
        return TRAINING_PASSES * model.flops(length, chunk_bytes, ends_written)
    return TRAINING_PASSES * forward_flops(model, length)


@lru_cache(maxsize=1024)
def training_flops_per_token(
    config: ModelConfig,
    chunk_bytes: float = CHUNK_BYTES,
    ends_written: bool = True,
    techniques: tuple[Builder, ...] = (),
) -> float:
    """Floating-point operations of training on one token, in sequences that fill the context."""
    model = build_on_meta(config, techniques)
    return training_flops(model, config.context, chunk_bytes, ends_written) / config.context
