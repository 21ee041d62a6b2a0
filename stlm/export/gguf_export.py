"""Writes a checkpoint as a GGUF file, which llama.cpp loads as a Llama, by llama.cpp's library `gguf`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from stlm.errors import UserError
from stlm.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from stlm.export.k_quants import quantize_q4_k, quantize_q6_k
from stlm.export.llama import check_llama_checkpoint
from stlm.files import atomic_path
from stlm.model.config import ModelConfig
from stlm.model.llama import llama_shapes, llama_weights
from stlm.options import GGUF_TYPES
from stlm.tokens.tokenizer import Tokenizer
from stlm.training.checkpoints import check_fits, load_checkpoint

# `general.file_type`: what most tensors are stored in.
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
}
_OURS = {GGMLQuantizationType.Q4_K: quantize_q4_k, GGMLQuantizationType.Q6_K: quantize_q6_k}
_MOST = 65504.0  # of float16, in which all types but F32 store weights or the scales of blocks


def export_gguf(
    checkpoint: Path,
    path: Path,
    kind: str,
    fallback: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Write `checkpoint` to `path`, atomically; type -> how many tensors are stored in it.

    Matrices, the embedding among them, are stored as `kind`, one of GGUF_TYPES, and norms in float32.
    Matrices whose rows are not whole blocks of `kind` are stored as `fallback`. `about` is metadata: keys and
    texts, whole numbers or lists of texts. What was merged for `export_llama` is merged here.

    Raises UserError, before weights are read, for a model or tokenizer that llama.cpp cannot read, and for
    matrices that do not fit `kind`, naming them.
    """
    config, tokenizer = check_llama_checkpoint(checkpoint)
    vocabulary = gguf_tokenizer(tokenizer)
    kinds = stored_kinds(config, kind, fallback)
    model, _ = load_checkpoint(checkpoint)
    check_fits(model, tokenizer, checkpoint)
    weights = {name: weight.numpy() for name, weight in llama_weights(model).items()}
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        try:
            _add_about(writer, about or {})
            _add_config(writer, config, kind)
            _add_tokenizer(writer, vocabulary, tokenizer)
            names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
            for name, weight in weights.items():
                stored = _quantized(name, _llama_cpp_order(name, weight, config), kinds[name])
                target = names.get_name(name, try_suffixes=(".weight",))
                writer.add_tensor(target, stored, raw_dtype=kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    found = [each.name for each in kinds.values()]
    return {name: found.count(name) for name in dict.fromkeys(found)}


def stored_kinds(config: ModelConfig, kind: str, fallback: str | None) -> dict[str, GGMLQuantizationType]:
    """Tensor (under Llama's names) -> the type that it is stored in; see `export_gguf`."""
    shapes = llama_shapes(config)
    kinds = {name: GGMLQuantizationType[kind if len(shape) > 1 else "F32"] for name, shape in shapes.items()}
    misfits = _misfits(shapes, kinds)
    if misfits and fallback is None:
        rows = sorted({shapes[name][-1] for name in misfits})
        fitting = [
            each for each in GGUF_TYPES if all(row % _block(GGMLQuantizationType[each]) == 0 for row in rows)
        ]
        raise UserError(
            f"--type {kind}: rows must divide by {_block(GGMLQuantizationType[kind])}; those of "
            f"{_listed(misfits)} have {' or '.join(map(str, rows))} weights. Give --fallback TYPE to store "
            f"these in another type, or another --type; {', '.join(fitting)} fit them"
        )
    if fallback is not None:
        kinds |= dict.fromkeys(misfits, GGMLQuantizationType[fallback])
        if still := _misfits(shapes, kinds):
            raise UserError(
                f"--fallback {fallback}: rows must divide by {_block(GGMLQuantizationType[fallback])}, and "
                f"those of {_listed(still)} do not; F16 and F32 fit any"
            )
    return kinds


def _block(kind: GGMLQuantizationType) -> int:
    """How many weights a block has."""
    return GGML_QUANT_SIZES[kind][0]


def _misfits(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, GGMLQuantizationType]) -> list[str]:
    return [name for name, shape in shapes.items() if shape[-1] % _block(kinds[name])]


def _listed(names: list[str]) -> str:
    """The names of tensors, one for those that differ in their layer alone."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _add_about(writer: GGUFWriter, about: Mapping[str, Any]) -> None:
    for key, value in about.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint64(key, value) if value >= 1 << 32 else writer.add_uint32(key, value)
        else:
            writer.add_array(key, list(value))


def _add_config(writer: GGUFWriter, config: ModelConfig, kind: str) -> None:
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)


def _add_tokenizer(writer: GGUFWriter, vocabulary: GgufTokenizer, tokenizer: Tokenizer) -> None:
    """A text begins after the end-of-text token, as in training: llama.cpp adds it to each prompt."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_eot_token_id(tokenizer.eot)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _llama_cpp_order(name: str, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of queries and keys as llama.cpp rotates them: neighbours turn together, not halves of a head."""
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    Y, X = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, Y // heads // 2, X).swapaxes(1, 2).reshape(Y, X))


def _quantized(name: str, weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    largest = float(np.abs(weight).max())
    if kind is not GGMLQuantizationType.F32 and largest > _MOST:
        raise UserError(
            f"{name}: a weight of {largest:g} is beyond float16 ({_MOST:g}), which {kind.name} is made of; "
            "--type F32 stores it"
        )
    return _OURS[kind](weight) if kind in _OURS else gguf.quantize(weight, kind)
