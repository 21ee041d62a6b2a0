"""Checkpoints: what they say of themselves, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stlm.errors import UserError
from stlm.files import read_json, sha256
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.training.checkpoints import last_checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(
        layers=1, width=16, heads=2, kv_heads=1, ffn_width=24, vocab_size=50, context=8, tied=request.param
    )
    model = Transformer(config).eval()
    save_checkpoint(tmp_path / "step-0000001", model, {"step": 1, "tokens": 8})
    return tmp_path / "step-0000001", model


def test_a_checkpoint_is_self_describing_and_gives_the_same_logits(checkpoint):
    folder, model = checkpoint
    loaded, description = load_checkpoint(folder)
    assert description["step"] == 1
    assert description["model"]["kv_heads"] == 1
    assert description["code"]["torch"] == torch.__version__
    tokens_BL = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BL), loaded(tokens_BL), atol=0, rtol=0)
    assert (loaded.output.weight is loaded.embedding.weight) == model.config.tied


def test_damaged_checkpoints_are_told(checkpoint):
    folder, _ = checkpoint
    weights, config = folder / "model.safetensors", folder / "config.json"
    # Without a checksum, by which any change is told as damage.
    whole, text = weights.read_bytes(), json.dumps(read_json(config), indent=2)
    for damaged in (whole[:-10], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.safetensors: the weights are damaged"):
            load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: no such file"):
        load_checkpoint(folder)
    weights.write_bytes(whole)
    for content, expected in [
        (text[:40], "config.json: not valid JSON"),
        ("[]", "config.json: not a checkpoint's description"),
        (json.dumps({**json.loads(text), "format": 99}), "config.json: not a checkpoint's description"),
        (
            text.replace('"width": 16', '"width": 32'),
            r"not the weights of the model in config\.json: [\d,]+ numbers, expected [\d,]+;",
        ),
        (text.replace('"width": 16', '"width": 17'), r"config.json: model\.heads: 2 does not divide width"),
        (text.replace('"layers": 1', '"layers": "1"'), r"config.json: model\.layers: .*found '1'"),
        (text.replace('"layers": 1', '"layers": 1e99'), r"config.json: model\.layers: "),
        (text.replace('"layers": 1', '"layer": 1'), r"config.json: model\.layer: no such key .*'layers'"),
        (text.replace('"vocab_size": 50', '"vocab_size": null'), r"model\.vocab_size: this key is missing"),
        (text.replace('"step": 1', '"stop": 1'), r"config.json: step: this key is missing"),
        (text.replace('"step": 1', '"step": "one"'), r"config.json: step: .*found 'one'"),
        (text.replace('"tokens": 8', '"tokens": -8'), r"config.json: tokens: .*found -8"),
        (text.replace('"weights_sha256": "', '"weights_sha256": 7, "x": "'), r"weights_sha256: .*found 7"),
        (json.dumps({**json.loads(text), "model": {}}), r"model\.vocab_size: this key is missing"),
        (json.dumps({**json.loads(text), "model": 3}), r"config.json: model: .*found 3"),
    ]:
        config.write_text(content)
        with pytest.raises(UserError, match=expected):
            load_checkpoint(folder)


def _replace(folder, **changes) -> None:
    """Other tensors in a checkpoint whose config.json has their digest; None takes one away."""
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(weights, path)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"weights_sha256": sha256(path)}))


def test_weights_that_are_not_the_models_are_named(checkpoint):
    folder, model = checkpoint
    infinite = model.embedding.weight.detach().clone()
    infinite[3, 4] = torch.inf
    for changed, expected in [
        ({"norm.weight": None}, "numbers, expected"),
        ({"norm.weight": None, "nrom.weight": torch.ones(16)}, r"no tensor norm\.weight"),
        ({"norm.weight": torch.ones(4, 4)}, r"norm\.weight is torch\.float32 \[4, 4\], expected .* \[16\]"),
        ({"norm.weight": torch.ones(16, dtype=torch.int64)}, r"norm\.weight is torch\.int64 \[16\]"),
        ({"norm.weight": torch.full((16,), torch.nan)}, r"the tensor norm\.weight has NaN or infinite"),
        (
            {
                "norm.weight": torch.ones(16),
                "embedding.weight": infinite,
            },
            r"the tensor embedding\.weight has NaN or infinite values; delete",
        ),
    ]:
        before = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
        _replace(folder, **changed)
        with pytest.raises(UserError, match=expected):
            load_checkpoint(folder)
        for name, content in before.items():
            (folder / name).write_bytes(content)


def test_a_folder_that_is_no_checkpoint_is_not_started_from(tmp_path, make_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run()
    parent = run.folder.with_name("other") / "checkpoints"
    for name in ("step-0000002", "step-0000010", "step-abc", "step-", "step-\u0663"):
        (parent / name).mkdir(parents=True)
    assert last_checkpoint(run, "other").name == "step-0000010"
    for folder in parent.glob("step-0*"):
        folder.rmdir()
    with pytest.raises(UserError, match=r"other/checkpoints: no checkpoint; run: stlm train \S+ other"):
        last_checkpoint(run, "other")
