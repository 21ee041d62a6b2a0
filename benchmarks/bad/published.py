"""Folders of published models that are damaged or of another kind, and their settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad.case import Case, edit, put
from bad.checkpoints import change

FOLDER = "published/other"
CONFIG, WEIGHTS = f"{FOLDER}/config.json", f"{FOLDER}/model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = f"{FOLDER}/tokenizer.json", f"{FOLDER}/tokenizer_config.json"
INDEX = f"{WEIGHTS}.index.json"
EVALUATE = ("evaluate", "tiny", "other")
GENERATE = ("generate", "tiny/other", "A", "--tokens", "5")
Spoil = Callable[[Path], None]


def _remove(*paths: str) -> Spoil:
    def spoil(project: Path) -> None:
        for path in paths:
            (project / path).unlink()

    return spoil


def _weights(change_it: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(project: Path) -> None:
        weights = load_file(project / WEIGHTS)
        change_it(weights)
        save_file(weights, project / WEIGHTS, {"format": "pt"})

    return spoil


def _cut(path: str, length: int) -> Spoil:
    return lambda project: (project / path).write_bytes((project / path).read_bytes()[:length])


def _index(listed: Any, keep: bool = False) -> Spoil:
    """A list of weights' files without the one file of them all; `keep`: it becomes part.safetensors."""

    def spoil(project: Path) -> None:
        if keep:
            (project / WEIGHTS).rename(project / FOLDER / "part.safetensors")
        (project / INDEX).write_text(json.dumps(listed))
        (project / FOLDER / "other.safetensors").write_bytes(b"")
        if not keep:
            (project / WEIGHTS).unlink()

    return spoil


def _vocabulary(change_it: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(project: Path) -> None:
        path = project / TOKENIZER
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change_it(content) or content))

    return spoil


def _empty(content: dict[str, Any]) -> None:
    content["model"] |= {"vocab": {}, "merges": []}
    content["added_tokens"] = []


