"""Runs with a `data` section: difficulty under a reference, attention within documents, interruptions."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stlm.errors import UserError
from stlm.files import read_json
from stlm.integrity import seal
from stlm.teaching import teacher
from stlm.teaching.draw import padded
from stlm.tokens.config import DataConfig
from stlm.training import difficulty
from stlm.training.checkpoints import load_checkpoint
from stlm.training.curve import validate
from stlm.training.loop import Trainer, train
from stlm.training.resume import resume


@pytest.fixture
def make(make_run):
    """A function that gives a run with a `data` section."""

    def make(name, model=None, **data):
        run = make_run(name, model=model, save_every=1)
        return run.model_copy(update={"data": DataConfig(**data)})

    return make


def weights(run) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.folder / "checkpoints" / "step-0000012")[0].state_dict()


def test_records_of_the_default_are_those_without_the_section(make_run):
    run = make_run()
    assert "data" not in run.model_dump(mode="json")
    assert type(run).model_validate_json(run.model_dump_json()) == run
    own = run.model_copy(update={"data": DataConfig(order="source")})
    assert own.model_dump(mode="json")["data"]["order"] == "source"
    assert Trainer(own).setup.fingerprint != Trainer(run).setup.fingerprint


@pytest.mark.parametrize("data", [{}, {"order": "source"}])
def test_a_limit_that_is_kept_is_the_same_run(make, data):
    limited, free = make("run", max_epochs=2, **data), make("run", **data)
    assert limited.model_dump(mode="json") != free.model_dump(mode="json")
    assert Trainer(limited).setup.fingerprint == Trainer(free).setup.fingerprint
    assert (
        Trainer(make("run", attention="within", **data)).setup.fingerprint != Trainer(free).setup.fingerprint
    )


def test_difficulty_is_the_references_loss(make):
    reference = make("reference")
    train(reference)
    easy = make("easy", order="difficulty", reference="reference")
    trainer = Trainer(easy)
    model, _ = load_checkpoint(reference.folder / "checkpoints" / "step-0000012")
    seen = []
    with torch.no_grad():
        for step in range(12):
            for row in torch.from_numpy(trainer.setup.micro_batches.rows.batch(step)):
                seen.append(F.cross_entropy(model(row[None, :-1])[0], row[1:]).item())
    assert len(seen) == 48 and np.ptp(seen) > 0.05
    assert all(second > first - 1e-4 for first, second in pairwise(seen))
    plain = Trainer(reference)
    rows = [
        sorted(row.tobytes() for step in range(12) for row in t.setup.micro_batches.rows.batch(step))
        for t in (trainer, plain)
    ]
    assert rows[0] == rows[1]


def test_a_large_vocabulary_is_measured_in_smaller_parts(make, monkeypatch):
    train(make("reference"))
    sizes, found = [], []
    weights_of = teacher.weights_of
    monkeypatch.setattr(teacher, "weights_of", lambda logits: sizes.append(len(logits)) or weights_of(logits))
    for logits in (2**25, padded(257) * 500):
        monkeypatch.setitem(teacher._LOGITS, "cpu", logits)
        trainer = Trainer(make("easy", order="difficulty", reference="reference"))
        (kept,) = trainer.setup.run.state_folder.parent.glob("*difficulty/*.npy")
        found.append(np.load(kept))
        kept.unlink()
    assert sizes == [48 * 32, 500, 500, 500, 36]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


def test_scores_are_computed_once_for_runs_that_read_the_same(make, monkeypatch):
    train(make("reference"))
    counted = []
    measure = difficulty.mean_losses
    monkeypatch.setattr(difficulty, "mean_losses", lambda *a: counted.append(1) or measure(*a))
    easy = make("easy", order="difficulty", reference="reference")
    train(easy)
    scored = len(counted)
    assert scored > 0
    hard = make("hard", order="difficulty", reference="reference", direction="hard_first")
    train(hard)
    assert len(counted) == scored
    records = [read_json(run.folder / "train.json") for run in (easy, hard)]
    spent = [record["prepared"]["data.reference"]["seconds"] for record in records]
    assert spent[0] == spent[1] > 0, "each counts it whole"
    assert all(record["seconds"] >= second - 0.1 for record, second in zip(records, spent, strict=True))
    assert not torch.equal(weights(easy)["norm.weight"], weights(hard)["norm.weight"])
    (kept,) = (easy.state_folder.parent / ".difficulty").glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.npy: damaged.*delete .state/"):
        Trainer(easy)


def test_a_reference_that_was_trained_anew_is_measured_anew(make):
    reference = make("reference")
    train(reference)
    easy = make("easy", order="difficulty", reference="reference")
    mark = Trainer(easy).setup.fingerprint
    train(reference.model_copy(update={"seed": 1}))
    assert Trainer(easy).setup.fingerprint != mark
    assert len(list((easy.state_folder.parent / ".difficulty").glob("*.npy"))) == 2


def test_scores_that_changed_under_a_run_are_another_run(make, monkeypatch):
    """And a variant may be named `difficulty`."""
    train(make("reference"))
    run = make("difficulty", order="difficulty", reference="reference")
    trainer = Trainer(run)
    mark = trainer.setup.fingerprint
    assert Trainer(run).setup.fingerprint == mark
    trainer.step()
    trainer.state.save()
    (kept,) = (run.state_folder.parent / ".difficulty").glob("*.npy")
    assert run.state_folder != kept.parent
    scores = np.load(kept)
    scores[0] = np.nextafter(scores[0], np.float32(9))
    np.save(kept, scores)
    seal(kept)
    assert Trainer(run).setup.fingerprint != mark
    kept.unlink()
    again = Trainer(run)
    assert again.setup.fingerprint == mark and resume(again.state), "measured alike, it is the same run"
    measure = difficulty.mean_losses

    def overtaken(*arguments):
        if not kept.exists():
            np.save(kept, scores)  # another run, which was sooner
            seal(kept)
        return measure(*arguments)

    kept.unlink()
    monkeypatch.setattr(difficulty, "mean_losses", overtaken)
    assert Trainer(run).setup.fingerprint != mark
    np.testing.assert_array_equal(np.load(kept), scores)


def test_a_missing_reference_is_told(make):
    with pytest.raises(UserError, match="no checkpoint; run: stlm train test reference"):
        Trainer(make("easy", order="difficulty", reference="reference"))


@pytest.mark.parametrize(
    "data",
    [
        {"order": "difficulty", "reference": "reference", "pacing": "competence"},
        {"attention": "within"},
        {"order": "length", "unique_tokens": 640},
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(make, monkeypatch, data):
    train(make("reference"))
    plain, broken = make("plain", **data), make("broken", **data)
    train(plain)
    step = Trainer.step

    def interrupted(self):
        if self.state.progress.step == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.setattr(Trainer, "step", step)
    train(broken)
    for name, tensor in weights(plain).items():
        assert torch.equal(weights(broken)[name], tensor), name
    assert read_json(plain.folder / "train.json")["data"] == json.loads(plain.data.model_dump_json())


def test_attention_within_documents_is_another_training_on_the_same_rows(make):
    across, within = make("across"), make("within", attention="within")
    one, other = Trainer(across), Trainer(within)
    rows = [trainer.setup.micro_batches.rows.batch(3) for trainer in (one, other)]
    np.testing.assert_array_equal(*rows)
    assert len({tuple(validate(t.setup, t.curve.validation).row.values()) for t in (one, other)}) == 1
    one.step(), other.step()
    assert not torch.equal(one.setup.model.norm.weight, other.setup.model.norm.weight)
