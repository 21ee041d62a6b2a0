"""Quantizers for Q4_K and Q6_K, which the library `gguf` reads but does not write.

After the reference of llama.cpp (ggml-quants.c, `make_qkx2_quants` and `make_qx_quants`, MIT licence): a
block of 256 weights is cut into groups, each group's scale (and minimum) is searched by weighted least
squares, and scales are themselves stored in 6 or 8 bits. Every sum is in float32 and in the
reference's order, so the bytes are the reference's, unless its compiler joins a product and a sum into one
instruction.

Shapes: n weights of a group, G groups, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 256
_AT_A_TIME = 512  # blocks; the arrays of a search then fit a processor's cache
_TINY = np.float32(1e-15)  # below this, the reference takes a group for zero
_f32 = np.float32


def quantize_q4_k(weight_YX: np.ndarray) -> np.ndarray:
    """Q4_K of a matrix: uint8 [Y, X / 256 * 144]. Raises ValueError where X does not divide by 256."""
    return _by_blocks(weight_YX, _q4_k_blocks)


def quantize_q6_k(weight_YX: np.ndarray) -> np.ndarray:
    """Q6_K of a matrix: uint8 [Y, X / 256 * 210]. Raises ValueError where X does not divide by 256."""
    return _by_blocks(weight_YX, _q6_k_blocks)


def _by_blocks(weight_YX: np.ndarray, quantize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    *rows, width = weight_YX.shape
    if width % BLOCK:
        raise ValueError(f"rows of {width} do not divide by {BLOCK}")
    blocks = weight_YX.astype(_f32, copy=False).reshape(-1, BLOCK)
    parts = [quantize(blocks[start : start + _AT_A_TIME]) for start in range(0, len(blocks), _AT_A_TIME)]
    return np.concatenate(parts).reshape(*rows, -1)


def _q4_k_blocks(x_B256: np.ndarray) -> np.ndarray:
    """Eight groups of 32: x = d * scale * level - dmin * minimum; levels of 4 bits, the others of 6."""
    B = len(x_B256)
    x_nG = np.ascontiguousarray(x_B256.reshape(-1, 32).T)
    levels_nG, scale_G, minimum_G = _search_with_minimum(x_nG, most=15)
    scales_B8, d_B, d_G = _six_bits(scale_G.reshape(B, 8))
    minima_B8, dmin_B, dmin_G = _six_bits(minimum_G.reshape(B, 8))
    with np.errstate(divide="ignore", invalid="ignore"):
        again_nG = np.clip(np.rint((x_nG + dmin_G) / d_G), 0, 15)
    levels_nG = np.where(d_G != 0, again_nG, levels_nG).astype(np.uint8)
    levels_B423 = levels_nG.T.reshape(B, 4, 2, 32)
    low, high = slice(0, 4), slice(4, 8)
    packed = [
        d_B.view(np.uint8).reshape(B, 2),
        dmin_B.view(np.uint8).reshape(B, 2),
        scales_B8[:, low] | scales_B8[:, high] >> 4 << 6,
        minima_B8[:, low] | minima_B8[:, high] >> 4 << 6,
        scales_B8[:, high] & 15 | (minima_B8[:, high] & 15) << 4,
        (levels_B423[:, :, 0] | levels_B423[:, :, 1] << 4).reshape(B, 128),
    ]
    return np.concatenate(packed, axis=1)


def _six_bits(value_B8: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers from 0 as 6 bits each; their unit, float16 [B]; what they then stand for, float32 [G]."""
    most_B = np.maximum(value_B8.max(axis=1), _f32(0))
    inverse_B = np.divide(_f32(63), most_B, out=np.zeros_like(most_B), where=most_B > 0)
    bits_B8 = np.minimum(np.rint(inverse_B[:, None] * value_B8).astype(np.int32).astype(np.uint8), 63)
    unit_B = (most_B / _f32(63)).astype(np.float16)
    return bits_B8, unit_B, (unit_B.astype(_f32)[:, None] * bits_B8.astype(_f32)).reshape(-1)


