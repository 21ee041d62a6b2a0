"""Writes a checkpoint as a folder that `transformers` loads as a Llama (Touvron et al. 2023).

The paper's baseline is a Llama: RMSNorm before each part, rotary positions that rotate halves, SwiGLU,
grouped key/value heads, no biases. Only the names differ; and here query, key and value are one matrix, and
gate and up another.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.files import atomic_directory, write_json
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.techniques.base import refuse
from stlm.tokens.tokenizer import EOT, Tokenizer, load_tokenizer
from stlm.training.checkpoint_names import WEIGHTS
from stlm.training.checkpoints import check_fits, load_checkpoint

GENERATION = "generation_config.json"
# All files of an exported folder.
FILES = {WEIGHTS, GENERATION, "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
# The value of each key of `model` in a Llama.
_LLAMA = {
    "positions": "rope",
    "norm": "rmsnorm",
    "ffn": "swiglu",
    "qk_norm": False,
    "qkv_shift": False,
    "logit_softcap": 0.0,
    "value_embeddings": 0,
}
# The keys that `llama_config` writes, and those that `llama_weights` merges.
_WRITTEN = {
    *("layers", "width", "heads", "kv_heads", "ffn_width", "rope_theta", "norm_eps", "context", "tied"),
    *("vocab_size", "dropout", "attention_dropout", "zero_init"),
    *("sharing", "lora", "low_rank", "embedding_rank"),
}


def export_llama(checkpoint: Path, folder: Path, card: str | None = None) -> None:
    """Write `checkpoint` (`.../checkpoints/step-N`, with its tokenizer next to it) to `folder`, atomically.

    `AutoModelForCausalLM` and `AutoTokenizer` load the folder, in float32. Logits equal the checkpoint's,
    except for rounding. The tokenizer gives the same ids for any text, adds none, and treats the text
    `<|endoftext|>` as ordinary text (`split_special_tokens`), as ours does. The end-of-text token is both bos
    and eos. `card` becomes README.md.

    Raises UserError if the model or its tokenizer cannot be written as a Llama, naming key and value.
    """
    model, _ = load_checkpoint(checkpoint)
    refuse(model.techniques, "export", lambda message: UserError(f"{checkpoint}: {message}"))
    if model.config.bytes is not None:
        raise UserError(f"{checkpoint}: model.bytes: a byte-level model is no Llama, which reads tokens")
    # Keys that are neither written nor merged, including future ones, must have the Llama's value.
    plain = {key: field.default for key, field in ModelConfig.model_fields.items() if key not in _WRITTEN}
    for key, needed in (plain | _LLAMA).items():
        found = getattr(model.config, key)
        if found != needed:
            raise UserError(f"{checkpoint}: model.{key}: {found} is not what a Llama has ({needed})")
    tokenizer = load_tokenizer(checkpoint.parent / "tokenizer")
    check_fits(model, tokenizer, checkpoint)
    content = tokenizer_json(tokenizer)
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
                "bos_token": EOT,
                "eos_token": EOT,
                "add_bos_token": False,
                "add_eos_token": False,
                "split_special_tokens": True,
                "clean_up_tokenization_spaces": False,
                "model_max_length": model.config.context,
            },
        )
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def llama_config(config: ModelConfig) -> dict[str, object]:
    """The content of `config.json`, except for token ids.

    The base of the rotary wavelengths is written under two names, an old and a new one.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    }


@torch.inference_mode()
def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights under Llama's names; a tied head is left out, as `transformers` does.

    A layer's matrix is the model's output for the unit vectors: layers that share a matrix get copies,
    adapters are merged, and factors, including those of an embedding, are multiplied.
    """
    config = model.config
    query, key_value = config.width, config.kv_heads * config.head_width
    embedding_VD, head_VD = model.embedding.weight, model.output.weight
    if model.embedding_up is not None:
        embedding_VD = embedding_VD @ model.embedding_up
    if model.output_down is not None:
        head_VD = head_VD @ model.output_down.T
    weights = {"model.embed_tokens.weight": embedding_VD, "model.norm.weight": model.norm.weight}
    if not config.tied:
        weights["lm_head.weight"] = head_VD
    for number, block in enumerate(model.blocks):
        q, k, v = _matrix(block.attention.qkv).split([query, key_value, key_value])
        gate, up = _matrix(block.ffn.gate_up).chunk(2)
        tensors = {
            "input_layernorm": block.attention_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": _matrix(block.attention.out),
            "post_attention_layernorm": block.ffn_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": _matrix(block.ffn.down),
        }
        weights |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in tensors.items()}
    # Copies: the matrices share the memory of a joint one, which the file format rejects.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}


def _matrix(linear: nn.Module) -> Tensor:
    """The matrix [outputs, inputs] of a linear map without bias."""
    return linear(torch.eye(linear.in_features)).T


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The `tokenizer.json` of the library `tokenizers`, for GPT-2's and trained byte-pair vocabularies.

    Raises UserError for other kinds.
    """
    if "tokenizer.json" in tokenizer.files:
        return tokenizer.files["tokenizer.json"].decode()
    if tokenizer.name != "gpt2":
        raise UserError(f"tokenizer: {tokenizer.name} has no byte-pair vocabulary; expected gpt2 or bpe-N")
    vocabulary = json.loads(tokenizer.files["encoder.json"])
    # The first line is the version; each merge consists of two words.
    merges = [tuple(line.split()) for line in tokenizer.files["vocab.bpe"].decode().splitlines()[1:] if line]
    gpt2 = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = decoders.ByteLevel()
    gpt2.add_special_tokens([EOT])
    return gpt2.to_str(pretty=True)
