"""Objectives of named parts: the plain one, what techniques add, and their columns in the curve."""

from __future__ import annotations

import csv

import dvclive
import pytest
import torch
from pydantic import PrivateAttr
from safetensors.torch import load_file
from technique_runs import with_techniques

from stlm.errors import UserError
from stlm.files import read_json
from stlm.techniques.base import Technique
from stlm.training.curve import validate
from stlm.training.loop import Trainer, train
from stlm.training.objective import Forward
from stlm.training.records import CURVE_COLUMNS


class ZLoss(Technique):
    """The squared logarithm of the softmax's sum, weighted, in steps up to `last`."""

    supports = frozenset({"compile"})
    weight: float
    last: int = 10**9
    _prepared: list = PrivateAttr(default_factory=list)
    _steps: list = PrivateAttr(default_factory=list)

    def prepare(self, run, device, group) -> None:
        self._prepared.append((run.name, device.type, group.size))

    def before_step(self, model, step, steps) -> None:
        self._steps.append((step, steps))

    def objective(self, forward: Forward) -> dict[str, torch.Tensor]:
        if forward.step > self.last:
            return {}
        logits_NV = forward.model.head(forward.hidden_ND).float()
        return {"z": self.weight * logits_NV.logsumexp(dim=-1).square().mean()}


class Halved(Technique):
    """Half the next-token loss in the place of the whole, in steps up to `last`."""

    replaces_next_token = True
    last: int = 10**9

    def objective(self, forward: Forward) -> dict[str, torch.Tensor]:
        return {"next_token": forward.next_token_loss() / 2} if forward.step <= self.last else {}


class Undeclared(Halved):
    replaces_next_token = False


class Quiet(Technique):
    """Adds nothing."""


class Counted(Technique):
    """How many targets of the validation text are even, and how many of each block's numbers."""

    figures = ("even",)

    def layer_figures(self, model):
        return {"even_here": 1}

    def validated(self, model, tokens_BL, targets_BL, counted_BL) -> dict[str, torch.Tensor]:
        counts = torch.stack([((targets_BL % 2 == 0) & counted_BL).sum(), counted_BL.sum()]).double()
        return {"even": counts, "even_here": counts.view(2, 1, 1)}


def rows(run) -> list[dict[str, str]]:
    with (run.folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoints" / "step-0000012" / "model.safetensors")


@pytest.mark.parametrize("model", [{}, {"tied": False, "logit_softcap": 5.0}])
def test_the_plain_objective_is_the_models_loss_to_the_bit(make_run, model):
    setup = Trainer(make_run(model={"dropout": 0.0, **model})).setup
    (tokens,) = setup.micro_batches.of_step(1, setup.share)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    parts = setup.losses(tokens, 1)
    assert list(parts) == ["next_token"]
    assert parts["next_token"].item() == setup.model.loss(inputs, targets).item()
    alone = Forward(setup.model, inputs, targets, None, 1, 12)
    assert alone.next_token_loss().item() == parts["next_token"].item()
    assert alone.hidden_ND is alone.hidden_ND


def test_parts_become_columns_of_the_curve_and_their_sum_is_the_loss(make_run, monkeypatch):
    logged = set()
    monkeypatch.setattr(dvclive.Live, "log_metric", lambda self, name, value: logged.add(name))
    technique = ZLoss(weight=1e-2)
    run = with_techniques(make_run(), z=technique)
    train(run)
    curve = rows(run)
    assert list(curve[0]) == [*CURVE_COLUMNS, "train_next_token", "train_z"]
    for row in curve:
        parts = float(row["train_next_token"]) + float(row["train_z"])
        assert float(row["train_loss"]) == pytest.approx(parts, abs=2e-6)
        assert float(row["train_z"]) > 0
    assert {"train_loss", "train_next_token", "train_z"} <= logged
    final = read_json(run.folder / "train.json")["final"]
    assert final["train_z"] == float(curve[-1]["train_z"])
    assert technique._prepared == [(run.name, "cpu", 1)]
    assert technique._steps == [(step, 12) for step in range(1, 13)]


def test_a_part_of_no_weight_changes_no_weight(make_run):
    """The next-token loss given the hidden states has the bits of the whole, dropout included."""
    plain, zero = make_run("plain"), with_techniques(make_run("zero"), z=ZLoss(weight=0.0))
    train(plain)
    train(zero)
    assert list(rows(plain)[0]) == CURVE_COLUMNS
    assert [row["train_loss"] for row in rows(plain)] == [row["train_loss"] for row in rows(zero)]
    assert all(torch.equal(weights(zero)[name], weight) for name, weight in weights(plain).items())


def test_a_run_that_stops_between_two_rows_has_the_same_columns(make_run, monkeypatch):
    names, technique = ("whole", "broken"), ZLoss(weight=1e-2)
    runs = [with_techniques(make_run(name, save_every=1), z=technique) for name in names]
    train(runs[0])
    step = Trainer.step

    def interrupted(self):
        step(self)
        if self.state.progress.step == 5:  # rows are due at even steps, and the states with them
            self.state.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        train(runs[1])
    train(runs[1])
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in rows(run)] for run in runs]
    assert timeless[0] == timeless[1]


