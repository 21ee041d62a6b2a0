"""Forward passes for generation in C (stlm/kernels/inference.c): the same numbers as torch's, up to rounding.

`why_not` is the one place that decides which models have them. What it does not know of has none: a further
kind of block, a replaced module, a hook; their passes are those of `Transformer`.

Shapes: N new tokens, M of them with logits, D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.kernels.library import kernels
from stlm.model.block import Attention
from stlm.model.feed_forward import GELU, SquaredReLU, SwiGLU, squared_relu
from stlm.model.fused import RMSNorm
from stlm.model.projection import Adapter, Dense, LowRank
from stlm.model.transformer import Transformer

# The kinds of feed-forward networks, in the order of the kernel's numbers, with their activations.
_FFNS = {SwiGLU: F.silu, GELU: F.gelu, SquaredReLU: squared_relu}
_NORMS = (RMSNorm, nn.LayerNorm)

# Weights of a head from which on it is screened, and the most logits for which it is.
_LEAST_SCREENED = 2**22
_MOST_SCREENED = 1000

_int, _float, _array = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


# The structures of inference.c, field by field.
class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, _array) for name in ("weight", "right", "a", "b")),
        *((name, _int) for name in ("rank", "adapter_rank")),
        ("scale", _float),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("gain", _array), ("bias", _array))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "ffn_norm")),
        *((name, _Matrix) for name in ("qkv", "out", "up", "down")),
        *((name, _array) for name in ("shift", "q_gain", "k_gain", "values")),
    )


class _Screen(ctypes.Structure):
    _fields_ = tuple((name, _array) for name in ("weight", "scales", "error"))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("D", "H", "K", "E", "F", "V", "R", "layernorm", "ffn")),
        *((name, _float) for name in ("eps", "cap", "embedding_scale")),
        *((name, _array) for name in ("embedding", "embedding_up", "positions", "cos", "sin")),
        *((name, _array) for name in ("output_down", "head")),
        ("norm", _Norm),
        ("blocks", ctypes.POINTER(_Block)),
        ("screen", _Screen),
    )


class _Cache(ctypes.Structure):
    _fields_ = (("B", _int), ("P", _int), ("kv", _array), ("unshifted", _array))


class KeysAndValues(Protocol):
    """Memory of a cache: `kv` [layers, 2, B, K, places, E], and `unshifted`, see `stlm.model.cache.Cache`."""

    kv: Tensor
    unshifted: Tensor


def why_not(model: nn.Module) -> str | None:
    """Why the model's passes cannot be those in C; None: they can."""
    if not kernels().by_type:
        return kernels().why_none
    if type(model) is not Transformer:
        return f"{type(model).__name__} is another kind of model"
    if model.training:
        return "the model is being trained"
    if model.inserted_embeddings is not None:
        return "something is inserted into the rows"
    if model.route is not None:
        return "a technique leads the rows through the blocks"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{type(module).__name__} has a hook"
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return (
                f"a tensor is {tensor.dtype} on {tensor.device}; expected torch.float32 on cpu, without gaps"
            )
    tables = (model.embedding, model.output, *model.value_embeddings)
    if model.config.positions == "learned":
        tables += (model.positions,)
    if any(type(table) not in (nn.Embedding, nn.Linear) for table in tables) or model.output.bias is not None:
        return "an embedding or the head is of another kind"
    if type(model.norm) not in _NORMS:
        return f"{type(model.norm).__name__} is another kind of norm"
    return next((reason for block in model.blocks if (reason := _why_not_block(block, model))), None)


def _why_not_block(block: nn.Module, model: Transformer) -> str | None:
    # Subclasses must say it of themselves: whatever they change, they change it in training alone.
    if not vars(type(block)).get("plain_in_evaluation", False):
        return f"{type(block).__name__} is another kind of block"
    if type(block.attention) is not Attention:
        return f"{type(block.attention).__name__} is another kind of attention"
    if type(block.ffn) not in _FFNS or type(block.ffn) is not type(model.blocks[0].ffn):
        return f"{type(block.ffn).__name__} is another kind of feed-forward network"
    if block.ffn.activation is not _FFNS[type(block.ffn)]:
        return "an activation is of another kind"
    if any(type(norm) is not type(model.norm) for norm in (block.attention_norm, block.ffn_norm)):
        return "a norm is of another kind"
    if any(type(matrix) not in (Dense, LowRank) for matrix in _matrices(block)):
        return "a matrix is of another kind"
    if any(type(matrix.adapter) not in (Adapter, type(None)) for matrix in _matrices(block)):
        return "an adapter is of another kind"
    return None


