"""Scoring: benchmarks, perplexity and statistics of a model, given only its log-probabilities."""
