"""Runs with made-up techniques, which are in no file of stlm/techniques/."""

from __future__ import annotations

from torch import Tensor, nn

from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.techniques.base import Technique


class Wrapped(Technique):
    """Blocks within modules that change nothing."""

    def build(self, model: Transformer) -> None:
        for number, block in enumerate(model.blocks):
            model.blocks[number] = Around(block)


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BLD: Tensor, *arguments) -> Tensor:
        return self.block(x_BLD, *arguments)


def with_techniques(run: Run, **techniques: Technique) -> Run:
    return run.model_copy(update={"techniques": techniques})
