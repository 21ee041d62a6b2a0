"""The config of a byte-level model: the section `bytes` of `model`. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Bounds the memory that a list of layers takes; the deepest published Transformers have a thousand layers.
MOST_LAYERS = 10_000
_TRIED = 10_000


def check_divides(key: str, found: int, divided_key: str, whole: int) -> None:
    """Raise ValueError unless `found`, the value of `key`, divides `whole`, the value of `divided_key`."""
    if whole % found:
        # Search outwards from `found`; for huge numbers the search is cut off.
        near = (
            number
            for off in range(1, min(max(found, whole), _TRIED))
            for number in (found - off, found + off)
            if 0 < number <= whole and whole % number == 0
        )
        nearest = next(near, 1)
        raise ValueError(
            f"{key}: {found} does not divide {divided_key}: {whole} (nearest that does: {nearest})"
        )


class ByteConfig(BaseModel):
    """Bytes in, bytes out: replaces the embedding and the head (paper, section 5.2)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    width: int = Field(64, ge=2, description="Width of the byte embedding and of both byte transformers.")
    heads: int = Field(2, ge=1, description="Attention heads of the byte transformers. Must divide `width`.")
    ffn_width: int = Field(
        192, ge=1, description="Hidden units of their feed-forward networks, whose kind is `ffn`."
    )
    encoder_layers: int = Field(
        2,
        ge=1,
        le=MOST_LAYERS,
        description="Blocks of the transformer that encodes each chunk; it sees all bytes of the chunk.",
    )
    decoder_layers: int = Field(
        2, ge=1, le=MOST_LAYERS, description="Blocks of the transformer that writes a chunk byte by byte."
    )
    pooling: Literal["mean", "attention", "last", "query"] = Field(
        "mean",
        description="How a chunk's bytes become one vector: their mean; their mean with learned weights; the "
        "last byte; or attention by a learned query, with `model.heads` heads at the core's width "
        "(Byte2Word).",
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> ByteConfig:
        check_divides("heads", self.heads, "width", self.width)
        if self.width % 2:
            raise ValueError(f"width: {self.width} is odd; positions in a chunk come in sine/cosine pairs")
        return self
