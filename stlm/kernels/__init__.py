"""Passes over memory in C, compiled where they run; without a compiler torch's operations do the same."""
