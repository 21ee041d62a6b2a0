"""Quantization: matrices of 8 bits or fewer, rounded, by GPTQ (Frantar et al. 2022), or learned.

Learned weights are trained with a straight-through gradient (Bengio et al. 2013): a forward pass computes
with the rounded weights, and their gradient moves the exact ones. The model's parameters are always the
rounded weights. What the exact ones have beyond them is kept apart, and added before rounding again.

The maths is in stlm.model.quantizers, how a model's matrices are rounded and stored in stlm.model.quantized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.model.counts import build_on_meta
from stlm.model.flops import forward_flops
from stlm.model.quantized import (
    Quantized,
    matrices,
    packed,
    quantize_by_text,
    relative_errors,
    unpacked,
)
from stlm.model.quantizers import TERNARY, Kind, round_tokens
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run

# GPTQ passes the text through the blocks twice.
_PASSES = 2


class Quantization(Technique):
    """Matrices, embeddings and head of few bits: a group of weights shares a scale, and each weight is a
    code. Rounded at once (`training: {start_from: RUN, steps: 0}`), or trained so. Norms, biases and
    positions stay as they are. A tied embedding is one table, rounded once: the head reads the same.
    """

    supports: ClassVar[frozenset[str]] = frozenset(
        {
            "attention_within",
            "batches",
            "cache",
            "compile",
            "drafts",
            "export",
            "packing",
            "sharing",
            "start_from",
        }
    )

    keeps_near: ClassVar[bool] = True

    bits: Literal[8, 4, 3, 2, "ternary"] = Field(
        8,
        description="Bits of a weight. `ternary`: the blocks' matrices are -1, 0 or 1 times their mean "
        "absolute value (BitNet b1.58, Ma et al. 2024), for `method: learned`.",
    )
    group: int | None = Field(
        32,
        ge=8,
        le=1024,
        description="Inputs of an output that share a scale of 16 bits, fewer at the end of a row that it "
        "does not divide. null: all of them. A ternary matrix has one scale.",
    )
    zero_points: bool = Field(
        False,
        description="Whether each group has a zero of its own, so that its codes span its least to its "
        "largest weight. false: symmetric, as GGUF's Q8_0 (8 bits) and Q4_0 (4 bits).",
    )
    method: Literal["round", "gptq", "learned"] = Field(
        "round",
        description="`round`: to the nearest. `gptq`: blocks' matrices column by column, and later columns "
        "make up for what earlier ones lost on a part of the training text. Both take no steps. `learned`: "
        "rounded at the start and after every step, with a straight-through gradient.",
    )
    embedding_bits: Literal[8, 4, 3, 2, 32] | None = Field(
        None,
        description="Bits of the embedding, of an untied head and of value embeddings; 32: they are not "
        "rounded. null: `bits`, or 8 with `ternary`.",
    )
    activations: Literal[8] | None = Field(
        None,
        description="Bits of the inputs of the blocks' matrices, with a scale for each token. null: they "
        "are not rounded.",
    )
    calibration_bytes: int = Field(
        100_000, ge=1, description="Bytes of the training text that `gptq` measures inputs on."
    )

    @property
    def supported(self) -> frozenset[str]:
        """See `Technique.supported`: an exported model would not round its activations."""
        return self.supports - {"export"} if self.activations else self.supports

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        steps, config = run.training.steps, run.model
        if self.method == "learned" and not steps:
            raise ValueError(
                "method: learned trains, and training.steps is 0; expected steps, or round, gptq"
            )
        if self.method != "learned" and self.bits == "ternary":
            raise ValueError(f"method: {self.method}: ternary weights are trained; expected learned")
        if self.method != "learned" and steps:
            raise ValueError(
                f"method: {self.method} rounds once, and training.steps is {steps}; expected "
                "training: {start_from: RUN, steps: 0}, or method: learned"
            )
        if config.lora is not None:
            raise ValueError("bits: model.lora: adapters are not merged into their matrices; expected null")
        if self.method == "gptq" and config.sharing is not None:
            raise ValueError("method: gptq: model.sharing: layers share matrices; expected round or learned")

    def _kind(self, name: str) -> Kind | None:
        """How a matrix is rounded; None: it is not."""
        if name.startswith("blocks."):
            if self.bits == "ternary":
                return Kind(TERNARY)
            return Kind(self.bits, self.group, self.zero_points)
        bits = self.embedding_bits or (8 if self.bits == "ternary" else self.bits)
        return None if bits == 32 else Kind(bits, self.group, self.zero_points)

    def kinds(self, model: nn.Module) -> dict[str, Kind]:
        """How each matrix of a model is rounded."""
        return {name: kind for name, _, _ in matrices(model) if (kind := self._kind(name)) is not None}

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. No weight is renamed, and none is rounded before `at_start`."""
        if self.activations is None:
            return
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_round_input)

    def at_start(self, model: Transformer, run: Run, text: Callable[[int], Tensor]) -> dict[str, Any]:
        """See `Technique.at_start`."""
        started, flops = time.perf_counter(), 0.0
        before = {name: weight.detach().clone() for name, weight, _ in matrices(model)}
        model.quantized = Quantized(self.kinds(model), trained=self.method == "learned")
        try:
            if self.method == "gptq":
                rows_NM = text(self.calibration_bytes).to(model.embedding.weight.device)
                rows, length = len(rows_NM), rows_NM.shape[1] - 1
                flops = _PASSES * rows * sum(forward_flops(block, length) for block in model.blocks)
                quantize_by_text(model, model.quantized, rows_NM)
            else:
                model.quantized.round(model)
                model.quantized.check()
        except ValueError as error:
            raise UserError(f"run {run.name}: techniques.quantization.bits: {error}") from None
        error, by_matrix = relative_errors(model, {name: before[name] for name in model.quantized.kinds})
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "extra_flops": flops,
            "relative_error": round(error, 6),
            # A list, as tables show every other number of a record.
            "by_matrix": [
                {"name": name, "relative_error": round(share, 6)} for name, share in by_matrix.items()
            ],
        }

    def after_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.after_step`: the update moved the exact weights, which are rounded again."""
        model.quantized.round(model)

    def packed(self, model: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Technique.packed`."""
        return packed(weights, model.quantized)

    def unpacked(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Technique.unpacked`."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return unpacked(stored, self.kinds(model), shapes)[0]

    def loaded(self, model: Transformer, stored: Mapping[str, Tensor]) -> None:
        """See `Technique.loaded`: the model can be stored again."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.quantized = unpacked(stored, self.kinds(model), shapes)[1]

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: what the exact weights have beyond the rounded ones, in float32."""
        model = build_on_meta(run.model)
        kinds = self.kinds(model) if self.method == "learned" else {}
        return 4 * sum(weight.numel() for name, weight, _ in matrices(model) if name in kinds)


def _round_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_tokens(arguments[0]), *arguments[1:])
