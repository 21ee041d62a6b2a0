"""Layers that share matrices, and adapters: against unshared copies, dense sums and torch's own counts."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_counts, parameter_groups, training_flops_per_token
from stlm.model.projection import projections
from stlm.model.transformer import Transformer

TINY = {"layers": 5, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 16, "vocab_size": 61}
ORDERS = {
    "one": ({}, [0, 0, 0, 0, 0]),
    "groups": ({"group": 2}, [0, 0, 2, 2, 4]),
    "cyclic": ({"units": 2}, [0, 1, 0, 1, 0]),
    "sandwich": ({}, [0, 1, 1, 1, 4]),
}
SHARED = [
    {"sharing": {"what": what, "order": order, **keys}}
    for what in ("ffn", "attention", "all")
    for order, (keys, _) in ORDERS.items()
]
REDUCED = [
    *SHARED,
    {"lora": {"rank": 3}},
    {"sharing": {"what": "all"}, "lora": {"rank": 2, "what": "ffn", "alpha": 8.0}},
    {
        "sharing": {"what": "ffn"},
        "lora": {"rank": 2, "what": "attention"},
        "qkv_shift": True,
        "qk_norm": True,
    },
    {"low_rank": {"ffn": 6}},
    {"low_rank": {"ffn": 6, "down": 9, "qkv": 4}},
    {"low_rank": {"attention": 5, "ffn": 7}, "ffn": "relu2"},
    {"embedding_rank": 8},
    {"embedding_rank": 8, "tied": False, "value_embeddings": 1},
    {
        "sharing": {"what": "all", "order": "cyclic", "units": 2},
        "low_rank": {"ffn": 6, "attention": 5},
        "lora": {"rank": 2},
        "embedding_rank": 8,
        "tied": False,
        "norm": "layernorm",
        "positions": "learned",
    },
]


def strong(**options: object) -> Transformer:
    """A model whose every weight shows in the logits."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1.0))
    return model


def loss(model: Transformer) -> torch.Tensor:
    tokens_BL = torch.arange(34).reshape(2, 17) * 7 % 61
    return model.loss(tokens_BL[:, :-1], tokens_BL[:, 1:])


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_as_drawn(order):
    keys, source_layers = ORDERS[order]
    config = ModelConfig(**TINY, sharing={"what": "ffn", "order": order, **keys})
    assert list(config.source_layers["ffn"]) == source_layers
    assert list(config.source_layers["attention"]) == [0, 1, 2, 3, 4]
    model = build_model(config)
    for layer, source in enumerate(source_layers):
        ours, first = model.blocks[layer], model.blocks[source]
        assert ours.ffn.down.weight is first.ffn.down.weight
        assert ours.ffn.gate_up.weight is first.ffn.gate_up.weight
        assert (ours.ffn_norm.weight is first.ffn_norm.weight) == (layer == source)
        assert (ours.attention.out.weight is first.attention.out.weight) == (layer == source)


@pytest.mark.parametrize("options", REDUCED, ids=str)
def test_parameters_and_flops_are_those_counted_by_torch(options, torch_operations):
    """Unique parameters by group; products of matrices, those of shared ones at every use."""
    config = ModelConfig(**TINY, **options)
    model = build_model(config)
    groups = parameter_groups(build_on_meta(config))
    by_name = Counter()
    for name, parameter in model.named_parameters():
        part = next((own for own in ("attention", "ffn") if f".{own}." in name), None)
        if ".adapter." in name:
            part = "adapters"
        elif "norm" in name or "gain" in name:
            part = "norms"
        elif name.endswith(".shift"):
            part = "shifts"
        elif not name.startswith("blocks."):
            first = name.split(".")[0]
            part = {"value_embeddings": "value embeddings", "positions": "positions"}.get(first)
            part = part or ("head" if first.startswith("output") else "token embedding")
        by_name["FFN" if part == "ffn" else part] += parameter.numel()
    assert groups == by_name
    counts = parameter_counts(config)
    assert counts.total == sum(p.numel() for p in model.parameters()) == sum(groups.values())
    assert counts.embedding + counts.non_embedding == counts.total

    with FlopCounterMode(display=False) as counter:
        loss(model.train()).backward()
    # Attention's products are batched ones, of which torch counts the upper half too.
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in by_operation.items() if "bmm" not in str(operation))
    attention = 6 * 2 * config.layers * config.context / 2 * config.width
    assert products / 32 == training_flops_per_token(config) - attention


@pytest.mark.parametrize("options", SHARED, ids=str)
def test_a_shared_matrix_gets_the_summed_gradient_of_an_unshared_copys(options):
    shared = strong(**options)
    unshared = build_model(ModelConfig(**TINY))
    unshared.load_state_dict(shared.state_dict())
    assert loss(shared).item() == pytest.approx(loss(unshared).item(), rel=1e-6)
    loss(shared).backward()
    loss(unshared).backward()
    places: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in shared.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    theirs = dict(unshared.named_parameters())
    assert max(map(len, places.values())) > 1
    for parameter, names in places.items():
        if "output.weight" in names:
            continue  # tied to the embedding in both
        summed = torch.stack([theirs[name].grad for name in names]).sum(dim=0)
        torch.testing.assert_close(parameter.grad, summed, atol=1e-5, rtol=1e-4)


