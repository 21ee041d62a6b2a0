"""Mixture of experts: that it computes what it says, balances, and changes nothing else of a model."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import last_checkpoint, rows_of, same_weights, train_in_parts, train_in_two_processes

from stlm.errors import UserError
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import active_parameters, build_on_meta, parameter_counts, parameter_groups
from stlm.model.documents import Documents
from stlm.model.feed_forward import FFNS
from stlm.model.flops import forward_flops
from stlm.model.inherit import inherit
from stlm.model.transformer import Transformer
from stlm.study.listing import runs_table
from stlm.study.load import load_study
from stlm.techniques.base import CAPABILITIES, refuse
from stlm.techniques.experts import Experts, Mixture, mixtures, switch_loss
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import checkpoint_name, load_checkpoint, save_checkpoint
from stlm.training.curve import validate
from stlm.training.distributed import Group
from stlm.training.loop import Trainer, train
from stlm.training.objective import Objective, total
from stlm.training.optimizers import build_optimizer, orthogonalize

L, EOT = 16, 0
TINY = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": L, "dropout": 0.0}
TOKENIZER = ByteTokenizer()
KEYS = {
    "top 1": {},
    "top 2": {"top": 2},
    "top 1, weight 1": {"normalize": True},
    "shared, sigmoid, bias": {"top": 2, "shared": 1, "router": "sigmoid", "balance": "bias"},
    "all experts": {"experts": 3, "top": 3, "normalize": False, "width": 20},
}
OPTIONS = {
    **{ffn: {"ffn": ffn} for ffn in FFNS},
    "learned, shift, value embeddings": {"positions": "learned", "qkv_shift": True, "value_embeddings": 1},
    "shared layers": {
        "layers": 4,
        "sharing": {"what": "all", "order": "groups", "group": 2},
        "lora": {"rank": 3},
    },
    "low rank": {"low_rank": {"ffn": 8}},
}
each_keys = pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def new_model(*techniques: Experts, **options: object) -> Transformer:
    torch.manual_seed(1)
    return build_model(ModelConfig(**({"vocab_size": 257} | TINY | options)), techniques)


def random_model(*techniques: Experts, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts, and whose experts differ."""
    model = new_model(*techniques, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


def some_tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 257, (rows, L), generator=torch.Generator().manual_seed(2))


def loss_of(model: Transformer) -> torch.Tensor:
    tokens_BL = some_tokens()
    return model.train().loss(tokens_BL[:, :-1], tokens_BL[:, 1:])


def with_experts(run, *, data=None, **keys):
    return run.model_copy(
        update={"techniques": {"experts": Experts(**keys)}, **({"data": data} if data else {})}
    )


def parts_of(run, model: Transformer, tokens_BM: torch.Tensor) -> dict[str, torch.Tensor]:
    objective = Objective(run)
    return objective(objective.forward(model.train(), tokens_BM, None, 1))


# What it computes


def naive(mixture: Mixture, x_ND: torch.Tensor) -> torch.Tensor:
    """Token by token, choice by choice, from the definition."""
    outputs = []
    for x_D in x_ND:
        logits_E = mixture.router.float() @ x_D.float()
        scores_E = logits_E.sigmoid() if mixture.sigmoid else logits_E.softmax(dim=0)
        ranked_E = scores_E if mixture.bias is None else scores_E + mixture.bias
        chosen = ranked_E.argsort(descending=True)[: mixture.top].tolist()
        whole = sum(scores_E[e] for e in chosen) if mixture.normalized else 1.0
        if mixture.top == 1 and mixture.normalized:
            whole = whole.detach()
        y_D = sum(scores_E[e] / whole * mixture.experts[e](x_D[None])[0].float() for e in chosen)
        outputs.append(y_D if mixture.shared is None else y_D + mixture.shared(x_D[None])[0].float())
    return torch.stack(outputs)


@each_keys
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_grouped_products_are_those_of_each_token_alone(keys, precision):
    half = precision == "bfloat16"
    close = {"atol": 4e-2, "rtol": 4e-2} if half else {"atol": 1e-5, "rtol": 1e-4}
    mixture = random_model(Experts(**keys), layers=1).blocks[0].ffn.train()
    x_ND = torch.randn(29, 32)
    x_ND = (x_ND.bfloat16() if half else x_ND).requires_grad_()
    found = []
    for compute in (mixture, lambda x: naive(mixture, x)):
        mixture.zero_grad(set_to_none=True)
        x_ND.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y_ND = compute(x_ND)
        (y_ND.float() * torch.linspace(-1, 1, 29)[:, None]).sum().backward()
        gradients = {name: p.grad for name, p in mixture.named_parameters() if p.requires_grad}
        found.append((y_ND.float(), x_ND.grad.float(), gradients))
    (y, dx, own), (expected_y, expected_dx, expected) = found
    torch.testing.assert_close(y, expected_y, **close)
    torch.testing.assert_close(dx, expected_dx, **close)
    assert own["router"].abs().max() > 1e-3
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(own[name], gradient, atol=close["atol"] * (1 + scale), rtol=1e-2, msg=name)


