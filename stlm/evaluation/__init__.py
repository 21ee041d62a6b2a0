"""Scoring: benchmarks, perplexity and statistics of a model seen only through its log-probabilities."""
