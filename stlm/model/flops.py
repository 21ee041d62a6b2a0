"""Forward FLOPs of a module, derived from its structure.

A module may have a method ``flops(length)``: the floating-point operations of its forward pass over one
sequence of `length` tokens, including its children. `length` may be a mean, and so a fraction. All other
modules cost what their linear layers cost.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def forward_flops(module: nn.Module, length: float) -> float:
    """The forward floating-point operations of `module` on one sequence of `length` tokens.

    A linear layer multiplies and adds once for each weight and token. Look-ups cost nothing; vectors (norms,
    gains, biases) are left out, as in Kaplan et al. (2020, appendix B).

    Raises NotImplementedError for a module without a `flops` method that holds a matrix, as it is unknown
    what the matrix is multiplied with.
    """
    method = getattr(module, "flops", None)
    if method is not None:
        return method(length)
    if isinstance(module, nn.Linear):
        # A LoRA adapter is a child of the layer that it adapts.
        return 2 * module.weight.numel() * length + children_flops(module, length)
    if not isinstance(module, nn.Embedding):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise NotImplementedError(
                    f"{type(module).__name__} holds the matrix {name!r}: to count its FLOPs it needs a "
                    "method flops(length), or an nn.Linear that holds the matrix"
                )
    return children_flops(module, length)


def children_flops(module: nn.Module, length: float, without: Collection[str] = ()) -> float:
    """Sum the forward FLOPs of the children of `module`, except those named in `without`.

    A child that is registered several times is used, and counted, several times.
    """
    # nn.Module.children() yields a child only once, however often it is registered.
    named = module._modules.items()
    return sum(
        forward_flops(child, length) for name, child in named if child is not None and name not in without
    )
