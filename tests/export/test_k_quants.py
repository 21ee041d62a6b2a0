"""Q4_K and Q6_K: bytes equal those of the reference's loops, written out; errors are within half a step."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from stlm.export.k_quants import quantize_q4_k, quantize_q6_k

F = np.float32
QUANTIZERS = {Kind.Q4_K: quantize_q4_k, Kind.Q6_K: quantize_q6_k}


def blocks() -> np.ndarray:
    """Blocks of 256 as weights are, and odd ones: zeros, constants, one sign, outliers, tiny numbers."""
    draw = np.random.default_rng(3)
    normal = draw.standard_normal((6, 256))
    odd = [
        np.zeros(256),
        np.full(256, 0.7),
        np.full(256, -0.7),
        np.abs(normal[0]),
        -np.abs(normal[1]) - 1,
        np.abs(normal[1]) + 1,
        np.where(np.arange(256) == 77, 300.0, normal[2]),
        np.where(np.arange(256) < 32, 0.0, normal[3]),
        np.where(np.arange(256) % 32 < 16, 0.0, normal[3]),
        normal[4] * 1e-4,
        normal[5] * 1e-17,
        draw.standard_cauchy(256),
        np.repeat(draw.standard_normal(8), 32),
        np.sign(normal[0]),
    ]
    return np.concatenate([normal * 0.05, np.stack(odd)]).astype(F)


def total(numbers: list[np.float32]) -> np.float32:
    """The sum in order, in float32."""
    found = F(0)
    for number in numbers:
        found = F(found + number)
    return found


def level(number: np.float32, low: int, high: int) -> int:
    return max(low, min(high, round(float(number))))


def reference_q4(x: list[np.float32]) -> tuple[list[int], np.float32, np.float32]:
    """Levels, scale and minimum of a group of 32."""
    size = F(math.sqrt(F(total([v * v for v in x]) / F(32))))
    w = [F(size + abs(v)) for v in x]
    low, high = min(F(0), min(x)), max(x)
    if low == high:
        return [0] * len(x), F(0), -low
    sum_w, sum_x = total(w), total([a * v for a, v in zip(w, x, strict=True)])

    def error(levels: list[int], scale: np.float32, low: np.float32) -> np.float32:
        off = [F(F(F(scale * F(n)) + low) - v) for n, v in zip(levels, x, strict=True)]
        return total([F(a * F(d * d)) for a, d in zip(w, off, strict=True)])

    inverse = F(F(15) / F(high - low))
    scale = F(F(1) / inverse)
    best = [level(F(inverse * F(v - low)), 0, 15) for v in x]
    least = error(best, scale, low)
    for step in range(21):
        inverse = F(F(F(F(-1) + F(F(0.1) * F(step))) + F(15)) / F(high - low))
        tried = [level(F(inverse * F(v - low)), 0, 15) for v in x]
        wl = [F(a * F(n)) for a, n in zip(w, tried, strict=True)]
        sum_l, sum_l2 = total(wl), total([F(p * F(n)) for p, n in zip(wl, tried, strict=True)])
        sum_xl = total([F(p * v) for p, v in zip(wl, x, strict=True)])
        determinant = F(F(sum_w * sum_l2) - F(sum_l * sum_l))
        if determinant <= 0:
            continue
        new_scale = F(F(F(sum_w * sum_xl) - F(sum_x * sum_l)) / determinant)
        new_low = F(F(F(sum_l2 * sum_x) - F(sum_l * sum_xl)) / determinant)
        if new_low > 0:
            new_low, new_scale = F(0), F(sum_xl / sum_l2)
        found = error(tried, new_scale, new_low)
        if found < least:
            best, least, scale, low = tried, found, new_scale, new_low
    return best, scale, -low


def reference_q6(x: list[np.float32]) -> tuple[list[int], np.float32]:
    """Levels and scale of a group of 16."""
    widest = max(x, key=abs)
    if abs(widest) < 1e-15:
        return [0] * len(x), F(0)

    def attempt(steps: np.float32) -> tuple[list[int], np.float32, np.float32]:
        inverse = F(-steps / widest)
        tried = [level(F(inverse * v), -32, 31) for v in x]
        xl = total([F(F(F(v * v) * v) * F(n)) for v, n in zip(x, tried, strict=True)])
        return tried, xl, total([F(F(F(v * v) * F(n)) * F(n)) for v, n in zip(x, tried, strict=True)])

    best, sum_xl, sum_l2 = attempt(F(32))
    scale = F(sum_xl / sum_l2) if sum_l2 > 0 else F(0)
    gain = F(scale * sum_xl)
    for step in range(-9, 10):
        if step == 0:
            continue
        tried, sum_xl, sum_l2 = attempt(F(F(32) + F(F(0.1) * F(step))))
        if sum_l2 > 0 and F(sum_xl * sum_xl) > F(gain * sum_l2):
            best, scale = tried, F(sum_xl / sum_l2)
            gain = F(scale * sum_xl)
    return [n + 32 for n in best], scale


def expected_q4(block: np.ndarray) -> bytes:
    groups = [list(block[start : start + 32]) for start in range(0, 256, 32)]
    with np.errstate(all="ignore"):
        found = [reference_q4(group) for group in groups]
    bits, units = [], []
    for values in ([scale for _, scale, _ in found], [low for _, _, low in found]):
        most = max(F(0), max(values))
        inverse = F(F(63) / most) if most > 0 else F(0)
        bits.append([min(63, round(float(F(inverse * value)))) for value in values])
        units.append(np.float16(F(most / F(63))))
    (scales, lows), (d, dmin) = bits, units
    levels: list[int] = []
    for group, (first, _, _), scale, low in zip(groups, found, scales, lows, strict=True):
        step, offset = F(F(d) * F(scale)), F(F(dmin) * F(low))
        levels += [level(F(F(v + offset) / step), 0, 15) for v in group] if step else first
    packed = [scales[j] | scales[j + 4] >> 4 << 6 for j in range(4)]
    packed += [lows[j] | lows[j + 4] >> 4 << 6 for j in range(4)]
    packed += [scales[j] & 15 | (lows[j] & 15) << 4 for j in range(4, 8)]
    packed += [levels[j + i] | levels[j + i + 32] << 4 for j in range(0, 256, 64) for i in range(32)]
    return d.tobytes() + dmin.tobytes() + bytes(packed)


def expected_q6(block: np.ndarray) -> bytes:
    groups = [list(block[start : start + 16]) for start in range(0, 256, 16)]
    with np.errstate(all="ignore"):
        found = [reference_q6(group) for group in groups]
    widest = max((scale for _, scale in found), key=abs)
    if abs(widest) < 1e-15:
        return bytes(210)
    inverse = F(F(-128) / widest)
    d = np.float16(F(F(1) / inverse))
    scales = [min(127, round(float(F(inverse * scale)))) for _, scale in found]
    levels: list[int] = []
    for group, (first, _), scale in zip(groups, found, scales, strict=True):
        step = F(F(d) * F(scale))
        levels += [level(F(v / step), -32, 31) + 32 for v in group] if step else first
    low, high = [], []
    for half in (0, 128):
        for pair in ((0, 64), (32, 96)):
            low += [
                levels[half + pair[0] + i] & 15 | (levels[half + pair[1] + i] & 15) << 4 for i in range(32)
            ]
        quarters = range(4)
        high += [sum(levels[half + 32 * q + i] >> 4 << 2 * q for q in quarters) for i in range(32)]
    return bytes(low) + bytes(high) + np.array(scales, np.int8).tobytes() + d.tobytes()


@pytest.mark.parametrize(("kind", "expected"), [(Kind.Q4_K, expected_q4), (Kind.Q6_K, expected_q6)])
def test_bytes_are_those_of_the_reference(kind: Kind, expected) -> None:
    found = QUANTIZERS[kind](blocks())
    assert found.shape == (20, gguf.GGML_QUANT_SIZES[kind][1]) and found.dtype == np.uint8
    for number, block in enumerate(blocks()):
        assert found[number].tobytes() == expected(block), number


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_errors_are_at_most_half_a_step(kind: Kind) -> None:
    """Of weights as they are, as `gguf` reads them back; but where the search cut off the outermost ones."""
    x = (np.random.default_rng(1).standard_normal((50, 512)) * 0.04).astype(F)
    read = gguf.dequantize(QUANTIZERS[kind](x), kind)
    n = 32 if kind is Kind.Q4_K else 16
    groups, off = read.reshape(-1, n), np.abs(read - x).reshape(-1, n)
    values = np.sort(groups, axis=1)
    gaps = np.diff(values, axis=1)
    step = np.where(gaps > 1e-6, gaps, np.inf).min(
        axis=1, keepdims=True
    )  # the least gap is one step, or more
    inner = (groups > values[:, :1]) & (groups < values[:, -1:])
    assert inner.mean() > 0.8
    assert (off <= 0.501 * step)[inner].all()
    relative = np.sqrt((off**2).mean() / (x**2).mean())
    assert relative < {Kind.Q4_K: 0.075, Kind.Q6_K: 0.019}[kind]


def test_four_bits_are_better_than_the_simple_ones() -> None:
    x = np.random.default_rng(2).standard_normal((20, 256)).astype(F)
    errors = {
        kind: np.square(
            gguf.dequantize(QUANTIZERS.get(kind, lambda a, k=kind: gguf.quantize(a, k))(x), kind) - x
        )
        for kind in (Kind.Q4_K, Kind.Q4_0, Kind.Q4_1)
    }
    means = {kind: float(error.mean()) for kind, error in errors.items()}
    assert means[Kind.Q4_K] < 0.9 * means[Kind.Q4_1] < means[Kind.Q4_0]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_blocks_do_not_see_each_other(kind: Kind) -> None:
    """Any number of blocks at a time gives the same bytes, and rows are rows."""
    x = np.random.default_rng(4).standard_normal((3, 512 * 256)).astype(F)
    whole = QUANTIZERS[kind](x)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    assert whole.shape == (3, 512 * size)
    for row, column in ((0, 0), (1, 511), (2, 300)):
        one = QUANTIZERS[kind](x[row : row + 1, 256 * column : 256 * (column + 1)])
        assert (whole[row, size * column : size * (column + 1)] == one[0]).all()
    with pytest.raises(ValueError, match="rows of 128 do not divide by 256"):
        QUANTIZERS[kind](x[:, :128])
