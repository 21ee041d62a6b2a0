"""A fetched model's tokenizer, small: trained here, with SmolLM2's pre-tokenization and its gaps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers
from raw_samples import stories
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stlm.files import sha256, write_json
from stlm.tokens.byte_pairs import letters

EOT = "<|endoftext|>"
SPECIAL = [EOT, "<|im_start|>", "<|im_end|>", "<file>", "<name>", "<issue>"]
# Bytes without a token, as in SmolLM2; the last ones of SPECIAL stand for them.
ABSENT = (0x04, 0x1D, 0xF1)


def smollm_pre_tokenizer() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def write_model(
    folder: Path,
    size: int = 500,
    texts: Iterable[str] | None = None,
    pre_tokenizer: Any = None,
    change: Callable[[dict[str, Any]], None] = lambda content: None,
) -> Path:
    """Write data/raw/<name>/ as `stlm fetch` does, without weights; `change` edits its tokenizer.json."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer or smollm_pre_tokenizer()
    trained.decoder = decoders.ByteLevel()
    alphabet = [letter for letter, byte in letters().items() if byte not in ABSENT]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(stories(300) if texts is None else texts, trainer)
    content = json.loads(trained.to_str())
    change(content)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    entry = {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(
        folder / "source.json", {"name": folder.name, "kind": "model", "prefix": EOT, "files": [entry]}
    )
    return folder


def reference(path: Path) -> Callable[[str], list[int]]:
    """The ids that `transformers` gives to a text, for which special tokens are ordinary text."""
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=EOT, split_special_tokens=True)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]
