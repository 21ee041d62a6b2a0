"""What training reads is what was written: single flipped bits and cuts of every file that it reads."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from stlm.errors import UserError
from stlm.files import read_json, write_json
from stlm.tokens.config import DataConfig
from stlm.tokens.shards import read_split
from stlm.training import difficulty, loop
from stlm.training.loop import Trainer, train
from stlm.training.resume import resume


def flip(path, place):
    """Flip a bit of a file: the number `place`, from 0."""
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def places(path, number, seed=0):
    """Bits of a file, drawn by a seed, the first and the last among them."""
    bits = 8 * path.stat().st_size
    return [0, bits - 1, *random.Random(seed).sample(range(bits), number - 2)]


def check_every_flip(path, number, read, match):
    whole = path.read_bytes()
    for place in places(path, number):
        flip(path, place)
        with pytest.raises(UserError, match=match):
            read()
        path.write_bytes(whole)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=match):
            read()
    path.write_bytes(whole)


@pytest.fixture
def own_tokens(make_run):
    """A run whose tokens may be damaged: the fixture's are shared."""
    run = make_run(checkpoints=[3], save_every=3)
    folder = run.tokens_folder
    source = folder.resolve()
    folder.unlink()
    shutil.copytree(source, folder)
    return run


@pytest.fixture
def stopped(own_tokens, monkeypatch):
    """A run that has trained and was stopped before its results were put in place."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "publish", lambda *arguments: None)
        train(own_tokens)
    return own_tokens


def test_a_state_with_one_flipped_bit_is_not_resumed(stopped):
    """Six of six were, with other final weights."""
    state = stopped.state_folder / "state.pt"
    trainer = Trainer(stopped)
    check_every_flip(
        state,
        100,
        lambda: resume(trainer.state),
        r"^\.state/test/tiny-run/state\.pt: damaged.*; delete \.state/test/tiny-run",
    )
    assert resume(trainer.state)
    flip(state, 8 * 5000)
    with pytest.raises(UserError, match="damaged"):
        train(stopped)
    assert state.exists() and not stopped.folder.exists(), "nothing is lost or written"


def test_a_checkpoint_that_waits_to_be_published(stopped):
    folder = stopped.state_folder / "output" / "checkpoints" / "step-0000003"
    for name in ("model.safetensors", "config.json"):
        flip(folder / name, 8 * 100)
        with pytest.raises(UserError, match=rf"step-0000003/{name}: .*delete \.state/test/tiny-run"):
            resume(Trainer(stopped).state)
        flip(folder / name, 8 * 100)
    train(stopped)
    assert (stopped.folder / "train.json").exists()


def test_tokenizers_are_checked_before_the_first_step(own_tokens, monkeypatch):
    """A truncated one trained to the end, and the checkpoint could not be used."""
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a step was taken"))
    path = own_tokens.tokens_folder / "tokenizer" / "tokenizer-name.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"tokenizer-name\.json: .*; run: stlm tokenize tiny bytes"):
        train(own_tokens)
    # Whole, but of another corpus.
    other = read_json(shutil.copy(own_tokens.tokens_folder.resolve() / "meta.json", "meta-before.json"))
    description = {"name": "bytes", "vocab_size": 258, "eot": 257, "sha256": {}}
    write_json(path, description)
    assert "tokenizer_sha256" in other
    with pytest.raises(UserError, match=r"tokenizer.*; run: stlm tokenize tiny bytes"):
        train(own_tokens)


def test_a_tokenizer_that_is_damaged_while_the_run_trains(own_tokens, monkeypatch):
    path = own_tokens.tokens_folder / "tokenizer" / "tokenizer-name.json"
    whole = path.read_bytes()
    original = loop.summary
    with monkeypatch.context() as patch:
        patch.setattr(loop, "summary", lambda *a: path.write_bytes(b"{") and original(*a))
        with pytest.raises(UserError, match=r"tokenizer-name\.json: not valid JSON"):
            train(own_tokens)
    path.write_bytes(whole)
    train(own_tokens)
    assert (own_tokens.folder / "checkpoints" / "tokenizer" / path.name).read_bytes() == whole


def test_every_file_of_tokens(own_tokens):
    folder = own_tokens.tokens_folder
    for shard in folder.glob("train-*.arrow"):
        check_every_flip(
            shard, 60, lambda: read_split(folder, "train"), r"arrow: .*; run: stlm tokenize tiny bytes"
        )
    meta = folder / "meta.json"
    before, whole, harmless = read_json(meta), meta.read_bytes(), 0
    for place in places(meta, 300):
        flip(meta, place)
        try:
            read_split(folder, "train")
            assert read_json(meta) == before
            harmless += 1  # white space
        except UserError as error:
            assert str(error).endswith("run: stlm tokenize tiny bytes")
        meta.write_bytes(whole)
    assert harmless < 60


def test_the_weight_of_a_component_is_not_taken_from_a_damaged_file(own_tokens):
    meta = own_tokens.tokens_folder / "meta.json"
    meta.write_text(meta.read_text().replace('"weight": 1.0', '"weight": 3.0'))
    with pytest.raises(UserError, match=r"meta\.json: damaged, or changed by hand"):
        train(own_tokens)
    # One of an earlier version has no checksum, and is read.
    content = json.loads(meta.read_text())
    del content["checksum"], content["tokenizer_sha256"]
    write_json(meta, content)
    train(own_tokens)


def test_scores_of_difficulty(own_tokens, make_run, monkeypatch):
    reference = own_tokens.model_copy(update={"name": "reference", "variant": "reference"})
    train(reference)
    data = DataConfig(order="difficulty", reference="reference")
    run = own_tokens.model_copy(update={"data": data})
    Trainer(run)
    monkeypatch.setattr(difficulty, "mean_losses", lambda *arguments: pytest.fail("measured again"))
    (kept,) = (run.state_folder.parent / ".difficulty").glob("*.npy")
    check_every_flip(kept, 20, lambda: Trainer(run), r"\.npy: damaged.*; delete \.state/test/\.difficulty")
    Trainer(run)


def test_a_reference_or_origin_with_a_changed_description(own_tokens):
    train(own_tokens.model_copy(update={"name": "first", "variant": "first"}))
    config = own_tokens.folder.with_name("first") / "checkpoints" / "step-0000012" / "config.json"
    run = own_tokens.model_copy(
        update={"training": own_tokens.training.model_copy(update={"start_from": "first"})}
    )
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with pytest.raises(UserError, match=r"config\.json: damaged.*run: stlm train test first"):
        Trainer(run)


def test_results_list_the_files_beside_them(own_tokens):
    train(own_tokens)
    listed = json.loads((own_tokens.folder / "train.json").read_text())["checksum"]["files"]
    assert set(listed) == {"curve.csv", "watch.csv"}