def test_depth_scales_the_projections_into_the_residual_stream_of_shared_layers_too():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**TINY, "width": 128, "ffn_width": 256}, sharing={"what": "all"}))
    assert model.blocks[3].ffn.down.weight.std().item() == pytest.approx(0.02 / 10**0.5, rel=0.05)
    assert model.blocks[3].ffn.gate_up.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("sharing", [None, {"what": "all"}])
@pytest.mark.parametrize("what", ["ffn", "attention", "all"])
def test_a_model_with_adapters_starts_as_the_one_without(sharing, what, torch_operations):
    torch.manual_seed(3)
    plain = build_model(ModelConfig(**TINY, sharing=sharing))
    torch.manual_seed(3)
    adapted = build_model(ModelConfig(**TINY, sharing=sharing, lora={"rank": 2, "what": what}))
    tokens_BL = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(adapted(tokens_BL), plain(tokens_BL), atol=0, rtol=0)
    loss(adapted).backward()
    for name, parameter in adapted.named_parameters():
        if ".adapter." in name:
            # What a zero B hides from A's gradient, B's own shows.
            assert (parameter.grad.abs().max() > 0) == name.endswith(".b.weight")


def test_adapters_are_the_low_rank_sum_and_each_layers_own():
    """Against a dense model without sharing, whose matrices are W + scale B A."""
    adapted = strong(sharing={"what": "all"}, lora={"rank": 2, "alpha": 3.0}).eval()
    dense = build_model(ModelConfig(**TINY)).eval()
    dense.load_state_dict(adapted.state_dict(), strict=False)
    with torch.no_grad():
        for (_, own), (_, of) in zip(projections(dense), projections(adapted), strict=True):
            own.weight.copy_(of.weight + 1.5 * of.adapter.b.weight @ of.adapter.a.weight)
        tokens_BL = torch.randint(0, 61, (2, 16))
        torch.testing.assert_close(adapted(tokens_BL), dense(tokens_BL), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(dense.blocks[0].ffn.down.weight, dense.blocks[1].ffn.down.weight)


def test_moved_and_copied_models_still_share():
    model = strong(sharing={"what": "all", "order": "sandwich"})
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        assert other.blocks[1].ffn.down.weight is other.blocks[3].ffn.down.weight
        assert other.blocks[0].ffn.down.weight is not other.blocks[1].ffn.down.weight


def test_shared_layers_are_one_graph_with_the_eager_loss():
    torch._dynamo.reset()
    model = strong(sharing={"what": "all"}, lora={"rank": 2}, embedding_rank=8).eval()
    counter = CompileCounter()
    compiled = torch.compile(model.loss, backend=counter)
    tokens_BL = torch.randint(0, 61, (2, 17))
    expected = model.loss(tokens_BL[:, :-1], tokens_BL[:, 1:])
    torch.testing.assert_close(compiled(tokens_BL[:, :-1], tokens_BL[:, 1:]), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharing": {"what": "ffn", "order": "groups"}}, "order: groups needs group"),
        ({"sharing": {"what": "ffn", "units": 2}}, "units is used by order: cyclic alone; found one"),
        (
            {"sharing": {"what": "ffn", "order": "cyclic", "units": 6}},
            "sharing.units: 6 is more than the model has layers: 5",
        ),
        (
            {"sharing": {"what": "all", "order": "cyclic", "units": 5}},
            r"sharing.units: 5 for 5 layers shares nothing \(at most 4 does\)",
        ),
        (
            {"layers": 3, "sharing": {"what": "all", "order": "sandwich"}},
            "sharing.order: sandwich leaves 3 layers nothing to share.*it needs layers: 4",
        ),
        ({"layers": 1, "sharing": {"what": "ffn"}}, "sharing: one layer has none to share with; leave"),
        ({"low_rank": {}}, "give a rank: ffn, attention, qkv, out, up, down"),
        (
            {"low_rank": {"ffn": 4, "up": 24}},
            r"low_rank.up: 24 saves nothing in gate_up \(96 x 32\).*most 23",
        ),
        (
            {"low_rank": {"ffn": 20}},
            r"low_rank.ffn: 20 saves nothing in down \(32 x 48\).* 1,600 weights, not 1,536; .*most 19",
        ),
        (
            {"low_rank": {"attention": 16}},
            r"low_rank.attention: 16 saves nothing in out \(32 x 32\).*at most 15",
        ),
        ({"lora": {"rank": 40}}, "lora.rank"),
        ({"embedding_rank": 32}, "embedding_rank: 32 is no lower rank; it must be below 32"),
        ({"embedding_rank": 21}, r"embedding_rank: 21 saves nothing in a table \(61 x 32\).*at most 20"),
    ],
)
def test_impossible_reductions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**TINY, **options})


@pytest.mark.parametrize(
    "options", [{"low_rank": {"ffn": 19, "attention": 15}}, {"embedding_rank": 20, "tied": False}], ids=str
)
def test_the_largest_rank_saves(options):
    plain = ModelConfig(**{**TINY, **options, "low_rank": None, "embedding_rank": None})
    assert parameter_counts(ModelConfig(**TINY, **options)).total < parameter_counts(plain).total


def test_a_config_without_them_is_recorded_as_before():
    recorded = ModelConfig(**TINY).model_dump()
    assert not {"sharing", "lora", "low_rank", "embedding_rank"} & recorded.keys()
    config = ModelConfig(**TINY, sharing={"what": "ffn"}, embedding_rank=4)
    assert ModelConfig.model_validate(config.model_dump()) == config
