"""Reads a Llama from a GGUF file: its configuration, weights in float32, and tokenizer, as of transformers.

The file's structure and its quantized blocks are read by the library `gguf`, of llama.cpp. What llama.cpp's
conversion of a Llama changed is undone here: the names of tensors, and the order of the rows of queries and
keys, whose rotary positions turn neighbours there, and halves of a head in transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Types of tokens, as llama.cpp numbers them.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class GgufError(ValueError):
    """A file that is no GGUF, or no plain Llama; the message names the key or tensor."""


class GgufFile:
    """A GGUF file with a Llama; raises GgufError for anything else, when it is opened or a part is read."""

    def __init__(self, path: Path) -> None:
        with _reading():
            self._reader = gguf.GGUFReader(path)
        self._expect("general.architecture", "llama")
        # An expert model, scaled rotary positions or a partial rotation would be another function.
        for key in ("llama.expert_count", "llama.rope.scaling.type", "llama.rope.scale_linear"):
            if self.get(key) not in (None, 0, "none", 1.0):
                raise GgufError(f"{key}: {self.get(key)!r} is not what a plain Llama has")
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            if self.get(f"llama.{key}") not in (None, self._head_width):
                raise GgufError(
                    f"llama.{key}: {self.get(f'llama.{key}')} is not the heads' {self._head_width}"
                )

    def get(self, key: str) -> Any:
        """The value of a key of the file's metadata; None without it."""
        with _reading():
            field = self._reader.fields.get(key)
            return None if field is None else field.contents()

    def _need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise GgufError(f"{key}: this key is missing")
        return value

    def _expect(self, key: str, wanted: str) -> None:
        if self._need(key) != wanted:
            raise GgufError(f"{key}: {self.get(key)!r}, expected {wanted!r}")

    @property
    def _heads(self) -> int:
        return self._need("llama.attention.head_count")

    @property
    def _head_width(self) -> int:
        return self._need("llama.embedding_length") // self._heads

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`, with the ids of special tokens where the file names them."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(self._need("tokenizer.ggml.tokens")),
            "hidden_size": self._need("llama.embedding_length"),
            "intermediate_size": self._need("llama.feed_forward_length"),
            "num_hidden_layers": self._need("llama.block_count"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self.get("llama.attention.head_count_kv") or self._heads,
            "max_position_embeddings": self._need("llama.context_length"),
            "rms_norm_eps": _decimal(self._need("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _decimal(self.get("llama.rope.freq_base") or 10000.0),
            "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in self._reader.tensors},
        }

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of special tokens, where the file names them: `bos_token_id`, `eos_token_id`, ..."""
        found = {key: self.get(f"tokenizer.ggml.{name}_token_id") for key, name in _SPECIAL.items()}
        return {f"{key}_id": value for key, value in found.items() if value is not None}

    @property
    def starts_with(self) -> str | None:
        """The token that llama.cpp adds before a text; None where the file does not ask for one.

        Here no tokenizer adds it: whoever reads a text puts the model's `prefix` before it.
        """
        if not self.get("tokenizer.ggml.add_bos_token"):
            return None
        return self._need("tokenizer.ggml.tokens")[self._need("tokenizer.ggml.bos_token_id")]

    @property
    def stored(self) -> dict[str, int]:
        """How many tensors there are of each type, for example 210 of Q4_1."""
        return dict(Counter(tensor.tensor_type.name for tensor in self._reader.tensors).most_common())

    def weights(self) -> dict[str, np.ndarray]:
        """The weights in float32 under the names of transformers, each [outputs, inputs]."""
        kv_heads = self.get("llama.attention.head_count_kv") or self._heads
        found = {}
        for tensor in self._reader.tensors:
            with _reading(f"{tensor.name}: "):
                # A copy: what is stored in float32 is a view of the file, which cannot be written.
                weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            name = _llama_name(tensor.name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = _halves(weight, self._heads if name.endswith("q_proj.weight") else kv_heads)
            found[name] = np.ascontiguousarray(weight)
        return found

    def tokenizer_json(self) -> str:
        """The `tokenizer.json` of the library `tokenizers`; it adds no tokens to a text."""
        self._expect("tokenizer.ggml.model", "gpt2")
        if self.get("tokenizer.ggml.add_eos_token"):
            raise GgufError(
                "tokenizer.ggml.add_eos_token: a token added to the end of a text is not supported"
            )
        kind = self._need("tokenizer.ggml.pre")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "smollm":  # digits one by one
            before = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        elif kind == "gpt-2":
            before = byte_level
        else:
            raise GgufError(f"tokenizer.ggml.pre: {kind!r} is not supported; expected gpt-2 or smollm")
        tokens, types = self._need("tokenizer.ggml.tokens"), self._need("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._need("tokenizer.ggml.merges")]
        with _reading("tokenizer.ggml.merges: "):
            model = models.BPE({token: number for number, token in enumerate(tokens)}, merges)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = before
        tokenizer.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, types, strict=True):
            if kind in (_CONTROL, _USER_DEFINED):
                added = tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
                (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
        if tokenizer.get_vocab_size() != len(tokens):
            raise GgufError("tokenizer.ggml.tokens: a token is listed twice")
        return tokenizer.to_str()

    def tokenizer_config(self) -> dict[str, Any]:
        """The `tokenizer_config.json`: the names of special tokens, and the template of a chat."""
        tokens = self._need("tokenizer.ggml.tokens")
        config = {key.removesuffix("_id"): tokens[number] for key, number in self.special_ids.items()}
        template = self.get("tokenizer.chat_template")
        return config | ({"chat_template": template} if template else {})


@contextmanager
def _reading(what: str = "") -> Iterator[None]:
    """Turn whatever the libraries raise on a damaged file into a GgufError."""
    try:
        yield
    except GgufError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise GgufError(f"{what}damaged, or no GGUF ({type(error).__name__}: {reason})") from None


def _decimal(number: float) -> float:
    """The shortest decimal number that is this one in float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _llama_name(name: str) -> str:
    """The name of a tensor in transformers."""
    if name in _TENSORS:
        return _TENSORS[name]
    kind, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    part, _, suffix = part.partition(".")
    if kind != "blk" or not number.isdigit() or part not in _BLOCK_TENSORS or suffix != "weight":
        raise GgufError(f"a tensor {name}, which a plain Llama does not have")
    return f"model.layers.{number}.{_BLOCK_TENSORS[part]}.weight"


def _halves(weight_YX: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys in transformers' order: in each head, first halves before second ones."""
    Y, X = weight_YX.shape
    return weight_YX.reshape(heads, Y // heads // 2, 2, X).swapaxes(1, 2).reshape(Y, X)