def _beyond(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<|extra|>"})


def _far_beyond(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 5000


def _words(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": {"A": 0, "story": 1}, "unk_token": "<unk>"}


def _no_bytes(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {"A": 0}
    content["model"]["merges"] = []


def _bad_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [["no", "such"]]


def _unknown_kind(content: dict[str, Any]) -> None:
    content["model"]["type"] = "Bpe2"


def _bad_pattern(content: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = split


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][3] = torch.nan


def _whole(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)


def _shape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(31)


def _lack(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def _names(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[f"own.{name}"] = weights.pop(name)


def _pickled(project: Path) -> None:
    (project / WEIGHTS).rename(project / FOLDER / "pytorch_model.bin")


def _code(project: Path) -> None:
    change(CONFIG, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(
        project
    )
    (project / FOLDER / "own.py").write_text("raise SystemExit('foreign code ran')\n")


def _file_for_folder(project: Path) -> None:
    shutil.rmtree(project / FOLDER)
    (project / FOLDER).write_text("a file")


def _locked(project: Path) -> None:
    (project / WEIGHTS).chmod(0)


def _folders() -> list[Case]:
    cannot = r"transformers cannot load it, the model: "
    tokenizer = r"transformers cannot load it, the tokenizer: .*expected tokenizer\.json"
    wrong: list[tuple[str, Spoil, str]] = [
        ("no folder", lambda project: shutil.rmtree(project / FOLDER), r"published/other: no such folder"),
        ("a file", _file_for_folder, r"published/other: a file; expected a folder"),
        ("an empty folder", lambda project: _only(project), r"no config\.json; expected a folder"),
        ("no config.json", _remove(CONFIG), r"no config\.json"),
        ("config.json is empty", put(CONFIG, ""), r"config\.json: not readable as JSON"),
        ("config.json is a list", put(CONFIG, "[]"), r"config\.json: a JSON list"),
        ("config.json is cut", _cut(CONFIG, 100), r"config\.json: not readable as JSON"),
        ("config.json nests deeply", put(CONFIG, "[" * 100_000), r"config\.json: not readable as JSON"),
        (
            "config.json without model_type",
            change(CONFIG, model_type=...),
            r"model_type: None: expected a name",
        ),
        ("model_type is a number", change(CONFIG, model_type=3), r"model_type: 3: expected a name"),
        ("model_type is unknown", change(CONFIG, model_type="lama"), cannot),
        ("model_type is of another kind", change(CONFIG, model_type="clip"), r"published/other"),
        ("model_type is an encoder", change(CONFIG, model_type="t5"), r"published/other"),
        ("hidden_size is text", change(CONFIG, hidden_size="many"), cannot),
        ("hidden_size is 0", change(CONFIG, hidden_size=0), r"published/other"),
        ("hidden_size is below zero", change(CONFIG, hidden_size=-32), r"published/other"),
        ("hidden_size is 10^9", change(CONFIG, hidden_size=10**9), r"published/other"),
        ("hidden_size is missing", change(CONFIG, hidden_size=...), r"published/other"),
        ("no attention heads", change(CONFIG, num_attention_heads=0), r"published/other"),
        ("layers are text", change(CONFIG, num_hidden_layers="one"), r"published/other"),
        ("layers are a fraction", change(CONFIG, num_hidden_layers=1.5), r"published/other"),
        (
            "more layers than weights",
            change(CONFIG, num_hidden_layers=3),
            r"the weights lack \d+ of the model's",
        ),
        ("10^9 layers", change(CONFIG, num_hidden_layers=10**9), r"num_hidden_layers: 1000000000, but"),
        ("vocab_size is another", change(CONFIG, vocab_size=400), r"published/other"),
        ("vocab_size is 0", change(CONFIG, vocab_size=0), r"published/other"),
        ("an activation that is none", change(CONFIG, hidden_act="own"), cannot),
        ("an epsilon that is text", change(CONFIG, rms_norm_eps="little"), r"published/other"),
        ("positions are text", change(CONFIG, max_position_embeddings="many"), r"published/other"),
        ("positions are 0", change(CONFIG, max_position_embeddings=0), r"max_position_embeddings: 0"),
        ("positions are missing", change(CONFIG, rope_parameters=3), r"published/other"),
        (
            "rotary angles of no kind",
            change(CONFIG, rope_parameters={"rope_type": "own"}),
            r"published/other",
        ),
        (
            "quantized weights",
            change(CONFIG, quantization_config={"quant_method": "gptq"}),
            r"published/other",
        ),
        ("code of its own", _code, cannot),
        ("no weights", _remove(WEIGHTS), r"no weights as \*\.safetensors"),
        ("pickled weights", _pickled, r"no weights as \*\.safetensors.*pytorch_model\.bin"),
        ("weights are empty", put(WEIGHTS, b""), r"0 bytes, truncated or no safetensors"),
        ("weights are cut", _cut(WEIGHTS, 5000), r"5,000 bytes, truncated or no safetensors"),
        ("weights are cut in the header", _cut(WEIGHTS, 50), r"50 bytes, truncated or no safetensors"),
        ("weights are a pointer", put(WEIGHTS, "version https://git-lfs"), r"truncated or no safetensors"),
        ("weights may not be read", _locked, r"model\.safetensors"),
        ("a NaN weight", _weights(_nan), r"the tensor model\.norm\.weight has NaN or infinite values"),
        ("whole numbers for a weight", _weights(_whole), r"the tensor model\.norm\.weight is of I8"),
        ("a weight of another shape", _weights(_shape), r"published/other"),
        ("a weight too few", _weights(_lack), r"the weights lack 1 of the model's tensors"),
        ("weights of other names", _weights(_names), r"the weights lack \d+ of the model's tensors"),
        ("no weights at all", _weights(lambda weights: weights.clear()), r"published/other"),
        (
            "an index of missing files",
            _index({"weight_map": {"a": "gone.safetensors"}}),
            r"lists gone\.safetens",
        ),
        (
            "an index of files elsewhere",
            _index({"weight_map": {"a": "../x"}}),
            r"lists \.\./x, not in the folder",
        ),
        ("an index that is a list", _index([]), r"index\.json: a JSON list"),
        ("an index without a map", _index({}), r"index\.json: weight_map: expected"),
        ("an index of numbers", _index({"weight_map": {"a": 3}}), r"index\.json: weight_map: expected"),
        (
            "an index of other tensors",
            _index({"weight_map": {"a": "part.safetensors"}}, keep=True),
            r"published/other",
        ),
        ("no tokenizer", _remove(TOKENIZER, TOKENIZER_CONFIG), r"published/other.*tokenizer"),
        ("tokenizer.json is gone", _remove(TOKENIZER), r"published/other.*tokenizer"),
        ("tokenizer.json is empty", put(TOKENIZER, ""), tokenizer),
        ("tokenizer.json is cut", _cut(TOKENIZER, 500), tokenizer),
        ("tokenizer.json is a list", put(TOKENIZER, "[]"), tokenizer),
        ("tokenizer.json is {}", put(TOKENIZER, "{}"), tokenizer),
        ("a tokenizer of no tokens", _vocabulary(_empty), r"published/other"),
        ("a tokenizer of one letter", _vocabulary(_no_bytes), r"published/other|no token"),
        ("a tokenizer of words", _vocabulary(_words), r"published/other|tokenizer"),
        ("a tokenizer of no kind", _vocabulary(_unknown_kind), tokenizer),
        ("merges of unknown tokens", _vocabulary(_bad_merges), tokenizer),
        ("a pattern that is none", _vocabulary(_bad_pattern), tokenizer),
        ("a token beyond the rows", _vocabulary(_beyond), r"1 have no row, first '<\|extra\|>' \(320\)"),
        ("a token far beyond the rows", _vocabulary(_far_beyond), r"tokenizer has 5,001 tokens"),
        (
            "a pad token beyond the rows",
            change(TOKENIZER_CONFIG, pad_token="[PAD]"),
            r"first '\[PAD\]' \(320\)",
        ),
        (
            "no bos and no eos",
            change(TOKENIZER_CONFIG, bos_token=None, eos_token=None),
            r"neither a bos nor an",
        ),
        ("a bos that is a number", change(TOKENIZER_CONFIG, bos_token=3), r"published/other"),
        ("tokenizer_config.json is a list", put(TOKENIZER_CONFIG, "[]"), tokenizer),
        ("tokenizer_config.json is cut", _cut(TOKENIZER_CONFIG, 20), tokenizer),
    ]
    unprivileged = {"weights may not be read"}
    cases = [
        Case(f"published: {name}", EVALUATE, spoil, expects, unprivileged=name in unprivileged)
        for name, spoil, expects in wrong
    ]
    both = (
        "no folder",
        "a NaN weight",
        "a token beyond the rows",
        "tokenizer.json is cut",
        "weights are cut",
    )
    return cases + [
        Case(f"published: generate: {name}", GENERATE, spoil, expects)
        for name, spoil, expects in wrong
        if name in both
    ]


def _only(project: Path) -> None:
    shutil.rmtree(project / FOLDER)
    (project / FOLDER).mkdir()


def _setting(text: str) -> Spoil:
    return edit("params/tiny.yaml", "{folder: published/other}", f"{{folder: published/other, {text}}}")


def _settings() -> list[Case]:
    prefix = r"prefix: .* is no token of other"
    found = [
        Case("published: a prefix that is none", EVALUATE, _setting("prefix: <|endotext|>"), prefix),
        Case(
            "published: the nearest prefix", EVALUATE, _setting("prefix: <|endftext|>"), r"<\|endoftext\|>'\?"
        ),
        Case("published: a prefix of two tokens", EVALUATE, _setting("prefix: 'A 9'"), prefix),
        Case("published: an empty prefix", EVALUATE, _setting("prefix: ''"), r"published\.other\.prefix"),
        Case(
            "published: a prefix that is a number",
            EVALUATE,
            _setting("prefix: 3"),
            r"published\.other\.prefix",
        ),
        Case(
            "published: a prefix that is a list",
            EVALUATE,
            _setting("prefix: [a]"),
            r"published\.other\.prefix",
        ),
        Case("published: generate: a prefix that is none", GENERATE, _setting("prefix: <bos>"), prefix),
        Case(
            "published: report: another prefix than it was scored with",
            ("report", "tiny"),
            _setting("prefix: A"),
            r"prefix: not set, the study asks for A: run `stlm evaluate tiny other`",
        ),
        Case(
            "published: report: another context than it was scored with",
            ("report", "tiny"),
            _setting("context: 32"),
            r"context: null, the study asks for 32",
        ),
        Case(
            "published: a context longer than its own",
            EVALUATE,
            _setting("context: 65"),
            r"context: 65 is longer",
        ),
        Case("published: a context of 1", EVALUATE, _setting("context: 1"), r"published\.other\.context"),
        Case(
            "published: generate: a context of 65",
            GENERATE,
            _setting("context: 65"),
            r"context: 65 is longer",
        ),
        Case("published: generate: a name that is none", ("generate", "tiny/othr", "A"), None, r"tiny/other"),
        Case(
            "published: generate: a step",
            ("generate", "tiny/other@5", "A"),
            None,
            r"tiny/other@5|tiny/other:",
        ),
        Case("published: generate", GENERATE, status=0),
        # Read as tokenizer.json has it.
        Case(
            "published: a tokenizer's class that is none",
            GENERATE,
            change(TOKENIZER_CONFIG, tokenizer_class="OwnTokenizer"),
            status=0,
        ),
        Case("published: generate: by its folder", ("generate", FOLDER, "A", "--tokens", "5"), status=0),
        Case(
            "published: study: a damaged one",
            ("study", "tiny"),
            put(WEIGHTS, b""),
            r"cannot be read",
            status=0,
        ),
        Case(
            "published: study: no folder", ("study", "tiny"), _gone, r"published/other +not there", status=0
        ),
    ]
    return found


def _gone(project: Path) -> None:
    shutil.rmtree(project / FOLDER)


def cases() -> list[Case]:
    """Of `published` in params/, evaluated, written with, listed and reported."""
    return [*_folders(), *_settings()]
