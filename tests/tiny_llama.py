"""A tiny Llama of random weights as it is published: a folder of transformers, or a GGUF file as llama.cpp's.

The rows of queries and keys are put in llama.cpp's order by the formula of its converter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 384
# Widths in whole blocks of 32, which quantization wants.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXTS = [
    "The cat sat on the mat, and it's 12,345 years old in 2024; don't you think so?\n",
    "A dog went to the house of the old man. The house was old, and the man was not there.\n\n",
    "naïve café \u6c34\u306f\u6c34 \U0001f642 e\u0301 \u0661\u0662\u0663 \u0996\u09a8\n",
]
ENTRY: dict[str, Any] = {
    "name": "tiny",
    "description": "a tiny Llama",
    "licence": "Apache-2.0",
    "origin": "the tests",
    "training_tokens": 123,
    "prefix": "<|endoftext|>",
    "model": {
        "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 96, "rope_theta": 5000.0,
        "norm_eps": 1e-5, "context": 128, "tied": True, "vocab_size": VOCABULARY,
    },
}  # fmt: skip


def llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama in evaluation mode, whose norms are not all ones and whose logits are not all alike."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if parameter.dim() == 1 else 0))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs after single digits, as SmolLM's; the special tokens come first."""
    bpe = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 9, trainer)
    found = bpe.get_vocab_size()
    bpe.add_special_tokens([f"<filler-{number}>" for number in range(VOCABULARY - found)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def save(folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, **changes: Any) -> Path:
    """The folder of transformers of `llama(**changes)`; `shards`: its weights in several files."""
    model = llama(**changes).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": "60KB"} if shards else {}))
    tokenizer().save_pretrained(folder)
    return folder


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    without: str = "",
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """The GGUF file of `llama()`; matrices are quantized to `kind`, and `metadata` replaces texts."""
    model, words = llama(), tokenizer()
    config = model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, words, metadata or {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = _permuted(weight, heads)
        stored = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight",))
        if target != without:
            writer.add_tensor(target, gguf.quantize(weight, stored), raw_dtype=stored)
    for name, weight in (more or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, words: PreTrainedTokenizerFast, metadata: dict[str, Any]) -> None:
    content = json.loads(words.backend_tokenizer.to_str())
    added = {token["content"]: token["special"] for token in content["added_tokens"]}
    tokens = sorted(words.get_vocab(), key=words.get_vocab().get)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model(metadata.get("tokenizer.ggml.model", "gpt2"))
    writer.add_tokenizer_pre(metadata.get("tokenizer.ggml.pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_unk_token_id(words.unk_token_id)
    for key, value in metadata.items():
        if not key.startswith("tokenizer.ggml."):
            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
