"""Runs that start from larger models: published ones and other runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from published_folder import write_published, write_published_tokens
from technique_runs import with_techniques

from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.files import read_json
from stlm.model.cut import choose, cut_layers, cut_vocabulary
from stlm.model.cutting import spread
from stlm.model.importance import influence, mean_loss
from stlm.report.schema import TrainRecord
from stlm.study.catalogues import load_models
from stlm.study.runs import Run
from stlm.techniques.early_exit import EarlyExit
from stlm.tokens.batches import ValidationSet
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.dependencies import Dependency
from stlm.training.importance_tables import bits_per_byte, importance_tables
from stlm.training.inherited import calibration_rows
from stlm.training.loop import Trainer, train
from stlm.training.published import load_published

LARGE = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "dropout": 0.0}
SMALL = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 24, "dropout": 0.0}
LAST = "step-0000012"


@pytest.fixture
def published(make_run, tmp_path):
    """A function that gives a run on the tokens of a made model; and that model."""
    model = write_published(tmp_path)
    write_published_tokens(tmp_path, "hf:made", "hf:made:290", "hf:made:280")

    def make(name="cut", tokenizer="hf:made", keys=None, start="made", **training) -> Run:
        size = load_tokenizer(tmp_path / "data/tokens/tiny" / tokenizer / "tokenizer").vocab_size
        layout = {"rope_theta": 500.0, "norm_eps": 1e-6, "vocab_size": size}
        run = make_run(name, model={**LARGE, **layout, **(keys or {})}, start_from=start, **training)
        return run.model_copy(
            update={"tokenizer": tokenizer, "sources": {"start": "made"} if start == "made" else {}}
        )

    return model, make


def model_of(run: Run):
    return Trainer(run).setup.model.eval()


def logits(model, vocabulary: int) -> torch.Tensor:
    rows = torch.randint(vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(rows)


def test_a_run_that_inherits_everything_is_the_published_model(published):
    parent, make = published
    assert torch.equal(logits(model_of(make()), 300), logits(parent, 300))


def test_a_part_of_the_vocabulary_is_its_rows(published, tmp_path):
    parent, make = published
    ids = load_tokenizer(tmp_path / "data/tokens/tiny/hf:made:280/tokenizer").parent_ids
    model = model_of(make(tokenizer="hf:made:280"))
    assert len(model.embedding.weight) == 280
    assert torch.equal(model.embedding.weight, parent.embedding.weight[torch.from_numpy(ids)])
    assert torch.equal(logits(model, 280), logits(cut_vocabulary(parent, torch.from_numpy(ids)), 280))


def test_a_published_model_is_recorded(published):
    _, make = published
    run = make(keys=SMALL, tokenizer="hf:made:280", steps=3, warmup_steps=0)
    assert run.depends == {} and list(run.dependencies) == ["start"]
    train(run)
    content = read_json(run.folder / "train.json")
    start = content["depends"]["start"]
    assert (start["source"], start["licence"], start["training_tokens"]) == ("made", "MIT", 1000)
    assert len(start["weights_sha256"]) == 64 and start["flops"] == 0 and start["text_tokens"] == 0
    inherited = start["inherited"]
    assert inherited["from"]["vocab_size"] == 300 and len(inherited["layers"]["kept"]) == 2
    assert inherited["measured_on_tokens"] > 1000 and inherited["seconds"] >= 0
    assert len(inherited["width"]["heads"]) == 2 and inherited["ffn"]["measure"] == "wanda"
    record = TrainRecord.model_validate(content)
    measured = content["prepared"]["training.inherit"]
    assert measured == {"seconds": inherited["seconds"], "extra_flops": inherited["flops"]}
    assert record.total_flops == run.flops + inherited["flops"] > run.flops and record.start.run is None
    _, description = load_checkpoint(run.folder / "checkpoints" / "step-0000003")
    assert description["depends"]["start"]["source"] == "made"
    assert "inherited" not in description["depends"]["start"]


def test_the_fingerprint_has_the_parent_and_the_choice(published):
    _, make = published
    prints = {
        Trainer(run).setup.fingerprint
        for run in (
            make(),
            make(keys={"layers": 2}),
            make(keys={"layers": 2}, inherit={"layers": "first"}),
            make(keys={"layers": 2}).model_copy(
                update={"sources": {}, "training": make(start=None).training}
            ),
        )
    }
    assert len(prints) == 4


def test_layers_are_chosen_on_the_training_text(published):
    parent, make = published
    run = make(keys={"layers": 2})
    rows = calibration_rows(run)
    scores = influence(parent, rows)
    kept = [layer for layer in range(3) if layer != min(range(3), key=scores.__getitem__)]
    assert torch.equal(logits(model_of(run), 300), logits(cut_layers(parent, kept), 300))
    assert len(calibration_rows(make(inherit={"bytes": 300}))) < len(rows)


def test_what_was_cut_is_kept_and_read_again(published, monkeypatch):
    """A resumed run, other seeds and processes do not measure again; other settings do."""
    _, make = published
    run = make(keys=SMALL)
    first = model_of(run)
    monkeypatch.setattr("stlm.training.inherited.cut", lambda *_: pytest.fail("cut again"))
    again = model_of(run.model_copy(update={"seed": 5, "name": "other"}))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(pytest.fail.Exception, match="cut again"):
        model_of(make(keys=SMALL, inherit={"ffn": "magnitude"}))


def test_a_cut_run_resumes_exactly(published, monkeypatch):
    _, make = published
    plain, broken = make("plain", keys=SMALL), make("broken", keys=SMALL)
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


def test_rounds_of_cutting_and_training(published):
    """made -> 3 layers of less width -> 2 layers and fewer tokens; the last cuts what the second trained."""
    _, make = published
    first = make("first", "hf:made:290", keys={**SMALL, "layers": 3})
    second = make("second", "hf:made:290", keys=SMALL, start="first", inherit={"layers": (0, 2)})
    third = make("third", "hf:made:280", keys=SMALL, start="second")
    for run in (first, second, third):
        train(run)
    middle, _ = load_checkpoint(first.folder / "checkpoints" / LAST)
    assert torch.equal(logits(model_of(second), 290), logits(cut_layers(middle, [0, 2]), 290))
    start = read_json(third.folder / "train.json")["depends"]["start"]
    assert (start["run"], start["depends"]["start"]["run"]) == ("second", "first")
    assert start["depends"]["start"]["depends"]["start"]["source"] == "made"
    # The second read on where the first stopped, the third has other tokens.
    assert start["text_tokens"] == 0 and start["depends"]["start"]["text_tokens"] == first.tokens
    record = TrainRecord.model_validate(read_json(third.folder / "train.json"))
    cuts = [
        read_json(run.folder / "train.json")["depends"]["start"]["inherited"]
        for run in (first, second, third)
    ]
    measured = sum(cut.get("flops", 0.0) for cut in cuts)
    assert record.total_flops == first.flops + second.flops + third.flops + measured > measured > 0


def rows_read(run: Run, step: int = 0):
    return Trainer(run).setup.micro_batches.rows.batch(step)


def test_text_goes_on_along_a_chain_or_starts_anew(make_run):
    origin = make_run("origin")
    second, third = make_run("second", start_from="origin"), make_run("third", start_from="second")
    train(origin)
    train(second)
    plain = make_run("plain", steps=40)
    assert (rows_read(second) == rows_read(plain, 12)).all()
    assert (rows_read(third) == rows_read(plain, 24)).all()
    shorter = make_run("shorter", model={"context": 16}, start_from="origin")
    assert (rows_read(shorter) == rows_read(make_run("plain", model={"context": 16}))).all()
    for data in (DataConfig(order="source"), DataConfig(attention="within")):
        other = second.model_copy(update={"data": data})
        fresh = plain.model_copy(update={"data": data, "training": second.training, "sources": {}})
        assert (rows_read(other) == rows_read(fresh.model_copy(update={"training": origin.training}))).all()
        assert not Dependency.read(other, "start").goes_on(other)


def test_a_run_with_the_same_data_section_goes_on(make_run):
    data = DataConfig(attention="within")
    origin = make_run("origin").model_copy(update={"data": data})
    train(origin)
    run = make_run("run", start_from="origin").model_copy(update={"data": data})
    assert (rows_read(run) == rows_read(origin, 12)).all()


@pytest.mark.parametrize(
    "keys", [{"qk_norm": True, "qkv_shift": True, "value_embeddings": 2}, {"tied": False}]
)
def test_a_run_of_our_own_is_cut(make_run, keys):
    origin = make_run("origin", model={**LARGE, **keys})
    train(origin)
    small = {**SMALL, **keys}
    run = make_run("cut", model=small, start_from="origin", inherit={"heads": "taylor", "ffn": "taylor"})
    train(run)
    cut = read_json(run.folder / "train.json")
    whole = read_json(origin.folder / "train.json")
    assert cut["parameters"]["total"] < whole["parameters"]["total"] / 2
    fresh = make_run("fresh", model=small, steps=12)
    train(fresh)
    final = [read_json(one.folder / "train.json")["final"]["val_loss"] for one in (run, fresh)]
    assert final[0] < final[1]


def test_a_run_with_early_exits_is_cut(make_run):
    """The technique has no weights of its own; the smaller run has it, or does not."""
    origin = with_techniques(make_run("origin", model=LARGE), early_exit=EarlyExit())
    train(origin)
    run = make_run("plain", model={**LARGE, "layers": 2}, start_from="origin", inherit={"layers": "first"})
    source, _ = load_checkpoint(origin.folder / "checkpoints" / LAST)
    wanted = logits(cut_layers(source, [0, 1]), 257)
    assert torch.equal(logits(model_of(run), 257), wanted)
    torch.testing.assert_close(logits(model_of(with_techniques(run, early_exit=EarlyExit())), 257), wanted)


def test_cut_and_factorized_at_once(make_run):
    origin = make_run("origin", model=LARGE)
    train(origin)
    run = make_run("cut", model={**SMALL, "low_rank": {"ffn": 6}, "lora": {"rank": 2}}, start_from="origin")
    train(run)
    start = read_json(run.folder / "train.json")["depends"]["start"]
    assert start["truncation"]["relative_error"] > 0 and start["inherited"]["ffn"]


def test_learned_positions_are_cut_to_the_context(make_run):
    origin = make_run("origin", model={**LARGE, "positions": "learned"})
    train(origin)
    run = make_run("run", model={**LARGE, "positions": "learned", "context": 16}, start_from="origin")
    source, _ = load_checkpoint(origin.folder / "checkpoints" / LAST)
    assert torch.equal(model_of(run).positions.weight, source.positions.weight[:16])


def test_parts_that_change_nothing_at_first_are_made(make_run):
    origin = make_run("origin", model={**LARGE, "tied": True})
    train(origin)
    made = {"qkv_shift": True, "value_embeddings": 1, "tied": False}
    run = make_run("run", model={**LARGE, **made}, start_from="origin")
    source, _ = load_checkpoint(origin.folder / "checkpoints" / LAST)
    assert torch.equal(logits(model_of(run), 257), logits(source, 257))


def test_a_model_that_was_not_fetched_says_what_to_run(published, tmp_path):
    _, make = published
    (tmp_path / "data/raw/made/model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"data/raw/made/model.safetensors: no such file; run: stlm fetch made"
    ):
        Trainer(make())


def test_other_tokens_are_refused(published, make_run):
    _, make = published
    run = make().model_copy(update={"tokenizer": "bytes"})
    with pytest.raises(UserError, match="bytes has other tokens than made: hf:made"):
        Trainer(run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 257})}))


def test_importance_is_listed_without_training(published):
    parent, make = published
    run = make(keys=SMALL, tokenizer="hf:made:280", inherit={"bytes": 2000})
    text = importance_tables(run, [2, 1], with_loss=True)
    lines = text.splitlines()
    assert lines[0].startswith("run cut starts from made: 3 layers, width 32, 4 heads (2 of keys and values)")
    at = next(n for n, line in enumerate(lines) if line.split()[:3] == ["layer", "influence", "left"])
    assert "the share of the best 24 in %" in lines[at - 1]
    assert lines[at].split()[5:] == ["magnitude", "activation", "wanda", "taylor"]
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["0", "1", "2"]
    assert all(24 / 48 * 100 <= float(share) <= 100 for share in lines[at + 1].split()[3:])
    heads = next(n for n, line in enumerate(lines) if line.startswith("heads' shares"))
    assert [len(line.split()) for line in lines[heads + 2 : heads + 5]] == [1 + 4 * 4] * 3
    cuts = next(number for number, line in enumerate(lines) if line.startswith("layers left"))
    assert lines[cuts].split()[2:] == ["first", "spread", "influence", "loss"]
    assert [line.split()[0] for line in lines[cuts + 1 : cuts + 4]] == ["3", "2", "1"]
    ids = torch.from_numpy(load_tokenizer(run.tokens_folder / "tokenizer").parent_ids)
    validation = ValidationSet(run.tokens_folder, 32, 500)
    assert lines[cuts + 1].split()[1] == f"{bits_per_byte(cut_vocabulary(parent, ids), validation):.4f}"
    assert lines[-1].startswith("the run's model, cut as training.inherit says: ")
    assert not run.folder.exists() and not run.state_folder.parent.exists()
    with pytest.raises(UserError, match="--layers: 4: made has 3"):
        importance_tables(run, [4])
    with pytest.raises(UserError, match="run cut starts from new weights"):
        importance_tables(make(start=None))


def test_bits_per_byte_are_those_of_training(make_run):
    run = make_run()
    train(run)
    model, _ = load_checkpoint(run.folder / "checkpoints" / LAST)
    validation = ValidationSet(run.tokens_folder, 32, 500)
    final = read_json(run.folder / "train.json")["final"]["val_bits_per_byte"]
    assert bits_per_byte(model, validation) == pytest.approx(final, abs=1e-5)


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_needs_the_layers_of_most_influence(tmp_path):
    """Of a third of its layers, it matters which go; all of them are the model to the bit."""
    root = Path(__file__).parents[2]
    folder = tmp_path / "raw/smollm2_135m"
    try:
        fetch(load_models(root)["smollm2_135m"], folder)
    except UserError as error:
        pytest.skip(str(error))
    model = load_published(folder)
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = words.encode((root / "docs/decisions.md").read_text()[:4000], add_special_tokens=False).ids
    rows = torch.tensor([[0, *ids[:256]], [0, *ids[256:512]]])
    whole, scores = mean_loss(model, rows), influence(model, rows)
    assert mean_loss(cut_layers(model, range(30)), rows) == whole
    assert sorted(scores)[-2:] == sorted((scores[0], scores[29]))
    best, even = (
        mean_loss(cut_layers(model, kept), rows)
        for kept in (choose(torch.tensor(scores), 20), spread(30, 20))
    )
    assert whole < best < even - 1
