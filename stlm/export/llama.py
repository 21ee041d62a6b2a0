"""Writes a checkpoint as a folder that `transformers` loads as a Llama (stlm.model.llama)."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from safetensors.torch import save
from tokenizers import decoders, models, pre_tokenizers

from stlm.errors import UserError
from stlm.files import atomic_directory, write_json
from stlm.model.config import ModelConfig
from stlm.model.llama import NotLlamaError, check_is_llama, llama_config, llama_weights
from stlm.techniques.base import refuse
from stlm.tokens.tokenizer import EOT, Tokenizer, load_tokenizer
from stlm.training.checkpoint_names import WEIGHTS
from stlm.training.checkpoints import check_fits, load_checkpoint, read_description, read_techniques

GENERATION = "generation_config.json"
# All files of an exported folder.
FILES = {WEIGHTS, GENERATION, "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
_INSTEAD = (
    "no format of `stlm export` has a layout for it. A variant without it can be exported; `stlm generate` "
    "and `stlm evaluate` read this checkpoint"
)


def export_llama(checkpoint: Path, folder: Path, card: str | None = None) -> None:
    """Write `checkpoint` (`.../checkpoints/step-N`, with its tokenizer next to it) to `folder`, atomically.

    `AutoModelForCausalLM` and `AutoTokenizer` load the folder, in float32. Logits equal the checkpoint's,
    except for rounding. The tokenizer gives the same ids for any text, adds none, and treats the text
    `<|endoftext|>` as ordinary text (`split_special_tokens`), as ours does. The end-of-text token is both bos
    and eos. `card` becomes README.md.

    Raises UserError if the model or its tokenizer cannot be written as a Llama, naming key and value.
    """
    _, tokenizer = check_llama_checkpoint(checkpoint)
    content = tokenizer_json(tokenizer)
    model, _ = load_checkpoint(checkpoint)
    check_fits(model, tokenizer, checkpoint)
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    with atomic_directory(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(save(llama_weights(model), metadata={"format": "pt"}))
        write_json(temporary / "config.json", {**llama_config(model.config), **ends})
        # transformers needs padding if prompts differ in length; it is masked, so any token will do.
        write_json(temporary / GENERATION, {**ends, "pad_token_id": tokenizer.eot})
        (temporary / "tokenizer.json").write_text(content, encoding="utf-8")
        write_json(
            temporary / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokenizer.eot_spelling,
                "eos_token": tokenizer.eot_spelling,
                "add_bos_token": False,
                "add_eos_token": False,
                "split_special_tokens": True,
                "clean_up_tokenization_spaces": False,
                "model_max_length": model.config.context,
            },
        )
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def check_llama_checkpoint(checkpoint: Path) -> tuple[ModelConfig, Tokenizer]:
    """The config and the tokenizer of a checkpoint that can be written as a Llama; no weights are read.

    Raises UserError for any other, naming the technique or key that a Llama lacks.
    """

    def refused(reason: object) -> UserError:
        return UserError(f"{checkpoint}: {reason}; {_INSTEAD}")

    config, description = read_description(checkpoint)
    refuse(read_techniques(checkpoint, description), "export", refused)
    if config.bytes is not None:
        raise refused("model.bytes: a byte-level model is no Llama, which reads tokens")
    try:
        check_is_llama(config)
    except NotLlamaError as error:
        raise refused(error) from None
    return config, load_tokenizer(checkpoint.parent / "tokenizer")


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The `tokenizer.json` of the library `tokenizers`: of GPT-2's, trained and published vocabularies.

    Raises UserError for other kinds.
    """
    if "tokenizer.json" in tokenizer.files:
        return tokenizer.files["tokenizer.json"].decode()
    if tokenizer.name != "gpt2":
        raise UserError(
            f"tokenizer: {tokenizer.name} has no byte-pair vocabulary; expected gpt2, bpe-N or hf:NAME"
        )
    vocabulary = json.loads(tokenizer.files["encoder.json"])
    # The first line is the version; each merge consists of two words.
    merges = [tuple(line.split()) for line in tokenizer.files["vocab.bpe"].decode().splitlines()[1:] if line]
    gpt2 = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = decoders.ByteLevel()
    gpt2.add_special_tokens([EOT])
    return gpt2.to_str(pretty=True)
