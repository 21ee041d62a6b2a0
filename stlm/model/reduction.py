"""Ways to have fewer parameters, as sections of `model`: sharing between layers, adapters, low rank.

Needs no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The two networks of a block, by their attribute names.
PARTS = ("attention", "ffn")


class SharingConfig(BaseModel):
    """Layers that share matrices. Norms, gains, shifts and adapters remain separate in each layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    what: Literal["ffn", "attention", "all"] = Field(
        description="Whose matrices are shared: the feed-forward network's (MobiLlama, Thawakar et al. "
        "2024), attention's, or both (ALBERT, Lan et al. 2020)."
    )
    order: Literal["one", "groups", "cyclic", "sandwich"] = Field(
        "one",
        description="Which layers share. `one`: all. `groups`: each group of `group` consecutive layers "
        "(Lan et al. 2020; MobileLLM's immediate sharing, Liu et al. 2024). `cyclic`: layer i uses set i mod "
        "`units` (CYCLE of Takase and Kiyono 2021). `sandwich`: all but the first and the last (Subformer, "
        "Reid et al. 2021).",
    )
    group: int | None = Field(None, ge=2, description="For order `groups`: the number of layers in a group.")
    units: int | None = Field(
        None, ge=1, description="For order `cyclic`: the number of different sets of matrices."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> SharingConfig:
        for key, order in (("group", "groups"), ("units", "cyclic")):
            given = getattr(self, key) is not None
            if self.order == order and not given:
                raise ValueError(f"order: {order} needs {key}")
            if given and self.order != order:
                raise ValueError(f"{key} is used by order: {order} alone; found {self.order}")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks of a block that are shared."""
        return PARTS if self.what == "all" else (self.what,)

    def source_layers(self, layers: int) -> tuple[int, ...]:
        """For each layer, from 0, the first layer that uses the same matrices."""
        if self.order == "groups":
            return tuple(layer - layer % self.group for layer in range(layers))
        if self.order == "cyclic":
            return tuple(layer % self.units for layer in range(layers))
        if self.order == "sandwich":
            return tuple(min(layer, 1) if layer < layers - 1 else layer for layer in range(layers))
        return (0,) * layers


class LoraConfig(BaseModel):
    """Adapters (LoRA, Hu et al. 2022): each layer adds scale x A B to its matrices, A and B of rank r."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(
        ge=1,
        description="Rank r. Query, key and value share one A, and so do gate and up, as each is one "
        "product.",
    )
    what: Literal["ffn", "attention", "all"] = Field("all", description="Which networks have adapters.")
    alpha: float | None = Field(
        None, gt=0, description="The scale is alpha / rank; default: `rank`, a scale of 1."
    )

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks of a block that have adapters."""
        return PARTS if self.what == "all" else (self.what,)

    @property
    def scale(self) -> float:
        """The factor of the adapters' outputs."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LowRankConfig(BaseModel):
    """Matrices W as products U V of a given rank, initialized so that U V has the variance of W.

    The rank of a single matrix, where given, overrides that of its network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ffn: int | None = Field(
        None, ge=1, description="Rank of the feed-forward matrices, gate and up as one; null: full."
    )
    attention: int | None = Field(
        None,
        ge=1,
        description="Rank of attention's: query, key and value as one, and the output's; null: full.",
    )
    # Omitted from records when null, so that older configs compare equal.
    qkv: int | None = Field(
        None,
        ge=1,
        description="Rank of query, key and value as one; null: `attention`'s.",
        exclude_if=lambda value: value is None,
    )
    out: int | None = Field(
        None,
        ge=1,
        description="Rank of attention's output; null: `attention`'s.",
        exclude_if=lambda value: value is None,
    )
    up: int | None = Field(
        None,
        ge=1,
        description="Rank of the matrix into the hidden units, gate and up as one; null: `ffn`'s.",
        exclude_if=lambda value: value is None,
    )
    down: int | None = Field(
        None,
        ge=1,
        description="Rank of the matrix from the hidden units; null: `ffn`'s.",
        exclude_if=lambda value: value is None,
    )

    @model_validator(mode="after")
    def _some(self) -> LowRankConfig:
        keys = type(self).model_fields
        if all(getattr(self, key) is None for key in keys):
            raise ValueError(f"give a rank: {', '.join(keys)}")
        return self

    def key(self, part: str, name: str) -> str | None:
        """The key that sets the rank of a part's matrix, the matrix's own or the part's; None: full rank."""
        matrix_key = name.removeprefix("gate_")
        return next((key for key in (matrix_key, part) if getattr(self, key) is not None), None)
