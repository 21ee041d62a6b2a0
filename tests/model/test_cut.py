"""Models cut to smaller ones: nothing cut is nothing changed, and what is chosen is what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stlm.model.config import ModelConfig
from stlm.model.cut import (
    choose_heads,
    cut_context,
    cut_ffn,
    cut_layers,
    cut_vocabulary,
    fewer_inputs,
    mask_heads,
)
from stlm.model.cutting import choose_layers, cut, measuring_flops, short, spread
from stlm.model.importance import first_order, influence, mean_loss, removals, second_moments, unit_scores
from stlm.model.inherit_config import InheritConfig
from stlm.model.transformer import Transformer
from stlm.model.width import channel_scores, channels, components, cut_width, stream_moments

SIZES = {
    "layers": 3,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 40,
    "context": 32,
    "vocab_size": 60,
}
KINDS = [
    {"tied": False},
    {"tied": True},
    {"qk_norm": True, "qkv_shift": True, "value_embeddings": 2, "logit_softcap": 15.0, "tied": False},
    {"ffn": "relu2", "positions": "learned", "tied": False},
]
ALL_HEADS, ALL_KV = [[0, 1, 2, 3]] * 3, [[0, 1]] * 3


def trained(**keys) -> Transformer:
    """A model whose weights are as large as trained ones, with gains that differ."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SIZES, **keys})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "gain" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return model


def text(rows: int = 24) -> Tensor:
    return torch.randint(60, (rows, 33), generator=torch.Generator().manual_seed(1))


