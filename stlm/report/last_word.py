from stlm.report.results import RunResult


def word_perplexity(result: RunResult, benchmark: str, mode: str) -> float | None:
    """Moved: see `RunResult.word_perplexity`."""
    return result.word_perplexity(benchmark, mode)
