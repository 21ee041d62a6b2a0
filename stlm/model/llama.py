"""The Llama layout (Touvron et al. 2023): its config.json and the names of its weights, and ours for them.

The paper's baseline is a Llama: RMSNorm before each part, rotary positions that rotate halves, SwiGLU,
grouped key/value heads, no biases. Only the names differ; and here query, key and value are one matrix, and
gate and up another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer

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
# Keys of config.json that change what is computed -> the values with which it is what ours computes.
_PLAIN: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


class NotLlamaError(ValueError):
    """A configuration or weights that are not of a plain Llama; the message names key or tensor."""


def check_is_llama(config: ModelConfig) -> None:
    """Raise NotLlamaError if a model of ours has what a Llama lacks, naming the key of `model`."""
    # Keys that are neither written nor merged, including future ones, must have the Llama's value.
    plain = {key: field.default for key, field in ModelConfig.model_fields.items() if key not in _WRITTEN}
    for key, needed in (plain | _LLAMA).items():
        found = getattr(config, key)
        if found != needed:
            raise NotLlamaError(f"model.{key}: {found} is not what a Llama has ({needed})")


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


def read_llama_config(content: Mapping[str, Any]) -> ModelConfig:
    """The configuration of ours that computes what a `config.json` of a Llama describes.

    Keys that it leaves out have the defaults of transformers. Raises NotLlamaError for another architecture
    and for what ours does not compute: biases, scaled rotary positions, heads of another width, quantization.
    """
    if content.get("model_type") != "llama":
        raise NotLlamaError(f"model_type: {content.get('model_type')!r}, expected 'llama'")
    if "LlamaForCausalLM" not in (content.get("architectures") or ["LlamaForCausalLM"]):
        raise NotLlamaError(f"architectures: {content['architectures']}, expected ['LlamaForCausalLM']")
    for key, allowed in _PLAIN.items():
        found = content.get(key)
        if found not in allowed:
            raise NotLlamaError(f"{key}: {found!r} is not what a plain Llama has ({allowed[-1]!r})")
    rope = content.get("rope_parameters") or {}
    plain = isinstance(rope, Mapping) and rope.get("partial_rotary_factor", 1) == 1
    if not plain or rope.get("rope_type", "default") != "default":
        raise NotLlamaError(f"rope_parameters: {rope} scales the rotary positions, or rotates a part")
    try:
        heads = content["num_attention_heads"]
        head_width = content["hidden_size"] / heads
        if content.get("head_dim") not in (None, head_width):
            raise NotLlamaError(
                f"head_dim: {content['head_dim']} is not hidden_size / num_attention_heads ({head_width:g})"
            )
        sizes = {
            "layers": content["num_hidden_layers"],
            "width": content["hidden_size"],
            "heads": heads,
            "kv_heads": content.get("num_key_value_heads") or heads,
            "ffn_width": content["intermediate_size"],
            "rope_theta": rope.get("rope_theta", content.get("rope_theta", 10000.0)),
            "norm_eps": content.get("rms_norm_eps", 1e-6),
            "context": content["max_position_embeddings"],
            "tied": content.get("tie_word_embeddings", False),
            "vocab_size": content["vocab_size"],
        }
        if sizes["vocab_size"] is None:
            raise NotLlamaError("vocab_size: null, expected a number")
        return ModelConfig.model_validate(sizes, strict=True)
    except KeyError as error:
        raise NotLlamaError(f"{error.args[0]}: this key is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise NotLlamaError(
            f"its sizes describe no model: {key + ': ' if key else ''}{first['msg']}"
        ) from None
    except (TypeError, ZeroDivisionError) as error:
        raise NotLlamaError(f"its sizes describe no model: {error}") from None


def llama_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names of a Llama's tensors, and their shapes; without a head if it is tied."""
    width, key_value = config.width, config.kv_heads * config.head_width
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (key_value, width),
        "self_attn.v_proj": (key_value, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (config.ffn_width, width),
        "mlp.up_proj": (config.ffn_width, width),
        "mlp.down_proj": (width, config.ffn_width),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    for number in range(config.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def check_llama_weights(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raise NotLlamaError unless `weights` are those of `config`, finite; drops what may stand beside them.

    That is a tied head, if it equals the embedding, and the wavelengths that old versions stored.
    """
    head = weights.get("lm_head.weight")
    if config.tied and head is not None:
        if not torch.equal(head, weights.get("model.embed_tokens.weight", head[:0])):
            raise NotLlamaError("lm_head.weight differs from the embedding, but tie_word_embeddings is true")
        del weights["lm_head.weight"]
    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:
        del weights[name]
    wanted = llama_shapes(config)
    for name in [*wanted, *weights]:
        if name not in weights:
            raise NotLlamaError(f"no tensor {name}")
        if name not in wanted:
            raise NotLlamaError(f"a tensor {name}, which a plain Llama does not have")
        found = weights[name]
        if tuple(found.shape) != wanted[name] or not found.is_floating_point():
            raise NotLlamaError(
                f"{name} is {found.dtype} {list(found.shape)}, expected {list(wanted[name])}, floating-point"
            )
        if not torch.isfinite(found).all():
            raise NotLlamaError(f"{name} has NaN or infinite values")


def own_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's weights under our names, copied to float32: the state of a `Transformer` of `config`.

    A tied head is the embedding's tensor itself.
    """

    def joined(*names: str) -> Tensor:
        return torch.cat([weights[f"{name}.weight"].float() for name in names])

    embedding_VD = weights["model.embed_tokens.weight"].to(torch.float32, copy=True)
    own = {
        "embedding.weight": embedding_VD,
        "norm.weight": joined("model.norm"),
        "output.weight": embedding_VD if config.tied else joined("lm_head"),
    }
    for number in range(config.layers):
        llama, block = f"model.layers.{number}", f"blocks.{number}"
        attention, mlp = f"{llama}.self_attn", f"{llama}.mlp"
        for theirs, ours in _NORMS.items():
            own[f"{block}.{ours}.weight"] = joined(f"{llama}.{theirs}")
        qkv = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        own[f"{block}.attention.qkv.weight"] = joined(*qkv)
        own[f"{block}.attention.out.weight"] = joined(f"{attention}.o_proj")
        own[f"{block}.ffn.gate_up.weight"] = joined(f"{mlp}.gate_proj", f"{mlp}.up_proj")
        own[f"{block}.ffn.down.weight"] = joined(f"{mlp}.down_proj")
    return own


def from_llama(config: ModelConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """Our model of `config` in evaluation mode, with a Llama's weights in float32 (`check_llama_weights`)."""
    with torch.device("meta"):  # nothing is drawn, and no memory is taken twice
        model = Transformer(config)
    model.load_state_dict(own_weights(config, weights), assign=True)
    if config.tied:
        model.output.weight = model.embedding.weight
    model.make_positions(config.context)
    model.techniques = ()
    return model.eval()


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
