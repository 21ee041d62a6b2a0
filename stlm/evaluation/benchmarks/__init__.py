"""The benchmarks by name, one small file each. Adding one: write its file, list it here, name its source in
params/benchmarks.yaml."""

from stlm.errors import UserError, nearest
from stlm.evaluation.benchmarks.arc import ARC_CHALLENGE, ARC_EASY
from stlm.evaluation.benchmarks.blimp import BLIMP
from stlm.evaluation.benchmarks.hellaswag import HELLASWAG
from stlm.evaluation.benchmarks.items import Benchmark, Item, Option, subset
from stlm.evaluation.benchmarks.mmlu import MMLU
from stlm.evaluation.benchmarks.synthetic import SYNTHETIC_CHOICE, SYNTHETIC_PAIRS
from stlm.evaluation.benchmarks.winogrande import WINOGRANDE

__all__ = ["BENCHMARKS", "Benchmark", "Item", "Option", "benchmark", "subset"]

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        BLIMP,
        HELLASWAG,
        ARC_EASY,
        ARC_CHALLENGE,
        WINOGRANDE,
        MMLU,
        SYNTHETIC_PAIRS,
        SYNTHETIC_CHOICE,
    )
}


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name; UserError naming the nearest one otherwise."""
    if name not in BENCHMARKS:
        raise UserError(f"evaluation.benchmarks: no benchmark {name!r}{nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
