"""A run's vocabulary as a part of its teacher's.

Shapes: V tokens of the run, W of the teacher, C positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stlm.tokens.names import hf_name
from stlm.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from stlm.training.dependencies import Dependency


class Subset(NamedTuple):
    """A vocabulary that is a part of the teacher's: each of its V tokens is one of the teacher's W.

    The teacher reads a token by its own id, `parents_V`. What it predicts is projected: the probability of a
    token that the run lacks goes to the first piece with which the run writes its bytes, `first_pieces_W`.
    For if the text went on with that token, the run's next token would be that piece: the projection is the
    distribution of the run's next token. (Given a text cut as the teacher would cut it. After a first piece
    the teacher sees a text that it would have written otherwise, and says what it makes of that.)
    """

    parents_V: np.ndarray
    first_pieces_W: np.ndarray

    @classmethod
    def of(cls, dependency: Dependency, tokens_folder: Path) -> Subset | None:
        """That of the tokens in a folder, as `dependency` reads them; None if it has the same tokens.

        Raises ``UserError`` for tokens that it does not have.
        """
        parents_V = dependency.ids(tokens_folder / "tokenizer")
        if parents_V is None:
            return None
        pieces_W = np.asarray(load_tokenizer(tokens_folder / "tokenizer").first_pieces, np.int64)
        if (name := hf_name(dependency.tokenizer)) is not None and name.size is not None:
            pieces_W = pieces_W[load_tokenizer(dependency.tokenizer_folder).parent_ids]
        return cls(parents_V, pieces_W)

    def read(self, tokens: Tensor) -> Tensor:
        """The teacher's ids of the run's tokens, of any shape."""
        return torch.from_numpy(self.parents_V).to(tokens.device)[tokens]

    def project(self, q_CW: Tensor) -> Tensor:
        """The distribution [C, V] over the run's tokens, given one over the teacher's; sums stay."""
        pieces_W = torch.from_numpy(self.first_pieces_W).to(q_CW.device)
        # Rows beyond the teacher's tokens are padding.
        return q_CW.new_zeros(len(q_CW), len(self.parents_V)).index_add_(
            1, pieces_W, q_CW[:, : len(pieces_W)]
        )
