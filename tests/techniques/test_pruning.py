"""Pruned runs: zeros that survive training, resuming and export; gradual pruning; tickets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trained_runs import curve_of, same_weights, train_in_parts, train_in_two_processes, weights_of

from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.export.llama import llama_weights
from stlm.files import read_json
from stlm.model.build import build_model
from stlm.model.pruning import Choice, cubic, matrices, prune_smallest, sparsegpt
from stlm.report.card import read_card
from stlm.report.schema import TrainRecord
from stlm.study.load import load_study
from stlm.study.runs import Run
from stlm.techniques.pruning import Pruning
from stlm.techniques.registry import load_techniques
from stlm.training.checkpoints import load_checkpoint
from stlm.training.inherited import calibration_rows
from stlm.training.loop import Trainer, train

BLOCKS = ("attention", "ffn")
NAMES = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")


def zeros(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The places of zeros in the blocks' matrices."""
    return {
        name: weight == 0
        for name, weight in weights.items()
        if name.startswith("blocks.") and weight.dim() == 2
    }


def same_zeros(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    places = zeros(one), zeros(other)
    return all(torch.equal(places[0][name], places[1][name]) for name in places[0])


def checkpoint(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:07d}"


@pytest.fixture
def make(make_technique_run) -> Callable[..., Run]:
    """A function that gives a run with two blocks, and the technique where keys of it are given."""

    def run(name: str, keys: dict | None = None, model: dict | None = None, **training) -> Run:
        techniques = () if keys is None else (Pruning(**keys),)
        made = make_technique_run(name, {"layers": 2, **(model or {})}, techniques, **training)
        return made

    return run


@pytest.fixture
def parent(make) -> Run:
    run = make("parent", checkpoints=(2,))
    train(run)
    return run


def record(run: Run) -> TrainRecord:
    return TrainRecord.model_validate(read_json(run.folder / "train.json"))


# At once


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_run_of_no_steps_is_its_parent_pruned(parent, make, method):
    run = make("pruned", {"method": method}, start_from="parent", steps=0)
    train(run)
    before, after = weights_of(parent), weights_of(run)
    for name, places in zeros(after).items():
        assert (places.sum(dim=1) == places.shape[1] // 2).all(), name
        kept = before[name].masked_fill(places, 0.0)
        assert torch.equal(kept, after[name]) == (method != "sparsegpt"), name
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    content, found = read_json(run.folder / "train.json"), record(run)
    assert found.sparsity.matrices == 0.5 and 0 < found.sparsity.model < 0.5
    assert found.sparsity.by_layer == {f"block {n}": dict.fromkeys(NAMES, 0.5) for n in (1, 2)}
    assert content["final"]["val_sparsity"] == 0.5
    measured = content["prepared"]["pruning"]
    assert measured.keys() >= {"seconds", "sha256"} and (found.flops > 0) == (method != "magnitude")
    if method != "magnitude":
        rows_NM = calibration_rows(run)
        assert measured["measured_on_tokens"] == rows_NM[:, 1:].numel() > 1000
        assert found.flops == measured["extra_flops"]
    card = read_card(checkpoint(run, 0)).markdown()
    assert "Weights that are zero" in card and "attention.qkv" in card and "are zero, of all" in card


def test_sparsegpts_first_matrix_is_that_of_the_calibration_text(parent, make):
    from stlm.model.importance import second_moments

    run = make(
        "pruned", {"method": "sparsegpt", "matrices": ("attention.qkv",)}, start_from="parent", steps=0
    )
    train(run)
    model, _ = load_checkpoint(checkpoint(parent, 8))
    moments = second_moments(model, calibration_rows(run), {"qkv": model.blocks[0].attention.qkv})
    expected = sparsegpt(model.blocks[0].attention.qkv.weight.detach(), moments["qkv"], Choice(0.5))
    torch.testing.assert_close(
        weights_of(run)["blocks.0.attention.qkv.weight"], expected, rtol=1e-3, atol=1e-5
    )


def test_all_seeds_are_measured_on_one_text(make):
    runs = [
        make("pruned", {"method": "wanda"}, start_from="parent").model_copy(update={"seed": s})
        for s in (0, 1)
    ]
    assert torch.equal(*(calibration_rows(run) for run in runs))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_zeros_survive_training_with_decay_and_a_resume(parent, make, optimizer):
    keys, recipe = {"method": "wanda", "scope": "matrix"}, {"optimizer": optimizer, "weight_decay": 0.3}
    start = make("start", keys, start_from="parent", steps=0)
    train(start)
    whole, parts = (make(name, keys, start_from="parent", **recipe) for name in ("whole", "parts"))
    train(whole)
    train_in_parts(parts, 5)
    before, after = weights_of(start), weights_of(whole)
    assert same_zeros(before, after) and record(whole).sparsity.matrices == 0.5
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert set(zeros(after)) <= moved  # it was trained
    assert same_weights(whole, parts) and curve_of(whole) == curve_of(parts)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_and_moments_of_zeros_are_zero(make, optimizer):
    trainer = Trainer(make("run", {}, optimizer=optimizer))  # of new weights, which only `check` refuses
    model = trainer.setup.model.train()
    norms = []
    for _ in range(3):
        trainer.step()
        norms.append(trainer.state.norm.item())
    chosen = matrices(model, BLOCKS)
    for matrix in chosen:
        state = trainer.setup.optimizer.state[matrix.weight]
        gone = matrix.weight == 0
        assert gone.sum() == gone.numel() // 2
        moments = [value for value in state.values() if value.shape == gone.shape]
        assert moments and all((moment[gone] == 0).all() and (moment[~gone] != 0).any() for moment in moments)


def test_the_norm_that_clips_is_of_what_is_trained(make):
    run = make("run", {}, clip=1e-9)
    trainer = Trainer(run)
    trainer.setup.model.train()
    _, _, _ = trainer._backward(1)
    everything = torch.stack([p.grad.norm() for p in trainer.setup.model.parameters()]).norm()
    trainer.setup.optimizer.zero_grad(set_to_none=True)
    trainer.step()
    assert 0 < trainer.state.norm.item() < 0.99 * everything.item()


def test_a_compiled_step_is_the_plain_one(make):
    plain, compiled = (Trainer(make("run", {})) for _ in range(2))
    model = compiled.setup.model
    compiled.setup.objective._compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    for _ in range(2):
        for trainer in (plain, compiled):
            trainer.setup.model.train()
            trainer.step()
    for one, other in zip(plain.setup.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all((matrix.weight == 0).double().mean() == 0.5 for matrix in matrices(model, BLOCKS))


def test_two_processes_end_as_one(parent, make):
    one = make("one", {"method": "sparsegpt"}, start_from="parent", accumulation=2)
    two = make("two", {"method": "sparsegpt"}, start_from="parent", accumulation=2)
    train(one)
    train_in_two_processes(two)
    found, other = weights_of(one), weights_of(two)
    assert same_zeros(found, other)
    for name, weight in found.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-5)


def test_it_is_made_once_for_runs_that_share_it(parent, make):
    keys, calls = {"method": "wanda"}, []
    train(make("first", keys, start_from="parent", steps=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pruning, "change_start", lambda *_: calls.append(1) or {})
        train(make("second", keys, start_from="parent", steps=2))
        assert not calls
        train(make("third", {**keys, "sparsity": 0.3}, start_from="parent", steps=0))
        assert calls == [1]
    assert same_zeros(weights_of(make("first", steps=0, start_from="x")), weights_of(make("second", steps=2)))


def test_a_run_goes_on_from_a_pruned_one_and_an_export_has_its_zeros(parent, make):
    pruned = make("pruned", {"pattern": "2:4"}, start_from="parent", steps=0)
    train(pruned)
    healed = make("healed", {"pattern": "2:4"}, start_from="pruned")
    train(healed)
    assert same_zeros(weights_of(pruned), weights_of(healed))
    for places in zeros(weights_of(healed)).values():
        assert (places.view(len(places), -1, 4).sum(dim=2) == 2).all()
    exported = llama_weights(load_checkpoint(checkpoint(healed, 8))[0])
    matrices_of = [w for name, w in exported.items() if "_proj" in name]
    assert len(matrices_of) == 14 and all((w == 0).double().mean() == 0.5 for w in matrices_of)


def test_it_is_scored_as_the_plain_model_of_its_weights(parent, make):
    run = make("pruned", {}, start_from="parent", steps=0)
    train(run)
    evaluate_run(run, EvaluationConfig(benchmarks=["synthetic_pairs"]))
    scored = read_json(run.folder / "evaluation.json")["checkpoints"]["step-0000000"]
    assert scored["benchmarks"]["synthetic_pairs"]["modes"] and scored["perplexity"]["bits_per_byte"] > 0
    model, _ = load_checkpoint(checkpoint(run, 0))
    plain = build_model(run.model)
    plain.load_state_dict(model.state_dict())
    tokens_BL = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens_BL), plain.eval()(tokens_BL))


def test_no_sparsity_is_the_plain_run(parent, make):
    plain = make("plain", start_from="parent")
    none = make("none", {"sparsity": 0.0}, start_from="parent")
    train(plain)
    train(none)
    assert all(torch.equal(w, weights_of(none)[name]) for name, w in weights_of(plain).items())


# Gradually


def test_gradual_pruning_follows_its_schedule_and_ends_exactly(make):
    keys = {"begin": 2, "end": 9, "every": 3, "sparsity": 0.75, "scope": "global"}
    run = make("gradual", keys, steps=12, checkpoints=tuple(range(1, 13)), optimizer="muon")
    train(run)
    found = []
    for step in range(1, 13):
        model, _ = load_checkpoint(checkpoint(run, step))
        weights = [matrix.weight for matrix in matrices(model, BLOCKS)]
        found.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
    after = {step: cubic(step, 2, 9, 0.75) for step in (5, 8, 9)}
    expected = [0.0] * 4 + [after[5]] * 3 + [after[8]] + [after[9]] * 4
    assert found == pytest.approx(expected, abs=1e-4) and after[9] == 0.75
    assert record(run).sparsity.matrices == pytest.approx(0.75, abs=1e-4)
    column = [float(row["val_sparsity"]) for row in curve_of(run) if row["val_sparsity"]]
    assert column == pytest.approx([found[3], found[7], found[11]], abs=1e-6)


def test_gradual_pruning_resumes_and_never_brings_a_weight_back(make):
    keys = {"begin": 1, "end": 7, "every": 2}
    whole, parts = (make(name, keys, checkpoints=(3, 5)) for name in ("whole", "parts"))
    train(whole)
    train_in_parts(parts, 4)
    assert same_weights(whole, parts)
    places = [zeros(load_checkpoint(checkpoint(whole, step))[0].state_dict()) for step in (3, 5, 8)]
    for name, first in places[0].items():
        assert (
            first.any()
            and not (first & ~places[1][name]).any()
            and not (places[1][name] & ~places[2][name]).any()
        )


# Tickets


def test_a_ticket_rewound_to_its_start_has_the_first_weights_where_the_mask_is_one(parent, make):
    run = make("ticket", {"ticket": "parent"})
    trainer = Trainer(run)
    found = {name: p.detach().clone() for name, p in trainer.setup.model.named_parameters()}
    first = dict(Trainer(make("fresh")).setup.model.named_parameters())
    last, _ = load_checkpoint(checkpoint(parent, 8))
    prune_smallest(matrices(last, BLOCKS), Choice(0.5))
    assert same_zeros(found, last.state_dict())
    for name, weight in found.items():
        places = zeros(found).get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(weight, first[name].detach().masked_fill(places, 0.0))
    train(run)
    assert same_zeros(found, weights_of(run)) and record(run).sparsity.matrices == 0.5
    depends = record(run).depends
    assert depends["ticket"].run == "parent" and record(run).total_flops == 2 * parent.flops


def test_a_ticket_rewound_to_a_step_and_pruned_again(parent, make):
    first = make("first", {"ticket": "parent", "rewind": 2, "sparsity": 0.2, "scope": "global"})
    train(first)
    keys = {"ticket": "first", "rewind": 2, "rewind_of": "parent", "sparsity": 0.36, "scope": "global"}
    second = make("second", keys)
    found = Trainer(second).setup.model.state_dict()
    early = load_file(checkpoint(parent, 2) / "model.safetensors")
    earlier, places = zeros(weights_of(first)), zeros(found)
    for name, gone in places.items():
        assert torch.equal(found[name], early[name].masked_fill(gone, 0.0))
        assert not (earlier[name] & ~gone).any()  # what was pruned before stays so
    share = sum(int(gone.sum()) for gone in places.values()) / sum(gone.numel() for gone in places.values())
    assert share == pytest.approx(0.36, abs=1e-4)
    assert torch.equal(found["embedding.weight"], early["embedding.weight"])


def test_a_ticket_whose_checkpoint_is_gone_says_so(parent, make):
    with pytest.raises(UserError, match=r"step-0000003: no such checkpoint, which techniques.pruning.rewind"):
        Trainer(make("run", {"ticket": "parent", "rewind": 3}))


# Settings

STUDY = """
description: Pruning.
corpus: synthetic
tokenizer: bpe-1280
model: {layers: 2, width: 32, heads: 2, kv_heads: 1, ffn_width: 48, context: 32}
training: {steps: 20, warmup_steps: 1, checkpoints: [5]}
evaluation: {benchmarks: {}}
variants:
  baseline: {}
  wider: {model: {width: 64}}
  series: {techniques: {series_activation: {}}}
"""


def load(project: Path, variant: str):
    (project / "params" / "pruned.yaml").write_text(f"{STUDY}  run: {variant}\n")
    return load_study("pruned")


FROM = "training: {start_from: baseline}, "


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("{techniques: {pruning: {}}}", "pruning.begin: new weights are not pruned at once"),
        (
            f"{{{FROM}model: {{lora: {{rank: 2}}}}, techniques: {{pruning: {{}}}}}}",
            "pruning.sparsity: model.lora: an adapter's product would fill the zeros",
        ),
        (
            f"{{{FROM}model: {{low_rank: {{ffn: 9}}}}, techniques: {{pruning: {{}}}}}}",
            "pruning.sparsity: model.low_rank: a product of two factors",
        ),
        (
            "{model: {sharing: {what: ffn}}, techniques: {pruning: {begin: 1, end: 5}}}",
            "pruning does not support layers that share weights",
        ),
        (
            f"{{{FROM}techniques: {{pruning: {{pattern: '3:5'}}}}}}",
            "pruning.pattern: 3:5: attention.qkv has rows of 32, which 5 does not divide",
        ),
        (f"{{{FROM}techniques: {{pruning: {{matrices: [head]}}}}}}", "head: model.tied: it is the embedding"),
        (f"{{{FROM}techniques: {{pruning: {{matrices: [fnn]}}}}}}", "matrices: 'fnn': expected some of"),
        (
            f"{{{FROM}techniques: {{pruning: {{matrices: [embedding], method: wanda}}}}}}",
            "method: wanda: matrices: embedding: only matrices of the blocks",
        ),
        (
            "{techniques: {pruning: {begin: 5, end: 9, method: wanda}}}",
            "method: wanda: gradual pruning is by magnitude",
        ),
        (
            "{techniques: {pruning: {ticket: baseline, method: wanda}}}",
            "method: wanda: a ticket is by magnitude",
        ),
        ("{techniques: {pruning: {begin: 5, end: 21}}}", "pruning.end: 21 is above training.steps: 20"),
        ("{techniques: {pruning: {begin: 5, end: 5}}}", "end: 5 is not above begin: 5"),
        ("{techniques: {pruning: {begin: 5}}}", "end: gradual pruning needs begin and end"),
        ("{techniques: {pruning: {begin: 1, end: 5, pattern: '2:4'}}}", "pattern: 2:4: gradual pruning has"),
        (
            "{techniques: {pruning: {pattern: '2:4', sparsity: 0.6}}}",
            "sparsity: 0.6: pattern 2:4 is 0.5",
        ),
        ("{techniques: {pruning: {pattern: '2:4', scope: global}}}", "scope: global: a pattern is chosen"),
        ("{techniques: {pruning: {method: sparsegpt, scope: global}}}", "scope: global: sparsegpt prunes"),
        ("{techniques: {pruning: {rewind: 5}}}", "rewind: 5: only a ticket is rewound"),
        (
            "{techniques: {pruning: {ticket: baseline, rewind: 6}}}",
            r"rewind: 6: 'baseline' keeps checkpoints of 5, 20",
        ),
        ("{techniques: {pruning: {ticket: wider}}}", "ticket: 'wider' has another model"),
        ("{techniques: {pruning: {ticket: series}}}", "ticket: 'series' has techniques.series_activation"),
        (
            f"{{{FROM}techniques: {{pruning: {{ticket: baseline}}}}}}",
            "rewind: 0: training.start_from: baseline, that of 'baseline' is None",
        ),
        (
            f"{{{FROM}techniques: {{pruning: {{ticket: baseline, rewind: 5}}}}}}",
            "rewind: 5: its weights replace those of training.start_from",
        ),
        (
            "{techniques: {pruning: {ticket: baselin}}}",
            "pruning.ticket: 'baselin' is no variant .*'baseline'",
        ),
        (
            "{techniques: {pruning: {begin: 1, end: 5}, early_exit: {}}}",
            "early_exit and techniques.pruning cannot be combined|pruning and techniques.early_exit cannot",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(project, variant, message):
    with pytest.raises(UserError, match=message):
        load(project, variant)


def test_what_fits_is_a_study_and_tickets_are_trained_after_what_they_are_of(project):
    run = load(project, "{techniques: {pruning: {ticket: baseline, rewind: 5}}}").runs["run"]
    assert run.depends == {"ticket": "baseline"}
    run = load(
        project, "{training: {start_from: baseline, steps: 0, checkpoints: []}, techniques: {pruning: {}}}"
    )
    assert run.runs["run"].tokens == 0


def test_records_say_the_settings():
    keys = {"method": "sparsegpt", "pattern": "2:4", "matrices": ["ffn"]}
    found = load_techniques({"pruning": keys}, "any.yaml", "techniques")["pruning"]
    assert found.choice == Choice(0.5, "row", (2, 4)) and Pruning(**found.model_dump(mode="json")) == found
    assert not found.neutral() and Pruning(sparsity=0).neutral() and Pruning().choice == Choice(0.5, "row")
