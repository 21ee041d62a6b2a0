"""Studies whose runs start from published models, or from larger runs."""

from __future__ import annotations

import pytest

from stlm.engines import dvc_stages, fetched, train_inputs
from stlm.errors import UserError
from stlm.study.load import load_study

STUDY = """\
description: Models cut from a published one.
corpus: synthetic
tokenizer: hf:smollm2_135m:4096
baseline: scratch
model: {layers: 12, width: 384, heads: 6, kv_heads: 3, ffn_width: 768, rope_theta: 100000.0, context: 256}
training: {steps: 10, warmup_steps: 1}
evaluation: {benchmarks: []}
variants:
  scratch: {}
  cut:
    training: {start_from: smollm2_135m, inherit: {layers: loss, width: importance}}
  whole:
    tokenizer: hf:smollm2_135m
    model: {layers: 30, width: 576, heads: 9, ffn_width: 1536}
    training: {start_from: smollm2_135m}
  round:
    model: {layers: 8}
    training: {start_from: cut}
  bytes:
    tokenizer: bytes
  trained:
    model: {kv_heads: 6, positions: learned, context: 64}
"""


@pytest.fixture
def cutting(project):
    (project / "params" / "cutting.yaml").write_text(STUDY)
    return project


def test_roles_name_models_and_runs(cutting):
    study = load_study("cutting")
    cut, again = study.runs["cut"], study.runs["round"]
    assert (cut.sources, cut.depends) == ({"start": "smollm2_135m"}, {})
    assert (again.sources, again.depends) == ({}, {"start": "cut"})
    assert cut.training.inherit.layers == "loss" and "inherit" not in again.training.model_dump()
    assert "sources" not in again.model_dump() and cut.model_dump()["sources"] == cut.sources
    tokens = "data/tokens/synthetic/hf:smollm2_135m:4096"
    assert train_inputs(study, cut) == [tokens, "data/raw/smollm2_135m"]
    assert train_inputs(study, again) == [tokens, "results/cutting/runs/cut/checkpoints"]
    stages = dvc_stages(study)
    assert stages["train-cutting-cut"]["deps"] == train_inputs(study, cut)
    assert "smollm2_135m" in fetched(study) and "fetch-smollm2_135m" in stages


def test_a_variant_may_not_have_a_models_name(cutting):
    text = STUDY.replace("  bytes:\n", "  smollm2_135m:\n")
    (cutting / "params" / "cutting.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"variants.smollm2_135m: a model in params/models.yaml has this name"
    ):
        load_study("cutting")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cut.training.start_from=smolm2_135m"], "no variant of this study and no model in.*'smollm2_135m'"),
        (["cut.model={layers: 31}"], "has model.layers: 30, the run 31; a model may be cut, not grown"),
        (
            ["cut.model={heads: 4, kv_heads: 2}"],
            "model.heads: 4 of width 96, expected heads of width 64: .* 6 of",
        ),
        (["cut.model={kv_heads: 1}"], "1 for 6 heads are groups of 6, .* 3 groups of 3; expected 2, 3, 6"),
        (["cut.model={rope_theta: 10000}"], "has model.rope_theta: 100000.0, the run 10000.0; weights of"),
        (["cut.model={ffn: gelu}"], "has model.ffn: swiglu, the run gelu"),
        (["cut.model={qk_norm: true}"], "has model.qk_norm: False, the run True"),
        (["cut.model={sharing: {what: ffn}}"], "has model.sharing: None, the run {'what': 'ffn'"),
        (["cut.training.inherit.layers=[0, 1]"], r"inherit.layers: \[0, 1\] names 2 layers, .*layers is 12"),
        (["cut.training.inherit.layers=[1, 0]"], r"expected layers in ascending order, each once"),
        (
            ["cut.training.inherit.layers=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 30]"],
            "inherit.layers: 30: the last of its layers is 29",
        ),
        (["cut.training.inherit.ffn=wands"], "wands"),
        (["cut.tokenizer=bytes"], "has the tokenizer hf:smollm2_135m, the run bytes; .*of hf:smollm2_135m:N"),
        (["round.tokenizer=hf:smollm2_135m:8192"], "has the tokenizer hf:smollm2_135m:4096, the run hf:smol"),
        (["round.tokenizer=hf:smollm2_135m"], "must be the same, or of hf:smollm2_135m:N a smaller one"),
        (["round.corpus=simple_wiki"], "has the corpus synthetic, the run simple_wiki, and so another"),
        (
            [
                "scratch.model={norm: layernorm}",
                "round.training.start_from=scratch",
                "round.model={norm: layernorm, width: 320, heads: 5, kv_heads: 5}",
            ],
            "model.norm: layernorm: the width",
        ),
        (
            [
                "scratch.model={positions: sinusoidal}",
                "round.training.start_from=scratch",
                "round.model={positions: sinusoidal, width: 320, heads: 5, kv_heads: 5}",
            ],
            "sinusoidal positions are fixed",
        ),
        (
            [
                "scratch.model={low_rank: {ffn: 64}}",
                "round.training.start_from=scratch",
                "round.model={layers: 8, low_rank: {ffn: 64}}",
            ],
            "model.low_rank: .*such a model is not cut",
        ),
        (
            ["round.training.start_from=trained", "round.model={kv_heads: 6, positions: learned, layers: 8}"],
            "has model.context: 64, the run 256",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(cutting, overrides, expected):
    with pytest.raises(UserError, match=expected):
        load_study("cutting", [f"variants.{override}" for override in overrides])


@pytest.mark.parametrize(
    "override",
    [
        "cut.model={width: 448, heads: 7, kv_heads: 7}",
        "cut.model={kv_heads: 2}",
        "cut.model={qkv_shift: true, value_embeddings: 2, tied: false, low_rank: {ffn: 64}, lora: {rank: 4}}",
        "round.tokenizer=hf:smollm2_135m:1024",
        "whole.corpus=simple_wiki",
        "round.data={attention: within}",
    ],
)
def test_what_can_be_cut_is_loaded(cutting, override):
    also = ["variants.round.training.start_from=null"] if override.startswith("cut") else []
    load_study("cutting", [f"variants.{override}", *also])


def test_techniques_with_weights_of_their_own_are_refused(cutting):
    with pytest.raises(
        UserError, match=r"'scratch': its techniques.pauses does not support weights of another"
    ):
        load_study(
            "cutting",
            ["variants.scratch.techniques={pauses: {}}", "variants.round.training.start_from=scratch"],
        )
    with pytest.raises(
        UserError, match=r"techniques.experts.upcycle: 'scratch' is larger than the run's model"
    ):
        load_study(
            "cutting",
            [
                "variants.round.training.start_from=null",
                "variants.round.techniques={experts: {upcycle: scratch}}",
            ],
        )
