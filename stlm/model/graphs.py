"""Keeping a function out of compiled graphs, without importing the compiler."""

# `torch.compiler.disable` imports torch's compiler when a module is loaded, a second's work in every process.
# torch's own modules avoid that by this decorator, which does the same when the function is first called.
from torch._compile import _disable_dynamo as outside_graphs

__all__ = ["outside_graphs"]
