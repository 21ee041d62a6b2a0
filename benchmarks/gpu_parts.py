"""Checks of a model's parts for benchmarks/gpu_checks.py: attention, head, scoring, generation, a whole step.

Shapes: B batch, L length, H query heads, K key/value heads, E head width, N positions, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_runs import device, on_cuda
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.token_model import TokenModel
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import training_flops_per_token
from stlm.model.documents import Documents
from stlm.model.fused_attention import fused_attention
from stlm.model.head_loss import head_loss as fused_head_loss
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.config import TrainingConfig
from stlm.training.devices import choose_device
from stlm.training.optimizers import build_optimizer

# Dense bfloat16 (float16 where there is none), TFLOP/s, as the makers say; the first name in a card's counts.
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "4090": 165,
    "3090": 71,
    "V100": 125,
    "T4": 65,
}
SMALL = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 96, "context": 64}


def synchronize() -> None:
    """Wait for the device."""
    if on_cuda():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], rounds: int = 10) -> float:
    """The fastest of some calls, after two to warm up."""
    best = float("inf")
    for number in range(rounds + 2):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        if number > 1:
            best = min(best, time.perf_counter() - begin)
    return round(1e3 * best, 4)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device())


def attention() -> dict[str, Any]:
    """Ways to attend within documents and causally, with grouped heads: right, and how fast."""
    B, L, H, K, E = (24, 512, 16, 4, 32) if on_cuda() else (2, 64, 4, 2, 16)
    tokens_BL = torch.randint(0, L // 4, (B, L), device=device())  # an end of text every L / 4 tokens or so
    masks = {"documents": Documents.of(tokens_BL, 0).sees, "causal": None}
    found: dict[str, Any] = {
        "shape": f"{B} x {L}, {H} heads of {E}, {K} of keys, milliseconds there and back"
    }
    for dtype in (torch.bfloat16, torch.float32):
        for kind, mask in masks.items():
            name = f"{kind}, {str(dtype).removeprefix('torch.')}"
            found[name] = _ways(mask, tokens_BL, (B, L, H, K, E), dtype)
    slow = {
        name: row
        for name, row in found.items()
        if isinstance(row, dict) and row["ours"] > 1.5 * min(v for v in row["torch"].values() if v)
    }
    assert not on_cuda() or not slow, f"another of torch's ways is faster by half: {slow}"
    return found


def _ways(
    mask: Tensor | None, tokens_BL: Tensor, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> dict[str, Any]:
    B, L, H, K, E = shape
    q, k, v = (_random(B, heads, L, E, dtype=dtype).requires_grad_() for heads in (H, K, K))
    copies = tuple(x.repeat_interleave(H // K, dim=1).detach().requires_grad_() for x in (k, v))
    dy = torch.randn_like(q)
    causal = {"attn_mask": mask, "is_causal": mask is None}

    def timed(call: Callable[[], Tensor]) -> float | None:
        try:
            return milliseconds(lambda: call().backward(dy))
        except RuntimeError:  # this backend does not take it
            return None

    exact = F.scaled_dot_product_attention(
        *(x.detach().double() for x in (q, *(x.repeat_interleave(H // K, dim=1) for x in (k, v)))), **causal
    )
    error = float((fused_attention(q, k, v, mask).double() - exact).abs().max())
    assert error < (0.05 if dtype == torch.bfloat16 else 2e-3), f"attention is off by {error}"
    ways: dict[str, float | None] = {
        "groups": timed(lambda: F.scaled_dot_product_attention(q, k, v, **causal, enable_gqa=True))
    }
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    for backend in backends if on_cuda() else ():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            ways[f"groups, {backend}"] = timed(
                lambda: F.scaled_dot_product_attention(q, k, v, **causal, enable_gqa=True)
            )
            ways[f"whole heads, {backend}"] = timed(
                lambda: F.scaled_dot_product_attention(q, *copies, **causal)
            )
    row = {
        "largest_error": error,
        "ours": timed(lambda: fused_attention(q, k, v, mask)),
        "torch": ways,
    }
    if on_cuda() and mask is not None:
        row["others"] = _other_ways(q, k, v, tokens_BL, dy)
    return row


def _other_ways(q: Tensor, k: Tensor, v: Tensor, tokens_BL: Tensor, dy: Tensor) -> dict[str, Any]:
    """What training does not use: the times say whether it should. Their failure is none of the check's."""
    found: dict[str, Any] = {}
    B, L = tokens_BL.shape
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document_BL = (tokens_BL == 0).cumsum(dim=1)
        mask = create_block_mask(
            lambda b, h, i, j: (document_BL[b, i] == document_BL[b, j]) & (i >= j), B, None, L, L, device()
        )
        flex = torch.compile(flex_attention)
        found["flex"] = milliseconds(
            lambda: flex(q, k, v, block_mask=mask, enable_gqa=True).backward(dy.to(q.dtype))
        )
    except Exception as error:
        found["flex"] = f"{type(error).__name__}: {str(error)[:200]}"
    if q.dtype != torch.bfloat16:
        return found
    try:
        from torch.nn.attention.varlen import varlen_attn

        begins = torch.where((tokens_BL == 0).flatten())[0]
        rows = torch.arange(0, B * L + 1, L, device=device())
        cuts = torch.cat([begins, rows]).unique().int()
        longest = int(cuts.diff().max())
        flat = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in (q, k, v)]
        dflat = torch.randn_like(flat[0])
        found["varlen"] = milliseconds(
            lambda: varlen_attn(
                *flat, cuts, cuts, longest, longest, window_size=(-1, 0), enable_gqa=True
            ).backward(dflat)
        )
    except Exception as error:
        found["varlen"] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def head_loss() -> dict[str, Any]:
    """The loss in parts, and its gradients, are those of whole logits."""
    found = {}
    for N, D, V in ((6000, 64, 50257), (500, 64, 1000), (64, 32, 257)) if on_cuda() else ((70, 32, 1000),):
        for cap in (0.0, 10.0):
            x, weight = _random(N, D).requires_grad_(), _random(V, D).mul_(0.2).requires_grad_()
            targets = torch.randint(V, (N,), device=device())
            loss = fused_head_loss(x, weight, targets, cap)
            own = [loss, *torch.autograd.grad(loss, (x, weight))]
            logits = x.double() @ weight.double().T
            exact = F.cross_entropy(torch.tanh(logits / cap) * cap if cap else logits, targets)
            expected = [exact, *torch.autograd.grad(exact, (x, weight))]
            apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(own, expected, strict=True)]
            found[f"{N} x {V}, cap {cap:g}"] = max(apart)
            assert max(apart) < 5e-3, f"vocabulary {V}, cap {cap}: {apart}"
    return found


