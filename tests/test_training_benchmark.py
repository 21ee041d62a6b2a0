"""benchmarks/training.py: what its seconds come to, and what it refuses."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, training_flops_per_token

MODEL = {
    "layers": 1,
    "width": 64,
    "heads": 2,
    "kv_heads": 1,
    "ffn_width": 96,
    "context": 32,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "training.py"
    spec = spec_from_file_location("training_benchmark", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side(parameters: int, *seconds: float) -> SimpleNamespace:
    return SimpleNamespace(parameters=parameters, seconds=seconds, memory=2**21)


def test_operations_of_a_peer_do_not_depend_on_the_sides_beside_it(benchmark):
    config = ModelConfig(**MODEL)
    ours = parameter_counts(config).total
    peak = side(10**9, 0.5, 0.25)
    sides = {"nanogpt": side(ours + 1000, 0.2, 0.4), "stlm": side(ours, 0.3, 0.1)}
    both = benchmark.figures(MODEL, 4, peak, sides)
    assert both["ratios"] == {"nanogpt": 2.0}
    flops = 4 * 32 * training_flops_per_token(config)
    assert both["sides"]["stlm"]["mfu"] == round(flops / 0.1 / 4e9, 3)
    more = flops + 6 * 4 * 32 * 1000
    assert both["sides"]["nanogpt"]["mfu"] == round(more / 0.2 / 4e9, 3) > 0
    alone = benchmark.figures(MODEL, 4, peak, {"nanogpt": sides["nanogpt"]})
    assert alone["sides"]["nanogpt"] == both["sides"]["nanogpt"]
    assert alone["ratios"] == {}


@pytest.mark.parametrize("part", [["--side", "nanogpt"], ["--model", "desk"], ["--dtype", "float32"]])
def test_a_part_does_not_replace_the_whole(benchmark, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", *part])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert f"{part[0]}: a part of results/benchmarks/training.json" in capsys.readouterr().err
    called = []
    monkeypatch.setattr(benchmark, "measure_speed", called.append)
    monkeypatch.setattr(sys, "argv", ["training.py", *part, "--output", "own.json"])
    assert benchmark.main() == 0 and called[0].output == Path("own.json")