def test_a_part_may_end_and_the_others_go_on(make_run):
    run = with_techniques(make_run(), z=ZLoss(weight=1e-2, last=5))
    train(run)
    found = {int(row["step"]): row for row in rows(run)}
    assert found[6]["train_z"] and not found[8]["train_z"]
    assert found[8]["train_next_token"] == found[8]["train_loss"]


def test_a_technique_may_replace_the_next_token_loss(make_run):
    run = with_techniques(make_run(model={"dropout": 0.0}), half=Halved(last=1))
    setup = Trainer(run).setup
    (tokens,) = setup.micro_batches.of_step(1, setup.share)
    whole = setup.model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert setup.loss(tokens, 1).item() == whole / 2
    assert setup.loss(tokens, 2).item() == whole, (
        "where it puts nothing in its place, the plain loss is there"
    )


@pytest.mark.parametrize(
    ("techniques", "part"),
    [
        ({"z": Undeclared()}, "next_token"),
        ({"a": Halved(), "b": Halved()}, "next_token"),
        ({"a": ZLoss(weight=1.0), "b": ZLoss(weight=1.0)}, "z"),
    ],
)
def test_a_part_is_there_once(make_run, techniques, part):
    setup = Trainer(with_techniques(make_run(), **techniques)).setup
    (tokens,) = setup.micro_batches.of_step(1, setup.share)
    with pytest.raises(UserError, match=f"has a part '{part}' already"):
        setup.losses(tokens, 1)


def test_metrics_of_the_validation_text_are_read_off_it(make_run):
    trainer = Trainer(with_techniques(make_run(), counted=Counted()))
    found = validate(trainer.setup, trainer.curve.validation)
    batches = list(trainer.curve.validation.batches(4))
    even = sum(((targets % 2 == 0) & (mask > 0)).sum() for _, targets, mask in batches)
    share = even / sum(mask.sum() for _, _, mask in batches)
    assert found.row["val_even"] == found.layers["block 1"]["even_here_1"] == pytest.approx(share)


class Named(Technique):
    """Another metric of a name that is there, at once or by layer."""

    layered: bool = False

    @property
    def figures(self):
        return () if self.layered else ("even",)

    def layer_figures(self, model):
        return {"even": 1} if self.layered else {}


@pytest.mark.parametrize("layered", [False, True])
def test_a_metric_is_there_once(make_run, layered):
    run = with_techniques(make_run(), counted=Counted(), named=Named(layered=layered))
    with pytest.raises(UserError, match=r"techniques.test_objective: a metric 'even' is there already; name"):
        Trainer(run)


@pytest.mark.parametrize(
    ("techniques", "compiled"),
    [({}, ["loss"]), ({"z": ZLoss(weight=1.0)}, ["hidden"]), ({"quiet": Quiet()}, [])],
)
def test_what_is_compiled(make_run, monkeypatch, techniques, compiled):
    """The whole loss of the plain objective; else `hidden`, where techniques allow it."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function: given.append(function.__name__) or function)
    train(with_techniques(make_run(compile=True), **techniques))
    assert given == compiled


def test_residuals_asked_for_first_are_those_of_the_loss(make_run, monkeypatch):
    setup = Trainer(make_run(model={"layers": 3, "dropout": 0.0})).setup
    (tokens,) = setup.micro_batches.of_step(1, setup.share)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole = setup.model.loss(inputs, targets).item()
    forward = Forward(setup.model, inputs, targets, None, 1, 12)
    assert len(forward.residuals({0})) == 2
    monkeypatch.setattr(setup.model, "residuals", lambda *arguments, **keys: pytest.fail("a second pass"))
    assert forward.next_token_loss().item() == whole
