"""Kernels in C, compiled on the machine that runs them; without a compiler torch's operations are used."""