def test_an_expert_without_tokens_costs_and_changes_nothing():
    mixture = random_model(Experts(), layers=1).blocks[0].ffn.train()
    with torch.no_grad():
        mixture.router.zero_()
        mixture.router[2] = 1.0
    x_ND = torch.rand(9, 32)
    torch.testing.assert_close(mixture(x_ND), naive(mixture, x_ND))
    mixture(x_ND).sum().backward()
    assert mixture.experts[0].down.weight.grad is None and mixture.experts[2].down.weight.grad is not None
    assert mixture.load_E.tolist() == [0, 0, 2 * 9, 0]
    assert mixture(x_ND[:0]).shape == (0, 32)


@each_option
@pytest.mark.parametrize("top", [2, 4])
def test_identical_experts_are_the_dense_network(options, top):
    """With weights that sum to 1: logits, loss and gradients, of which each expert has a part."""
    technique = Experts(top=top, width=48)
    plain, model = random_model(**options), random_model(technique, **options)
    given = technique.inherited(model, plain.state_dict())
    assert not model.load_state_dict(given, strict=False).unexpected_keys
    tokens_BL = some_tokens()
    torch.testing.assert_close(model(tokens_BL), plain(tokens_BL), atol=1e-4, rtol=1e-3)
    losses = [loss_of(one) for one in (model, plain)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if ".ffn." in name:
            start, end = name.split(".ffn.")
            copies = [own[f"{start}.ffn.experts.{e}.{end}"].grad for e in range(4)]
            gradient = sum(copy for copy in copies if copy is not None)
            if top < 4:
                assert any(not torch.allclose(gradient, copy) for copy in copies if copy is not None)
        else:
            gradient = own[name].grad
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-2, msg=name)


@each_option
def test_one_expert_is_the_plain_model_to_the_bit(options):
    neutral = Experts(experts=1)
    assert neutral.neutral() and not Experts().neutral()
    plain, model = random_model(**options), random_model(neutral, **options)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    tokens_BL = some_tokens()
    assert torch.equal(model(tokens_BL), plain(tokens_BL))
    losses = [loss_of(one) for one in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name].grad, p.grad) for name, p in plain.named_parameters())


def test_the_first_expert_is_the_plain_network_and_the_others_start_like_it():
    plain, model = new_model(), new_model(Experts())
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        first, *others = block.ffn.experts
        for name, parameter in other.ffn.named_parameters():
            assert torch.equal(dict(first.named_parameters())[name], parameter)
            for expert in others:
                weight = dict(expert.named_parameters())[name]
                assert not torch.equal(weight, parameter)
                assert weight.std().item() == pytest.approx(parameter.std().item(), rel=0.1)
    zero = new_model(Experts(top=2, shared=1), zero_init=True).blocks[0].ffn
    for network in (*zero.experts, zero.shared):
        assert not network.down.weight.any() and network.gate_up.weight.all()


def test_which_layers_have_experts_and_how_wide_they_are():
    def found(**keys):
        model = new_model(Experts(**keys), layers=5)
        return [n for n, block in enumerate(model.blocks) if isinstance(block.ffn, Mixture)]

    assert found() == [0, 1, 2, 3, 4]
    assert found(every=2) == [0, 2, 4] and found(every=2, first=2) == [1, 3] and found(first=5) == [4]
    widths = {1: 48, 2: 24, 3: 16}
    for top, width in widths.items():
        mixture = new_model(Experts(top=top)).blocks[0].ffn
        assert {expert.down.in_features for expert in mixture.experts} == {width}
    mixture = new_model(Experts(top=2, shared=2)).blocks[0].ffn
    assert mixture.experts[0].down.in_features == 12 and mixture.shared.down.in_features == 24


def test_a_replaced_activation_is_each_experts():
    plain = new_model(layers=1).blocks[0].ffn
    plain.activation = torch.tanh
    mixture = Mixture(plain, new_model().config, Experts(top=2, width=20))
    assert all(expert.activation is torch.tanh for expert in mixture.experts)
    x_ND = torch.randn(7, 32)
    torch.testing.assert_close(mixture(x_ND), naive(mixture, x_ND))


# Balance