def logits(model: Transformer, rows: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model((text() if rows is None else rows)[:, :-1])


def inputs_of(model: Transformer, name: str) -> Tensor:
    """What a module read [tokens, X], by a hook of the test's own."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(text()[:, :-1])
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("keys", KINDS)
def test_inheriting_everything_is_the_parent_to_the_bit(keys):
    model = trained(**keys)
    moments = [torch.eye(40, dtype=torch.float64)] * 3
    same = cut_vocabulary(model, torch.arange(60))
    same = cut_layers(same, [0, 1, 2])
    same = cut_ffn(same, [range(40)] * 3, moments)
    same = cut_context(mask_heads(same, ALL_HEADS, [torch.eye(32, dtype=torch.float64)] * 3), 32)
    assert same is not model and same.config == model.config
    assert torch.equal(logits(same), logits(model))
    assert mean_loss(same, text()) == mean_loss(model, text())
    assert cut(model, model.config, InheritConfig(), text()).model is model


@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("refit", [True, False])
def test_a_stream_of_which_nothing_is_cut_is_the_parents(keys, refit):
    """Rotated, a tied head is exact only where the last gain is the same for all channels."""
    model = trained(**keys)
    moments = stream_moments(model, text())
    every = channels(range(32), 32)
    assert torch.allclose(
        logits(cut_width(model, every, moments, ALL_HEADS, ALL_KV, refit)), logits(model), atol=1e-5
    )
    if model.config.tied:
        model.norm.weight.data.fill_(1.3)
    rotated = cut_width(model, components(moments), moments, ALL_HEADS, ALL_KV, refit)
    assert not torch.allclose(rotated.embedding.weight, model.embedding.weight, atol=1e-2)
    torch.testing.assert_close(logits(rotated), logits(model), atol=1e-5, rtol=0)


def test_a_tied_head_with_gains_is_exact_when_untied():
    model = trained(tied=True)
    moments = stream_moments(model, text())
    rotated = cut_width(model, components(moments), moments, ALL_HEADS, ALL_KV, tied=False)
    torch.testing.assert_close(logits(rotated), logits(model), atol=1e-5, rtol=0)
    tied = cut_width(model, components(moments), moments, ALL_HEADS, ALL_KV)
    assert tied.output.weight is tied.embedding.weight
    assert (logits(tied) - logits(model)).abs().max() > 1e-2  # the test above can fail


def test_the_gain_of_a_tied_head_has_the_least_squared_error():
    model = trained(tied=True)
    moments = stream_moments(model, text())
    basis = components(moments)[:, :24]
    smaller = cut_width(model, basis, moments, [[0, 1, 2]] * 3, [[0, 0, 1]] * 3)
    x_ND = inputs_of(model, "norm").double()
    x_ND = x_ND / x_ND.square().mean(dim=1, keepdim=True).sqrt()
    table, gain = model.embedding.weight.double(), model.norm.weight.double()
    wanted, z, left = (x_ND * gain) @ table.T, x_ND @ basis, table @ basis
    design = (z[:, None] * left[None]).reshape(-1, 24).detach().numpy()
    best = np.linalg.lstsq(design, wanted.detach().reshape(-1).numpy(), rcond=None)[0]
    scale = z.square().sum(dim=1).mean().div(24).sqrt().item()
    np.testing.assert_allclose(smaller.norm.weight.detach().numpy(), best * scale, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("keys", KINDS)
def test_hidden_units_that_are_zero_leave_the_logits(keys):
    model = trained(**keys)
    with torch.no_grad():
        for block in model.blocks:
            up = block.ffn.gate_up if model.config.ffn == "swiglu" else block.ffn.up
            up.weight[[3, 7, 30]] = 0  # the gate of these, or the unit
    modules = {str(n): block.ffn.down for n, block in enumerate(model.blocks)}
    for how in ("activation", "wanda", "taylor"):
        smaller = cut(
            model, model.config.model_copy(update={"ffn_width": 37}), InheritConfig(ffn=how), text()
        )
        assert smaller.model.config.ffn_width == 37
        torch.testing.assert_close(logits(smaller.model), logits(model), atol=1e-5, rtol=0)
        assert smaller.record["ffn"]["share_of_scores_by_layer"] == [1, 1, 1]
    moments = second_moments(model, text(), modules)
    assert all(moment[3].abs().max() == 0 for moment in moments.values())


def test_heads_whose_values_are_zero_leave_the_logits_of_a_mask():
    model = trained()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[32 + 16 + 8 :] = 0  # the second value head: query heads 2 and 3
    kept = [choose_heads(torch.tensor([1.0, 2.0, 0.0, 0.0]), 2, 2, 1)] * 3
    assert kept[0] == ([0, 1], [0])
    masked = mask_heads(model, [heads for heads, _ in kept])
    torch.testing.assert_close(logits(masked), logits(model), atol=1e-6, rtol=0)


def test_heads_are_chosen_by_groups_or_get_copies():
    scores = torch.tensor([5.0, 1.0, 1.0, 3.1, 3.1, 3.1, 0.0, 4.0, 4.2])
    assert choose_heads(scores, 3, 6, 3) == ([0, 1, 3, 4, 7, 8], [0, 1, 2])
    assert choose_heads(scores, 3, 6, 2) == ([3, 4, 5, 6, 7, 8], [1, 2])
    assert choose_heads(scores, 3, 7, 7) == ([0, 1, 3, 4, 5, 7, 8], [0, 0, 1, 1, 1, 2, 2])


def test_a_head_with_a_copy_of_its_keys_computes_what_it_did():
    """Each query head with a key/value head of its own: as all heads, on the whole width."""
    model = trained(tied=False)
    moments = stream_moments(model, text())
    copies = cut_width(model, channels(range(32), 32), moments, ALL_HEADS, [[0, 0, 1, 1]] * 3, refit=False)
    assert copies.config.kv_heads == 4
    torch.testing.assert_close(logits(copies), logits(model), atol=1e-5, rtol=0)


def test_wanda_is_magnitude_where_inputs_are_equal():
    weight_YX = torch.randn(10, 24)
    for unit in (1, 4):
        equal = unit_scores("wanda", weight_YX, 3.0 * torch.eye(24, dtype=torch.float64), unit, None)
        magnitude = unit_scores("magnitude", weight_YX, torch.eye(24, dtype=torch.float64), unit, None)
        torch.testing.assert_close(equal, magnitude * 3.0**0.5)
    moment = torch.diag(torch.rand(24, dtype=torch.float64) + 0.1)
    other = unit_scores("wanda", weight_YX, moment, 1, None)
    torch.testing.assert_close(other, weight_YX.double().norm(dim=0) * moment.diagonal().sqrt())
    assert other.argsort().tolist() != magnitude_order(weight_YX)


def magnitude_order(weight_YX: Tensor) -> list[int]:
    return weight_YX.norm(dim=0).argsort().tolist()


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("how", ["influence", "loss"])
def test_a_planted_layer_that_does_nothing_is_found(layer, how):
    model = trained(layers=4)
    with torch.no_grad():
        model.blocks[layer].attention.out.weight.zero_()
        model.blocks[layer].ffn.down.weight.zero_()
    if how == "loss":  # a text that the model knows, so that every other layer is needed
        model = fitted(model, layer)
    chosen = choose_layers(model, 3, InheritConfig(layers=how), text())
    assert chosen.layers == [number for number in range(4) if number != layer]
    smaller = cut_layers(model, chosen.layers)
    assert torch.equal(logits(smaller), logits(model))


def fitted(model: Transformer, fixed: int) -> Transformer:
    """Trained on the text for a while, without the planted layer's weights."""
    still = set(model.blocks[fixed].parameters())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p not in still], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(text()[:, :-1], text()[:, 1:]).backward()
        optimizer.step()
    return model.eval()


