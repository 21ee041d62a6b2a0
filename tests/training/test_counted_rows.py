"""What techniques change of the rows of a micro-batch, and the mean over the targets that count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.model.rows import Rows
from stlm.techniques.base import Technique
from stlm.techniques.denoising import Denoising
from stlm.techniques.encoder_decoder import EncoderDecoder
from stlm.techniques.masked_next_token import MaskedNextToken
from stlm.training.loop import Trainer
from stlm.training.objective import Objective

CALLS: list[tuple[int, int, int]] = []


class Odd(Technique):
    """Counts targets whose positions are odd, and shifts the inputs by a number that it draws."""

    count: bool = True
    none: bool = False

    def rows(self, rows: Rows, step: int, steps: int) -> Rows:
        CALLS.append((step, steps, int(torch.randint(10**6, ()))))
        if not self.count:
            return rows
        counted_BL = (torch.arange(rows.tokens_BL.shape[1]) % 2 == 1).expand_as(rows.tokens_BL)
        return rows._replace(
            tokens_BL=(rows.tokens_BL + 1) % 257, counted_BL=counted_BL & (not self.none), layout=None
        )


def run_with(make_run, **keys):
    run = make_run(steps=2, warmup_steps=1, accumulation=2, model={"dropout": 0.0})
    return run.model_copy(update={"techniques": {"odd": Odd(**keys)}})


def test_the_loss_is_the_mean_over_the_counted_targets(make_run):
    run = run_with(make_run)
    trainer = Trainer(run)
    objective, model = trainer.setup.objective, trainer.setup.model
    assert not objective.plain and Objective(run.model_copy(update={"techniques": {}})).plain
    read = torch.randint(0, 257, (4, 33))
    forward = objective.forward(model, read, None, 1)
    loss = objective(forward)["next_token"]
    logits = model((read[:, :-1] + 1) % 257)[:, 1::2]
    expected = F.cross_entropy(logits.flatten(0, 1), read[:, 1:][:, 1::2].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected.backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


def test_without_a_choice_the_loss_is_the_plain_one_to_the_bit(make_run):
    run = run_with(make_run, count=False)
    trainer = Trainer(run)
    model, read = trainer.setup.model, torch.randint(0, 257, (4, 33))
    loss = trainer.setup.objective(trainer.setup.objective.forward(model, read, None, 1))
    assert loss.keys() == {"next_token"}
    assert torch.equal(loss["next_token"], model.loss(read[:, :-1], read[:, 1:]))


def test_no_counted_target_is_a_loss_of_zero(make_run):
    trainer = Trainer(run_with(make_run, none=True))
    model, read = trainer.setup.model, torch.randint(0, 257, (4, 33))
    loss = trainer.setup.objective(trainer.setup.objective.forward(model, read, None, 1))["next_token"]
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.filterwarnings("ignore")
def test_it_is_called_once_a_micro_batch_of_training_with_its_own_numbers(make_run):
    calls = []
    for _ in range(2):
        CALLS.clear()
        trainer = Trainer(run_with(make_run))
        for _ in range(2):
            trainer.step()
        assert [call[:2] for call in CALLS] == [(1, 2), (1, 2), (2, 2), (2, 2)]
        trainer.curve.start_clock()
        trainer.curve.add_row()  # validates
        assert len(CALLS) == 4
        calls.append(list(CALLS))
    assert calls[0] == calls[1] and len({number for _, _, number in calls[0]}) == 4


MIXTURE = [{"task": task, "share": 0.3} for task in ("infill", "prefix", "spans")]


@pytest.mark.parametrize(
    ("technique", "attention"),
    [
        (MaskedNextToken(), "across"),
        (MaskedNextToken(), "within"),
        (Denoising(mixture=MIXTURE), "across"),
        (Denoising(mixture=MIXTURE), "within"),
        (EncoderDecoder(), "across"),
    ],
)
def test_a_row_alone_is_what_it_is_among_the_others(make_run, technique, attention):
    run = make_run(batch_size=8, model={"layers": 2})
    data = run.data.model_copy(update={"attention": attention})
    run = run.model_copy(update={"techniques": {technique.key(): technique}, "data": data})
    setup = Trainer(run).setup
    model = setup.model.eval()
    (tokens_BM,) = setup.micro_batches.of_step(1, setup.share)
    rows = setup.rows(tokens_BM, 1)
    together = model.hidden(rows.tokens_BL, rows.layout)
    for number in range(8):
        one = rows.alone(number)
        assert torch.equal(one.targets_BL, rows.targets_BL[number : number + 1])
        assert torch.equal(one.counted_BL, rows.counted_BL[number : number + 1])
        found, expected = model.hidden(one.tokens_BL, one.layout)[0], together[number]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, equal_nan=True)
