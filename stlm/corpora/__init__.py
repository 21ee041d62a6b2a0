"""Corpora, benchmarks and vocabularies: schemas, sources, and the synthetic story grammar."""
