"""A run of no steps: what it starts from, kept, validated and recorded as it is."""

import pytest
import torch
from pydantic import ValidationError

from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.files import read_json
from stlm.report.run_files import read_curve, read_watch
from stlm.report.schema import TrainRecord
from stlm.study.start import check_start
from stlm.techniques.early_exit import EarlyExit
from stlm.tokens.config import DataConfig
from stlm.training.checkpoints import load_checkpoint
from stlm.training.config import TrainingConfig
from stlm.training.dependencies import Dependency
from stlm.training.loop import Trainer, train
from stlm.training.memory import training_memory

FIRST, LAST = "step-0000000", "step-0000012"


@pytest.fixture
def pair(make_run):
    """A trained run, and one of no steps that starts from it."""
    parent, run = make_run("parent"), make_run("kept", start_from="parent", steps=0)
    train(parent)
    train(run)
    return parent, run


def weights(run, name):
    return load_checkpoint(run.folder / "checkpoints" / name)[0].state_dict()


def test_it_is_what_it_starts_from_to_the_bit(pair):
    parent, run = pair
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == [FIRST, "tokenizer"]
    assert weights(run, FIRST).keys() == weights(parent, LAST).keys()
    for name, value in weights(parent, LAST).items():
        assert torch.equal(value, weights(run, FIRST)[name]), name


def test_it_is_validated_and_recorded_without_a_cost(pair):
    parent, run = pair
    rows = read_curve(run.folder / "curve.csv")
    assert rows["step"].tolist() == rows["tokens"].tolist() == [0]
    assert rows["train_loss"].isna().all() and rows["tokens_per_second"].isna().all()
    before = read_curve(parent.folder / "curve.csv").iloc[-1]
    assert rows["val_bits_per_byte"].iloc[0] == before["val_bits_per_byte"]
    assert read_watch(run.folder / "watch.csv") is None
    content = read_json(run.folder / "train.json")
    record = TrainRecord.model_validate(content)
    assert (record.steps, record.tokens, record.flops) == (0, 0, 0.0) and record.loss_spikes == []
    assert content["tokens_per_second"] == 0
    assert record.total_flops == parent.flops and record.start.tokens == parent.tokens
    assert content["final"]["val_loss"] == before["val_loss"]
    _, description = load_checkpoint(run.folder / "checkpoints" / FIRST)
    assert (description["step"], description["tokens"], description["flops"]) == (0, 0, 0.0)


def test_it_is_evaluated_as_its_parent_is(pair):
    found = []
    for run in pair:
        evaluate_run(run, EvaluationConfig(benchmarks=[]))
        found.append(list(read_json(run.folder / "evaluation.json")["checkpoints"].values())[-1])
    assert (found[1]["step"], found[1]["tokens"]) == (0, 0)
    assert found[0]["perplexity"] == found[1]["perplexity"]


def test_a_run_that_starts_from_it_reads_on_where_the_first_stopped(pair, make_run):
    parent, _ = pair
    further = make_run("further", start_from="kept", steps=2)
    assert Dependency.read(further, "start").text_tokens == parent.tokens
    one, other = Trainer(further), Trainer(make_run("direct", start_from="parent", steps=2))
    for trainer in (one, other):
        trainer.setup.model.train()
        trainer.step()
    assert torch.equal(one.setup.model.embedding.weight, other.setup.model.embedding.weight)


def test_the_last_row_may_be_missing_when_it_resumes(pair, make_run):
    # Trained again, the same comes out, with a saved state or without.
    run = make_run("again", start_from="parent", steps=0)
    trainer = Trainer(run)
    trainer.state.save()
    train(run)
    assert torch.equal(weights(run, FIRST)["embedding.weight"], weights(pair[1], FIRST)["embedding.weight"])
    assert len(read_curve(run.folder / "curve.csv")) == 1


def test_a_row_that_is_only_cut_trains_nothing(make_run):
    parent = make_run("parent", model={"layers": 3})
    train(parent)
    run = make_run("cut", model={"layers": 2}, start_from="parent", steps=0)
    check_start("test.yaml", run, {"parent": parent, "cut": run})
    train(run)
    record = TrainRecord.model_validate(read_json(run.folder / "train.json"))
    assert len(record.start.inherited["layers"]["kept"]) == 2
    assert record.flops == record.start.inherited["flops"] > 0  # of measuring
    assert len(load_checkpoint(run.folder / "checkpoints" / FIRST)[0].blocks) == 2


def test_the_order_of_text_that_is_not_read_matters_not(pair, make_run):
    data = DataConfig(sequence=["tiny"], max_epochs=1.0)
    run = make_run("ordered", start_from="parent", steps=0).model_copy(update={"data": data})
    train(run)
    assert read_json(run.folder / "train.json")["tokens"] == 0


def test_a_technique_costs_nothing_in_no_steps(make_run):
    techniques = {"early_exit": EarlyExit()}
    model = {"layers": 3}
    parent = make_run("parent", model).model_copy(update={"techniques": techniques})
    train(parent)
    run = make_run("kept", model, start_from="parent", steps=0).model_copy(update={"techniques": techniques})
    train(run)
    assert run.flops == 0 and run.flops_per_token > 0
    assert weights(run, FIRST).keys() == weights(parent, LAST).keys()


def test_no_backward_pass_needs_memory(make_run):
    none, one = (make_run(start_from="parent", steps=steps, warmup_steps=0) for steps in (0, 1))
    least = training_memory(none, "float32", False, 4)
    assert least.least == least.weights < training_memory(one, "float32", False, 4).least


def test_it_needs_weights_to_start_from_and_keeps_one_checkpoint():
    with pytest.raises(ValidationError, match=r"steps: 0 keeps the weights .* start_from names none"):
        TrainingConfig(steps=0)
    with pytest.raises(ValidationError, match=r"checkpoints: 5: with steps: 0 .*valid: \[\]"):
        TrainingConfig(steps=0, start_from="parent", checkpoints=(5,))
    # Nothing to warm up: a study's recipe may say how long.
    assert TrainingConfig(steps=0, start_from="parent", warmup_steps=100).checkpoint_steps == (0,)
