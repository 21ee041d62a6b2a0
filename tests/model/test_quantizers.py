"""Grids, GPTQ and packed codes: error bounds, GGUF's bits, what is restored."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from stlm.model.quantizers import TERNARY, Grid, Kind, gptq, pack, round_tokens, unpack

KINDS = [
    Kind(bits, group, zero_points)
    for bits in (8, 4, 3, 2)
    for group in (None, 32, 64)
    for zero_points in (False, True)
]
each_kind = pytest.mark.parametrize("kind", [*KINDS, Kind(TERNARY)], ids=str)


def some_weights(rows: int = 24, inputs: int = 192, scale: float = 0.05) -> Tensor:
    weight_YX = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)) * scale
    weight_YX[0] = 0  # a row, and a group, that has no scale
    weight_YX[1, :64] = 0
    weight_YX[2] = weight_YX[2].abs()  # no negative one
    return weight_YX


def moments(inputs: int = 192, tokens: int = 2000) -> Tensor:
    """Second moments of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(2)
    mix_XX = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x_NX = torch.randn(tokens, inputs, generator=generator) @ (mix_XX + torch.eye(inputs) / 3)
    return (x_NX.T @ x_NX).double() / tokens


def error(weight_YX: Tensor, rounded_YX: Tensor, moment_XX: Tensor) -> float:
    """The mean squared error of the outputs."""
    difference_YX = (rounded_YX - weight_YX).double()
    return ((difference_YX @ moment_XX) * difference_YX).sum().item()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_error_is_at_most_half_a_step(kind):
    weight_YX = some_weights()
    grid = Grid.of(weight_YX, kind)
    step_YGS = grid.scale_YG1.abs().double().expand(-1, -1, 192 // kind.groups(192))
    error_YGS = (grid.rounded(weight_YX) - weight_YX).double().abs().unflatten(1, (kind.groups(192), -1))
    # The scale is rounded to float16, by a part in 2^11 of it (or by 2^-25, where it is subnormal).
    slack_YGS = kind.top * torch.maximum(step_YGS * 2**-11, torch.tensor(2.0**-25))
    bound_YGS = step_YGS / 2 + slack_YGS
    if not kind.zero_points and kind.bits < 8:
        # As in GGUF, weights opposite to the one farthest from 0 have one code less.
        last_YGS = grid.codes(weight_YX).view_as(error_YGS) == kind.top
        bound_YGS = torch.where(last_YGS, step_YGS + slack_YGS, bound_YGS)
    assert (error_YGS <= bound_YGS * (1 + 1e-5) + 1e-12).all()
    assert (error_YGS > 0.4 * step_YGS)[2:].any()  # the bound is no wide one


@each_kind
def test_zero_stays_zero_and_all_codes_are_in_range(kind):
    weight_YX = some_weights()
    grid = Grid.of(weight_YX, kind)
    codes_YX, rounded_YX = grid.codes(weight_YX), grid.rounded(weight_YX)
    assert (rounded_YX[weight_YX == 0] == 0).all()
    assert codes_YX.min() >= 0 and codes_YX.max() == kind.top
    if kind.bits == 8 and not kind.zero_points:
        assert codes_YX.min() == 1  # -127 to 127


@each_kind
def test_codes_are_read_off_the_weights_and_packed_and_unpacked(kind):
    grid = Grid.of(some_weights(), kind)
    codes_YX = grid.codes(some_weights())
    assert torch.equal(grid.read(grid.values(codes_YX)), codes_YX)
    packed_YP = pack(codes_YX, kind)
    assert packed_YP.shape == (24, kind.packed_bytes(192)) and packed_YP.dtype == torch.uint8
    assert torch.equal(unpack(packed_YP, kind, 192).float(), codes_YX)
    with pytest.raises(ValueError, match=f"expected uint8 in rows of {kind.packed_bytes(192)}"):
        unpack(packed_YP[:, :-1], kind, 192)


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-7])
@each_kind
def test_weights_that_are_too_small_for_a_scale_become_zero(kind, size):
    weight_YX = some_weights() * size
    grid = Grid.of(weight_YX, kind)
    rounded_YX = grid.rounded(weight_YX)
    assert torch.equal(grid.values(grid.read(rounded_YX)), rounded_YX)
    # Half a step of the least scale in float16, which 127 of them may lie away.
    assert (rounded_YX - weight_YX).abs().max() <= 128 * 2.0**-25 if size == 1e-7 else not rounded_YX.any()


@pytest.mark.parametrize("inputs", [1, 5, 7, 48, 50])
@pytest.mark.parametrize("kind", [Kind(8), Kind(4), Kind(3), Kind(2), Kind(TERNARY)], ids=str)
def test_rows_of_any_length_are_packed(kind, inputs):
    generator = torch.Generator().manual_seed(inputs)
    codes_YX = torch.randint(kind.top + 1, (9, inputs), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes_YX, kind), kind, inputs), codes_YX)


@pytest.mark.parametrize(("bits", "name"), [(8, "Q8_0"), (4, "Q4_0")])
def test_symmetric_groups_of_32_are_ggufs_to_the_bit(bits, name):
    kind = gguf.GGMLQuantizationType[name]
    weight_YX = some_weights(64, 256)
    # Ties, at which roundings differ, and weights equally far from 0.
    weight_YX[3] = (torch.arange(256) % 32 - 16).float() * 0.5
    weight_YX[4, ::2] = weight_YX[4, 1::2].abs().amax() * 2
    weight_YX[4, 1::2] = -weight_YX[4, ::2]
    blocks = gguf.quants.quantize(weight_YX.numpy(), kind)
    grid = Grid.of(weight_YX, Kind(bits, 32))
    expected_YX = gguf.quants.dequantize(blocks, kind)
    assert np.array_equal(grid.rounded(weight_YX).numpy(), expected_YX)
    stored = blocks.reshape(64, 8, -1)[..., :2].copy().view(np.float16)
    assert np.array_equal(grid.scale_YG1.half().numpy(), stored)
    if bits == 8:
        codes = blocks.reshape(64, 8, -1)[..., 2:].view(np.int8).reshape(64, 256)
        assert np.array_equal(grid.codes(weight_YX).numpy() - 128, codes)


