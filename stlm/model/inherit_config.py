"""How what a smaller model inherits from a larger one is chosen: `training.inherit`. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Measure = Literal["magnitude", "activation", "wanda", "taylor"]
_MEASURES = (
    "`magnitude`: the norm of its weights in the matrix that writes into the residual stream. `activation`: "
    "the root mean square of its output. `wanda`: both multiplied (Sun et al. 2023), the size of what it "
    "writes. `taylor`: the mean change of a token's loss without it, to first order (Molchanov et al. 2017; "
    "Michel et al. 2019)."
)


class InheritConfig(BaseModel):
    """Which layers, heads, hidden units and directions of the stream a smaller model inherits."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: Literal["influence", "loss", "spread", "first"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "influence",
        description="`influence`: those that change their input's direction most (1 - cosine; ShortGPT, Men "
        "et al. 2024). `loss`: the layer without which the loss is lowest is left out, again and again; it "
        "takes a forward pass for each layer that is left, each time. `spread`: evenly, the first and the "
        "last among them. `first`: the first. Or a list of layers, numbered from 0.",
    )
    heads: Measure = Field(
        "wanda",
        description="The measure of attention's heads; a group that shares keys and values counts the sum "
        f"of its heads' squares. {_MEASURES}",
    )
    ffn: Measure = Field("wanda", description="The measure of hidden units; as for `heads`.")
    width: Literal["importance", "components"] = Field(
        "importance",
        description="`importance`: the channels of the residual stream that matter most to the matrices that "
        "read them are kept, as they are. `components`: the stream is rotated to its principal components, "
        "and the last are cut (SliceGPT, Ashkboos et al. 2024, with one rotation for all layers); it suits "
        "models with `tied: false`.",
    )
    refit: bool = Field(
        True,
        description="Whether the matrices that read heads, hidden units or the stream are refitted to what "
        "is left of their inputs, by ridge regression on the text; otherwise columns are left out and no "
        "more.",
    )
    bytes: int = Field(
        100_000, ge=1, description="Bytes of the training text that what is measured is measured on."
    )

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if (isinstance(layers, tuple) and list(layers) != sorted(set(layers))) or layers == ():
            raise ValueError(f"{list(layers)}: expected layers in ascending order, each once")
        return layers
