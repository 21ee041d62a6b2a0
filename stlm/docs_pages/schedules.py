"""The plots of docs/schedules.md: every schedule over a training."""

from __future__ import annotations

from pathlib import Path

from stlm.report.style import figure
from stlm.training.config import TrainingConfig
from stlm.training.schedules import DROPOUTS, LEARNING_RATES, dropout_factor, learning_rate

SCHEDULES = Path("docs/schedules")
_STEPS = 1000
# Warm-up steps of schedules that need more than the others to show their shape.
_WARMUPS = {"one_cycle": 300}


def write_schedule_plots(root: Path = Path()) -> Path:
    """Write docs/schedules/{learning-rate,dropout}.svg and return their folder."""
    folder = root / SCHEDULES
    folder.mkdir(parents=True, exist_ok=True)
    steps = range(1, _STEPS + 1)
    rates = {
        name: [learning_rate(_recipe(schedule=name, warmup_steps=_WARMUPS.get(name, 100)), s) for s in steps]
        for name in LEARNING_RATES
    }
    factors = {name: [dropout_factor(_recipe(dropout_schedule=name), s) for s in steps] for name in DROPOUTS}
    _panels(folder, "learning-rate", "Learning rate, share of the peak", rates)
    _panels(folder, "dropout", "Factor of the dropout probability", factors)
    return SCHEDULES


def _recipe(**keys: object) -> TrainingConfig:
    """A recipe of 1,000 steps whose learning rate has the peak 1 and the minimum 0.1."""
    recipe = {"steps": _STEPS, "learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 100}
    return TrainingConfig(**(recipe | keys))


def _panels(folder: Path, name: str, title: str, curves: dict[str, list[float]]) -> None:
    """A panel for each schedule: in one panel the curves would overlap."""
    columns = 3
    with figure(folder, name, title, width=8.0, height=4.2, heading="") as drawing:
        axes = drawing.subplots(-(-len(curves) // columns), columns, sharex=True, sharey=True)
        for axis in axes.flat[len(curves) :]:
            axis.set_visible(False)
        for number, (axis, (schedule, values)) in enumerate(zip(axes.flat, curves.items(), strict=False)):
            axis.plot([step / _STEPS for step in range(1, _STEPS + 1)], values, color="#0072B2")
            axis.set_title(schedule)
            axis.set_ylim(-0.03, 1.08)
            if number + columns >= len(curves):
                axis.set_xlabel("share of training")
                axis.tick_params(labelbottom=True)
        drawing.supylabel(title, fontsize=11)
