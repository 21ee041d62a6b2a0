"""Keeps a function out of compiled graphs, without importing the compiler."""

# `torch.compiler.disable` imports torch's compiler when a module is loaded, which costs every process a
# second. torch's own modules use this decorator instead; it does the same when the function is first called.
from torch._compile import _disable_dynamo as outside_graphs

__all__ = ["outside_graphs"]
