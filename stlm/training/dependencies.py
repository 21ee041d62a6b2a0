"""The runs whose weights a run reads: their last checkpoints and their training costs."""

from __future__ import annotations

from typing import Any

from stlm.study.runs import Run
from stlm.training.checkpoints import last_checkpoint, read_description


class Dependency:
    """The last checkpoint of the run on which `run` depends in a given role (`Run.depends`).

    Raises ``UserError`` if there is no checkpoint yet.
    """

    def __init__(self, run: Run, role: str) -> None:
        self.checkpoint = last_checkpoint(run, run.depends[role])
        self.model, description = read_description(self.checkpoint)
        self.tokens: int = description["tokens"]
        self.weights_sha256: str = description["weights_sha256"]
        flops = description.get("flops")
        if flops is None:  # a checkpoint of an earlier version, without techniques
            other = run.model_copy(update={"model": self.model, "techniques": {}})
            flops = self.tokens * other.flops_per_token
        # For train.json. `flops` covers that training only; `depends` covers what it depended on in turn.
        self.record: dict[str, Any] = {
            "run": run.depends[role],
            "weights_sha256": self.weights_sha256,
            "step": description["step"],
            "tokens": self.tokens,
            "flops": flops,
            **({"depends": description["depends"]} if "depends" in description else {}),
        }


def read_dependencies(run: Run) -> dict[str, Dependency]:
    """Map each role to the run's dependency. Raises ``UserError`` if a checkpoint is missing."""
    return {role: Dependency(run, role) for role in run.depends}
