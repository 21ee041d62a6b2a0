"""Published models, from a local folder in the format of `transformers`, for our scoring engine.

No code from the folder is run and no pickle is read: the architecture must be one of `transformers`, and the
weights safetensors. When a model is loaded, it is tested for everything that the engine relies on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.errors import UserError
from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.hf_folder import check_files, check_tokenizer, loading
from stlm.evaluation.hf_tokenizer import HfTokenizer
from stlm.evaluation.hf_weights import check_finite, check_kinds
from stlm.evaluation.interface import Request
from stlm.model.fused_attention import fused_attention
from stlm.model.segments import Segments

# The keys of a configuration that may give the number of positions, in lm_eval's order.
_CONTEXT_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")


class Shape(NamedTuple):
    """The part of a model's configuration that the engine reads."""

    context: int
    vocab_size: int


# The segments of the row that is being processed: attention is called deep inside transformers.
_SEGMENTS: ContextVar[Segments | None] = ContextVar("segments", default=None)
_ATTENTION = "stlm_segments"


class HfModel(nn.Module):
    """A causal language model of `transformers` with the interface of our transformer.

    `packs`: whether several sequences may share a row. `calls_head`: whether only the model itself can
    compute its logits, for example scaled or capped ones. `hidden` then returns the logits, from which `head`
    and `logit` select. `probe` sets both.
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        super().__init__()
        self.model = model.eval()
        self.config = Shape(context, model.get_output_embeddings().weight.shape[0])
        self.calls_head = False
        self.packs = False

    def hidden(
        self, tokens_BL: Tensor, layout: Segments | None = None, rows_N: Tensor | None = None
    ) -> Tensor:
        """The residual stream after the last norm [B, L, D], or logits [B, L, V] if `calls_head`.

        `layout` and `rows_N` are those of `stlm.model.transformer.Transformer.hidden`. Without a layout, each
        row is a sequence from its first position on, padded at the right if at all.
        """
        inputs: dict[str, Any] = {"input_ids": tokens_BL, "use_cache": False}
        if layout is not None:
            inputs["position_ids"] = layout.positions
        before = _SEGMENTS.set(layout)
        try:
            if self.calls_head:
                x_BLX = self.model(**inputs).logits
            else:
                x_BLX = self.model.base_model(**inputs).last_hidden_state
        finally:
            _SEGMENTS.reset(before)
        return x_BLX if rows_N is None else x_BLX.flatten(0, 1)[rows_N]

    def head(self, x: Tensor, vocabulary: slice | None = None) -> Tensor:
        """Logits [..., V] for the result of `hidden`, over all or a part of the vocabulary."""
        vocabulary = slice(None) if vocabulary is None else vocabulary
        if self.calls_head:
            return x[..., vocabulary]
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return F.linear(x, head.weight[vocabulary], None if bias is None else bias[vocabulary])

    def logit(self, x_NX: Tensor, tokens_N: Tensor) -> Tensor:
        """The logit [N] of one token for each result of `hidden`."""
        if self.calls_head:
            return x_NX.gather(1, tokens_N[:, None])[:, 0]
        head = self.model.get_output_embeddings()
        logit_N = (x_NX * head.weight[tokens_N]).sum(dim=-1)
        bias = getattr(head, "bias", None)
        return logit_N if bias is None else logit_N + bias[tokens_N]


def _attention(
    module: nn.Module,
    q_BHLE: Tensor,
    k_BKLE: Tensor,
    v_BKLE: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention [B, L, H, E], within segments if there are any, with the signature of transformers.

    Raises TypeError for unsupported arguments, so that `probe` leaves such a model its own attention.
    """
    unknown = [key for key in ("softcap", "s_aux", "position_bias") if more.get(key) is not None]
    if unknown:
        raise TypeError(f"attention with {', '.join(unknown)}")
    segments = _SEGMENTS.get()
    if segments is not None:
        q_BLHE, k_BLKE, v_BLKE = (x.transpose(1, 2) for x in (q_BHLE, k_BKLE, v_BKLE))
        return segments.attend(q_BLHE, k_BLKE, v_BLKE, scale=scaling), None
    return fused_attention(q_BHLE, k_BKLE, v_BKLE, scale=scaling).transpose(1, 2), None


