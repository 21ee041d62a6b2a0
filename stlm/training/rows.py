"""What a micro-batch of training reads, and what it predicts.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stlm.model.layout import Layout


class Rows(NamedTuple):
    """The rows of a micro-batch; techniques may change them before the forward pass (`Technique.rows`).

    `tokens_BL`: the inputs, ids of the vocabulary or of added tokens (`Transformer.add_tokens`).
    `targets_BL`: what each position predicts, ids of the vocabulary. `layout`: how sequences lie in the rows;
    None: one in each row. `counted_BL`: the positions whose targets count in the loss; None: all.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    layout: Layout | None = None
    counted_BL: Tensor | None = None
