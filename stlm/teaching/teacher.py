"""A model that reads a run's text: its hidden states and its distribution over the run's tokens.

Shapes: B rows, L positions, D width, V tokens of the run, W tokens of the teacher, C positions at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from stlm.model.layout import Layout
from stlm.model.projection import Dense, projections
from stlm.model.transformer import Transformer
from stlm.teaching.draw import padded, weights_of
from stlm.teaching.subset import Subset

# Logits computed at once: few enough for a core's cache on a CPU.
_LOGITS = {"cpu": 2**22, "cuda": 2**26}


class Teacher:
    """A model in evaluation mode, without gradients, that reads tokens of a run and predicts them.

    `dtype`: of the matrix products; in bfloat16 the matrices are stored so, and the model must not be used
    otherwise afterwards. The residual stream stays in float32.
    """

    def __init__(
        self,
        model: Transformer,
        subset: Subset | None = None,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.subset, self.dtype = model.eval().requires_grad_(False), subset, dtype
        self.config, self.device = model.config, model.embedding.weight.device
        self.temperature = temperature
        self.vocabulary = len(subset.parents_V) if subset else model.config.vocab_size
        head_WD = model.output.weight
        # Logits of the tokens that fill the last block are minus infinity; their rows are zero.
        self._head_WD = F.pad(head_WD, (0, 0, 0, padded(len(head_WD)) - len(head_WD))).to(dtype)
        if dtype != torch.float32:
            for _, matrix in projections(model.blocks):
                for linear in (matrix,) if isinstance(matrix, Dense) else (matrix.left, matrix.right):
                    linear.weight.data = linear.weight.data.to(dtype)

    @torch.inference_mode()
    def states(self, tokens_BL: Tensor, layout: Layout | None, layers: Sequence[int] = ()) -> list[Tensor]:
        """The residual stream [B, L, D] after each of `layers`, from 1, and the head's input, float32."""
        if self.subset is not None:
            tokens_BL = self.subset.read(tokens_BL)
        last, device = len(self.model.blocks), self.device.type
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(device, self.dtype)
        with autocast:
            kept = self.model.residuals(tokens_BL, layout, after=[layer - 1 for layer in layers])
            head = self.model.finish(kept[-1])
        by_layer = dict(zip([layer for layer in sorted(layers) if layer < last], kept, strict=False))
        return [by_layer.get(layer, kept[-1]).float() for layer in layers] + [head]

    @torch.inference_mode()
    def distributions(self, x_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Positions, and for them the distributions [C, V'] over the run's tokens, up to a factor each.

        `x_ND`: the head's input. V' is V in whole blocks; what is beyond V has no probability.
        """
        count = max(1, _LOGITS[self.device.type] // len(self._head_WD))
        words = self.config.vocab_size
        for begin in range(0, len(x_ND), count):
            here = slice(begin, min(begin + count, len(x_ND)))
            logits_CW = (x_ND[here].to(self.dtype) @ self._head_WD.T).float()
            if self.config.logit_softcap or self.temperature != 1:
                logits_CW = self.model.cap(logits_CW) / self.temperature
            logits_CW[:, words:] = -torch.inf
            q_CV = weights_of(logits_CW)
            if self.subset is not None:
                q_CV = self.subset.project(q_CV[:, :words])
                q_CV = F.pad(q_CV, (0, padded(self.vocabulary) - self.vocabulary))
            yield here, q_CV

    @torch.inference_mode()
    def losses(self, tokens_BM: Tensor) -> Tensor:
        """The loss [B, L], in nats, float32, of the tokens after the first in rows [B, L + 1]."""
        inputs_BL, targets_BL = tokens_BM[:, :-1], tokens_BM[:, 1:]
        x_ND = self.states(inputs_BL, None)[-1].flatten(0, 1)
        targets_N1, losses_N = targets_BL.reshape(-1, 1), x_ND.new_empty(len(x_ND), dtype=torch.float32)
        for here, q_CV in self.distributions(x_ND):
            wanted_C = q_CV.gather(1, targets_N1[here])[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
            losses_N[here] = q_CV.sum(dim=1).log() - wanted_C.log()
        return losses_N.view(targets_BL.shape)
