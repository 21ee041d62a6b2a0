"""Parameters and FLOPs of a model, counted on its modules.

A model is built on torch's `meta` device, where tensors have shapes and no values, so that nothing has to
describe it a second time. Each module says which group its parameters belong to:

- ``parameter_group``, an attribute of a module, is the group of all parameters within it.
- ``parameter_groups``, a mapping, gives the groups of parameters or child modules by their names in it.
- A child's own ``parameter_group`` comes before what its parent says, and both before the group of the
  parent. With ``one_group = True`` a module overrules whatever the modules within it say, except for the
  entries of its own ``parameter_groups``.

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

# In the order in which a token meets them; groups that are not listed come before the norms.
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

# What counts as embedding: all that grows with the vocabulary or the context, or stands in its place.
EMBEDDING_GROUPS = (
    "token embedding",
    "byte embedding",
    "byte encoder",
    "positions",
    "value embeddings",
    "byte decoder",
    "head",
)

# Training FLOPs over forward FLOPs: the backward pass computes the gradients of inputs and of weights.
TRAINING_PASSES = 3

_RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "trunc_normal_"})


class _NoInitialization(TorchFunctionMode):
    """Skips the initialization of tensors, which have no values here.

    Random numbers and arithmetic on the meta device make torch import its compiler, which takes a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# A study asks for the same counts several times; a deep model's modules are large, so that few are kept.
@lru_cache(maxsize=4)
def build_on_meta(config: ModelConfig, techniques: tuple[Builder, ...] = ()) -> nn.Module:
    """The model of `config` with its `techniques`, on the meta device. It is kept: do not change it.

    Raises ``UserError`` where a tensor has more elements than torch can number.
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
    """Where the parameters of `model` are: group -> how many, shared ones once, at their first place.

    The groups are in the order of `GROUPS`; those without parameters are left out. Together they are all of
    the model's parameters: those whose group nobody states are in one of the name of the top module.
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
    """Each parameter within `module`, which belongs to `group` if it says nothing else, with its group.

    `overruled`: what it says does not count. Shared parameters come at each of their places.
    """
    names: dict[str, str] = {}
    if not overruled:
        group = getattr(module, "parameter_group", group)
        names = getattr(module, "parameter_groups", names)
        overruled = getattr(module, "one_group", False)
    for name, parameter in module.named_parameters(recurse=False):
        yield parameter, names.get(name) or group or name
    for name, child in module._modules.items():
        if child is not None:
            stated = names.get(name)
            yield from grouped_parameters(child, stated or group or name, overruled and stated is None)


def total_counts(groups: dict[str, int]) -> ParameterCounts:
    """All parameters, those of embeddings and an untied head, and the rest, of `parameter_groups`."""
    embedding = sum(groups.get(name, 0) for name in EMBEDDING_GROUPS)
    total = sum(groups.values())
    return ParameterCounts(total, embedding, total - embedding)


@lru_cache(maxsize=1024)
def parameter_counts(config: ModelConfig, techniques: tuple[Builder, ...] = ()) -> ParameterCounts:
    """The parameters of the model of `config` (with its `vocab_size`) and its `techniques`."""
    return total_counts(parameter_groups(build_on_meta(config, techniques)))


def training_flops(
    model: nn.Module, length: float, chunk_bytes: float = CHUNK_BYTES, ends_written: bool = True
) -> float:
    """Floating-point operations of training on one sequence of `length` tokens, forward and backward.

    Six for each weight and time that a token is multiplied with it: a shared one as often as it is used, the
    head's matrix included, embedding look-ups not; plus attention's two products over an average of half the
    length (Kaplan et al. 2020, appendix B; the causal half counted). The optimizer's own work is not in it.
    Of a byte-level model a token is a chunk, each counted as read and written, with a symbol for its end
    where that does not follow from the bytes. All are taken to be of their mean length, `chunk_bytes`:
    attention within chunks of different lengths costs more, as it goes with the mean of their squares.
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
    """Floating-point operations that a training token costs, in sequences of the length of the context."""
    model = build_on_meta(config, techniques)
    return training_flops(model, config.context, chunk_bytes, ends_written) / config.context