def _matrices(block: nn.Module) -> tuple[nn.Module, ...]:
    """The matrices of a block, in the order of the kernel's."""
    up = block.ffn.gate_up if isinstance(block.ffn, SwiGLU) else block.ffn.up
    return block.attention.qkv, block.attention.out, up, block.ffn.down


class Inference:
    """Forward passes of one model. They see changes of its weights in place, but not other tensors or modules
    in their stead: make one for each text."""

    def __init__(self, model: Transformer) -> None:
        """Raises ValueError for a model that has none: see `why_not`."""
        if (reason := why_not(model)) is not None:
            raise ValueError(reason)
        self._kernels = kernels().by_type[torch.float32]
        config = model.config
        self._width, self._vocabulary, self._layers = config.width, config.vocab_size, len(model.blocks)
        # Tensors whose addresses the structures hold: they must live as long.
        self._kept: list[Tensor] = []
        self._blocks = (_Block * self._layers)(*map(self._block, model.blocks))
        without = self._layers - len(model.value_embeddings)
        for number, table in enumerate(model.value_embeddings, without):
            self._blocks[number].values = self._address(table.weight)
        self._model, self._places = self._describe(model), model.most_places
        self._head = model.output.weight.detach()
        # With bounded logits, several may be equal where the head's products are not.
        self._screens = not config.logit_softcap and self._head.numel() >= _LEAST_SCREENED
        self._screen: tuple[Tensor, ...] = ()
        self._screened: tuple[int, int] | None = None  # the state of the head that the screen is of

    def _describe(self, model: Transformer) -> _Model:
        config, address = model.config, self._address
        positions, cos, sin, scale = None, None, None, 1.0
        if config.positions == "learned":
            positions = model.positions.weight
        elif config.positions == "sinusoidal":
            positions, scale = model.sinusoids_LD, math.sqrt(config.width)
        else:
            cos, sin = model.cos_LE, model.sin_LE
        return _Model(
            D=config.width,
            H=config.heads,
            K=config.kv_heads,
            E=config.head_width,
            F=config.ffn_width,
            V=config.vocab_size,
            R=model.embedding.embedding_dim,
            layernorm=isinstance(model.norm, nn.LayerNorm),
            ffn=list(_FFNS).index(type(model.blocks[0].ffn)),
            eps=config.norm_eps,
            cap=config.logit_softcap,
            embedding_scale=scale,
            embedding=address(model.embedding.weight),
            embedding_up=address(model.embedding_up),
            positions=address(positions),
            cos=address(cos),
            sin=address(sin),
            output_down=address(model.output_down),
            head=address(model.output.weight),
            norm=self._norm(model.norm),
            blocks=self._blocks,
        )

    def _block(self, block: Any) -> _Block:
        attention = block.attention
        norms = (self._norm(norm) for norm in (block.attention_norm, block.ffn_norm))
        vectors = map(self._address, (attention.shift, attention.q_gain, attention.k_gain))
        return _Block(*norms, *map(self._matrix, _matrices(block)), *vectors)

    def _matrix(self, matrix: Dense | LowRank) -> _Matrix:
        address, found = self._address, _Matrix()
        if isinstance(matrix, LowRank):
            found.weight, found.right = address(matrix.left.weight), address(matrix.right.weight)
            found.rank = matrix.right.out_features
        else:
            found.weight = address(matrix.weight)
        if (adapter := matrix.adapter) is not None:
            found.a, found.b = address(adapter.a.weight), address(adapter.b.weight)
            found.adapter_rank, found.scale = adapter.a.out_features, adapter.scale
        return found

    def _norm(self, norm: nn.Module) -> _Norm:
        return _Norm(self._address(norm.weight), self._address(getattr(norm, "bias", None)))

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        # Detached, as a parameter may get other memory (`module.to`), while this is read.
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    @classmethod
    def of(cls, model: nn.Module, before: Inference | None = None) -> Inference | None:
        """The model's passes in C, if it has such; what `before` made of the same head is taken over."""
        if why_not(model) is not None:
            return None
        inference = cls(model)
        state = inference._head_state()
        if before is not None and state is not None and before._screened == state:
            inference._screen, inference._screened = before._screen, state
            inference._model.screen = before._model.screen
        return inference

    def read(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        cache: KeysAndValues,
        wanted: Sequence[int],
        largest: int | None = None,
    ) -> Tensor:
        """The logits [M, V] after the tokens with the indices `wanted`, in rising order.

        Each of the N tokens is read at its position of its row of the cache, which holds the tokens before it
        or gets them in the same pass, in order. `largest`: so many of the largest logits, and those equal to
        the last of them, are exact, and the others any numbers below; None: all are exact.
        """
        screened = 0
        if largest is not None and len(wanted) == 1 and largest <= _MOST_SCREENED and self._screens:
            self._screen_head()
            screened = largest
        return self._pass(0, self._layers, None, tokens, rows, positions, cache, wanted, screened)

    def _head_state(self) -> tuple[int, int] | None:
        """What differs once the head changes, but for writes to its `.data`; None: torch counts none."""
        head = self._head
        return None if head.is_inference() else (head.data_ptr(), head._version)

    def _screen_head(self) -> None:
        """Make the head's copy in 8 bits if there is none or the head has changed since."""
        head_VR = self._head
        if self._screen and self._screened == self._head_state():
            return
        V, R = head_VR.shape
        own = torch.empty(V, R, dtype=torch.int8), torch.empty(V), torch.empty(V)
        self._model.screen = _Screen(*(tensor.data_ptr() for tensor in own))
        self._kernels.make_screen(
            V, R, head_VR.data_ptr(), ctypes.addressof(self._model) + _Model.screen.offset
        )
        self._screen, self._screened = own, self._head_state()

    def through(
        self,
        first: int,
        last: int,
        x_ND: Tensor,
        tokens: Sequence[int],
        positions: Sequence[int],
        cache: KeysAndValues,
    ) -> None:
        """Take tokens of a cache of one row through the blocks from `first` to before `last`.

        `x_ND` is their residual stream before, and then the one after; what it holds is not read if `first`
        is 0.
        """
        self._pass(first, last, x_ND, tokens, [0] * len(tokens), positions, cache, ())

    def logits(self, x_ND: Tensor) -> Tensor:
        """The logits [N, V] for the residual stream after any block."""
        N = len(x_ND)
        return self._pass(self._layers, self._layers, x_ND, [0] * N, [0] * N, [0] * N, None, range(N))

    def _pass(
        self,
        first: int,
        last: int,
        x_ND: Tensor | None,
        tokens: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        cache: KeysAndValues | None,
        wanted: Sequence[int],
        screened: int = 0,
    ) -> Tensor | None:
        N, M, numbers = len(tokens), len(wanted), _int * len(tokens)
        assert len(rows) == len(positions) == N
        # The kernel checks no index.
        assert 0 <= min(tokens) and max(tokens) < self._vocabulary, "a token is beyond the vocabulary"
        assert M <= N and list(wanted) == sorted(wanted) and all(0 <= number < N for number in wanted)
        assert 0 <= first <= last <= self._layers
        if cache is not None:
            memory = self._memory(cache)
            assert 0 <= min(rows) and max(rows) < memory.B
            assert 0 <= min(positions) and max(positions) < memory.P, f"{max(positions)} of {memory.P} places"
        else:
            assert first == last
            memory = _Cache()
        if x_ND is not None:
            assert x_ND.shape == (N, self._width) and x_ND.is_contiguous() and x_ND.dtype == torch.float32
        logits_MV = torch.empty(M, self._vocabulary) if M else None
        self._kernels.read_tokens(
            ctypes.addressof(self._model),
            ctypes.addressof(memory),
            first,
            last,
            N,
            numbers(*tokens),
            numbers(*rows),
            numbers(*positions),
            None if x_ND is None else x_ND.data_ptr(),
            M,
            (_int * M)(*wanted),
            None if logits_MV is None else logits_MV.data_ptr(),
            screened,
        )
        return logits_MV

    def _memory(self, cache: KeysAndValues) -> _Cache:
        kv, unshifted = cache.kv, cache.unshifted
        assert kv.dtype == torch.float32 and kv.device.type == "cpu" and kv.is_contiguous()
        assert len(kv) >= self._layers and (kv.shape[3], kv.shape[5]) == (self._model.K, self._model.E)
        assert kv.shape[4] <= self._places, f"{kv.shape[4]} places, the model has {self._places}"
        assert unshifted.dtype == torch.float32 and unshifted.is_contiguous()
        return _Cache(kv.shape[2], kv.shape[4], kv.data_ptr(), unshifted.data_ptr())
