"""Training that begins from the last checkpoint of another run of the study."""

from __future__ import annotations

from typing import Any

from stlm.model.inherit import inherit
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.training.checkpoints import last_checkpoint, load_checkpoint, read_description


class Start:
    """The last checkpoint of the run that `run` starts from, and what train.json says of it."""

    def __init__(self, run: Run) -> None:
        """Raises ``UserError`` where there is no checkpoint yet."""
        assert run.origin is not None
        self.checkpoint = last_checkpoint(run, run.origin)
        model, description = read_description(self.checkpoint)
        tokens = description["tokens"]
        origin = run.model_copy(update={"model": model})
        # The text goes on where that run stopped.
        self.rows = tokens // run.model.context
        self.record: dict[str, Any] = {
            "run": run.origin,
            "weights_sha256": description["weights_sha256"],
            "step": description["step"],
            "tokens": tokens,
            "flops": tokens * origin.flops_per_token,
        }

    @property
    def mark(self) -> dict[str, str]:
        """What a run's weights depend on."""
        return {"start": self.record["weights_sha256"]}

    def give(self, model: Transformer) -> None:
        """Give `model` the checkpoint's weights; what cutting them to lower ranks lost goes to the record."""
        source, _ = load_checkpoint(self.checkpoint)
        truncation = inherit(model, source)
        if truncation.by_matrix:
            self.record["truncation"] = {
                "relative_error": round(truncation.error, 5),
                "by_matrix": {name: round(error, 5) for name, error in truncation.by_matrix.items()},
            }
