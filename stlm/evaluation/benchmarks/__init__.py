"""The benchmarks by name, one small file each. To add one, write its file and list it here; if it reads
files of its own, also name their source in params/benchmarks.yaml."""

from collections.abc import Iterable

from stlm.errors import UserError, nearest
from stlm.evaluation.benchmarks.arc import ARC_CHALLENGE, ARC_EASY
from stlm.evaluation.benchmarks.blimp import BLIMP
from stlm.evaluation.benchmarks.hellaswag import HELLASWAG
from stlm.evaluation.benchmarks.items import Benchmark, FileBenchmark, Item, Option, TextBenchmark, subset
from stlm.evaluation.benchmarks.last_word import LAST_WORD
from stlm.evaluation.benchmarks.mmlu import MMLU, MMLU_CLOZE
from stlm.evaluation.benchmarks.steps import (
    STEPS_ARITHMETIC,
    STEPS_ARITHMETIC_WRITTEN,
    STEPS_ENTITIES,
    STEPS_ENTITIES_WRITTEN,
)
from stlm.evaluation.benchmarks.synthetic import SYNTHETIC_CHOICE, SYNTHETIC_PAIRS
from stlm.evaluation.benchmarks.winogrande import WINOGRANDE

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "FileBenchmark",
    "Item",
    "Option",
    "TextBenchmark",
    "benchmark",
    "data_names",
    "subset",
]

BENCHMARKS: dict[str, FileBenchmark | TextBenchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        BLIMP,
        HELLASWAG,
        ARC_EASY,
        ARC_CHALLENGE,
        WINOGRANDE,
        MMLU,
        MMLU_CLOZE,
        LAST_WORD,
        SYNTHETIC_PAIRS,
        SYNTHETIC_CHOICE,
        STEPS_ARITHMETIC,
        STEPS_ARITHMETIC_WRITTEN,
        STEPS_ENTITIES,
        STEPS_ENTITIES_WRITTEN,
    )
}


def benchmark(name: str) -> FileBenchmark | TextBenchmark:
    """The benchmark `name`; raises UserError naming the nearest one if there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"evaluation.benchmarks: no benchmark {name!r}{nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def data_names(names: Iterable[str]) -> list[str]:
    """The data folders in data/raw/ that these benchmarks read, each once, in order."""
    chosen = map(benchmark, names)
    return list(dict.fromkeys(one.data_name for one in chosen if isinstance(one, FileBenchmark)))
