"""Kernels are compiled once, are torch's operations up to rounding, and can be missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stlm.kernels import library
from stlm.kernels.library import kernels, kernels_for
from stlm.model.causal_attention import causal_attention
from stlm.model.fused import RMSNorm, swiglu
from stlm.model.head_loss import head_loss
from stlm.model.rotary import rope_tables

needs_kernels = pytest.mark.skipif(not kernels().by_type, reason=f"no kernels: {kernels().why_none}")
TYPES = [torch.float32, torch.bfloat16]


def found(tmp_path: Path, first: str = "", **environment: str) -> dict:
    """What a new process finds, with a cache of its own and these variables, after the statement `first`."""
    program = f"""
{first}
import json, torch
from pathlib import Path
from stlm.kernels.library import _openmp_of_torch, kernels
own = kernels()
maps = Path("/proc/self/maps").read_text()
print(json.dumps(dict(
    types=len(own.by_type),
    why=own.why_none,
    openmp=len(set(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line)),
    linked=_openmp_of_torch() if own.by_type else None,
)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled_here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A cache into which a new process has compiled them, which takes long, and what that process found."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, found(cache)


@needs_kernels
def test_they_are_compiled_once_and_share_torchs_threads(compiled_here):
    cache, first = compiled_here
    assert (first["types"], first["openmp"]) == (2, 1), first["why"]
    (file,) = (cache / "stlm").iterdir()
    before = file.stat().st_mtime_ns
    # Without a compiler now: what was compiled serves.
    assert found(cache, PATH="")["types"] == 2
    assert file.stat().st_mtime_ns == before


@needs_kernels
def test_another_packages_openmp_is_not_taken(compiled_here):
    """What was compiled for torch's serves, where another package's is loaded before it."""
    pytest.importorskip("sklearn")
    cache, _ = compiled_here
    own = found(cache, "import sklearn.utils._openmp_helpers", PATH="")
    if own["openmp"] < 2:
        pytest.skip("it brings none")
    assert own["types"] == 2, own["why"]
    assert Path(own["linked"]).parent.name in ("lib", "torch.libs")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler (no-such-compiler)"),
        ({"CC": "cc -no-such-option"}, "no-such-option"),
        ({"CC": "'"}, "quotation"),
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
    """By the probabilities of pairs, e^0 and e to numbers down to where nothing is left, and beyond."""
    below = -torch.logspace(-3, 2.2, 4000)
    pairs = torch.stack([torch.zeros(4000), below], dim=1).to(dtype)
    own, losses = pairs.clone(), torch.empty(4000)
    kernels_for(own).cross_entropy(4000, 2, own, torch.zeros(4000, dtype=torch.int64), 0.0, True, losses)
    exact = pairs.double().softmax(dim=-1)[:, 1]
    error = ((own[:, 1].double() - exact) / exact).abs()[below > -87]
    assert len(error) > 3000 and error.max() < (5e-7 if dtype == torch.float32 else 2**-8)
    assert not own[below < -88, 1].any()
    torch.testing.assert_close(losses, pairs.double().logsumexp(dim=-1).float())


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
    if own.attention is None:
        return
    # From the value's position on; a block of 32 or 48 queries that ends before it sees none of it.
    qkv_BLSE, y_BLHE = torch.ones(2, 70, 4, 6, dtype=dtype), torch.empty(2, 70, 2, 6, dtype=dtype)
    qkv_BLSE[1, 60, 3, 2] = bad
    weights = torch.empty(4, own.attention_weights(70), dtype=dtype)
    own.attention(2, 70, 2, 1, 6, qkv_BLSE, None, None, 0, None, y_BLHE, weights)
    assert y_BLHE[0].isfinite().all() and y_BLHE[1, :32].isfinite().all()
    assert not y_BLHE[1, 60:, :, 2].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
def test_threads_share_the_work_and_always_alike(dtype):
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


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("batch", "kv_heads"), [(3, 2), (1, 1)])
def test_any_number_of_threads_gives_the_same_bits(batch, kv_heads, dtype):
    """Of attention, the head's loss and SwiGLU, all large enough for several threads."""
    if kernels_for(torch.empty(0, dtype=dtype)).attention is None:
        pytest.skip("no products of bfloat16 here")
    generator = torch.Generator().manual_seed(0)
    qkv_BLSE = torch.randn(batch, 130, 8 + 2 * kv_heads, 16, generator=generator).to(dtype)
    rope = tuple(table.unsqueeze(-2) for table in rope_tables(130, 16, 100.0))
    gate_up = torch.randn(300, 256, generator=generator).to(dtype)
    logits, targets = torch.randn(300, 200, generator=generator).to(dtype), torch.arange(300) % 200

    def everything() -> list[torch.Tensor]:
        own, gates = qkv_BLSE.clone().requires_grad_(), gate_up.clone().requires_grad_()
        y_BLHE, product = causal_attention(own, 8, None, rope), swiglu(gates)
        (y_BLHE.float().square().sum() + product.float().square().sum()).backward()
        left, losses = logits.clone(), torch.empty(300)
        kernels_for(left).cross_entropy(300, 200, left, targets, 5.0, True, losses)
        return [y_BLHE, own.grad, product, gates.grad, left, losses]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    qkv_BLSE, rope = torch.randn(2, 10, 4, 8), rope_tables(9, 8, 100.0)
    with pytest.raises(ValueError, match="angles of 10 positions and 8 dimensions"):
        causal_attention(qkv_BLSE, 2, None, rope)
    for sees in (torch.ones(1, 1, 10, 10, dtype=torch.bool), torch.ones(2, 1, 10, 10)):
        with pytest.raises(ValueError, match="keys are seen"):
            causal_attention(qkv_BLSE, 2, sees)
    for heads in (1, 4):
        with pytest.raises(ValueError, match="4 heads"):
            causal_attention(qkv_BLSE, heads)
    with pytest.raises(IndexError, match="targets from 0 to 5, expected from 0 to 4"):
        head_loss(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 5]))
    with pytest.raises(RuntimeError):
        RMSNorm(8, eps=1e-5)(torch.randn(2, 9))


def test_where_there_is_a_compiler_there_are_kernels():
    """Or all the tests here would be skipped, and no one would know."""
    if sys.platform != "linux" or shutil.which("cc") is None or os.environ.get("STLM_KERNELS") == "0":
        pytest.skip("no Linux, no C compiler, or switched off")
    assert set(kernels().by_type) == set(TYPES), kernels().why_none


def test_the_sources_are_installed_with_the_package():
    import tomllib
    from fnmatch import fnmatch

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["stlm"]
    folder = Path(library.__file__).parent
    for source in folder.glob("*.[ch]"):
        name = source.relative_to(folder.parent).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name
    assert all(source.exists() for source in library.SOURCES)