def test_influence_is_its_definition():
    model, rows = trained(value_embeddings=1), text()
    found = influence(model, rows)
    with torch.no_grad():
        stream = [model.embedding(rows[:, :-1]), *model.residuals(rows[:, :-1], after=range(3))]
    for number, score in enumerate(found):
        before, after = stream[number].double(), stream[number + 1].double()
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert score == pytest.approx(1 - cosine.mean().item(), abs=1e-6)


@pytest.mark.parametrize("keys", KINDS)
def test_layers_left_out_one_by_one_have_the_loss_of_the_model_without_them(keys):
    model, rows = trained(**{**keys, "layers": 4}), text(6)
    gone: list[int] = []
    for layer, loss in removals(model, rows, 2):
        left = [number for number in range(4) if number not in gone]
        losses = {
            number: mean_loss(cut_layers(model, [other for other in left if other != number]), rows)
            for number in left
        }
        assert layer == min(losses, key=losses.__getitem__)
        assert loss == pytest.approx(losses[layer], abs=1e-5)
        gone.append(layer)


def test_tables_of_values_follow_their_layers():
    model = trained(value_embeddings=2)
    smaller = cut_layers(model, [0, 2])
    assert smaller.config.value_embeddings == 1
    assert torch.equal(smaller.value_embeddings[0].weight, model.value_embeddings[1].weight)
    more = cut_layers(model, [0, 2], value_embeddings=2)
    assert more.value_embeddings[0].weight.abs().max() == 0
    assert torch.equal(logits(more), logits(smaller))
    assert not torch.equal(logits(cut_layers(model, [0, 2], value_embeddings=0)), logits(smaller))


def test_spread_keeps_the_first_and_the_last():
    assert spread(30, 6) == [0, 6, 12, 17, 23, 29]
    assert spread(5, 5) == [0, 1, 2, 3, 4] and spread(5, 1) == [0] and spread(5, 2) == [0, 4]


def test_a_part_of_the_text_is_spread_over_it():
    rows = torch.arange(100)[:, None].expand(-1, 513)
    assert short(rows).shape == (8, 129) and short(rows)[:, 0].tolist() == list(range(0, 96, 12))
    assert short(rows[:3]).shape == (3, 129) and short(rows[:, :17]).shape == (64, 17)


def test_second_moments_are_those_of_the_inputs():
    model = trained()
    modules = {"down": model.blocks[1].ffn.down, "out": model.blocks[2].attention.out}
    found = second_moments(model, text(), modules)
    for name, module in (("down", "blocks.1.ffn.down"), ("out", "blocks.2.attention.out")):
        x = inputs_of(model, module).double()
        torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    stream = stream_moments(model, text())
    assert list(stream)[:2] == ["blocks.0.attention_norm", "blocks.0.ffn_norm"] and len(stream) == 7
    for moment in stream.values():
        assert moment.trace().item() == pytest.approx(32, rel=1e-5)


def test_first_order_is_the_gradient_times_the_value():
    """Checked by a difference: a unit's values scaled by 1 - e change the loss by e sum(x g)."""
    model, rows = trained(), text(1)
    module = model.blocks[1].ffn.down
    found = first_order(model, rows, {"x": module}, {"x": 1})["x"]
    kept = {}

    def keep(_, args):
        args[0].retain_grad()
        kept["x"] = args[0]

    hook = module.register_forward_pre_hook(keep)
    loss = model.loss(rows[:, :-1], rows[:, 1:]) * 32
    loss.backward()
    hook.remove()
    by_hand = (kept["x"] * kept["x"].grad).detach().flatten(0, -2)
    torch.testing.assert_close(found, by_hand.abs().mean(dim=0).double(), rtol=1e-4, atol=1e-7)

    e = 1e-2
    hook = module.register_forward_pre_hook(lambda _, args: args[0] * (1 - e * (torch.arange(40) == 5)))
    with torch.no_grad():
        changed = model.loss(rows[:, :-1], rows[:, 1:]) * 32
    hook.remove()
    assert (changed - loss).item() / -e == pytest.approx(by_hand[:, 5].sum().item(), rel=0.05, abs=2e-3)
    heads = first_order(model, rows, {"x": model.blocks[1].attention.out}, {"x": 8})["x"]
    assert heads.shape == (4,) and (heads > 0).all()


