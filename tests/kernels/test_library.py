"""Kernels are compiled once, are torch's operations up to rounding, and can be missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stlm.kernels import library
from stlm.kernels.library import kernels, kernels_for

needs_kernels = pytest.mark.skipif(not kernels().by_type, reason=f"no kernels: {kernels().why_none}")
TYPES = [torch.float32, torch.bfloat16]


def found(tmp_path: Path, **environment: str) -> dict:
    """What a new process finds, with a cache of its own and these variables."""
    program = """
import json, torch
from pathlib import Path
from stlm.kernels.library import compiled, kernels
own = kernels()
maps = Path("/proc/self/maps").read_text()
print(json.dumps({
    "types": len(own.by_type),
    "why": own.why_none,
    "openmp": len({line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line}),
}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@needs_kernels
def test_they_are_compiled_once_and_share_torchs_threads(tmp_path):
    first = found(tmp_path)
    assert (first["types"], first["openmp"]) == (2, 1)
    (file,) = (tmp_path / "stlm").iterdir()
    before = file.stat().st_mtime_ns
    # Without a compiler now: what was compiled serves.
    assert found(tmp_path, CC="no-such-compiler")["types"] == 2
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler (no-such-compiler)"),
        ({"CC": "cc -no-such-option"}, "no-such-option"),
        ({"STLM_KERNELS": "0"}, "STLM_KERNELS=0"),
    ],
)
def test_where_they_cannot_be_there_are_none(environment, reason, tmp_path):
    own = found(tmp_path, **environment)
    if sys.platform == "linux" and kernels().by_type:
        assert reason in own["why"]
    assert own["types"] == 0 and own["why"]
    assert not list(tmp_path.rglob("*.*"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "stlm").write_text("a file, not a folder")
    own = found(tmp_path)
    assert own["types"] == 0 and own["why"]


def test_other_types_and_graphs_are_torchs():
    assert kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    assert kernels_for(torch.zeros(1, device="meta")) is None
    seen = []
    torch.compile(lambda x: seen.append(kernels_for(x)) or x + 1, backend="eager")(torch.zeros(1))
    assert seen == [None]


def test_arrays_with_gaps_are_refused():
    own = kernels().by_type.get(torch.float32)
    if own is None:
        pytest.skip("no kernels")
    gate_up = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="swiglu_float32: argument 3 has gaps"):
        own.swiglu(4, 2, gate_up[:, :4], torch.zeros(4, 2))


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
def test_exponentials_over_their_whole_range(dtype):
    """By softmax of pairs: of the larger, e^0; of the other, e to numbers down to where nothing is left."""
    below = -torch.logspace(-3, 2.2, 4000)
    pairs = torch.stack([torch.zeros(4000), below], dim=1).to(dtype)
    weight = pairs.clone()[:, None].contiguous()
    # One query that sees both keys.
    kernels_for(weight).causal_softmax(4000, 1, 1, 2, None, 1, 2, weight)
    exact = pairs.double().softmax(dim=-1)
    error = ((weight[:, 0].double() - exact) / exact).abs()[exact > 1e-37]
    assert error.max() < (5e-7 if dtype == torch.float32 else 2**-8)


@needs_kernels
def test_cross_entropy_far_from_zero():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 80.0, -80.0]])
    own, targets, losses = logits.clone(), torch.tensor([1, 2]), torch.empty(2)
    kernels_for(own).cross_entropy(2, 3, own, targets, 0.0, True, losses)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    expected = logits.softmax(dim=-1) - F.one_hot(targets, 3)
    torch.testing.assert_close(own, expected, atol=1e-7, rtol=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows(dtype, bad):
    """A run that diverges is found by its loss and its gradients."""
    own = kernels_for(torch.zeros(1, dtype=dtype))
    logits, losses = torch.zeros(2, 40, dtype=dtype), torch.empty(2)
    logits[0, 7] = bad
    own.cross_entropy(2, 40, logits, torch.tensor([3, 3]), 0.0, True, losses)
    assert losses.isfinite().tolist() == [False, True]
    assert not logits[0].isfinite().all() and logits[1].isfinite().all()
    x, y, inverse = torch.ones(2, 40), torch.empty(2, 40, dtype=dtype), torch.empty(2)
    x[1, 3] = bad
    own.rms_norm(2, 40, x, torch.ones(40), 1e-5, y, inverse)
    assert y[0].isfinite().all() and not y[1].isfinite().all()
    gate_up, y = torch.ones(2, 80, dtype=dtype), torch.empty(2, 40, dtype=dtype)
    gate_up[1, 50] = bad
    own.swiglu(2, 40, gate_up, y)
    assert y[0].isfinite().all() and not y[1].isfinite().all()
    weight = torch.zeros(2, 1, 40, dtype=dtype)
    weight[1, 0, 5] = bad
    own.causal_softmax(2, 1, 1, 40, None, 1, 40, weight)
    assert weight[0].isfinite().all() and not weight[1].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
def test_threads_share_the_work_and_always_alike(dtype, monkeypatch):
    """Large enough for several threads, which give what one gives; sums over rows, always the same bits."""
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(1000, 96, generator=generator).to(dtype)
    x, gain = torch.randn(1000, 96, generator=generator), torch.randn(96, generator=generator)
    own, inverse = kernels_for(dy), x.square().mean(dim=1).add(1e-5).rsqrt()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            dx, parts = torch.empty_like(x), torch.zeros(threads, 96)
            own.rms_norm_backward(1000, 96, dy, x, gain, inverse, dx, parts, threads)
            assert parts.any(dim=1).all()
            results.append((dx, parts.sum(dim=0)))
    finally:
        torch.set_num_threads(before)
    for dx, dgain in results:
        assert torch.equal(dx, results[0][0])
        torch.testing.assert_close(dgain, results[0][1], atol=1e-4, rtol=1e-5)
    assert torch.equal(results[1][1], results[2][1])


def test_the_source_is_installed_with_the_package():
    import tomllib
    from fnmatch import fnmatch

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["stlm"]
    name = library.SOURCE.relative_to(Path(library.__file__).parents[1]).as_posix()
    assert library.SOURCE.exists() and any(fnmatch(name, pattern) for pattern in patterns)