class HfRequestEncoder(RequestEncoder):
    """Encodes requests as lm_eval does: the token that starts a text also precedes a context if the tokenizer
    itself adds such a token to texts.
    """

    def __init__(self, tokenizer: HfTokenizer) -> None:
        super().__init__(tokenizer)
        self._bos = np.array([tokenizer.eot] if tokenizer.adds_bos else [], dtype=np.int32)

    def __call__(self, requests: Sequence[Request]) -> list[Encoded]:
        encoded = super().__call__(requests)
        if not len(self._bos):
            return encoded
        return [
            e if e.starts_with_eot else Encoded(np.concatenate([self._bos, e.tokens]), e.n_context + 1, True)
            for e in encoded
        ]


def load_hf(
    folder: Path, context: int | None = None, prefix: str | None = None, packing: bool = True
) -> tuple[HfModel, HfTokenizer]:
    """Load the model and tokenizer in `folder`, in float32, and test the model.

    `context` bounds the sequences; None: as the model states. `prefix`: the token that starts a text, see
    `HfTokenizer`. Without `packing`, sequences never share a row, and the model keeps its own attention.

    Raises UserError for a folder that is missing, damaged or of another format, a missing tokenizer or one of
    another model, weights that are not finite, custom code or pickled weights, and an architecture that is
    not causal.
    """
    folder = Path(folder)
    with loading(folder, "the folder"):
        check_files(folder)
    _import_transformers()
    model, config = _load_model(folder)
    tokenizer = load_tokenizer(folder, prefix)
    check_kinds(model, folder)
    check_finite(model, folder)
    with loading(folder, "the configuration"):
        stated = stated_context(config)
    if stated is None and context is None:
        raise UserError(
            f"{folder}/config.json: none of {', '.join(_CONTEXT_KEYS)}; give the model's `context`"
        )
    if stated is not None and context is not None and context > stated:
        raise UserError(f"context: {context} is longer than the {stated} positions of {folder}")
    with loading(folder, "the model"):
        wrapped = HfModel(model, context or stated)
        tokenizer.check_rows(min(wrapped.config.vocab_size, model.get_input_embeddings().weight.shape[0]))
        probe(wrapped, folder, packing)
    return wrapped, tokenizer


