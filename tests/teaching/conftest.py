"""Runs on the counting corpus."""

from tiny_runs import make_run, tokens_folder

__all__ = ["make_run", "tokens_folder"]
