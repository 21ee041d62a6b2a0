"""Which weights go, and what SparseGPT makes of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.flops import forward_flops
from stlm.model.importance import moments_by_block, second_moments
from stlm.model.pruning import (
    Choice,
    Matrix,
    cubic,
    keep_lists,
    matrices,
    measuring_flops,
    prune_measured,
    prune_smallest,
    read_pattern,
    sparsegpt,
    sparsity_record,
    wanda_scores,
)

CONFIG = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 32}
BLOCKS = ("attention", "ffn")


def random_weight(outputs: int = 24, inputs: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def correlated_moment(inputs: int = 64, seed: int = 1) -> Tensor:
    """Of inputs that are mixtures of fewer sources, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x_NX = torch.randn(500, inputs // 4, generator=generator, dtype=torch.float64)
    x_NX = x_NX @ torch.randn(inputs // 4, inputs, generator=generator, dtype=torch.float64)
    x_NX = x_NX + 0.3 * torch.randn(500, inputs, generator=generator, dtype=torch.float64)
    x_NX = x_NX * torch.linspace(0.2, 3, inputs, dtype=torch.float64)
    return x_NX.T @ x_NX / 500


def random_model(**keys) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(**(CONFIG | {"vocab_size": 61, "dropout": 0.0} | keys)))


def rows(count: int = 12) -> Tensor:
    return torch.randint(61, (count, 33), generator=torch.Generator().manual_seed(3))


def error(weight_YX: Tensor, pruned_YX: Tensor, moment_XX: Tensor) -> float:
    """The mean square of what the outputs change by, on the text of the moments."""
    lost_YX = weight_YX.double() - pruned_YX.double()
    return (lost_YX @ moment_XX * lost_YX).sum().item()


def pruned_by(method: str, weight_YX: Tensor, moment_XX: Tensor, choice: Choice) -> Tensor:
    if method == "sparsegpt":
        return sparsegpt(weight_YX, moment_XX, choice)
    scores = weight_YX.abs() if method == "magnitude" else wanda_scores(weight_YX, moment_XX)
    return weight_YX * choice.keep(scores)


METHODS = ("magnitude", "wanda", "sparsegpt")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inputs", [50, 300])  # of one and of three groups of columns
def test_each_row_has_exactly_its_share_of_zeros(method, inputs):
    weight_YX = random_weight(inputs=inputs)
    for sparsity in (0.0, 0.3, 0.5, 0.77):
        found_YX = pruned_by(method, weight_YX, correlated_moment(inputs), Choice(sparsity))
        assert (found_YX == 0).sum(dim=1).tolist() == [round(sparsity * inputs)] * 24


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_has_exactly_its_share_wherever_it_is(method):
    weight_YX, moment_XX = random_weight(inputs=300), correlated_moment(300)
    zeros_Y = (pruned_by(method, weight_YX, moment_XX, Choice(0.41, "matrix")) == 0).sum(dim=1)
    assert zeros_Y.sum() == round(0.41 * 24 * 300) and len(set(zeros_Y.tolist())) > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8), (1, 3)])
def test_a_pattern_is_exact_in_every_group(method, kept, group):
    weight_YX, moment_XX = random_weight(inputs=96), correlated_moment(96)
    found_YX = pruned_by(method, weight_YX, moment_XX, Choice(1 - kept / group, "row", (kept, group)))
    assert ((found_YX != 0).view(24, -1, group).sum(dim=2) == kept).all()


