"""Inputs that cannot work, by topic: what `benchmarks/bad_inputs.py` gives to `stlm`."""
