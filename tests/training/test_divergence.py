"""Where a run diverged, with faults put into known layers at known documents."""

from __future__ import annotations

import math

import pytest
import torch

from stlm.errors import UserError
from stlm.files import read_json
from stlm.model.rows import Rows
from stlm.techniques.masked_next_token import MaskedNextToken
from stlm.tokens.shards import read_split
from stlm.training import loop
from stlm.training.distributed import Group
from stlm.training.divergence import RECORD, Part, locate
from stlm.training.finite import parts_of
from stlm.training.loop import Trainer, train
from stlm.training.watch import layer_of

BAD = ord("7")  # of the tokenizer `bytes`: rows with a 7 in them are hit, others are not
MASK = 257  # the id after the vocabulary


@pytest.fixture
def faulty(monkeypatch):
    """Make `part` of a block (from 0) put out infinity in rows that contain BAD, from a step on."""

    def plant(block: int, part: str, step: int) -> None:
        build = Trainer.__init__

        def planted(self, *arguments):
            build(self, *arguments)
            tokens = []
            self.setup.model.embedding.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))

            def fault(module, inputs, output):
                if self.state.progress.step < step - 1:
                    return output
                hit_B = (tokens[-1] == BAD).any(dim=1)
                return torch.where(hit_B[:, None, None], math.inf, output)

            getattr(self.setup.model.blocks[block], part).register_forward_hook(fault)

        monkeypatch.setattr(Trainer, "__init__", planted)

    return plant


@pytest.mark.parametrize(("part", "words"), [("ffn", "feed-forward"), ("attention", "attention")])
def test_the_step_the_layer_and_the_documents_are_named(make_run, faulty, part, words):
    faulty(1, part, step=4)
    run = make_run(model={"layers": 3}, steps=6, accumulation=2, checkpoints=[2], watch_every=0)
    with pytest.raises(UserError) as error:
        train(run)
    first, *lines = str(error.value).splitlines()
    assert first.startswith("run tiny-run: step 4: the loss is nan") and "step-0000002" in first
    assert lines[0] == f"Where: the {words} output of block 2 is the first that is not finite."
    trainer = Trainer(run)
    batches = [trainer.setup.micro_batches.rows.batch(3, micro, 2)[:, :-1] for micro in range(2)]
    micro = next(micro for micro in range(2) if (batches[micro] == BAD).any())
    rows = [row for row in range(4) if (batches[micro][row] == BAD).any()]
    assert 0 < len(rows) < 4, "a batch that tells nothing"
    assert f"of {len(rows)} of the 4 rows of micro-batch {micro + 1} of 2" in lines[1]
    record = read_json(run.state_folder / RECORD)
    assert (record["step"], record["layer"]) == (4, "block 2")
    assert [own["row"] for own in record["rows"]] == rows
    (component,) = read_split(run.tokens_folder, "train")
    texts = [bytes(document.tokens[:-1].tolist()).decode() for document in component]
    for own in record["rows"]:
        whole = bytes(
            t for t in trainer.setup.micro_batches.rows.batch(3, micro, 2)[own["row"]] if t != 256
        ).decode()
        named = [part["document"] for part in own["documents"]]
        assert named == list(range(named[0], named[-1] + 1))
        assert whole in "".join(texts[number] for number in named)
        assert "".join(whole.split()) == "".join("".join(p["text"].split()) for p in own["documents"])
        assert all(p["corpus"] == "tiny" and p["shard"].startswith("train") for p in own["documents"])
    assert f"row {rows[0]}: tiny, {record['rows'][0]['documents'][0]['shard']}, document" in lines[2]
    assert record["rows"][0]["documents"][0]["text"][:10] in lines[2]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """No look at a step before its row is due: the weights are spoilt by then."""
    step = Trainer.step

    def without_a_look(self):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "check_finite", lambda *arguments: None)
            step(self)

    monkeypatch.setattr(Trainer, "step", without_a_look)


@pytest.mark.parametrize("save_every", [3, 100])
def test_noticed_late_the_weights_before_it_are_made_again(make_run, faulty, as_on_a_gpu, save_every, capsys):
    run = make_run(model={"layers": 3}, steps=20, log_every=10, save_every=save_every, validate_every=20)
    batches = Trainer(run).setup.micro_batches.rows
    step = 8  # the state is of step 6
    rows = [row for row in range(4) if (batches.batch(step - 1, 0, 1)[row, :-1] == BAD).any()]
    assert 0 < len(rows) < 4, "a batch that tells nothing"
    faulty(1, "ffn", step)
    with pytest.raises(UserError) as error:
        train(run)
    first, where, *_ = str(error.value).splitlines()
    assert first.startswith("run tiny-run: step 8: the loss is nan")
    found = [own["row"] for own in read_json(run.state_folder / RECORD)["rows"]]
    if save_every == 3:
        assert where == "Where: the feed-forward output of block 2 is the first that is not finite."
        assert "repeating the steps since 6" in capsys.readouterr().err
        assert found == rows
    else:
        assert where.startswith("Where: the weights of all layers were no longer finite")
        assert found == [0, 1, 2, 3]


def masked_rows(trainer, step):
    """Which rows of a step's micro-batch masked next-token prediction masks: those that read the mask."""
    tokens_BM = next(trainer.setup.micro_batches.of_step(step, trainer.setup.share))
    rows = trainer.setup.run.techniques["masked_next_token"].rows(Rows.of(tokens_BM), step, 6)
    return (rows.tokens_BL == MASK).any(dim=1).nonzero().flatten().tolist()