def test_the_smallest_go_and_of_equal_ones_the_first():
    scores_YX = torch.tensor([[3.0, 1.0, 2.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    assert Choice(0.5).keep(scores_YX).tolist() == [[True, False, False, True], [False, False, True, True]]
    assert Choice(0.5, "matrix").keep(scores_YX).tolist() == [[False] * 4, [True] * 4]
    kept = Choice(0.5, "row", (1, 2)).keep(scores_YX).tolist()
    assert kept == [[True, False, False, True], [False, True, False, True]]


def test_inputs_of_one_size_make_wandas_choice_magnitudes():
    weight_YX, equal_XX = random_weight(), correlated_moment()
    equal_XX.diagonal().fill_(2.5)  # whatever their correlations
    for choice in (Choice(0.5), Choice(0.3, "matrix"), Choice(0.5, "row", (2, 4))):
        by_magnitude = pruned_by("magnitude", weight_YX, equal_XX, choice)
        assert torch.equal(pruned_by("wanda", weight_YX, equal_XX, choice), by_magnitude)
        unequal = pruned_by("wanda", weight_YX, correlated_moment(), choice)
        assert not torch.equal(unequal, by_magnitude)


def test_independent_inputs_of_one_size_make_sparsegpts_result_magnitudes():
    weight_YX, one_XX = random_weight(), 1.7 * torch.eye(64, dtype=torch.float64)
    for choice in (Choice(0.5), Choice(0.3, "matrix"), Choice(0.5, "row", (2, 4))):
        by_magnitude = pruned_by("magnitude", weight_YX, one_XX, choice)
        assert torch.equal(sparsegpt(weight_YX, one_XX, choice), by_magnitude)
        assert not torch.equal(sparsegpt(weight_YX, correlated_moment(), choice), by_magnitude)


@pytest.mark.parametrize("inputs", [64, 300])
def test_sparsegpt_loses_less_than_wanda_and_that_less_than_magnitude(inputs):
    weight_YX, moment_XX = random_weight(inputs=inputs), correlated_moment(inputs)
    for choice in (Choice(0.5), Choice(0.5, "matrix"), Choice(0.5, "row", (2, 4))):
        magnitude, wanda, sparse = (
            error(weight_YX, pruned_by(method, weight_YX, moment_XX, choice), moment_XX) for method in METHODS
        )
        assert sparse < 0.5 * wanda < wanda < magnitude


def test_sparsegpts_last_weights_make_up_for_the_first_as_least_squares_do():
    # One weight of the first column is cut: the best of what is left is a regression on the other inputs.
    weight_YX, moment_XX = random_weight(1, 8), correlated_moment(8)
    weight_YX[0, 0] = 1e-3
    found_YX = sparsegpt(weight_YX, moment_XX, Choice(1 / 8)).double()
    assert found_YX[0, 0] == 0 and (found_YX[0, 1:] != 0).all()
    damped_XX = moment_XX + 0.01 * moment_XX.diagonal().mean() * torch.eye(8)
    best = torch.linalg.solve(damped_XX[1:, 1:], damped_XX[1:] @ weight_YX[0].double())
    torch.testing.assert_close(found_YX[0, 1:], best, atol=1e-6, rtol=1e-6)


def test_sparsegpt_of_inputs_that_never_come_is_finite():
    weight_YX, moment_XX = random_weight(), correlated_moment()
    moment_XX[:9], moment_XX[:, :9] = 0, 0
    found_YX = sparsegpt(weight_YX, moment_XX, Choice(0.5))
    assert found_YX.isfinite().all() and (found_YX[:, :9] == 0).double().mean() > 0.7
    nothing = sparsegpt(weight_YX, torch.zeros(64, 64), Choice(0.5))
    assert torch.equal(nothing, pruned_by("magnitude", weight_YX, moment_XX, Choice(0.5)))
    assert weight_YX.ne(0).all()  # it is left as it was


def test_the_cubic_schedules_values():
    # Zhu and Gupta's equation 1, with s_i = 0, s_f = 0.8, from step 100 to 500.
    values = [cubic(step, 100, 500, 0.8) for step in (0, 100, 200, 300, 400, 500, 900)]
    assert values == pytest.approx([0, 0, 0.8 * (1 - 0.75**3), 0.7, 0.8 * (1 - 0.25**3), 0.8, 0.8])


@pytest.mark.parametrize("text", ["2-4", "4:2", "2:2", "0:4", "2:4:8", "a:b", ""])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match=r"pattern: .*expected N:M with 1 <= N < M"):
        read_pattern(text)
    assert read_pattern("2:4") == (2, 4)


def test_matrices_are_found_by_part_and_by_name():
    model = random_model()
    names = [(matrix.layer, matrix.name) for matrix in matrices(model, BLOCKS)]
    each = ["attention.qkv", "attention.out", "ffn.gate_up", "ffn.down"]
    assert names == [(layer, name) for layer in range(3) for name in each]
    found = matrices(model, ("ffn.down", "embedding"))
    assert [matrix.name for matrix in found] == ["ffn.down"] * 3 + ["embedding"]
    assert matrices(model, ("attention.qkv",))[0].rows == (32, 16, 16)
    with pytest.raises(ValueError, match=r"matrices: 'ffn.up': expected some of .*ffn.gate_up"):
        matrices(model, ("ffn.up",))
    assert [one.name for one in matrices(random_model(ffn="gelu"), ("ffn",))][:2] == ["ffn.up", "ffn.down"]


def test_queries_keys_and_values_are_matrices_of_their_own():
    model = random_model()
    chosen = matrices(model, ("attention.qkv",))
    with torch.no_grad():
        chosen[0].weight[:32] *= 100
    prune_smallest(chosen, Choice(0.5, "matrix"))
    for part, size in zip(chosen[0].weight.split((32, 16, 16)), (32, 16, 16), strict=True):
        assert (part == 0).sum() == size * 32 // 2


def test_a_global_choice_is_exact_over_all_and_uneven():
    model = random_model()
    chosen = matrices(model, BLOCKS)
    with torch.no_grad():
        chosen[0].weight.mul_(3)
    prune_smallest(chosen, Choice(0.6, "global"))
    zeros = [int((matrix.weight == 0).sum()) for matrix in chosen]
    assert sum(zeros) == round(0.6 * sum(matrix.weight.numel() for matrix in chosen))
    shares = [count / matrix.weight.numel() for count, matrix in zip(zeros, chosen, strict=True)]
    assert shares[0] < 0.4 < max(shares)
    record = sparsity_record(model, chosen, lambda number: f"block {number + 1}")
    assert record["matrices"] == pytest.approx(0.6, abs=1e-4) and record["model"] < 0.6
    assert record["by_layer"]["block 1"]["attention.qkv"] == pytest.approx(shares[0], abs=1e-5)
    assert list(record["by_layer"]) == ["block 1", "block 2", "block 3"]


@pytest.mark.parametrize("value_embeddings", [0, 2, 3])
def test_moments_block_by_block_are_those_of_the_whole_pass(value_embeddings):
    model, read = random_model(value_embeddings=value_embeddings), rows(200)  # in two batches
    for table in model.value_embeddings:
        nn.init.normal_(table.weight)
    modules = [{"down": block.ffn.down, "out": block.attention.out} for block in model.blocks]
    found: dict[str, Tensor] = {}
    moments_by_block(
        model, read, modules, lambda n, own: found.update({f"{n}.{k}": v for k, v in own.items()})
    )
    every = {f"{n}.{key}": module for n, own in enumerate(modules) for key, module in own.items()}
    expected = second_moments(model, read, every)
    assert found.keys() == expected.keys()
    for name, moment_XX in expected.items():
        torch.testing.assert_close(found[name], moment_XX, rtol=1e-4, atol=1e-6)


def test_later_blocks_are_measured_on_what_the_pruned_ones_give():
    model, read = random_model(), rows()
    modules = [{"down": block.ffn.down} for block in model.blocks]
    found: list[Tensor] = []

    def change(number: int, moments: dict[str, Tensor]) -> None:
        found.append(moments["down"])
        model.blocks[number].ffn.down.weight.zero_()

    moments_by_block(model, read, modules, change)
    # With all of them at zero, the inputs are what they were when each was measured.
    again = second_moments(model, read, {str(n): block.ffn.down for n, block in enumerate(model.blocks)})
    for one, other in zip(found, again.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_whole_model_loses_least_by_sparsegpt():
    read = rows(60)
    whole = random_model()
    with torch.no_grad():
        for matrix in matrices(whole, BLOCKS):
            matrix.weight.mul_(8)  # so that blocks matter
    names = {f"{m.layer}.{m.name}": m for m in matrices(whole, BLOCKS)}
    moments = second_moments(whole, read, {name: matrix.module for name, matrix in names.items()})
    errors = {}
    for method in METHODS:
        model = random_model()
        model.load_state_dict(whole.state_dict())
        chosen = matrices(model, BLOCKS)
        if method == "magnitude":
            prune_smallest(chosen, Choice(0.5))
        else:
            prune_measured(model, method, chosen, Choice(0.5), read)
        assert all(((one.weight == 0).sum(dim=1) == one.weight.shape[1] // 2).all() for one in chosen)
        errors[method] = {
            f"{m.layer}.{m.name}": error(
                names[f"{m.layer}.{m.name}"].weight, m.weight, moments[f"{m.layer}.{m.name}"]
            )
            for m in chosen
            if m.layer == 0  # whose inputs no pruning changes
        }
    for name, own in errors["sparsegpt"].items():
        if name != "0.attention.out":  # its inputs change with the pruned queries, keys and values
            assert own <= errors["wanda"][name] * 1.001 and own <= errors["magnitude"][name] * 1.001, name
    assert sum(errors["sparsegpt"].values()) < sum(errors["wanda"].values())
    block = forward_flops(whole.blocks[0], 32)
    assert measuring_flops(whole, Choice(0.5), read) == 60 * 7 * block
    assert measuring_flops(whole, Choice(0.5, "global"), read) == 60 * 3 * block


def test_wandas_global_choice_measures_all_matrices_first():
    model, read = random_model(), rows()
    chosen = matrices(model, BLOCKS)
    moments = second_moments(model, read, {str(n): matrix.module for n, matrix in enumerate(chosen)})
    scores = [
        wanda_scores(matrix.weight.detach(), moment)
        for matrix, moment in zip(chosen, moments.values(), strict=True)
    ]
    expected = keep_lists(chosen, Choice(0.5, "global"), scores)
    prune_measured(model, "wanda", chosen, Choice(0.5, "global"), read)
    for matrix, keep_YX in zip(chosen, expected, strict=True):
        assert torch.equal(matrix.weight != 0, keep_YX)


def test_a_matrix_outside_of_the_blocks_has_no_layer():
    model = random_model(tied=False)
    chosen: list[Matrix] = matrices(model, ("embedding", "head"))
    prune_smallest(chosen, Choice(0.25))
    assert [matrix.layer for matrix in chosen] == [None, None]
    assert (model.output.weight == 0).sum() == (model.embedding.weight == 0).sum() == 61 * 8
    record = sparsity_record(model, chosen, str)
    assert record["by_layer"] == {"embedding": {"embedding": 0.25}, "head": {"head": 0.25}}