def _import_transformers() -> None:
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError("transformers is not installed; run: pip install 'stlm[harness]'") from None
    # What matters is reported by us, in one line.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _load_model(folder: Path) -> tuple[nn.Module, Any]:
    """The model in float32, with all of its weights from the folder, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    local = {"local_files_only": True, "trust_remote_code": False}
    with loading(folder, "the model"):
        config = AutoConfig.from_pretrained(folder, **local)
        if config.is_encoder_decoder:
            raise UserError(
                f"{folder}: {config.model_type} is an encoder-decoder; expected a causal language model"
            )
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
    absent = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if absent:
        raise UserError(f"{folder}: the weights lack {len(absent)} of the model's tensors, first {absent[0]}")
    return model, config


def load_tokenizer(folder: Path, prefix: str | None = None) -> HfTokenizer:
    """The tokenizer in `folder`; `prefix` and errors as in `load_hf`."""
    _import_transformers()
    from transformers import AutoTokenizer

    wanted = "; expected tokenizer.json, or the vocabulary files that tokenizer_config.json's class reads"
    with loading(folder, "the tokenizer", wanted):
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_tokenizer(loaded, folder)
        return HfTokenizer(loaded, folder.name, prefix)


def stated_context(config: Any) -> int | None:
    """The longest sequence that a `transformers` configuration states, as lm_eval reads it."""
    found = ((key, getattr(config, key, None)) for key in _CONTEXT_KEYS)
    key, value = next((pair for pair in found if pair[1] is not None), (None, None))
    if key is not None and (not isinstance(value, int) or value < 2):
        raise UserError(f"config.json: {key}: {value!r}: expected a number of positions")
    return value


def _may_pack(model: nn.Module, context: int) -> bool:
    """Whether positions can be passed, and our attention can replace the model's.

    Our attention would widen windows that are narrower than the context; recurrent layers have no attention;
    and rotary angles that depend on the longest sequence would be those of the row.
    """
    config = model.config
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rotary.get("rope_type") in ("dynamic", "longrope"):
        return False
    takes = inspect.signature(model.base_model.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    narrow = window is not None and window < context
    return "position_ids" in takes and kinds == {"full_attention"} and not narrow


@torch.inference_mode()
def probe(model: HfModel, folder: Path, packing: bool = True) -> None:
    """Test what the engine relies on; sets `calls_head` and `packs`. UserError if a model is not causal.

    The tests use random tokens: a token's logits must not depend on later tokens; the head applied to the
    hidden state must give the model's logits; and sequences that share a row and a prefix must get the same
    logits as alone.
    """
    draw = torch.Generator().manual_seed(0)
    length = min(24, model.config.context)
    row_1L = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    logits_1LV = model.model(input_ids=row_1L, use_cache=False).logits.float()
    # Rounding is relative to the size of the logits.
    tolerance = 1e-3 * float(logits_1LV.std())
    if not torch.isfinite(logits_1LV).all():
        raise UserError(f"{folder}: the model's logits are NaN or infinite, though its weights are not")

    def same(found: Tensor, expected: Tensor) -> bool:
        return found.shape == expected.shape and bool((found.float() - expected).abs().max() <= tolerance)

    half = length // 2
    changed_1L = row_1L.clone()
    changed_1L[0, half:] = (changed_1L[0, half:] + 1) % model.config.vocab_size
    before = model.model(input_ids=changed_1L, use_cache=False).logits.float()[:, :half]
    if not same(before, logits_1LV[:, :half]):
        raise UserError(
            f"{folder}: {model.model.config.model_type} is not causal: "
            "a token's logits change with later tokens"
        )
    try:
        model.calls_head = not same(model.head(model.hidden(row_1L)), logits_1LV)
    except (TypeError, AttributeError, RuntimeError):
        # The base model has another interface: use the whole model's logits.
        model.calls_head = True
    if packing and _may_pack(model.model, model.config.context):
        model.packs = _attends_in_segments(model, row_1L, same)


def _attends_in_segments(model: HfModel, row_1L: Tensor, same: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether, with our attention, two continuations of one context in a row get the same logits as alone.

    If they do not, the model's own attention is restored.
    """
    from transformers import AttentionInterface

    length = row_1L.shape[1]
    shared, end = length // 3, 2 * length // 3
    paths = np.arange(end), np.concatenate([np.arange(shared), np.arange(end, length)])
    positions = np.concatenate([np.arange(end), np.arange(shared, len(paths[1]))])
    segments = Segments(positions, [(end, paths[0]), (length - end, paths[1])], row_1L.device)
    alone = [model.head(model.hidden(row_1L[:, path])).float() for path in paths]
    implementation = model.model.config._attn_implementation
    AttentionInterface.register(_ATTENTION, _attention)
    try:
        model.model.set_attn_implementation(_ATTENTION)
        packed = model.head(model.hidden(row_1L, segments))
        packs = all(same(packed[:, path], expected) for path, expected in zip(paths, alone, strict=True))
    except (TypeError, ValueError, KeyError, RuntimeError):
        packs = False
    if not packs:
        model.model.set_attn_implementation(implementation)
    return packs
