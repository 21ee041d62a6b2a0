"""Shared, adapted and factorized models in training: kept once, resumed, watched, begun from others."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open

from stlm.errors import UserError
from stlm.files import read_json
from stlm.model.build import build_model
from stlm.model.counts import training_flops_per_token
from stlm.model.rows import Rows
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.config import TrainingConfig
from stlm.training.divergence import Part, locate
from stlm.training.loop import Trainer, train
from stlm.training.optimizers import build_optimizer
from stlm.training.watch import Watch

REDUCED = {
    "layers": 4,
    "sharing": {"what": "all", "order": "sandwich"},
    "lora": {"rank": 2},
    "low_rank": {"ffn": 6},
    "embedding_rank": 16,
}
SHARED = {"layers": 4, "sharing": {"what": "all", "order": "cyclic", "units": 2}}
LAST = "step-0000012"


def model_of(run):
    torch.manual_seed(0)
    return build_model(run.model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_has_shared_tensors_once(make_run, tmp_path, tied):
    model = model_of(make_run(model={**REDUCED, "tied": tied})).eval()
    save_checkpoint(tmp_path / LAST, model, {"step": 1, "tokens": 8})
    with safe_open(tmp_path / LAST / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - no mapping
    assert sum(kept.values()) == sum(p.numel() for p in model.parameters())
    assert "blocks.1.ffn.down.left.weight" in kept and "blocks.2.ffn.down.left.weight" not in kept
    loaded, _ = load_checkpoint(tmp_path / LAST)
    assert loaded.blocks[1].attention.qkv.weight is loaded.blocks[2].attention.qkv.weight
    tokens_BL = torch.randint(0, 257, (2, 16))
    torch.testing.assert_close(loaded(tokens_BL), model(tokens_BL), atol=0, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_once(make_run, optimizer):
    model = model_of(make_run(model=REDUCED))
    groups = build_optimizer(model, TrainingConfig(optimizer=optimizer)).param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    if optimizer == "muon":
        names = {p: name for name, p in model.named_parameters()}
        for group in groups:
            for parameter in group["params"]:
                assert group["matrices"] == (names[parameter].startswith("blocks.") and parameter.dim() == 2)
                assert sum(group.get("parts", ())) in (0, len(parameter))
        parts = {names[p]: tuple(group["parts"]) for group in groups[2:] for p in group["params"]}
        # Factors that write are of several matrices where the whole is; those that read are of one.
        assert parts["blocks.0.ffn.gate_up.left.weight"] == (48, 48)
        assert parts["blocks.0.ffn.gate_up.right.weight"] == ()
        assert parts["blocks.0.attention.qkv.adapter.b.weight"] == (32, 16, 16)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_reduced_run_resumes_exactly(make_run, monkeypatch, optimizer):
    plain, broken = (make_run(name, model=REDUCED, optimizer=optimizer) for name in ("plain", "broken"))
    train(plain)
    step = Trainer.step

    def stop(self):
        if self.state.progress.step == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.setattr(Trainer, "step", step)
    train(broken)
    one, other = (load_checkpoint(run.folder / "checkpoints" / LAST)[0] for run in (plain, broken))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert read_json(plain.folder / "train.json")["parameters"]["total"] == sum(
        p.numel() for p in one.parameters()
    )


def test_a_shared_weight_is_watched_in_each_layer_that_uses_it(make_run):
    model = model_of(make_run(model=SHARED))
    watch = Watch(model, 1, model.hidden, {})
    tokens = torch.randint(257, (4, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    watch.before_update(1, tokens)
    watch.after_update(1)
    watch.drain()
    rows = {row["layer"]: row for row in watch.rows}
    assert list(rows) == ["embedding", "block 1", "block 2", "block 3", "block 4", "head"]
    for number, block in enumerate(model.blocks):
        gradients = torch.cat([p.grad.flatten() for p in block.parameters()])
        weights = torch.cat([p.detach().flatten() for p in block.parameters()])
        row = rows[f"block {number + 1}"]
        assert row["grad_norm"] == pytest.approx(gradients.norm().item(), rel=1e-3)
        assert row["weight_rms"] == pytest.approx(weights.square().mean().sqrt().item(), rel=1e-3)


def test_a_broken_shared_weight_names_all_its_layers(make_run):
    run = make_run(model=SHARED)
    model = model_of(run)
    tokens = [Part(0, 0, Rows.of(torch.randint(257, (4, 33))))]

    def loss_of(rows):
        return model.loss(rows.tokens_BL, rows.targets_BL)

    with torch.no_grad():
        model.blocks[3].ffn.down.weight[0, 0] = math.nan
    assert "the weights of block 2, block 4 were" in locate(model, loss_of, tokens).sentence
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    assert "the weights of all layers" in locate(model, loss_of, tokens).sentence
    model = model_of(run)
    model.blocks[1].ffn.down.weight.register_hook(lambda gradient: gradient * math.inf)
    place = locate(model, loss_of, tokens)
    assert "the gradient of blocks.1.ffn.down.weight (block 2, block 4) is the first" in place.sentence


@pytest.mark.parametrize("low_rank", [{"ffn": 9, "attention": 7}, None])
def test_a_run_goes_on_from_anothers_weights_and_text(make_run, low_rank):
    origin = make_run("origin")
    train(origin)
    run = make_run("cut", model={"low_rank": low_rank}, start_from="origin", steps=3, warmup_steps=0)
    trainer, first = Trainer(run), Trainer(origin)
    assert (trainer.setup.micro_batches.rows.batch(0) == first.setup.micro_batches.rows.batch(12)).all()
    source, _ = load_checkpoint(origin.folder / "checkpoints" / LAST)
    assert torch.equal(trainer.setup.model.embedding.weight, source.embedding.weight)
    if low_rank is None:
        assert torch.equal(trainer.setup.model.blocks[0].ffn.down.weight, source.blocks[0].ffn.down.weight)
    train(run)
    start = read_json(run.folder / "train.json")["depends"]["start"]
    assert (start["run"], start["step"], start["tokens"]) == ("origin", 12, origin.tokens)
    assert start["flops"] == origin.tokens * training_flops_per_token(origin.model)
    if low_rank:
        assert 0 < start["truncation"]["relative_error"] < 1
        assert len(start["truncation"]["by_matrix"]) == 4
    else:
        assert "truncation" not in start
    fresh = make_run("cut", model={"low_rank": low_rank}, steps=3)
    assert Trainer(run).setup.fingerprint != Trainer(fresh).setup.fingerprint


def test_a_start_without_its_checkpoint_says_what_to_run(make_run):
    with pytest.raises(UserError, match=r"origin/checkpoints: no checkpoint; run: stlm train test origin"):
        Trainer(make_run("cut", start_from="origin"))


def test_records_without_a_start_are_as_before(make_run):
    assert "start_from" not in make_run().training.model_dump()
