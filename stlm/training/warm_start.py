"""Training that starts from the weights of another run of the study, or of a published model."""

from __future__ import annotations

from stlm.model.inherit import inherit
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.training.dependencies import Dependency
from stlm.training.distributed import Group
from stlm.training.inherited import inherited_model


def inherit_weights(model: Transformer, origin: Dependency, run: Run, group: Group | None = None) -> None:
    """Give the run's `model` the weights of `origin`, cut to its sizes and ranks.

    The record of `origin` gets what was kept, and the error of cutting to lower ranks.
    """
    truncation = inherit(model, inherited_model(run, origin, group))
    if truncation.by_matrix:
        origin.record["truncation"] = {
            "relative_error": round(truncation.error, 5),
            "by_matrix": {name: round(error, 5) for name, error in truncation.by_matrix.items()},
        }
