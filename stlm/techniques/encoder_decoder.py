"""Encoder-decoder: some of the blocks read a prefix in both directions, the others predict what follows it.

Elfeki et al. (2025), "Return of the Encoder: Maximizing Parameter Efficiency for SLMs", arXiv 2501.16273;
trained by prefix language modelling (Raffel et al. 2020, section 3.2.1), as there is no other task.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from stlm.model.activations import block_activations
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.encoder_decoder import EncoderDecoderTransformer, PrefixRows
from stlm.model.layout import Layout
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.model.rows import Rows
    from stlm.study.runs import Run
    from stlm.training.distributed import Group


class EncoderDecoder(Technique):
    """The first blocks become an encoder, which reads a prefix in both directions, and the others a decoder
    with cross-attention, which predicts what follows (Elfeki et al. 2025). Training cuts each row at random,
    and only the tokens after the cut are targets. In scoring and generation the encoder reads the context, or
    the end-of-text token of a text without one."""

    supports: ClassVar[frozenset[str]] = frozenset({"cache", "sharing"})

    encoder: int | None = Field(
        None,
        ge=0,
        description="Blocks of the encoder; the rest of `model.layers` are the decoder's. null: two thirds, "
        "rounded; 0: the plain model.",
    )
    cut: tuple[float, float] = Field(
        (0.0, 0.5),
        description="Least and most share of a row that is the prefix in training, and never less than one "
        "token. The number of tokens is drawn for each row, all numbers between with equal probability.",
    )

    _context: int | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keys_fit(self) -> EncoderDecoder:
        if not 0 <= self.cut[0] <= self.cut[1] <= 1:
            raise ValueError(
                f"cut: found {list(self.cut)}, expected two shares from 0 to 1, the smaller one first"
            )
        return self

    def neutral(self) -> bool:
        """Whether there is no encoder: then nothing is added, and rows are not cut."""
        return self.encoder == 0

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        layers = run.model.layers
        if not self.neutral() and self.encoder_blocks(layers) >= layers:
            raise ValueError(
                f"encoder: found {self.encoder_blocks(layers)} of model.layers: {layers}, expected at most "
                f"{layers - 1}, as the decoder needs a block, too"
            )

    def encoder_blocks(self, layers: int) -> int:
        """The encoder's blocks of so many, at least one."""
        return max(1, round(layers * 2 / 3)) if self.encoder is None else self.encoder

    def build(self, model: Transformer) -> Transformer | None:
        """See `Technique.build`."""
        if self.neutral():
            return None
        return EncoderDecoderTransformer(model, self.encoder_blocks(model.config.layers))

    # Training

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`: what `remarks` describes."""
        self._context = run.model.context

    def prefixes(self, length: int) -> tuple[int, int]:
        """The fewest and the most tokens of a row's prefix."""
        least, most = (max(1, round(share * length)) for share in self.cut)
        return least, most

    def targets(self, length: int) -> float:
        """The mean number of targets of a row of so many tokens, of which each predicts the next one."""
        return length + 1 - sum(self.prefixes(length)) / 2

    def rows(self, rows: Rows, step: int, steps: int) -> Rows:
        """See `Technique.rows`: the first target is predicted at a prefix's last token."""
        if self.neutral():
            return rows
        assert rows.layout is None, "attention within documents is refused"
        B, L = rows.tokens_BL.shape
        least, most = self.prefixes(L)
        prefix_B = torch.randint(least, most + 1, (B,)).to(rows.tokens_BL.device)
        counted_BL = torch.arange(L, device=prefix_B.device) >= prefix_B[:, None] - 1
        return rows._replace(layout=PrefixRows(L, prefix_B, most, L - least + 1), counted_BL=counted_BL)

    def watched(self, tokens_BL: Tensor, layout: Layout | None) -> Layout | None:
        """See `Technique.watched`: prefixes of the mean length."""
        if self.neutral():
            return layout
        B, L = tokens_BL.shape
        prefix = sum(self.prefixes(L)) // 2
        prefix_B = torch.full((B,), prefix, device=tokens_BL.device)
        return PrefixRows(L, prefix_B, prefix, L - prefix + 1)

    def remarks(self, layers: Mapping[str, Mapping[str, float]]) -> list[str]:
        """See `Technique.remarks`."""
        if self.neutral() or self._context is None:
            return []
        targets = self.targets(self._context)
        return [
            f"encoder_decoder: of a row's {self._context} tokens, {targets:g} on average were targets "
            f"({targets / self._context:.0%}); train_loss is theirs, after prefixes, and val_loss that of "
            "text without a context"
        ]

    # Cost

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: padded prefixes and rests instead of text without a
        context, whose prefix is one token, and the logits of the targets alone."""
        if self.neutral():
            return 0.0
        model, context = build_on_meta(run.model, (self,)), run.model.context
        least, most = self.prefixes(context)
        trained = model.flops_of(most, context - least + 1, self.targets(context))
        return TRAINING_PASSES * (trained - model.flops(context)) / context

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: each half keeps what its blocks do for its own places;
        cross-attention keeps its normalized input, queries, keys, values and output."""
        if self.neutral():
            return 0.0
        config, (least, most) = run.model, self.prefixes(run.model.context)
        encoder = self.encoder_blocks(config.layers)
        decoder = config.layers - encoder
        encoded, decoded = most / config.context, (config.context - least + 1) / config.context
        blocks = encoder * encoded + decoder * decoded - config.layers
        crossed = 3 * config.width * decoded + 2 * config.kv_heads * config.head_width * encoded
        return blocks * block_activations(config, narrow) + decoder * narrow * crossed