def test_measuring_leaves_the_model_as_it_was():
    model = trained()
    model.train()
    model.blocks[0].attention.out.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first_order(model, text(2), {"x": model.blocks[0].ffn.down}, {"x": 1})
    stream_moments(model, text(2))
    assert model.training and not model.blocks[0].attention.out.weight.requires_grad
    assert model.norm.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_fewer_inputs_are_refitted_by_least_squares():
    torch.manual_seed(0)
    x_NX = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 12, dtype=torch.float64)
    x_NX += torch.randn(500, 12, dtype=torch.float64)
    weight_YX = torch.randn(5, 12)
    kept = torch.tensor([0, 2, 3, 5, 8, 11])
    fitted_Yx = fewer_inputs(weight_YX, kept, x_NX.T @ x_NX / 500, ridge=1e-6)
    y_NY = x_NX @ weight_YX.double().T
    best = np.linalg.lstsq(x_NX[:, kept].numpy(), y_NY.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(fitted_Yx.numpy(), best, rtol=1e-3, atol=1e-4)
    error = (x_NX[:, kept] @ fitted_Yx.double().T - y_NY).norm()
    assert error < 0.7 * (x_NX[:, kept] @ weight_YX[:, kept].double().T - y_NY).norm()
    independent = fewer_inputs(weight_YX, kept, torch.diag(torch.rand(12, dtype=torch.float64)), 1e-6)
    assert torch.equal(independent, weight_YX[:, kept])
    shrunk = fewer_inputs(weight_YX, kept, x_NX.T @ x_NX / 500, ridge=1e9)
    torch.testing.assert_close(shrunk, weight_YX[:, kept])


def test_components_hold_a_stream_of_few_directions():
    """A stream that lives in 16 of 32 directions is cut to them without a loss."""
    # The norm's epsilon is added to a mean over 16 channels in place of 32.
    model = trained(tied=False, norm_eps=1e-12)
    directions = torch.linalg.qr(torch.randn(32, 32))[0][:, :16]
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight @ directions @ directions.T)
        for block in model.blocks:
            for matrix in (block.attention.out, block.ffn.down):
                matrix.weight.copy_(directions @ directions.T @ matrix.weight)
            block.attention.out.weight[:, 16:] = 0  # heads that write nothing
    config = ModelConfig(
        **{**SIZES, "width": 16, "heads": 2, "kv_heads": 1, "tied": False, "norm_eps": 1e-12}
    )
    smaller = cut(model, config, InheritConfig(width="components"), text())
    assert smaller.record["width"]["heads"] == [[0, 1]] * 3
    assert smaller.record["width"]["share_of_squares"] == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(logits(smaller.model), logits(model), atol=2e-4, rtol=0)
    channel = cut(model, config, InheritConfig(width="importance"), text())
    assert (logits(channel.model) - logits(model)).abs().max() > 1e-2


def test_channels_that_nothing_reads_are_the_least_important():
    model = trained(tied=False)
    with torch.no_grad():
        for block in model.blocks:
            block.attention_norm.weight[[4, 9]] = 0
            block.ffn_norm.weight[[4, 9]] = 0
        model.norm.weight[[4, 9]] = 0
    scores = channel_scores(model, stream_moments(model, text()))
    assert sorted(scores.argsort()[:2].tolist()) == [4, 9]
    assert scores.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("how", ["magnitude", "activation", "wanda", "taylor"])
@pytest.mark.parametrize("width", ["components", "importance"])
def test_all_at_once(keys, how, width):
    """Every part cut, by every measure: a model of the sizes asked for, refitted better than not."""
    model = trained(**keys)
    config = ModelConfig(
        **{**SIZES, **keys, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 20}
    )
    losses = []
    for refit in (True, False):
        asked = InheritConfig(heads=how, ffn=how, width=width, refit=refit)
        smaller = cut(model, config, asked, text())
        assert smaller.model.config == config
        assert smaller.record.keys() == {"layers", "ffn", "width"}
        wanted = logits(model)
        losses.append((logits(smaller.model) - wanted).square().mean().item())
    assert losses[0] < losses[1] * 1.05


def test_tokens_are_rows_of_the_tables():
    model = trained(value_embeddings=1)
    ids = torch.tensor([7, 3, 59])
    smaller = cut_vocabulary(model, ids)
    rows = torch.randint(3, (2, 12))
    wanted = logits(model, torch.cat([ids[rows], ids[rows][:, :1]], dim=1))[..., ids]
    found = logits(smaller, torch.cat([rows, rows[:, :1]], dim=1))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["influence", "loss"])
@pytest.mark.usefixtures("torch_operations")
def test_flops_of_choosing_layers_are_those_that_torch_counts(how):
    model, rows = trained(layers=5, ffn_width=800), text(48)
    config = model.config.model_copy(update={"layers": 2})
    with FlopCounterMode(display=False) as counted:
        choose_layers(model, 2, InheritConfig(layers=how), rows)
    found = measuring_flops(model, config, InheritConfig(layers=how), rows)
    # torch does not count attention on a CPU, which is little beside so wide a network.
    assert found == pytest.approx(counted.get_total_flops(), rel=0.03)
    assert measuring_flops(model, config, InheritConfig(layers="first"), rows) == 0
