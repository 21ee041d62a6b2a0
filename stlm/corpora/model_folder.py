"""Writes the folder of a published model: the same files, whatever its source; `transformers` loads it.

Nothing of a source is run: GGUF and safetensors are read as numbers, and code beside them is not looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stlm.corpora.config import GGUF, LlamaShape, ModelEntry
from stlm.corpora.errors import SourceError, shown
from stlm.corpora.gguf_file import GgufError, GgufFile
from stlm.corpora.sources import Found
from stlm.files import write_json
from stlm.model.llama import NotLlamaError, check_llama_weights, llama_config, read_llama_config

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_model(entry: ModelEntry, kind: str, found: Found, folder: Path) -> dict[str, Any]:
    """Fill `folder` from the files of a source of `kind`; the entry of source.json for the model.

    Raises SourceError, naming file and key, if they are damaged, no plain Llama, or of other sizes than
    `entry.model` says.
    """
    files = {output: each[0][1] for output, each in found.files.items()}
    named = ", ".join(shown(path) for each in found.files.values() for path, _ in each)
    try:
        content = _from_gguf(files[GGUF]) if GGUF in files else _from_transformers(found)
        config = read_llama_config(content["config"])
        _compare(entry.model, config)
        check_llama_weights(config, content["weights"])
        check_tokenizer(content["tokenizer"], entry)
        if content.get("starts_with") not in (None, entry.prefix):
            raise ValueError(
                f"prefix: {entry.prefix!r}, but its texts begin with {content['starts_with']!r} "
                "(tokenizer.ggml.add_bos_token)"
            )
    except (GgufError, NotLlamaError, SafetensorError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{kind}: {named}: {reason}") from None
    _write(content, llama_config(config), folder)
    return {
        "origin": entry.origin,
        "prefix": entry.prefix,
        "training_tokens": entry.training_tokens,
        "stored": content["stored"],
    }


def _from_gguf(path: Path) -> dict[str, Any]:
    file = GgufFile(path)
    return {
        "config": file.config,
        "weights": {name: torch.from_numpy(weight) for name, weight in file.weights().items()},
        "special_ids": file.special_ids,
        "starts_with": file.starts_with,
        "tokenizer": file.tokenizer_json(),
        "tokenizer_config": file.tokenizer_config(),
        "stored": file.stored,
    }


def _from_transformers(found: Found) -> dict[str, Any]:
    """The content of a folder of transformers; its weights may be several files."""
    jsons = {output: each[0][1] for output, each in found.files.items() if output.endswith(".json")}
    texts = {output: path.read_text(encoding="utf-8") for output, path in jsons.items()}
    objects = {output: _object(output, text) for output, text in texts.items()}
    weights: dict[str, Tensor] = {}
    for _, path in found.files["model.safetensors"]:
        weights |= load_file(path)
    stored: dict[str, int] = {}
    for weight in weights.values():
        name = str(weight.dtype).removeprefix("torch.")
        stored[name] = stored.get(name, 0) + 1
    ids = {**objects["config.json"], **objects.get("generation_config.json", {})}
    return {
        "config": objects["config.json"],
        "weights": weights,
        "special_ids": {key: ids[key] for key in _SPECIAL_IDS if ids.get(key) is not None},
        "tokenizer": texts["tokenizer.json"],
        "tokenizer_config": objects.get("tokenizer_config.json", {}),
        "stored": stored,
    }


def _object(name: str, text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"{name}: a JSON {type(content).__name__}, expected an object")
    return content


def _compare(wanted: LlamaShape, config: Any) -> None:
    """Raise ValueError if the files describe a model of other sizes than params/models.yaml."""
    for key in type(wanted).model_fields:
        asked, there = getattr(wanted, key), getattr(config, key)
        if asked != there:
            raise ValueError(f"params/models.yaml has model.{key}: {asked}, the files {there}")


def check_tokenizer(text: str, entry: ModelEntry) -> None:
    """Raise ValueError unless the tokenizer's tokens have rows in the embedding, and the prefix is one."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"tokenizer.json: {error}") from None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= entry.model.vocab_size:
        raise ValueError(
            f"tokenizer.json: it has the token {highest}, the embedding {entry.model.vocab_size} rows"
        )
    if tokenizer.token_to_id(entry.prefix) is None:
        raise ValueError(f"tokenizer.json: prefix: {entry.prefix!r} is none of its tokens")


def _write(content: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    weights = {name: weight.float().contiguous() for name, weight in sorted(content["weights"].items())}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # The library makes its file private.
    (folder / "model.safetensors").chmod(0o644)
    ids = content["special_ids"]
    known = {key: value for key, value in ids.items() if key in _SPECIAL_IDS}
    write_json(folder / "config.json", {**config, **known})
    write_json(folder / "generation_config.json", known)
    (folder / "tokenizer.json").write_text(content["tokenizer"], encoding="utf-8")
    # The class that takes tokenizer.json as it is; others may build their own splitting of a text.
    about = {**content["tokenizer_config"], "tokenizer_class": "PreTrainedTokenizerFast"}
    about |= {"clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"]}
    write_json(folder / "tokenizer_config.json", about)