def test_rows_are_named_by_the_masks_with_which_the_step_diverged(make_run, monkeypatch):
    technique = MaskedNextToken(rate=1.0, final_rate=1.0, random=0.0, kept=0.0)
    run = make_run(steps=6, batch_size=8, watch_every=0)
    run = run.model_copy(update={"techniques": {"masked_next_token": technique}})
    build, expected = Trainer.__init__, masked_rows(Trainer(run), step=2)

    def planted(self, *arguments):
        build(self, *arguments)
        loss = self.setup.model.hidden_loss

        def fault(x_ND, tokens_N, targets_N):
            """The head's loss of masks is infinite from step 2 on."""
            hit = self.state.progress.step == 1 and (tokens_N == MASK).any()
            return loss(x_ND, tokens_N, targets_N) * (math.inf if hit else 1.0)

        self.setup.model.hidden_loss = fault

    monkeypatch.setattr(Trainer, "__init__", planted)
    with pytest.raises(UserError, match="the loss of the head is not"):
        train(run)
    assert len(expected) == 4
    assert [own["row"] for own in read_json(run.state_folder / RECORD)["rows"]] == expected


def test_what_each_process_drew_is_repeated(make_run):
    run = make_run(batch_size=4, accumulation=2)
    run = run.model_copy(update={"techniques": {"masked_next_token": MaskedNextToken()}})
    trainer, micro_batches = Trainer(run), []
    for rank in range(4):  # two processes share each micro-batch
        share = Group(rank, 4).share(run.training)
        (tokens_BM,) = trainer.setup.micro_batches.of_step(3, share)
        micro_batches.append((share.micros[0], share.rows.start, trainer.setup.rows(tokens_BM, 3)))
    trainer.setup.group = Group(0, 4)
    found = list(parts_of(trainer.setup, 3))
    assert [part[:2] for part in found] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for part, (_, _, rows) in zip(found, micro_batches, strict=True):
        assert torch.equal(part.rows.tokens_BL, rows.tokens_BL) and len(rows.tokens_BL) == 2
    place = found[3].place("", "head", [1, 0])
    assert (place.micro, place.rows) == (1, [3, 2])


def parts(make_run, **model):
    trainer = Trainer(make_run(model={"layers": 3, **model}))
    return (
        trainer.setup.model,
        lambda rows: trainer.setup.loss_again(rows, 1),
        [
            Part(micro, 0, Rows.of(torch.from_numpy(trainer.setup.micro_batches.rows.batch(0, micro, 2))))
            for micro in range(2)
        ],
    )


def losses_of_rows(model, part):
    pairs = zip(part.rows.tokens_BL, part.rows.targets_BL, strict=True)
    return [model.loss(tokens[None], targets[None]).item() for tokens, targets in pairs]


def test_a_gradient_that_is_not_finite_is_traced_to_where_it_began(make_run):
    model, loss_of, micro_batches = parts(make_run)

    def fault(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    model.blocks[1].attention.register_forward_hook(fault)
    place = locate(model, loss_of, micro_batches)
    assert place.sentence.startswith("the gradient of blocks.1.attention.out.weight (block 2)")
    assert (place.layer, place.micro) == ("block 2", 0)
    model.eval()
    losses = losses_of_rows(model, micro_batches[0])
    assert place.rows == sorted(range(4), key=lambda row: -losses[row])


def test_logits_that_overflow_are_the_head(make_run):
    model, loss_of, micro_batches = parts(make_run, tied=False)
    with torch.no_grad():
        model.output.weight[BAD] = 3e38
        model.output.weight[BAD, :5] *= -1
    place = locate(model, loss_of, micro_batches)
    assert (place.layer, place.sentence) == (
        "head",
        "all activations are finite, the loss of the head is not",
    )


def test_weights_already_broken_name_what_had_grown(make_run):
    model, loss_of, micro_batches = parts(make_run)
    with torch.no_grad():
        model.blocks[2].ffn.down.weight[0, 0] = math.nan
    rows = [
        {"step": step, "layer": layer, "residual_rms": value}
        for step, values in ((1, (1.0, 2.0, 3.0)), (50, (2.0, 9.0, 6.0)))
        for layer, value in zip(("embedding", "block 1", "block 2"), values, strict=True)
    ]
    place = locate(model, loss_of, micro_batches, rows)
    assert place.sentence.startswith("the weights of block 3 were no longer finite")
    assert place.sentence.endswith("by step 50 the activations of block 1 had grown most, 4.5 times")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    assert "the weights of all layers" in locate(model, loss_of, micro_batches).sentence


def test_a_step_that_repeats_without_a_fault_names_the_worst_rows(make_run):
    model, loss_of, micro_batches = parts(make_run)
    means, singles = [], []

    def counting(rows):
        loss = loss_of(rows)
        (means if len(rows.tokens_BL) > 1 else singles).append(loss.item())
        return loss

    place = locate(model, counting, micro_batches)
    assert "no value that is not finite" in place.sentence
    largest = max(model.named_parameters(), key=lambda own: own[1].grad.abs().max())[0]
    assert f"is that of {largest} ({place.layer})" in place.sentence
    assert len(means) == 2 and place.micro == means.index(max(means))
    assert len(singles) == 4, "rows of one micro-batch alone are looked at"
    model.eval()
    losses = losses_of_rows(model, micro_batches[place.micro])
    assert place.rows == sorted(range(4), key=lambda row: -losses[row])


def test_parameters_belong_to_layers():
    assert layer_of("blocks.11.ffn.down.weight") == "block 12"
    assert layer_of("embedding.weight") == layer_of("positions.weight") == "embedding"
    assert layer_of("norm.weight") == layer_of("output.weight") == "head"
