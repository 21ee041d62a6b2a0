"""AdamW against torch's, Muon against a slow literal one, and exact after a resume."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch

from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.config import TrainingConfig
from stlm.training.loop import Trainer, train
from stlm.training.optimizers import QUINTIC, Muon, build_optimizer, orthogonalize

SMALL = {
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 48,
    "vocab_size": 61,
}
RECIPE = {"optimizer": "muon", "learning_rate": 1e-2, "matrix_learning_rate": 3e-2, "weight_decay": 0.2}


def slow_orthogonal(g_RC: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """By singular value decomposition in float64: the quintic on each singular value."""
    u, s, vt = torch.linalg.svd(g_RC.double(), full_matrices=False)
    a, b, c = QUINTIC
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (8, 40), (40, 8)])
def test_the_iteration_acts_on_singular_values_alone(rows, columns):
    torch.manual_seed(0)
    g_NRC = torch.randn(3, rows, columns) * torch.tensor([1e-6, 1.0, 1e3])[:, None, None]
    found = orthogonalize(g_NRC, 5, torch.float32)
    for one, given in zip(found, g_NRC, strict=True):
        torch.testing.assert_close(one.double(), slow_orthogonal(given), atol=2e-4, rtol=2e-3)
    # Near the orthogonal factor, whatever the size of the gradient.
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(2, 8, 40), 5, torch.float32))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_bfloat16_iterates_near_float32():
    torch.manual_seed(0)
    g_NRC = torch.randn(2, 16, 48)
    exact, rounded = (orthogonalize(g_NRC, 5, dtype).float() for dtype in (torch.float32, torch.bfloat16))
    assert (exact - rounded).norm() / exact.norm() < 0.05


def gradients(model: Transformer) -> None:
    """Of a loss, and of the same scale as in training."""
    tokens_BL = torch.randint(0, 61, (2, 17))
    model.zero_grad()
    model.loss(tokens_BL[:, :-1], tokens_BL[:, 1:]).backward()


def test_adamw_is_torchs_to_the_bit():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL))
    twin = copy.deepcopy(model)
    ours = build_optimizer(model, TrainingConfig(**{**RECIPE, "optimizer": "adamw"}))
    groups = [{"params": [], "weight_decay": group["weight_decay"]} for group in ours.param_groups]
    places = {id(p): place for place, group in enumerate(ours.param_groups) for p in group["params"]}
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        groups[places[id(parameter)]]["params"].append(other)
    config = TrainingConfig(**RECIPE)
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps, fused=True)
    for step in range(3):
        gradients(model)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        for optimizer in (ours, torchs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_step_does_not_import_torchs_compiler():
    """It takes most of a second, and every training and evaluation on a CPU would pay for it."""
    code = (
        "import sys, torch, stlm.training.loop, stlm.evaluation.evaluate\n"
        "from stlm.training.optimizers import AdamW, Muon\n"
        "parameter = torch.nn.Parameter(torch.ones(2, 2))\n"
        "group = {'params': [parameter], 'betas': (0.9, 0.95), 'eps': 1e-8, 'matrices': False}\n"
        "for optimizer in (AdamW([dict(group)]), Muon([dict(group)], torch.float32)):\n"
        "    parameter.sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad(set_to_none=True)\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_muon_is_the_literal_one(ffn):
    """Each matrix alone, queries, keys, values, gates and ups apart, by singular value decomposition."""
    torch.manual_seed(0)
    config = ModelConfig(**SMALL, ffn=ffn)
    model = Transformer(config)
    optimizer = build_optimizer(model, TrainingConfig(**RECIPE))
    blocks = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    rest = [p for name, p in model.named_parameters() if name not in blocks]
    twins = [p.detach().clone() for p in rest]
    adamw = torch.optim.AdamW(
        [
            {"params": [t for t in twins if t.dim() == 2], "weight_decay": 0.2},
            {"params": [t for t in twins if t.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    expected = {name: p.detach().clone().double() for name, p in blocks.items()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    rows = {"attention.qkv": [32, 16, 16], "ffn.gate_up": [48, 48]}
    for _ in range(3):
        gradients(model)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["scale"]
        for name, parameter in blocks.items():
            g = parameter.grad.double()
            momenta[name] = 0.95 * momenta[name] + 0.05 * g
            update = 0.95 * momenta[name] + 0.05 * g
            parts = next((own for key, own in rows.items() if key in name), [len(g)])
            turned = [slow_orthogonal(u) * 0.2 * max(u.shape) ** 0.5 for u in update.split(parts)]
            expected[name] = expected[name] * (1 - 3e-2 * 0.2) - 3e-2 * torch.cat(turned)
        for parameter, twin in zip(rest, twins, strict=True):
            twin.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        for name, parameter in blocks.items():
            torch.testing.assert_close(parameter.double(), expected[name], atol=2e-4, rtol=2e-3)
            expected[name] = parameter.detach().double()
        for parameter, twin in zip(rest, twins, strict=True):
            torch.testing.assert_close(parameter.detach(), twin, atol=1e-6, rtol=1e-5)


def test_an_update_has_the_size_of_adamws():
    """A root mean square of about 0.2 of the learning rate for every shape (Liu et al. 2025)."""
    torch.manual_seed(0)
    for rows, columns in ((32, 32), (16, 64), (64, 16)):
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        group = {"params": [weight], "matrices": True, "momentum": 0.95, "parts": []}
        weight.grad = torch.randn(rows, columns)
        Muon([{**group, "lr": 1.0}], torch.float32).step()
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_all_parameters_are_in_one_group_with_the_right_rate():
    model = Transformer(ModelConfig(**SMALL, value_embeddings=1, qk_norm=True))
    optimizer = build_optimizer(model, TrainingConfig(**RECIPE))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            matrix = names[id(parameter)].startswith("blocks.") and parameter.dim() == 2
            assert group["matrices"] == matrix
            assert group["scale"] == pytest.approx(3.0 if matrix else 1.0)
            assert group["weight_decay"] == (0.2 if parameter.dim() == 2 else 0.0)


def test_adamw_too_may_have_another_rate_for_matrices():
    model = Transformer(ModelConfig(**SMALL))
    rates = {
        id(p): group["scale"]
        for group in build_optimizer(
            model, TrainingConfig(learning_rate=1e-2, matrix_learning_rate=5e-3)
        ).param_groups
        for p in group["params"]
    }
    assert rates[id(model.embedding.weight)] == rates[id(model.norm.weight)] == 1.0
    assert rates[id(model.blocks[0].ffn.down.weight)] == pytest.approx(0.5)


def test_its_state_is_plain_and_exact():
    """Saved and loaded with `weights_only` between two steps, the third is the same to the bit."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL))
    optimizer = build_optimizer(model, TrainingConfig(**RECIPE))
    for _ in range(2):
        gradients(model)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Transformer(ModelConfig(**SMALL))
    other.load_state_dict(state["model"])
    resumed = build_optimizer(other, TrainingConfig(**RECIPE))
    resumed.load_state_dict(state["optimizer"])
    gradients(model)
    for one, its in zip(other.parameters(), model.parameters(), strict=True):
        one.grad = its.grad.clone()
    optimizer.step()
    resumed.step()
    for one, its in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, its)


def test_a_run_with_muon_and_scheduled_dropout_resumes_exactly(make_run, monkeypatch):
    recipe = {"optimizer": "muon", "schedule": "wsd", "dropout_schedule": "triangular"}
    plain, broken = make_run("plain", **recipe), make_run("broken", **recipe)
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
    one, other = (
        load_checkpoint(run.folder / "checkpoints" / "step-0000012")[0].state_dict()
        for run in (plain, broken)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