@pytest.mark.parametrize("inputs", [33, 48, 95])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.group == 32], ids=str)
def test_the_last_group_of_a_row_may_be_smaller(kind, inputs):
    """It is rounded as a matrix of its own is."""
    weight_YX = some_weights()[2:, :inputs]
    grid, last = Grid.of(weight_YX, kind), inputs // 32 * 32
    parts = [weight_YX[:, :last], weight_YX[:, last:]]
    expected_YX = torch.cat([Grid.of(part, kind).rounded(part) for part in parts], dim=1)
    assert torch.equal(grid.rounded(weight_YX), expected_YX)
    assert torch.equal(grid.values(grid.read(expected_YX)), expected_YX)
    independent = torch.eye(inputs).double()
    assert torch.equal(gptq(weight_YX, independent, kind)[1], expected_YX)


def test_rounded_once_more_nothing_changes():
    for kind in KINDS:
        if not kind.zero_points:
            rounded_YX = Grid.of(some_weights(), kind).rounded(some_weights())
            assert torch.equal(Grid.of(rounded_YX, kind).rounded(rounded_YX), rounded_YX), kind


def test_ternary_weights_are_bitnets():
    weight_YX = some_weights()
    scale = weight_YX.abs().mean()
    expected_YX = (weight_YX / scale).round().clamp(-1, 1)
    grid = Grid.of(weight_YX, Kind(TERNARY))
    assert torch.equal(grid.codes(weight_YX) - 1, expected_YX)
    assert torch.equal(grid.rounded(weight_YX), expected_YX * scale.half().float())
    assert len(grid.rounded(weight_YX).unique()) == 3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gptq_makes_less_error_on_the_text_than_rounding(kind):
    weight_YX, moment_XX = some_weights(), moments()
    grid, found_YX = gptq(weight_YX, moment_XX, kind)
    rounded_YX = Grid.of(weight_YX, kind).rounded(weight_YX)
    assert error(weight_YX, found_YX, moment_XX) < 0.8 * error(weight_YX, rounded_YX, moment_XX)
    assert torch.equal(grid.values(grid.read(found_YX)), found_YX)
    assert torch.equal(grid.rounded(found_YX), found_YX)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gptq_is_rounding_where_inputs_are_independent(kind):
    weight_YX, diagonal_X = some_weights(), moments().diagonal().clone()
    diagonal_X[5] = 0  # an input that is always 0
    _, found_YX = gptq(weight_YX, torch.diag(diagonal_X), kind)
    assert torch.equal(found_YX, Grid.of(weight_YX, kind).rounded(weight_YX))


def test_gptq_is_the_papers_one_column_after_another():
    """Without lazy updates, by the inverse Hessian itself, from which each done column is eliminated."""
    weight_YX, moment_XX, kind = some_weights(6, 64), moments(64), Kind(3, 32)
    damped_XX = moment_XX + 0.01 * moment_XX.diagonal().mean() * torch.eye(64)
    inverse_XX, left_YX = damped_XX.inverse(), weight_YX.double()
    expected_YX = torch.empty_like(weight_YX)
    for column in range(64):
        if column % 32 == 0:
            grid = Grid.of(left_YX[:, column : column + 32], kind)
        expected_YX[:, column] = grid.rounded(left_YX[:, column : column + 1])[:, 0]
        error_Y = (left_YX[:, column] - expected_YX[:, column]) / inverse_XX[column, column]
        left_YX = left_YX - error_Y[:, None] * inverse_XX[column]
        outer_XX = inverse_XX[:, column : column + 1] * inverse_XX[column] / inverse_XX[column, column]
        inverse_XX = inverse_XX - outer_XX
    torch.testing.assert_close(gptq(weight_YX, moment_XX, kind)[1], expected_YX)


def test_activations_are_rounded_by_token_and_pass_gradients():
    x_ND = (
        torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
        * torch.tensor([[1e-3, 1, 9, 100, 0]]).T
    )
    x_ND.requires_grad_()
    y_ND = round_tokens(x_ND)
    step_N1 = x_ND.abs().amax(dim=1, keepdim=True) / 127
    assert ((y_ND - x_ND).abs() <= step_N1 / 2 * (1 + 1e-4)).all() and (y_ND != x_ND)[:4].any(dim=1).all()
    assert all(len(row.unique()) <= 255 for row in y_ND)
    weights_ND = torch.randn(5, 48)
    (y_ND * weights_ND).sum().backward()
    assert torch.equal(x_ND.grad, weights_ND)
    half_ND = round_tokens(x_ND.detach().bfloat16())
    assert half_ND.dtype == torch.bfloat16


def test_weights_too_large_for_a_scale_are_refused():
    with pytest.raises(ValueError, match="too large for a scale in float16"):
        Grid.of(torch.full((2, 32), 1e8), Kind(4, 32)).checked()
    with pytest.raises(ValueError, match="too large for a scale in float16"):
        gptq(torch.full((2, 32), 1e8), torch.eye(32), Kind(4, 32))