def test_switchs_loss_is_1_where_the_router_is_uniform_and_the_number_of_experts_where_it_collapses():
    uniform, one = torch.full((2, 8), 1 / 8), torch.eye(8)[:2]
    load = torch.tensor([[3.0, 0, 0, 5, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    assert switch_loss(load, uniform).tolist() == pytest.approx([1, 1])
    assert switch_loss(100 * one, one).tolist() == pytest.approx([8, 8])
    assert switch_loss(torch.tensor([[6.0, 2.0]]), torch.tensor([[0.7, 0.3]])).item() == pytest.approx(
        2 * (0.75 * 0.7 + 0.25 * 0.3)
    )


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_part_is_the_weighted_sum_of_each_layers_loss(make_run, router):
    run = with_experts(make_run(model=TINY), weight=0.5, z_weight=0.25, router=router)
    model = random_model(run.techniques["experts"])
    tokens_BM = torch.cat([some_tokens(), some_tokens()[:, :1]], dim=1)
    with torch.no_grad():
        model.blocks[0].ffn.router.zero_()  # uniform: a loss of 1, whatever the choices
    inputs = []
    model.blocks[1].ffn.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    parts = parts_of(run, model, tokens_BM)
    assert set(parts) == {"next_token", "balance", "router_z"}
    logits_NE = inputs[0] @ model.blocks[1].ffn.router.T
    scores_NE = logits_NE.softmax(dim=1) if router == "softmax" else logits_NE.sigmoid()
    p_E = (scores_NE / scores_NE.sum(dim=1, keepdim=True)).mean(dim=0)
    f_E = F.one_hot(scores_NE.argmax(dim=1), 4).float().mean(dim=0)
    second = 4 * (p_E * f_E).sum()
    assert second > 1.01
    assert parts["balance"].item() == pytest.approx(0.5 * (1 + second.item()), rel=1e-5)
    z_E = logits_NE.logsumexp(dim=1).square().mean().item()
    uniform = torch.tensor(4.0).log().item() ** 2
    assert parts["router_z"].item() == pytest.approx(0.25 * (uniform + z_E), rel=1e-5)
    assert total(parts).item() == pytest.approx(sum(part.item() for part in parts.values()))
    gradient = torch.autograd.grad(parts["balance"], [model.blocks[1].ffn.router])[0]
    assert gradient.abs().max() > 0


def test_the_losss_gradient_evens_the_load(make_run):
    run = with_experts(make_run(model=TINY), weight=1.0)
    model = random_model(run.techniques["experts"])
    mixture = model.blocks[0].ffn
    x_ND, loads = torch.rand(400, 32), []
    with torch.no_grad():
        mixture.router.normal_(std=0.1)
        mixture.router[1] += 0.05  # most tokens choose the second expert
    for _ in range(100):
        mixture.train()(x_ND)
        routed = mixture.take_routed()
        loads.append(routed.load_E)
        loss = switch_loss(routed.load_E[None], routed.probability_E[None]).sum()
        (gradient,) = torch.autograd.grad(loss, [mixture.router])
        mixture.router.data -= 0.01 * gradient
    assert loads[0].min() == 0 and loads[0].max() > 250
    assert loads[-1].min() > 90 and loads[-1].max() < 110


def test_counts_sum_to_top_times_tokens_and_the_chosen_differ():
    model = random_model(Experts(top=3, experts=5, width=8))
    loss_of(model)
    for mixture in mixtures(model):
        assert mixture.load_E.sum() == 3 * 3 * (L - 1) and (mixture.load_E <= 3 * (L - 1)).all()
    model.eval()(some_tokens())
    chosen_NK = mixtures(model)[0].chosen_NK
    assert chosen_NK.shape == (3 * L, 3) and all(len(set(row)) == 3 for row in chosen_NK.tolist())
    assert mixtures(model)[0].load_E.sum() == 3 * 3 * (L - 1), "evaluation counts nothing"


def test_the_bias_chooses_and_never_weighs():
    mixture = random_model(Experts(balance="bias", normalize=False), layers=1).blocks[0].ffn.eval()
    x_ND = torch.randn(50, 32)
    with torch.no_grad():
        mixture.bias.zero_()
        before_N1, weight_N1, _ = mixture._route(x_ND)
        mixture.bias.copy_(torch.tensor([0.0, 0.0, 0.3, 0.0]))
        after_N1, biased_N1, load_E = mixture._route(x_ND)
        mixture.bias.fill_(7.0)
        assert torch.equal(mixture._route(x_ND)[1], weight_N1), "a bias of all changes nothing"
    moved_N = (before_N1 != after_N1)[:, 0]
    assert 0 < moved_N.sum() < 50 and (after_N1[moved_N] == 2).all()
    assert torch.equal(biased_N1[~moved_N], weight_N1[~moved_N])
    scores_NE = (x_ND @ mixture.router.T).softmax(dim=1)
    torch.testing.assert_close(biased_N1, scores_NE.gather(1, after_N1))
    assert load_E.sum() == 50 and load_E[2] == (after_N1 == 2).sum()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_bias_moves_by_its_rate_once_a_step_however_often_it_is_validated(make_run, accumulation):
    run = make_run(model={"dropout": 0.0}, accumulation=accumulation, steps=4, batch_size=2)
    trainer = Trainer(with_experts(run, balance="bias", rate=0.01))
    model, setup = trainer.setup.model.train(), trainer.setup
    (mixture,) = mixtures(model)
    assert mixture.bias.tolist() == [0, 0, 0, 0]
    for step in range(1, 4):
        before_E = mixture.bias.clone()
        trainer.step()
        load_E = mixture.load_E
        assert load_E.sum() == accumulation * 2 * 32, "of all micro-batches"
        expected_E = before_E + 0.01 * (load_E.mean() - load_E).sign()
        assert torch.equal(mixture.bias, expected_E), step
        for _ in range(2):
            validate(setup, trainer.curve.validation)
        assert torch.equal(mixture.bias, expected_E) and mixture.bias.grad is None
    assert mixture.bias.any()


def test_with_one_choice_of_weight_1_the_text_trains_the_router():
    mixture = random_model(Experts(normalize=True), layers=1).blocks[0].ffn
    x_ND = torch.randn(40, 32)
    chosen_N1, weight_N1, _ = mixture._route(x_ND)
    assert (weight_N1 == 1).all()
    weight_N1.sum().backward()
    scores_NE = (x_ND @ mixture.router.T).softmax(dim=1)
    expected = torch.autograd.grad(scores_NE.gather(1, chosen_N1).log().sum(), [mixture.router])[0]
    torch.testing.assert_close(mixture.router.grad, expected, atol=1e-4, rtol=1e-3)


def test_sigmoids_that_are_all_zero_give_no_nan(make_run):
    technique = Experts(router="sigmoid", top=2)
    model = random_model(technique)
    inputs = model.blocks[0].ffn.register_forward_pre_hook(lambda _, given: (given[0].abs() + 1,))
    with torch.no_grad():
        model.blocks[0].ffn.router.fill_(-10.0)
    tokens_BM = torch.cat([some_tokens(), some_tokens()[:, :1]], dim=1)
    loss = total(parts_of(with_experts(make_run(model=TINY), router="sigmoid", top=2), model, tokens_BM))
    inputs.remove()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# What it works with


@each_option
@pytest.mark.parametrize("keys", [{}, KEYS["shared, sigmoid, bias"]], ids=["top 1", "shared"])
def test_later_tokens_move_nothing(options, keys):
    model, tokens_BL = random_model(Experts(**keys), **options), some_tokens(4)
    changed_BL = tokens_BL.clone()
    changed_BL[:, L // 2 :] = tokens_BL[:, L // 2 :] % 256 + 1  # another one
    before, after = slice(L // 2), slice(L // 2, None)
    for training in (False, True):
        logits_BLV, changed_BLV = model.train(training)(tokens_BL), model(changed_BL)
        torch.testing.assert_close(changed_BLV[:, before], logits_BLV[:, before], atol=1e-4, rtol=1e-4)
        assert (changed_BLV[:, after] - logits_BLV[:, after]).abs().max() > 1e-2


@each_option
@torch.inference_mode()
def test_a_cache_and_some_positions_alone_change_nothing(options):
    model, tokens_BL = random_model(Experts(top=2), **options), some_tokens()
    whole_BLD = model.hidden(tokens_BL)
    cache = Cache(model.config, 3, torch.device("cpu"))
    found = [model.hidden(part, cache.extend(part.shape[1])) for part in tokens_BL.split([1, 5, 4, 6], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole_BLD, atol=2e-4, rtol=1e-3)
    rows_N = torch.tensor([0, 5, 17, 47])
    expected_ND = whole_BLD.flatten(0, 1)[rows_N]
    torch.testing.assert_close(model.hidden(tokens_BL, None, rows_N), expected_ND, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_documents_in_a_row_do_not_see_one_another():
    model, tokens_BL = random_model(Experts(top=2)), some_tokens(4)
    tokens_BL[:, 7] = EOT
    whole_BLD = model.hidden(tokens_BL, Documents.of(tokens_BL, EOT))
    second_BLD = model.hidden(tokens_BL[:, 7:], Documents.of(tokens_BL[:, 7:], EOT))
    torch.testing.assert_close(whole_BLD[:, 7:], second_BLD, atol=1e-4, rtol=1e-4)
    assert (model.hidden(tokens_BL) - whole_BLD).abs().max() > 1e-2


def test_packed_in_a_trie_as_in_single_rows():
    model = random_model(Experts(top=2, shared=1), context=48)
    requests = [
        Request("the cat", f" {one}{other}") for one in ("sat", "ran") for other in ("", " home", " on")
    ]
    scorer = TokenModel(model, RequestEncoder(TOKENIZER))
    assert scorer.packs
    packed = [score.logprob for score in scorer.loglikelihoods(requests)]
    scorer.packs = False
    single = [score.logprob for score in scorer.loglikelihoods(requests)]
    assert packed == pytest.approx(single, abs=1e-3)
    half = TokenModel(model, RequestEncoder(TOKENIZER), precision="bfloat16")
    mixture = half.transformer.blocks[0].ffn
    assert mixture.experts[3].down.weight.dtype == torch.bfloat16 and mixture.router.dtype == torch.float32
    assert all(score.logprob < 0 for score in half.loglikelihoods(requests))


@pytest.mark.parametrize("ffn", FFNS)
def test_in_bfloat16_the_router_is_in_float32_and_gradients_are_finite(ffn):
    model, outputs = random_model(Experts(top=2, shared=1), ffn=ffn), []
    route = model.blocks[0].ffn._route
    model.blocks[0].ffn._route = lambda x: outputs.append(route(x)) or outputs[-1]
    model.blocks[0].ffn.register_forward_hook(lambda *given: outputs.append(given[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    (_, weight_NK, _), y_BLD = outputs
    assert weight_NK.dtype == torch.float32 and y_BLD.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def test_layers_that_share_a_network_share_experts_and_not_routers():
    sharing = {"what": "ffn", "order": "groups", "group": 2}
    model = new_model(Experts(balance="bias", shared=1, top=2), layers=4, sharing=sharing)
    one, two, three, _ = mixtures(model)
    for networks in zip((*one.experts, one.shared), (*two.experts, two.shared), strict=True):
        assert networks[0].down.weight is networks[1].down.weight
    assert one.router is not two.router and one.bias is not two.bias
    assert one.experts[0].down.weight is not three.experts[0].down.weight
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(config, model.techniques).total
    # Two of four experts in each of two layers that share them may be four.
    assert active_parameters(model) == parameter_counts(config, model.techniques).total
    with pytest.raises(ValueError, match=r"every: 2, first: 1: .*all have experts"):
        run = type("Run", (), {"model": config})
        Experts(every=2).check(run, {})


# Counts and optimizers


@each_keys
@pytest.mark.parametrize("ffn", FFNS)
def test_flops_are_torchs_but_for_the_upper_half_of_attention(ffn, keys, torch_operations):
    model = random_model(Experts(**keys), ffn=ffn)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(some_tokens(1))
    upper_half = 2 * 2 * 32 * L**2
    assert forward_flops(model, L) == counter.get_total_flops() - upper_half


@each_option
def test_counts_on_meta_are_the_models_and_those_of_a_token_the_dense_ones_and_the_router(options):
    config = ModelConfig(**({"vocab_size": 257} | TINY | options))
    for technique in (Experts(), Experts(top=2, shared=1, balance="bias", width=16)):
        on_meta, model = build_on_meta(config, (technique,)), new_model(technique, **options)
        groups = parameter_groups(on_meta)
        assert groups == parameter_groups(model)
        assert groups["router"] == config.layers * 4 * (32 + (technique.balance == "bias"))
        assert active_parameters(on_meta) == active_parameters(model)
    if config.sharing is None:
        counts, dense = parameter_counts(config, (Experts(),)), parameter_counts(config)
        network = sum(p.numel() for p in new_model(**options).blocks[0].ffn.parameters())
        router = config.layers * 4 * 32
        assert counts.active == dense.total + router and dense.active is None
        assert counts.total == dense.total + router + config.layers * 3 * network
        assert forward_flops(build_on_meta(config, (Experts(),)), L) == (
            forward_flops(build_on_meta(config), L) + 2 * router * L
        )


@each_keys
@pytest.mark.parametrize("narrow", [2, 4])
def test_the_memory_of_the_backward_pass_is_estimated(make_run, keys, narrow):
    """Against the tensors that autograd keeps, by storage, without parameters and their copies."""
    shape = {"layers": 2, "width": 64, "ffn_width": 96, "context": 128}
    run = with_experts(make_run(model=TINY | shape), **keys)
    tokens_BL, kept = torch.randint(257, (8, 128)), []
    for techniques in ((), (run.techniques["experts"],)):
        model, storages = new_model(*techniques, **shape).train(), {}
        sizes = {p.numel() for p in model.parameters()}

        def keep(tensor, sizes=sizes, storages=storages):
            if tensor.numel() not in sizes:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            hidden = model.hidden(tokens_BL)
        kept.append(sum(storages.values()) / tokens_BL.numel())
        assert hidden.requires_grad
    extra = run.techniques["experts"].extra_bytes_per_token(run, narrow)
    assert extra == pytest.approx(kept[1] - kept[0], abs=0.1 * kept[0])


def test_every_experts_matrix_is_orthogonalized_by_itself_and_the_bias_has_no_optimizer(make_run):
    training = make_run(optimizer="muon", weight_decay=0.0, learning_rate=0.1).training
    model = new_model(Experts(balance="bias"))
    optimizer = build_optimizer(model, training)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in trained}
    assert names == {"blocks.0.ffn.bias", "blocks.1.ffn.bias"}
    assert {rows: len(own) for rows, own in model.matrix_parts().items()}[48, 48] == 2 * 4
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model).backward()
    expert = model.blocks[0].ffn.experts[1]
    gate = expert.gate_up.weight.grad[:48].clone()
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"] * 0.2 * 48**0.5
    moved = expert.gate_up.weight.detach() - before["blocks.0.ffn.experts.1.gate_up.weight"]
    expected = orthogonalize(gate.T[None], 5, torch.float32)[0].T
    torch.testing.assert_close(-moved[:48] / rate, expected, atol=2e-2, rtol=1e-1)


# Runs


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_run_learns_and_stopped_and_resumed_is_the_same(make_run, balance):
    """With Muon, attention within documents, dropout, several micro-batches and the watch."""
    recipe = {"optimizer": "muon", "watch_every": 3, "steps": 8, "accumulation": 2}
    keys = {"top": 2, "balance": balance, "data": DataConfig(attention="within")}
    keys |= {"rate": 0.02} if balance == "bias" else {}
    whole, stopped = (
        with_experts(make_run(name, {"layers": 2}, **recipe), **keys) for name in ("whole", "stopped")
    )
    train(whole)
    train_in_parts(stopped, 5)
    for file in ("curve.csv", "watch.csv"):
        assert rows_of(whole.folder / file) == rows_of(stopped.folder / file)
    assert same_weights(whole, stopped)
    curve = rows_of(whole.folder / "curve.csv")
    losses = [float(row["train_loss"]) for row in curve if row["train_loss"]]
    assert losses[-1] < losses[0]
    if balance == "loss":
        assert all(2 * 0.0099 < float(row["train_balance"]) < 2 * 0.02 for row in curve)
    else:
        assert "train_balance" not in curve[0]
    model, description = load_checkpoint(last_checkpoint(whole))
    assert description["techniques"] == {"experts": whole.techniques["experts"].model_dump()}
    if balance == "bias":
        biases = torch.stack([mixture.bias for mixture in mixtures(model)])
        assert biases.any() and (biases.abs() <= 8 * 0.02 + 1e-6).all()
        torch.testing.assert_close(biases / 0.02, (biases / 0.02).round(), atol=1e-4, rtol=0)


def test_load_by_layer_and_expert_is_in_watch_csv_of_the_text_that_counts(make_run):
    run = with_experts(
        make_run(model={"layers": 3}, watch_every=4, steps=8), experts=3, top=2, width=8, every=2
    )
    train(run)
    rows = rows_of(run.folder / "watch.csv")
    loads = [f"load_{number}" for number in (1, 2, 3)]
    measured = [row for row in rows if row["load_1"]]
    assert [(row["step"], row["layer"]) for row in measured] == [
        (step, layer) for step in ("4", "8") for layer in ("block 1", "block 3")
    ]
    for row in measured:
        assert sum(float(row[name]) for name in loads) == pytest.approx(1, abs=1e-4)
        assert float(row["residual_rms"]) > 0, "one row for a layer and a step"
    assert len({(row["step"], row["layer"]) for row in rows}) == len(rows)
    counts = read_json(run.folder / "train.json")["parameters"]
    assert counts["active"] == counts["total"] - 2 * 3 * 32 * 8, "one of three experts in two layers rests"


def test_padding_is_no_load():
    model, counted_BL = random_model(Experts(top=2)), torch.zeros(3, L, dtype=torch.bool)
    counted_BL[0, :5] = counted_BL[2, 3] = True
    tokens_BL = some_tokens()
    technique = model.techniques[0]
    model(tokens_BL)
    found = technique.validated(model, tokens_BL, tokens_BL, counted_BL)["load"]
    assert found.shape == (2, 2, 4) and found[1].tolist() == [[12] * 4] * 2
    chosen_BLK = mixtures(model)[0].chosen_NK.view(3, L, 2)
    expected = torch.bincount(torch.cat([chosen_BLK[0, :5].flatten(), chosen_BLK[2, 3]]), minlength=4)
    assert found[0, 0].tolist() == expected.tolist()
    filled_BL = torch.where(counted_BL.cumsum(dim=1) < counted_BL.sum(dim=1, keepdim=True), tokens_BL, 7)
    filled_BL[0, :5], filled_BL[2, :4] = tokens_BL[0, :5], tokens_BL[2, :4]
    model(filled_BL)
    assert torch.equal(technique.validated(model, filled_BL, filled_BL, counted_BL)["load"], found)


def test_a_dead_expert_is_named(make_run, capsys):
    rows = {"block 1": {"load_1": 0.024, "load_2": 0.026, "load_3": 0.95, "load_4": 0.0}, "head": {}}
    first, second = Experts().remarks(rows)
    assert re.match(r"block 1: expert 1 of 4 is dead: .*2\.40%.*less than 2\.50%", first)
    assert second.startswith("block 1: expert 4 of 4 is dead")
    assert Experts().remarks({"block 1": {f"load_{n}": 0.25 for n in (1, 2, 3, 4)}}) == []
    run = with_experts(make_run(steps=3), balance="none")
    build = Experts.build

    def zero(module, _):
        module.router.data.zero_()

    def collapsed(self, model):
        build(self, model)
        for mixture in mixtures(model):
            mixture.register_forward_pre_hook(zero)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "build", collapsed)
        train(run)
    remarks = read_json(run.folder / "train.json")["remarks"]
    assert len(remarks) == 3 and all("is dead" in remark for remark in remarks)
    said = capsys.readouterr().err
    assert all(f"tiny-run: {remark}" in said for remark in remarks)


def test_a_neutral_run_is_the_plain_one(make_run):
    plain, neutral = make_run("plain"), with_experts(make_run("neutral"), experts=1)
    for run in (plain, neutral):
        train(run)
    assert rows_of(plain.folder / "curve.csv") == rows_of(neutral.folder / "curve.csv")
    assert rows_of(plain.folder / "watch.csv") == rows_of(neutral.folder / "watch.csv")
    assert "remarks" not in read_json(neutral.folder / "train.json")
    assert "active" not in read_json(neutral.folder / "train.json")["parameters"]


def test_rows_of_a_micro_batch_in_two_processes_have_one_balance(make_run, monkeypatch):
    """The share of the load is that of all rows, so that the mean of the processes' losses is the whole's."""
    run = with_experts(make_run(model=TINY, batch_size=4), weight=1.0)
    model = random_model(run.techniques["experts"])
    tokens_BM = torch.cat([some_tokens(4), some_tokens(4)[:, :1]], dim=1)
    whole = parts_of(run, model, tokens_BM)["balance"]
    exchanged: list[torch.Tensor] = []
    losses = []
    for turn in ("count", "use"):
        losses = []
        for rank in range(2):
            objective = Objective(run)
            group = Group(rank, 2)
            objective.prepare(torch.device("cpu"), group)

            def exchange(self, tensors, turn=turn):
                if turn == "count":
                    exchanged.append(tensors[0].clone())
                else:
                    tensors[0].copy_(sum(exchanged))

            monkeypatch.setattr(Group, "sum", exchange)
            rows = group.share(run.training).rows
            losses.append(objective(objective.forward(model, tokens_BM[rows], None, 1))["balance"])
    assert len(exchanged) == 2
    assert sum(losses).item() / 2 == pytest.approx(whole.item(), rel=1e-5)
    halves = run.model_copy(update={"training": run.training.model_copy(update={"batch_size": 2})})
    apart = [parts_of(halves, model, half)["balance"].item() for half in tokens_BM.split(2)]
    assert sum(apart) / 2 != pytest.approx(whole.item(), rel=1e-4), "without the exchange it is another loss"


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2], ids=["rows", "micro-batches"])
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_two_processes_train_as_one(make_run, accumulation, balance):
    keys = {"top": 2, "balance": balance} | ({"weight": 0.5} if balance == "loss" else {"rate": 0.02})
    model, training = {"dropout": 0.0, "layers": 2}, {"steps": 6, "accumulation": accumulation}
    one, two = (with_experts(make_run(name, model, **training), **keys) for name in ("one", "two"))
    train(one)
    train_in_two_processes(two)
    for file, names in (("curve.csv", ("train_loss", "val_loss")), ("watch.csv", ("load_1", "load_4"))):
        for first, second in zip(rows_of(one.folder / file), rows_of(two.folder / file), strict=True):
            for name in names:
                assert bool(first[name]) == bool(second[name])
                if first[name]:
                    # Rounding may move a token at a tie.
                    close = {"abs": 0.01} if name.startswith("load") else {"rel": 1e-4}
                    assert float(first[name]) == pytest.approx(float(second[name]), **close)
    models = [load_checkpoint(last_checkpoint(run))[0] for run in (one, two)]
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-2, msg=name)


# Upcycling


@pytest.mark.parametrize("top", [1, 2])
def test_an_upcycled_model_starts_as_the_dense_one_and_its_experts_part(make_run, top):
    origin = make_run("dense", {"layers": 2, "dropout": 0.0})
    train(origin)
    run = with_experts(make_run("upcycled", {"layers": 2, "dropout": 0.0}), top=top, upcycle="dense")
    assert run.depends == {"start": "dense"}
    trainer = Trainer(run)
    model = trainer.setup.model.eval()
    dense, _ = load_checkpoint(last_checkpoint(origin))
    tokens_BL = some_tokens()
    torch.testing.assert_close(model(tokens_BL), dense(tokens_BL), atol=1e-5, rtol=1e-4)
    for number, mixture in enumerate(mixtures(model)):
        for expert in mixture.experts:
            for name, parameter in expert.named_parameters():
                plain = dict(dense.blocks[number].ffn.named_parameters())[name]
                assert torch.equal(parameter, plain)
        assert len(mixture.router.unique(dim=0)) == 4, "routers tell experts apart"
        chosen = mixture._route(torch.randn(200, 32))[0]
        assert len(chosen.unique()) > 1
    model.train()
    trainer.step()
    for mixture in mixtures(model):
        weights = [expert.down.weight for expert in mixture.experts]
        assert any(not torch.equal(weights[0], weight) for weight in weights[1:])


def test_an_upcycled_runs_cost_is_counted_and_it_goes_on_in_the_text(make_run):
    dense = make_run("dense", steps=4)
    train(dense)
    run = with_experts(make_run("upcycled", steps=3), upcycle="dense", balance="bias")
    train(run)
    record = read_json(run.folder / "train.json")
    assert record["depends"]["start"]["run"] == "dense"
    assert record["depends"]["start"]["flops"] == dense.flops
    rows = Trainer(run).setup.micro_batches.rows
    assert rows.skip == 4 * dense.training.batch_size


def test_only_this_technique_may_stand_between_the_models():
    with pytest.raises(AssertionError, match="more than ranks, adapters and techniques"):
        inherit(new_model(), new_model(Experts()))


def test_a_checkpoint_is_read_and_not_exported(tmp_path):
    model = random_model(Experts(top=2, balance="bias"), **OPTIONS["shared layers"])
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(1)
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    TOKENIZER.save(tmp_path / "checkpoints" / "tokenizer")
    loaded, _ = load_checkpoint(checkpoint)
    assert torch.equal(loaded(some_tokens()), model(some_tokens()))
    assert all(
        torch.equal(one.bias, other.bias)
        for one, other in zip(mixtures(loaded), mixtures(model), strict=True)
    )
    with pytest.raises(UserError, match="experts does not support export"):
        export_llama(checkpoint, tmp_path / "llama")


# Studies

STUDY = {
    "description": "Experts.",
    "corpus": "synthetic",
    "tokenizer": "bpe-1280",
    "seeds": [0],
    "baseline": "plain",
    "model": {**TINY, "context": 64},
    "training": {"steps": 4, "warmup_steps": 1},
    "evaluation": {"benchmarks": ["synthetic_pairs"], "modes": ["paper"]},
    "variants": {"plain": {}, "experts": {"techniques": {"experts": {}}}},
}


def load(project, **changes):
    (project / "params" / "experts.yaml").write_text(yaml.safe_dump(STUDY | changes))
    return load_study("experts")


def test_a_study_switches_it_on_and_shows_what_a_token_uses(project):
    study = load(project)
    plain, experts = study.runs["plain"], study.runs["experts"]
    router = 2 * 4 * 32
    assert experts.parameters.active == plain.parameters.total + router
    assert experts.flops_per_token == plain.flops_per_token + 6 * router
    header, line = (line for line in runs_table(study).splitlines() if re.match(r"run |experts ", line))
    assert "active for a token" in header and f"{experts.parameters.active:,}" in line
    study = load(project, variants={"plain": {}})
    assert "active" not in runs_table(study)


def test_upcycling_is_a_dependency_of_the_study(project):
    upcycled = {"techniques": {"experts": {"upcycle": "plain"}}}
    runs = load(project, variants={"plain": {}, "upcycled": upcycled}).runs
    assert runs["upcycled"].depends == {"start": "plain"}


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ({"expert": 3}, {}, r"experts\.expert: no such key.*experts"),
        ({"top": 5}, {}, r"top: 5 is more than experts: 4"),
        ({"top": 0}, {}, r"experts\.top: .*found 0"),
        ({"experts": 1, "width": 9}, {}, r"width: 9: with experts: 1"),
        ({"experts": 1, "z_weight": 0.1}, {}, r"z_weight: 0\.1: with experts: 1"),
        ({"first": 3}, {}, r"experts\.first: found 3, expected at most the 2"),
        ({"top": 2, "shared": 3}, {}, r"experts\.width: model\.ffn_width: 48 cannot be divided by the 5"),
        ({"upcycle": "plain", "shared": 1}, {}, r"shared: 1: with upcycle there is none"),
        ({"upcycle": "plain", "normalize": False}, {}, r"normalize: false: with upcycle it is true"),
        ({"upcycle": "plain", "width": 24}, {}, r"experts\.width: found 24, expected model\.ffn_width: 48"),
        ({"upcycle": "plane"}, {}, r"techniques\.experts\.upcycle: 'plane' is no variant.*plain"),
        ({"upcycle": "wrong"}, {}, r"techniques\.experts\.upcycle: 'wrong': a run cannot depend on itself"),
        (
            {"upcycle": "plain"},
            {"model": {"width": 64}},
            r"techniques\.experts\.upcycle: 'plain' has model\.width: 32, the run 64",
        ),
        (
            {"upcycle": "plain"},
            {"training": {"start_from": "plain"}},
            r"techniques\.experts\.upcycle: training\.start_from has the role 'start' already",
        ),
        (
            {},
            {"model": {"low_rank": {"ffn": 17}}, "top": 2},
            r"width: for 24 hidden units: low_rank\.ffn: 17",
        ),
        ({"every": 2}, {"model": {"sharing": {"what": "all"}}}, r"experts\.every: 2, first: 1: where layers"),
        ({"rate": 0.01}, {}, r"rate: 0\.01: only balance: bias has one"),
        ({"balance": "bias", "weight": 0.1}, {}, r"weight: 0\.1: only balance: loss has one"),
        ({}, {"model": {"bytes": {}}, "tokenizer": "words"}, "experts does not support byte-level models"),
        ({}, {"training": {"compile": True}}, r"experts does not support torch\.compile"),
        ({}, {"training": {"start_from": "plain"}}, "experts does not support weights of another run"),
        (
            {},
            {"techniques": {"series_activation": {}}},
            "experts cannot be combined|series_activation cannot",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(project, keys, more, message):
    more = dict(more)
    if "top" in more:
        keys = keys | {"top": more.pop("top")}
    techniques = {"experts": keys, **more.pop("techniques", {})}
    with pytest.raises(UserError, match=message):
        load(project, variants={"plain": {}, "wrong": {"techniques": techniques, **more}})


def test_all_that_it_does_not_name_is_refused():
    assert CAPABILITIES.keys() - Experts.supports == {
        "batches",
        "bytes",
        "compile",
        "drafts",
        "export",
        "start_from",
    }
    for capability in CAPABILITIES.keys() - Experts.supports:
        with pytest.raises(UserError, match=r"techniques\.experts does not support"):
            refuse([Experts()], capability)


def test_padding_of_narrow_rows_changes_nothing(monkeypatch):
    """In bfloat16 an expert's rows are padded; outputs and gradients are those of rows without padding."""
    model = random_model(Experts(experts=4, top=2))
    mixture, x_ND = model.blocks[0].ffn.train(), torch.randn(37, 32).requires_grad_()
    found = []
    for rows in (1, 64):
        monkeypatch.setattr("stlm.techniques.experts.ROWS", rows)
        seen: list[int] = []
        hook = mixture.experts[1].register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(len(given[0]))
        )
        with torch.autocast("cpu", torch.bfloat16):
            y_ND = mixture(x_ND)
        hook.remove()
        assert seen[0] % rows == 0 and (rows == 1 or seen[0] == 64)
        wanted = [x_ND, *(p for p in mixture.parameters() if p.requires_grad)]
        found.append([y_ND, *torch.autograd.grad(y_ND.float().square().sum(), wanted)])
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())