def _search_with_minimum(x_nG: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels from 0 to `most`, and the scale and minimum of x = scale * level - minimum, for each group.

    Errors are weighted by the size of a weight. 21 widths of a step are tried; for each, scale and minimum
    come from the normal equations.
    """
    weight_nG = np.sqrt(np.sum(x_nG * x_nG, axis=0) / _f32(len(x_nG))) + np.abs(x_nG)
    sum_w_G, sum_x_G = weight_nG.sum(axis=0), (weight_nG * x_nG).sum(axis=0)
    high_G, low_G = x_nG.max(axis=0), np.minimum(x_nG.min(axis=0), _f32(0))
    flat_G, lowest_G = high_G == low_G, low_G

    def levels(steps: np.float32) -> np.ndarray:
        return np.clip(np.rint(steps / (high_G - low_G) * (x_nG - low_G)), 0, most).astype(_f32)

    def error(level_nG: np.ndarray, scale_G: np.ndarray, low_G: np.ndarray) -> np.ndarray:
        difference_nG = scale_G * level_nG + low_G - x_nG
        return (weight_nG * (difference_nG * difference_nG)).sum(axis=0)

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        best_nG, scale_G = levels(_f32(most)), _f32(1) / (_f32(most) / (high_G - low_G))
        least_G = error(best_nG, scale_G, low_G)
        for step in range(21):
            level_nG = levels(_f32(-1) + _f32(0.1) * _f32(step) + _f32(most))
            product_nG = weight_nG * level_nG
            sum_l_G, sum_l2_G = product_nG.sum(axis=0), (product_nG * level_nG).sum(axis=0)
            sum_xl_G = (product_nG * x_nG).sum(axis=0)
            determinant_G = sum_w_G * sum_l2_G - sum_l_G * sum_l_G
            new_low_G = (sum_l2_G * sum_x_G - sum_l_G * sum_xl_G) / determinant_G
            new_scale_G = (sum_w_G * sum_xl_G - sum_x_G * sum_l_G) / determinant_G
            positive_G = new_low_G > 0  # a minimum is subtracted, so it cannot be negative
            new_scale_G = np.where(positive_G, sum_xl_G / sum_l2_G, new_scale_G)
            new_low_G = np.where(positive_G, _f32(0), new_low_G)
            error_G = error(level_nG, new_scale_G, new_low_G)
            better_G = (determinant_G > 0) & (error_G < least_G)
            best_nG = np.where(better_G, level_nG, best_nG)
            least_G, scale_G = np.where(better_G, error_G, least_G), np.where(better_G, new_scale_G, scale_G)
            low_G = np.where(better_G, new_low_G, low_G)
    zero = _f32(0)
    return (
        np.where(flat_G, zero, best_nG),
        np.where(flat_G, zero, scale_G),
        -np.where(flat_G, lowest_G, low_G),
    )


def _q6_k_blocks(x_B256: np.ndarray) -> np.ndarray:
    """Sixteen groups of 16: x = d * scale * (level - 32); levels of 6 bits, scales of 8."""
    B = len(x_B256)
    x_nG = np.ascontiguousarray(x_B256.reshape(-1, 16).T)
    levels_nG, scale_G = _search(x_nG, half=32)
    scale_BN = scale_G.reshape(B, 16)
    widest_B = np.take_along_axis(scale_BN, np.abs(scale_BN).argmax(axis=1)[:, None], axis=1)[:, 0]
    empty_B = np.abs(widest_B) < _TINY
    inverse_B = _f32(-128) / np.where(empty_B, _f32(1), widest_B)
    d_B = np.where(empty_B, _f32(0), _f32(1) / inverse_B).astype(np.float16)
    bits_BN = np.minimum(np.rint(inverse_B[:, None] * scale_BN), 127).astype(np.int8)
    bits_BN[empty_B] = 0
    d_G = (d_B.astype(_f32)[:, None] * bits_BN.astype(_f32)).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        again_nG = np.clip(np.rint(x_nG / d_G), -32, 31) + 32
    levels_BN = np.where(d_G != 0, again_nG, levels_nG).T.reshape(B, 256).astype(np.uint8)
    levels_BN[empty_B] = 0
    # Of each half of a block, 32 levels of each of four quarters share a byte of high bits.
    quarter = levels_BN.reshape(B, 2, 4, 32).transpose(2, 0, 1, 3)
    low, high = quarter & 15, quarter >> 4
    packed = [
        np.stack([low[0] | low[2] << 4, low[1] | low[3] << 4], axis=2).reshape(B, 128),
        (high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6).reshape(B, 64),
        bits_BN.view(np.uint8),
        d_B.view(np.uint8).reshape(B, 2),
    ]
    return np.concatenate(packed, axis=1)


def _search(x_nG: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels from 0 to 2 * `half` - 1, and the scale of x = scale * (level - half), for each group.

    Errors are weighted by the square of a weight. 19 widths of a step are tried.
    """
    widest_G = np.take_along_axis(x_nG, np.abs(x_nG).argmax(axis=0)[None], axis=0)[0]
    empty_G = np.abs(widest_G) < _TINY
    weight_nG = x_nG * x_nG
    weighted_nG = weight_nG * x_nG

    def attempt(steps: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        level_nG = np.clip(np.rint(-steps / widest_G * x_nG), -half, half - 1).astype(_f32)
        sum_xl_G = (weighted_nG * level_nG).sum(axis=0)
        return level_nG, sum_xl_G, (weight_nG * level_nG * level_nG).sum(axis=0)

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        best_nG, sum_xl_G, sum_l2_G = attempt(_f32(half))
        scale_G = np.where(sum_l2_G > 0, sum_xl_G / sum_l2_G, _f32(0))
        gain_G = scale_G * sum_xl_G
        for step in (*range(-9, 0), *range(1, 10)):
            level_nG, sum_xl_G, sum_l2_G = attempt(_f32(half) + _f32(0.1) * _f32(step))
            better_G = (sum_l2_G > 0) & (sum_xl_G * sum_xl_G > gain_G * sum_l2_G)
            best_nG = np.where(better_G, level_nG, best_nG)
            scale_G = np.where(better_G, sum_xl_G / sum_l2_G, scale_G)
            gain_G = np.where(better_G, scale_G * sum_xl_G, gain_G)
    zero = _f32(0)
    return np.where(empty_G, zero, best_nG + half), np.where(empty_G, zero, scale_G)
