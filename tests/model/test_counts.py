"""Counts read off the modules: against the closed formulas, the committed records and torch's own counter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import closed_formulas
import pytest
import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stlm.errors import UserError
from stlm.model.build import build_model
from stlm.model.config import CHUNK_BYTES, ModelConfig
from stlm.model.counts import (
    GROUPS,
    active_parameters,
    build_on_meta,
    parameter_counts,
    parameter_groups,
    total_counts,
    training_flops,
    training_flops_per_token,
)
from stlm.model.flops import children_flops, forward_flops
from stlm.study.load import load_study
from stlm.study.runs import Run
from stlm.techniques.base import Technique

ROOT = Path(__file__).parents[2]
CATALOGUES = {"benchmarks", "corpora", "models", "vocabularies"}
STUDIES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml") if path.stem not in CATALOGUES)
TINY = {"layers": 5, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 16, "vocab_size": 61}
BYTES = {"width": 16, "heads": 2, "ffn_width": 24, "encoder_layers": 1, "decoder_layers": 3}
# Together: every key that changes a count.
OPTIONS = [
    {"norm": "layernorm", "ffn": "gelu", "positions": "learned"},
    {"tied": False, "positions": "sinusoidal", "ffn": "relu2"},
    {"qk_norm": True, "qkv_shift": True, "value_embeddings": 2, "logit_softcap": 30.0, "zero_init": True},
    {"sharing": {"what": "ffn", "order": "sandwich"}, "lora": {"rank": 2, "what": "attention"}},
    {"sharing": {"what": "all"}, "lora": {"rank": 2}, "low_rank": {"ffn": 6, "qkv": 5}, "tied": False},
    {"embedding_rank": 8},
    {"embedding_rank": 8, "tied": False},
    *(
        {"bytes": BYTES | {"pooling": pooling}, "vocab_size": 258, "tied": tied}
        for pooling in ("mean", "attention", "last", "query")
        for tied in (True, False)
    ),
    {"bytes": BYTES, "vocab_size": 258, "qk_norm": True, "qkv_shift": True, "lora": {"rank": 2}},
]


def tiny(**options: object) -> ModelConfig:
    return ModelConfig(**TINY | options)


def agree(config: ModelConfig) -> None:
    """Raises where the counts are not those of the closed formulas."""
    groups, expected = parameter_groups(build_on_meta(config)), closed_formulas.parameter_groups(config)
    assert list(groups.items()) == list(expected.items())
    assert parameter_counts(config) == closed_formulas.parameter_counts(config)
    sizes = ((CHUNK_BYTES, True), (4.371, False), (17.25, True))
    for size in sizes if config.bytes else sizes[:1]:
        found = training_flops_per_token(config, *size)
        expected = closed_formulas.training_flops_per_token(config, *size)
        # Bytes of a chunk are a fraction, sums of which depend on their order.
        assert found == pytest.approx(expected, rel=1e-14) if config.bytes else found == expected


@pytest.mark.parametrize("study", STUDIES)
def test_counts_of_every_run_are_those_of_the_closed_formulas(study, project):
    for config in {run.model for run in load_study(study).runs.values()}:
        agree(config)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_of_every_option_are_those_of_the_closed_formulas(options):
    agree(tiny(**options))


def test_counts_are_those_of_all_committed_records():
    studies = sorted((ROOT / "results").glob("*/records/runs.json"))
    runs = {
        (path.parts[-3], run): record["train"]
        for path in studies
        for run, record in json.loads(path.read_text(encoding="utf-8"))["runs"].items()
    }
    assert len(runs) > 100
    with_techniques = [path for path, record in runs.items() if record.get("techniques")]
    for study, name in with_techniques:  # their FLOPs may be those of other runs, too
        run, record = load_study(study, root=ROOT).runs[name], runs.pop((study, name))
        counted = run.parameters.record()
        if "active" not in record["parameters"]:  # as in records of earlier versions
            counted.pop("active", None)
        assert counted == record["parameters"], name
        assert math.isclose(run.flops + prepared_flops(record), record["flops"], rel_tol=1e-12), name
    assert with_techniques
    for path, record in runs.items():
        config = ModelConfig.model_validate(record["model"])
        assert parameter_counts(config).record() == record["parameters"], path
        if config.bytes is None:
            counted = record["tokens"] * training_flops_per_token(config) + prepared_flops(record)
            assert math.isclose(counted, record["flops"], rel_tol=1e-12), path
        else:
            # The mean bytes of a chunk are not in the record: they are what the closed formula gives it for.
            ends = record["tokenizer"].partition("-")[0] not in ("spaces", "stride")
            size = chunk_bytes(config, record["flops"] / record["tokens"], ends)
            found = record["tokens"] * training_flops_per_token(config, size, ends)
            assert math.isclose(found, record["flops"], rel_tol=1e-12), path


def prepared_flops(record) -> float:
    """What a run spent before its first step, such as measuring what to cut."""
    return sum(part.get("extra_flops", 0.0) for part in record.get("prepared", {}).values())


def chunk_bytes(config: ModelConfig, flops: float, ends: bool) -> float:
    """The mean bytes of a chunk for which the closed formula gives so many FLOPs a token."""
    low, high = 0.0, 1000.0
    while (middle := (low + high) / 2) not in (low, high):
        if closed_formulas.training_flops_per_token(config, middle, ends) < flops:
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_the_model_on_meta_is_the_one_that_is_trained(options):
    config = tiny(**options)
    counted, trained = build_on_meta(config), build_model(config)
    assert all(tensor.is_meta for tensor in (*counted.parameters(), *counted.buffers()))
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (counted, trained)]
    assert shapes[0] == shapes[1]
    buffers = [{n: b.shape for n, b in model.named_buffers()} for model in (counted, trained)]
    assert buffers[0] == buffers[1]
    assert sum(parameter_groups(trained).values()) == sum(p.numel() for p in trained.parameters())


def test_counting_draws_no_random_numbers():
    before = torch.get_rng_state()
    build_on_meta.cache_clear()
    parameter_counts.cache_clear()
    parameter_counts(tiny(lora={"rank": 2}, low_rank={"ffn": 6}))
    assert torch.equal(before, torch.get_rng_state())


def test_counting_does_not_import_torchs_compiler():
    """It would take a second or two of each `stlm study`."""
    code = (
        "import sys; from stlm.model.counts import *\n"
        "lora, byte_level = {'lora': {'rank': 2}}, {'bytes': {}, 'vocab_size': 258}\n"
        "for keys in ({}, {'low_rank': {'ffn': 64}}, lora, {'positions': 'sinusoidal'}, byte_level):\n"
        "    config = ModelConfig(**{'vocab_size': 100} | keys)\n"
        "    assert parameter_counts(config).total and training_flops_per_token(config)\n"
        "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_a_study_does_not_import_torch(project):
    code = (
        "import sys; from stlm.study.load import load_study\n"
        "load_study('desk')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=project, check=False).returncode == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"embedding_rank": 8, "tied": False}, {"lora": {"rank": 2}}, {"low_rank": {"ffn": 6}}],
    ids=str,
)
def test_flops_are_torchs_but_for_the_upper_half_of_attention(options, torch_operations):
    """Torch counts both products of attention over all pairs of positions; half of them are masked.

    It does not see into kernels.
    """
    config = tiny(**options)
    model = build_model(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, config.context, dtype=torch.long))
    by_operation = counter.get_flop_counts()["Global"]
    whole = 4 * config.layers * config.context**2 * config.width
    attention = sum(count for operation, count in by_operation.items() if "bmm" in str(operation))
    assert attention == whole
    assert forward_flops(model, config.context) == sum(by_operation.values()) - whole / 2


@pytest.mark.parametrize("key", ["width", "ffn_width", "context"])
@pytest.mark.parametrize("size", [2**62, 10**30])
def test_a_model_too_large_to_be_numbered_is_refused(key, size):
    config = tiny(**{key: size}, positions="learned")
    with pytest.raises(UserError, match=rf"{key}: {size}.* more weights than can be counted"):
        parameter_counts(config)


class Routed(nn.Module):
    """A block that takes only some of the tokens, chosen by a router."""

    def __init__(self, block: nn.Module, width: int, kept: float) -> None:
        super().__init__()
        self.block, self.router, self.kept = block, nn.Linear(width, 1, bias=False), kept
        self.parameter_groups = {"router": "routers"}

    def flops(self, length: float) -> float:
        return forward_flops(self.router, length) + forward_flops(self.block, self.kept * length)


class Routers(Technique):
    """Routers in front of some blocks, and a module about which nothing is stated."""

    layers: list[int] = Field(default=[0, 1, 2, 3, 4])
    kept: float = 0.25

    def build(self, model: nn.Module) -> None:
        for number in self.layers:
            model.blocks[number] = Routed(model.blocks[number], model.config.width, self.kept)
        model.extra = nn.Sequential(nn.Linear(32, 3), nn.LayerNorm(3))

    def extra_flops_per_token(self, run: Run) -> float:
        return 1000.0 * run.model.layers


def test_a_technique_is_counted_by_what_it_builds():
    config = tiny()
    before, after = (parameter_groups(build_on_meta(config, own)) for own in ((), (Routers(),)))
    assert after == before | {"routers": 5 * 32, "extra": 32 * 3 + 3 + 6}
    assert list(after).index("FFN") < list(after).index("routers") < list(after).index("norms")
    counts = parameter_counts(config, (Routers(),))
    assert counts == total_counts(after)
    assert counts.total == sum(p.numel() for p in build_on_meta(config, (Routers(),)).parameters())
    # A quarter of the tokens is multiplied with the blocks' matrices, a sixteenth of the pairs attended to.
    products, pairs = before["attention"] + before["FFN"], 5 * 2 * 32 * 16 / 2
    rest = before["token embedding"] + 5 * 32 + 32 * 3
    expected = 6 * (products / 4 + pairs / 16 + rest)
    assert training_flops_per_token(config, techniques=(Routers(),)) == expected


def test_a_run_is_counted_with_its_techniques(project):
    plain = load_study("smoke").runs["baseline"]
    model = tiny(vocab_size=plain.model.vocab_size)
    runs = [
        plain.model_copy(update={"model": model, "techniques": techniques})
        for techniques in ({}, {"routers": Routers()}, {"routers": Routers(layers=[4])})
    ]
    totals = [run.parameters.total for run in runs]
    assert [total - totals[0] for total in totals] == [0, 5 * 32 + 105, 32 + 105]
    expected = training_flops_per_token(model, techniques=(Routers(layers=[4]),)) + 5000
    assert runs[2].flops_per_token == expected
    assert runs[2].flops == runs[2].tokens * expected


class Holder(nn.Module):
    """Modules and parameters of several groups."""

    def __init__(self, **statements: object) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(7))
        for name, value in statements.items():
            setattr(self, name, value)


def test_who_says_the_group_of_a_parameter():
    holder = Holder(parameter_group="mine", parameter_groups={"gain": "norms", "second": "head"})
    model = nn.ModuleDict({"top": holder})
    assert parameter_groups(model) == {"mine": 9, "norms": 7, "head": 15}
    holder.first.parameter_group = "adapters"
    assert parameter_groups(model) == {"adapters": 9, "norms": 7, "head": 15}
    # Above it, a module may overrule all that is said within.
    outer = nn.ModuleDict({"inner": holder, "named": nn.Linear(1, 1, bias=False)})
    outer.parameter_group, outer.one_group, outer.parameter_groups = "all", True, {"named": "positions"}
    assert parameter_groups(outer) == {"positions": 1, "all": 31}
    assert parameter_groups(nn.ModuleDict({"top": Holder()})) == {"top": 31}


def test_a_shared_parameter_is_counted_once_at_its_first_place():
    model = nn.ModuleDict({"one": nn.Linear(2, 3, bias=False), "two": nn.Linear(2, 3, bias=False)})
    model["two"].weight = model["one"].weight
    assert parameter_groups(model) == {"one": 6}
    assert forward_flops(model, 10) == 2 * 2 * 6 * 10


def test_a_module_that_is_used_twice_costs_twice():
    layer = nn.Linear(2, 3)
    assert forward_flops(nn.Sequential(layer, nn.ReLU(), layer), 10) == 2 * (2 * 6 * 10)
    assert children_flops(nn.ModuleDict({"a": layer, "b": layer}), 10, without=("a",)) == 2 * 6 * 10


@pytest.mark.parametrize("module", [nn.Conv1d(2, 3, 1), nn.Bilinear(2, 2, 2), nn.MultiheadAttention(4, 2)])
def test_a_matrix_of_unknown_use_is_refused(module):
    with pytest.raises(
        NotImplementedError, match=rf"{type(module).__name__} holds the matrix '\w+': .*flops\(length\)"
    ):
        forward_flops(nn.Sequential(module), 10)


def test_flops_of_a_training_are_three_forward_passes():
    model = build_on_meta(tiny())
    assert training_flops(model, 8) == 3 * forward_flops(model, 8) < training_flops(model, 16) / 2


def test_the_groups_are_all_there():
    """Together the options have a model in which each of the known groups has parameters."""
    found = {name for options in OPTIONS for name in parameter_groups(build_on_meta(tiny(**options)))}
    assert found == set(GROUPS)


class Sometimes(nn.Module):
    """Half of a layer is used by a token, of which a quarter by another use, and all of the bias."""

    active_shares = {"layer": 0.5, "inner": 0.25}  # noqa: RUF012

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 5, bias=False), inner
        self.bias = nn.Parameter(torch.zeros(3))


def test_active_parameters_are_the_shares_that_modules_state():
    plain = nn.Linear(6, 2, bias=False)
    assert active_parameters(plain) == 12
    one = Sometimes(plain)
    assert active_parameters(one) == 20 / 2 + 12 / 4 + 3
    assert active_parameters(Sometimes(one)) == 20 / 2 + (20 / 2 + 12 / 4 + 3) / 4 + 3
    # Several uses of a weight add up, to all of it at most.
    assert active_parameters(nn.ModuleList([one, Sometimes(plain)])) == 20 + 12 / 2 + 6
    assert active_parameters(nn.ModuleList([Sometimes(plain) for _ in range(6)])) == 6 * (10 + 3) + 12
