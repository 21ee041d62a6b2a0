"""Scoring: benchmarks, perplexity and statistics of a language model seen only through its log-probabilities."""
