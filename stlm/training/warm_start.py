"""Training that starts from the last checkpoint of another run of the study."""

from __future__ import annotations

from stlm.model.inherit import inherit
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.training.dependencies import Dependency


def inherit_weights(model: Transformer, origin: Dependency, run: Run) -> None:
    """Give `model` the weights of `origin`; its record gets the error of cutting to lower ranks."""
    source = origin.load()
    truncation = inherit(model, source)
    if truncation.by_matrix:
        origin.record["truncation"] = {
            "relative_error": round(truncation.error, 5),
            "by_matrix": {name: round(error, 5) for name, error in truncation.by_matrix.items()},
        }
