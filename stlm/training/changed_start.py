"""What techniques make of the weights that training begins with (`Technique.change_start`), made once.

As what a run inherits (`stlm.training.inherited`), it is kept in a folder next to the runs' states, named by
a hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from stlm.files import fingerprint, sha256
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.training.dependencies import Dependency
from stlm.training.distributed import Group
from stlm.training.inherited import kept_next_to_states

# Increases whenever the same weights, text and settings would be changed in another way.
_FORMAT = 1


def change_start(
    run: Run, model: Transformer, dependencies: dict[str, Dependency], group: Group | None = None
) -> dict[str, dict[str, Any]]:
    """Let the run's techniques change the weights of `model`; technique -> its record, for `prepared`."""
    changing = {name: one for name, one in run.techniques.items() if one.changes_start()}
    if not changing:
        return {}
    depends = {
        "format": _FORMAT,
        "weights": _digest(model),
        "depends": {role: one.weights_sha256 for role, one in dependencies.items()},
        "techniques": {name: one.model_dump(mode="json") for name, one in changing.items()},
        "tokens": sha256(run.tokens_folder / "meta.json"),
        "context": run.model.context,
        "bytes": run.training.inherit.bytes,
        "weights_of_mix": run.data.weights,
    }

    def make() -> tuple[Transformer, dict[str, Any]]:
        records = {}
        for name, one in changing.items():
            started = time.perf_counter()
            record = one.change_start(model, run)
            records[name] = {"seconds": round(time.perf_counter() - started, 1), **record}
        return model, {"changed": records}

    changed, description = kept_next_to_states(run, fingerprint(depends), make, group)
    model.load_state_dict(changed.state_dict())
    return {
        name: {**record, "sha256": description["weights_sha256"]}
        for name, record in description["changed"].items()
    }


def _digest(model: Transformer) -> str:
    """A hash of the model's weights and their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
