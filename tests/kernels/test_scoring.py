"""The kernels for scoring are torch's operations up to rounding, whatever the number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stlm.kernels.library import kernels, kernels_for
from stlm.model.config import ModelConfig
from stlm.model.documents import Documents
from stlm.model.fused import RMSNorm, add_and_norm, add_to
from stlm.model.layout import CausalRows
from stlm.model.rotary import rope_tables, rotate
from stlm.model.segments import Segments
from stlm.model.transformer import Transformer
from stlm.model.trie_attention import Sequences, trie_attention

pytestmark = pytest.mark.skipif(not kernels().by_type, reason=f"no kernels: {kernels().why_none}")
CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]
# Relative to float64, on inputs of the type itself.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
HEADS = [(4, 4, 8), (16, 4, 32), (8, 2, 32), (4, 1, 10), (2, 2, 5), (40, 1, 4), (6, 2, 64)]


def trie(kind: str) -> Segments:
    """A trie of sequences of each kind that matters."""
    rng = np.random.default_rng(0)
    own, shared = {
        "one token": ([1], [0]),
        "nothing shared": ([5, 1, 40, 3], [0, 0, 0, 0]),
        "options": ([30, 4, 1, 7, 2], [0, 30, 30, 30, 30]),
        "deep": ([1] * 60, list(range(60))),
        "long": ([300, 90], [0, 255]),
        "random": (rng.integers(1, 30, 60).tolist(), None),
    }[kind]
    segments, positions, path, used = [], [], np.empty(0, np.int64), 0
    for s, n in enumerate(own):
        common = int(rng.integers(0, len(path) + 1)) if shared is None else shared[s]
        path = np.concatenate([path[:common], np.arange(used, used + n)])
        segments.append((n, path))
        positions.append(np.arange(common, common + n))
        used += n
    return Segments(np.concatenate(positions), segments, CPU)


def attention(qkv_1NSE, heads, layout, rope, rows_N=None):
    """Attention in float64: each token over the path that ends with it."""
    x_NSE = qkv_1NSE[0].double()
    K = (x_NSE.shape[1] - heads) // 2
    qk_NHE, v_NKE = x_NSE.split([heads + K, K], dim=1)
    if rope is not None:
        qk_NHE = rotate(qk_NHE, *(table[0].double() for table in rope))
    paths = {}
    for own, path in layout._given[1]:
        for place in range(len(path) - own, len(path)):
            paths[path[place]] = torch.from_numpy(path[: place + 1])
    y_NHE = torch.empty(len(x_NSE), heads, x_NSE.shape[2], dtype=torch.float64)
    for token, path in paths.items():
        k_HCE, v_HCE = (
            x.repeat_interleave(heads // K, dim=1)[path].transpose(0, 1) for x in (qk_NHE[:, heads:], v_NKE)
        )
        y_NHE[token] = F.scaled_dot_product_attention(qk_NHE[token, :heads, None], k_HCE, v_HCE)[:, 0]
    return y_NHE if rows_N is None else y_NHE[rows_N]


def projections(layout: Segments, heads: int, kv_heads: int, width: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    N = layout.positions.shape[1]
    qkv_1NSE = torch.randn(1, N, heads + 2 * kv_heads, width, generator=generator).to(dtype)
    if width % 2:
        return qkv_1NSE, None
    tables = rope_tables(N, width, 1e4)
    return qkv_1NSE, tuple(table[layout.positions].unsqueeze(-2) for table in tables)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["one token", "nothing shared", "options", "deep", "long", "random"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
@torch.no_grad()
def test_attention_over_a_trie(heads, kv_heads, width, kind, dtype):
    layout = trie(kind)
    qkv_1NSE, rope = projections(layout, heads, kv_heads, width, dtype)
    expected_NHE = attention(qkv_1NSE, heads, layout, rope)
    found_1NHE = layout.attend_projections(qkv_1NSE, heads, rope)
    assert found_1NHE.dtype == dtype
    near = dict(atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(found_1NHE[0].double(), expected_NHE, **near)
    # Some tokens, one of them twice: the same bits.
    rows_N = torch.cat([torch.arange(0, len(expected_NHE), 3), torch.zeros(1, dtype=torch.int64)])
    assert torch.equal(layout.attend_projections(qkv_1NSE, heads, rope, rows_N), found_1NHE[0, rows_N])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 4), (8, 1), (9, 3)])
@torch.no_grad()
def test_the_bits_do_not_depend_on_the_number_of_threads(heads, kv_heads, dtype):
    layout, threads = trie("random"), torch.get_num_threads()
    qkv_1NSE, rope = projections(layout, heads, kv_heads, 32, dtype)
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(layout.attend_projections(qkv_1NSE, heads, rope))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_rows_of_one_sequence_and_separate_tensors(dtype):
    """Rows are sequences that share nothing; models of `transformers` give queries, keys and values apart."""
    torch.manual_seed(0)
    q_BLHE, k_BLKE, v_BLKE = (torch.randn(3, 37, n, 16).to(dtype) for n in (4, 2, 2))
    qkv_BLSE = torch.cat([q_BLHE, k_BLKE, v_BLKE], dim=2)
    layout = CausalRows(37)
    expected_BLHE = layout.attend(q_BLHE.double(), k_BLKE.double(), v_BLKE.double())
    near = dict(atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    found_BLHE = layout.attend_projections(qkv_BLSE, 4, None)
    torch.testing.assert_close(found_BLHE.double(), expected_BLHE, **near)
    sequences = Sequences(torch.full((3,), 37), torch.zeros(3, dtype=torch.int64))
    # Head first in memory, as transposed by others.
    apart = [x.flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1) for x in (q_BLHE, k_BLKE, v_BLKE)]
    found_NHE = trie_attention(*apart, sequences)
    assert torch.equal(found_NHE, found_BLHE.flatten(0, 1))


@torch.no_grad()
def test_a_layout_without_a_kernel_says_so():
    qkv_BLSE = torch.randn(1, 4, 8, 8)
    assert Documents.of(torch.tensor([[1, 0, 2, 3]]), 0).attend_projections(qkv_BLSE, 4, None) is None
    assert CausalRows(4).attend_projections(qkv_BLSE.double(), 4, None) is None
    # A sequence that does not begin as the one before does, and tokens in another order than the row's.
    for paths in (
        [(2, [0, 1]), (1, [1, 2])],
        [(2, [1, 0]), (1, [1, 2])],
        [(1, [0]), (1, [0, 2]), (1, [0, 1])],
    ):
        arrays = [(own, np.array(path)) for own, path in paths]
        layout = Segments(np.array([0, 1, 1]), arrays, CPU)
        assert layout.sequences is None
        assert layout.attend_projections(qkv_BLSE[:, :3], 4, None) is None
    with torch.enable_grad():
        assert trie("options").attend_projections(torch.randn(1, 44, 8, 8), 4, None) is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [1, 100, 4000])
def test_log_sum_in_parts(columns, dtype):
    torch.manual_seed(0)
    logits_NV = (torch.randn(7, 4000) * 5).to(dtype)
    logits_NV[0] = 200.0  # all equal: the first is the best
    logits_NV[1, 3] = torch.inf
    logits_NV[2, 3] = torch.nan
    logits_NV[3, 5:] = -torch.inf
    largest_N, sum_N = torch.full((7,), -torch.inf), torch.zeros(7)
    best_N = torch.zeros(7, dtype=torch.int64)
    for begin in range(0, 4000, columns):
        part_NV = logits_NV[:, begin : begin + columns].contiguous()
        kernels_for(part_NV).log_sum(*part_NV.shape, part_NV, begin, largest_N, sum_N, best_N)
    found_N, expected_N = largest_N + sum_N.log(), logits_NV.double().logsumexp(dim=1)
    finite = [0, 3, 4, 5, 6]
    torch.testing.assert_close(found_N[finite].double(), expected_N[finite], atol=2e-5, rtol=2e-6)
    assert not found_N[[1, 2]].isfinite().any()
    assert torch.equal(best_N[finite], logits_NV.float().argmax(dim=1)[finite])


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_a_sum_and_its_norm(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    norm.narrow = True
    x, added = torch.randn(2, 5, 48), torch.randn(2, 5, 48).to(dtype)
    x[0, 1, 3] = torch.nan
    before = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, normal = add_and_norm(x, added, norm)
        expected = norm(before + added)
    torch.testing.assert_close(total, before + added, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(normal, expected, equal_nan=True)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    again = add_to(total, added)
    torch.testing.assert_close(again, before + added + added, equal_nan=True)


def model(**changes) -> Transformer:
    torch.manual_seed(0)
    options = dict(layers=3, width=64, heads=4, kv_heads=2, ffn_width=96, context=400, vocab_size=61)
    transformer = Transformer(ModelConfig(**{**options, "dropout": 0.0, "attention_dropout": 0.0, **changes}))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.3)
    return transformer.eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"qkv_shift": True},
        {"value_embeddings": 2},
        {"positions": "learned", "norm": "layernorm", "ffn": "gelu"},
        {"ffn": "relu2", "logit_softcap": 5.0},
    ],
)
def test_a_model_scores_as_in_torchs_operations(changes, precision, monkeypatch):
    """With gradients there are no kernels for scoring. Residual streams at all tokens, and at some."""
    transformer, layout = model(**changes), trie("random")
    tokens = torch.randint(0, 61, layout.positions.shape, generator=torch.Generator().manual_seed(1))
    rows_N = torch.arange(0, tokens.shape[1], 7)
    # So small that the feed-forward network takes several parts.
    monkeypatch.setattr("stlm.model.block._PART_BYTES", 2**15)
    tolerance = dict(atol=1e-4, rtol=1e-4) if precision == "float32" else dict(atol=0.3, rtol=0.1)
    for rows in (None, rows_N):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            expected = transformer.hidden(tokens, trie("random"), rows).detach()
            with torch.inference_mode():
                found = transformer.hidden(tokens, layout, rows)
                kept = transformer.residuals(tokens, layout, rows, after=(0, 1))
                streams = [stream.clone() for stream in kept]
        torch.testing.assert_close(found, expected, **tolerance)
        # A later block leaves what was kept as it was.
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            (first,) = transformer.residuals(tokens, layout, None, after=(0,))[:1]
        assert torch.equal(streams[0], first)
