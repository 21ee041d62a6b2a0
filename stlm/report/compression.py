"""Runs that are kept near to what they start from, quantized ones say: bytes on disk against what is lost."""

from __future__ import annotations

from collections.abc import Iterator

from stlm.report.documents import amount_note
from stlm.report.names import count, difference_text, percent
from stlm.report.results import Results, RunResult
from stlm.report.table import Table


def compression_table(results: Results) -> Table | None:
    """A row for each run that was compared with its start, and before them one for each run that such a run
    starts from; None: no run was compared."""
    compared = {name: run for name, run in results.items() if run.evaluation.fidelity is not None}
    if not compared:
        return None
    starts = dict.fromkeys(run.train.start.run for run in compared.values() if run.train.start is not None)
    shown = [results[name] for name in starts if name in results and name not in compared]
    runs = [*shown, *compared.values()]
    tokens = min(run.evaluation.fidelity.tokens for run in compared.values())
    return Table.of_columns(
        "compression",
        f"Bytes on disk, and what is kept of the original, study {results.study.name}",
        [_columns(run, results) for run in runs],
        [
            "Bytes on disk: the file of the last checkpoint's weights. Difference: bits per byte beside the "
            "run that it starts from. Divergence: the mean Kullback-Leibler divergence of the next token "
            "from the original's, in nats a token; same first choice: at how many positions both hold the "
            f"same token for the most probable; on {tokens:,} tokens of the test text or more.",
            amount_note((run.label, run.perplexity) for run in runs),
        ],
    )


def _columns(run: RunResult, results: Results) -> Iterator[tuple]:
    size = run.train.checkpoints[-1].bytes
    fidelity, start = run.evaluation.fidelity, run.train.start
    origin = results.get(start.run) if fidelity is not None and start is not None and start.run else None
    bits = run.perplexity.bits_per_byte
    yield "", run.label, {"run": run.name, "label": run.label}
    yield "parameters", count(run.train.parameters.total), {"parameters": run.train.parameters.total}
    yield "bytes on disk", "–" if size is None else count(size), {"bytes_on_disk": size}
    yield "bits per byte", f"{bits:.4f}", {"bits_per_byte": round(bits, 6)}
    difference = None if origin is None else round(bits - origin.perplexity.bits_per_byte, 6)
    yield "difference", "–" if difference is None else difference_text(difference), {"difference": difference}
    if fidelity is None:
        yield "divergence", "–", {"kl_divergence": None}
        yield "same first\nchoice (%)", "–", {"agreement": None}
        return
    yield "divergence", f"{fidelity.kl_divergence:.4f}", {"kl_divergence": round(fidelity.kl_divergence, 6)}
    yield "same first\nchoice (%)", percent(fidelity.agreement), {"agreement": round(fidelity.agreement, 5)}