def scoring() -> dict[str, Any]:
    """Scores in float32 are the CPU's, and four times the text takes no more memory."""
    shape = {} if on_cuda() else SMALL
    config = ModelConfig(**shape, vocab_size=50257 if on_cuda() else 1000)
    torch.manual_seed(0)
    model = build_model(config).eval()
    rng = np.random.default_rng(0)

    def requests(count: int) -> list[Encoded]:
        lengths = rng.integers(4, config.context, count)
        return [
            Encoded(rng.integers(0, config.vocab_size, length).astype(np.int32), int(length) // 2, False)
            for length in lengths
        ]

    few = requests(6)
    encoder = RequestEncoder(ByteTokenizer())
    expected = [score.logprob for score in TokenModel(model, encoder).score_tokens(few)]
    scorer = TokenModel(model, encoder, device())
    found = [score.logprob for score in scorer.score_tokens(few)]
    apart = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert apart < 1e-4, f"{found}, on the CPU {expected}"
    result: dict[str, Any] = {"largest_difference": apart, "batch_tokens": scorer.batch_tokens}
    peaks = []
    for count in (1000, 4000) if on_cuda() else (20, 80):
        own = requests(count)
        if on_cuda():
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        begin = time.perf_counter()
        scorer.score_tokens(own)
        synchronize()
        tokens = sum(len(one.tokens) for one in own)
        result[f"tokens_per_second_of_{count}"] = round(tokens / (time.perf_counter() - begin))
        peaks.append(torch.cuda.max_memory_allocated() / 1e9 if on_cuda() else 0.0)
    if on_cuda():
        result["peak_memory_gb"] = [round(peak, 2) for peak in peaks]
        assert peaks[1] < 1.3 * peaks[0] + 0.2, f"memory grows with the text: {peaks} GB"
        assert peaks[1] < 10, f"{peaks} GB"
    return result


def generation() -> dict[str, Any]:
    """The same tokens with and without a cache of keys and values, past the end of the context."""
    config = ModelConfig(**SMALL, vocab_size=257)
    torch.manual_seed(0)
    model = build_model(config).to(device()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    found: dict[str, Any] = {}
    drawn, greedy = {}, Sampling(temperature=0)
    for cached in (True, False):
        generator = TokenGenerator(model, ByteTokenizer(), cached=cached)
        symbols: list[int] = []
        begin = time.perf_counter()
        logits_V = generator.start("Once upon")
        while len(symbols) < 2 * config.context:
            symbols.append(int(greedy.choose(logits_V, torch.Generator())) % 256)
            logits_V = generator.next(symbols[-1])
        drawn[cached] = symbols
        key = "with_cache" if cached else "without"
        found[key] = {"tokens_per_second": round(len(symbols) / (time.perf_counter() - begin), 1)}
    assert drawn[True] == drawn[False], f"{drawn}"
    return found


def mfu() -> dict[str, Any]:
    """Training steps of the paper's 50M model: tokens a second, and the share of the card's peak."""
    shape = {"vocab_size": 50257} if on_cuda() else {**SMALL, "vocab_size": 1000}
    config = ModelConfig(**shape)
    recipe = TrainingConfig(compile=False)
    where = choose_device(recipe)
    rows = recipe.batch_size if on_cuda() else 2
    tokens_BM = torch.randint(config.vocab_size, (rows, config.context + 1), device=device())
    n = 8192 if on_cuda() else 512
    a, b = (_random(n, n, dtype=where.dtype) for _ in range(2))
    reached = 2 * n**3 / (milliseconds(lambda: torch.mm(a, b)) / 1e3)
    named = torch.cuda.get_device_name() if on_cuda() else ""
    peak = next((1e12 * tflops for name, tflops in PEAKS.items() if name in named), None)
    flops = rows * config.context * training_flops_per_token(config)
    found: dict[str, Any] = {
        "precision": where.precision,
        "tokens_a_step": rows * config.context,
        "product_tflops": round(reached / 1e12, 3),
        "peak_tflops": peak and peak / 1e12,
    }
    for way in ("eager", "compiled") if on_cuda() else ("eager",):
        torch.manual_seed(0)
        model = build_model(config).to(device())
        optimizer = build_optimizer(model, recipe, where.dtype)
        loss_of = torch.compile(model.loss) if way == "compiled" else model.loss

        def step(model=model, optimizer=optimizer, loss_of=loss_of) -> None:
            with where.autocast():
                loss = loss_of(tokens_BM[:, :-1], tokens_BM[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if on_cuda():
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = milliseconds(step, 10 if on_cuda() else 3) / 1e3
        except Exception as error:
            if way == "eager":
                raise
            found[way] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        found[way] = {
            "seconds_a_step": round(seconds, 5),
            "tokens_per_second": round(rows * config.context / seconds),
            "mfu": peak and round(flops / seconds / peak, 3),
            "of_product": round(flops / seconds / reached, 3),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_cuda() else None,
        }
    return found
