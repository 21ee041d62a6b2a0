"""What is recorded by layer, against plain computations; that watching changes nothing."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from technique_runs import Wrapped, with_techniques
from torch import Tensor
from torch.nn import functional as F

from stlm.files import read_json
from stlm.model.config import ModelConfig
from stlm.model.layout import CausalRows
from stlm.model.transformer import Transformer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.loop import Trainer, train
from stlm.training.optimizers import build_optimizer
from stlm.training.watch import WATCH_COLUMNS, Watch, attention_figures, layer_of


def small_model(**keys) -> Transformer:
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 16}
    return Transformer(ModelConfig(**{**sizes, "vocab_size": 60, "dropout": 0.5, **keys}))


def rms(x: Tensor) -> float:
    return math.sqrt(sum(v * v for v in x.flatten().tolist()) / x.numel())


def norm(tensors) -> float:
    return math.sqrt(sum(v * v for t in tensors for v in t.flatten().tolist()))


def table(run):
    with (run.folder / "watch.csv").open() as file:
        return list(csv.DictReader(file))


def weights(run, step):
    return load_checkpoint(run.folder / "checkpoints" / f"step-{step:07d}")[0].state_dict()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_figures_are_those_of_a_plain_computation(make_run, tied, positions):
    model = small_model(tied=tied, positions=positions)
    training = make_run().training
    optimizer = build_optimizer(model, training)
    watch = Watch(model, 3, model.hidden, {})
    tokens = torch.randint(60, (4, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    watch.before_update(3, tokens)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    watch.after_update(3)
    watch.drain()
    rows = {row.pop("layer"): row for row in watch.rows}
    assert list(rows) == ["embedding", "block 1", "block 2", "head"]
    assert all(row.pop("step") == 3 for row in rows.values())
    after = dict(model.named_parameters())
    seen: dict[str, dict[str, float]] = {layer: {} for layer in rows}
    clipped = {}
    for layer, own in seen.items():
        names = [name for name in before if layer_of(name) == layer]
        own["weight_rms"] = norm(before[name] for name in names) / math.sqrt(
            sum(before[name].numel() for name in names)
        )
        own["update_ratio"] = norm((after[name] - before[name]).detach() for name in names) / norm(
            before[name] for name in names
        )
        clipped[layer] = norm(gradients[name] for name in names)
    # The gradients compared with were clipped since: their shares are the same.
    whole = math.sqrt(sum(row["grad_norm"] ** 2 for row in rows.values()))
    assert math.sqrt(sum(value**2 for value in clipped.values())) == pytest.approx(1e-3, rel=1e-3)
    assert whole > 0.1
    for layer, row in rows.items():
        assert row.pop("grad_norm") / whole == pytest.approx(clipped[layer] / 1e-3, rel=1e-3)
    model.load_state_dict(before, strict=False)
    model.eval()
    with torch.no_grad():
        x = model.embedding(tokens[:, :-1])
        if positions == "learned":
            x = x + model.positions.weight
        rope = (model.cos_LE[:, None], model.sin_LE[:, None]) if positions == "rope" else None
        seen["embedding"]["residual_rms"] = rms(x)
        for number, block in enumerate(model.blocks):
            own = seen[f"block {number + 1}"]
            attention = block.attention(block.attention_norm(x), rope, CausalRows(16))
            ffn = block.ffn(block.ffn_norm(x + attention))
            x = x + attention + ffn
            own |= {"attention_rms": rms(attention), "ffn_rms": rms(ffn), "residual_rms": rms(x)}
        seen["head"]["residual_rms"] = rms(model.norm(x))
    for number in (1, 2):
        logit, entropy = (rows[f"block {number}"].pop(f"attention_{key}") for key in ("logit_max", "entropy"))
        assert math.isfinite(logit) and 0 < entropy < math.log(16)
    for layer, row in rows.items():
        assert row == pytest.approx(seen[layer], rel=1e-4), layer


@pytest.mark.parametrize("kind", ["causal", "allowed", "added", "none"])
def test_logits_and_entropy_query_by_query(kind):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 4, 6, 8), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8)
    sees = torch.ones(6, 6, dtype=torch.bool).tril() if kind == "causal" else torch.ones(6, 6).bool()
    mask = None
    if kind in ("allowed", "added"):
        sees = (torch.rand(3, 1, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
        mask = sees if kind == "allowed" else torch.zeros(3, 1, 6, 6).masked_fill(~sees, -math.inf)
        sees = sees[0, 0]
    largest, entropies = -math.inf, []
    for head in range(4):
        for i in range(6):
            keys = [j for j in range(6) if sees[i, j]]
            logits = [(q[0, head, i] @ k[0, head // 2, j]).item() / math.sqrt(8) for j in keys]
            largest = max(largest, *logits)
            total = sum(map(math.exp, logits))
            shares = [math.exp(logit) / total for logit in logits]
            entropies.append(-sum(p * math.log(p) for p in shares))
    logit, entropy = attention_figures(q, k, mask, kind == "causal", None)
    assert logit.item() == pytest.approx(largest, rel=1e-5)
    assert entropy.item() == pytest.approx(sum(entropies) / 24, rel=1e-5)
    # The attention that a test of weights by hand is about is the one that torch computes.
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)[0, 3, 5],
        torch.tensor(shares) @ v[0, 1, keys],
    )


def test_nothing_stays_hooked_and_the_mode_is_as_it_was():
    model = small_model()
    watch = Watch(model, 1, model.hidden, {})
    tokens = torch.randint(60, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    before = torch.random.get_rng_state()
    watch.before_update(1, tokens)
    watch.after_update(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_watching_changes_no_weight_and_no_loss(make_run):
    recipe = {"steps": 12, "checkpoints": [5], "accumulation": 2}
    blind = make_run("blind", model={"layers": 2}, watch_every=0, **recipe)
    watched = make_run("watched", model={"layers": 2}, watch_every=1, **recipe)
    train(blind)
    train(watched)
    for step in (5, 12):
        one, other = weights(blind, step), weights(watched, step)
        for name in one:
            assert torch.equal(one[name], other[name]), name
    curves = [(run.folder / "curve.csv").read_text().splitlines() for run in (blind, watched)]
    losses = [[line.split(",")[4:6] for line in lines] for lines in curves]
    assert losses[0] == losses[1]
    assert table(blind) == []
    rows = table(watched)
    assert list(rows[0]) == WATCH_COLUMNS
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13) for _ in range(4)]


def test_the_steps_watched_are_the_first_and_every_so_many(make_run):
    run = make_run(steps=12, watch_every=5, log_every=4)
    train(run)
    assert [row["step"] for row in table(run) if row["layer"] == "head"] == ["1", "5", "10"]


def test_an_interrupted_run_has_the_records_of_an_undisturbed_one(make_run, monkeypatch):
    recipe = {"steps": 40, "watch_every": 3, "save_every": 10, "warmup_steps": 0}
    plain, broken = make_run("plain", **recipe), make_run("broken", **recipe)
    record, step = Watch.record, Trainer.step

    def spiking(self, number, loss, norm):
        """The loss jumps at two steps; the first attempt is killed after them, its last state older."""
        record(self, number, loss + 9 if number in (29, 30) else loss, norm)

    def interrupted(self):
        if self.state.progress.step == 33:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Watch, "record", spiking)
    train(plain)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        train(broken)
    train(broken)
    assert (plain.folder / "watch.csv").read_text() == (broken.folder / "watch.csv").read_text()
    spikes = [read_json(run.folder / "train.json")["loss_spikes"] for run in (plain, broken)]
    assert spikes[0] == spikes[1]
    assert [spike["step"] for spike in spikes[0]] == [29]
    assert spikes[0][0]["recovered_after"] in range(2, 12)
    assert spikes[0][0]["rise"] > 8


def test_the_first_step_that_is_not_finite_is_known_when_a_row_is_due():
    """On a GPU no step is looked at before."""
    model = small_model()
    watch = Watch(model, 0, model.hidden, {})
    one = torch.tensor(1.0)
    watch.record(7, one, one)
    assert watch.first_not_finite() is None
    watch.record(8, one, torch.tensor(math.inf))
    watch.record(9, torch.tensor(math.nan), one)
    step, loss, norm = watch.first_not_finite()
    assert (step, loss.item(), norm.item()) == (8, 1.0, math.inf)


def test_figures_that_were_measured_elsewhere_join_the_rows_of_their_step():
    watch = Watch(small_model(), 1, None, {})
    watch.rows += [{"step": 3, "layer": "block 1", "rms": 1.0}, {"step": 4, "layer": "block 1", "rms": 2.0}]
    watch.add(4, {"block 1": {"load_1": 1 / 3}, "block 2": {"load_1": 0.5}})
    assert watch.rows == [
        {"step": 3, "layer": "block 1", "rms": 1.0},
        {"step": 4, "layer": "block 1", "rms": 2.0, "load_1": 0.33333},
        {"step": 4, "layer": "block 2", "load_1": 0.5},
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_blocks_that_a_technique_wraps_are_watched_as_the_others(make_run, optimizer):
    keys = {"model": {"layers": 2}, "watch_every": 4, "optimizer": optimizer}
    plain = make_run("plain", **keys)
    wrapped = with_techniques(make_run("wrapped", **keys), wrapped=Wrapped())
    for run in (plain, wrapped):
        train(run)
    assert table(plain) == table(wrapped) and table(plain)[1]["ffn_rms"]
