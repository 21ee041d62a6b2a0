"""Where a teacher's answers are: in a folder named by all in params/ that they depend on. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stlm.files import fingerprint

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.techniques.distillation import Distillation

TAUGHT = Path("data/taught")


def distillation(run: Run) -> Distillation | None:
    """The run's distillation, if a stage of its own asks the teacher."""
    technique = run.techniques.get("distillation")
    return None if technique is None or technique.taught is None or technique.neutral() else technique


def settings(run: Run, technique: Distillation) -> dict[str, Any]:
    """What the answers depend on: teacher, rows of the text, and what is kept of each position.

    Rows are described by what selects them: two runs with equal settings read the same rows, and share the
    answers. The student's size and its recipe do not matter.
    """
    training, (first, last) = run.training, technique.taught_rows(run)
    name = run.depends.get("teacher")
    # Runs of the study that the choice of the text depends on. After a published model it begins anew.
    others = {role: f"{run.study}/{other}" for role, other in run.depends.items() if role != "teacher"}
    return {
        "teacher": technique.teacher if name is None else f"{run.study}/{name}",
        "context": run.model.context,
        "seed": run.seed,
        "data": run.data.unlimited.model_dump(mode="json"),
        "rows": [first, last, training.steps * training.accumulation * training.batch_size],
        **({"depends": others} if others else {}),
        "temperature": technique.temperature,
        "precision": training.precision,
        "taught": technique.taught.model_dump(mode="json", exclude={"states"}),
        "layers": list(technique.taught.teacher_layers),
    }


def taught_folder(run: Run) -> Path | None:
    """The folder of the answers that the run trains on; None if training asks the teacher itself."""
    technique = distillation(run)
    if technique is None:
        return None
    teacher = technique.teacher.replace(".", "-")
    name = f"{teacher}-{fingerprint(settings(run, technique))[:16]}"
    return TAUGHT / run.corpus / run.tokenizer / name
