"""Our tokenizers as the metadata of a GGUF file, from which llama.cpp builds its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from gguf import TokenType

from stlm.errors import UserError
from stlm.export.llama import tokenizer_json
from stlm.tokens.tokenizer import Tokenizer

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# `tokenizer.ggml.pre`, llama.cpp's name for a way to split texts -> the same in the library `tokenizers`.
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}


class GgufTokenizer(NamedTuple):
    """`pre`: how texts are split; tokens by id, their types, and merges, a space between both parts."""

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]


def gguf_tokenizer(tokenizer: Tokenizer) -> GgufTokenizer:
    """The vocabulary of a byte-pair tokenizer as llama.cpp's model `gpt2` reads it.

    Special tokens are of type CONTROL: llama.cpp then takes them for text unless it is told to parse them,
    as our tokenizers do. Raises UserError, naming the tokenizer, for one that is no byte-pair encoding, or
    that splits texts in a way for which llama.cpp has no name.
    """
    content = json.loads(tokenizer_json(tokenizer))
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    by_id = {id_: token for token, id_ in content["model"]["vocab"].items()} | special
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    if not merges:
        raise UserError(
            f"tokenizer: {tokenizer.name} has no merges, without which llama.cpp reads no vocabulary; "
            "`stlm export RUN FOLDER` exports it for transformers"
        )
    return GgufTokenizer(
        _pre(tokenizer.name, content["pre_tokenizer"]),
        [by_id[id_] for id_ in range(tokenizer.vocab_size)],
        [TokenType.CONTROL if id_ in special else TokenType.NORMAL for id_ in range(tokenizer.vocab_size)],
        [" ".join(merge) for merge in merges],
    )


def _pre(name: str, pre_tokenizer: Mapping[str, Any]) -> str:
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    plain = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for step in plain:
        if step["type"] == "ByteLevel":
            step.setdefault("use_regex", True)  # older files leave it out
    for pre, known in SPLITS.items():
        if plain == known:
            return pre
    kinds = ", ".join(step["type"] for step in steps)
    raise UserError(
        f"tokenizer: {name} splits texts in a way ({kinds}) for which `tokenizer.ggml.pre` of a GGUF file "
        f"has no name here (known: {', '.join(SPLITS)}); under another name llama.cpp would write other "
        "tokens. `stlm export RUN FOLDER` exports it for transformers"
    )
