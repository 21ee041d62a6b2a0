"""Corpora, benchmarks and vocabularies: schemas, sources, and the generators of synthetic text."""
