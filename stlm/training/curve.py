"""The records of a training run: rows of the curve with validations and checkpoints, and train.json."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.tokens.batches import ValidationSet
from stlm.training.checkpoint_names import WEIGHTS
from stlm.training.checkpoints import checkpoint_name, save_checkpoint
from stlm.training.resume import TrainingState
from stlm.training.schedules import learning_rate
from stlm.training.setup import Setup
from stlm.training.watch import block_name


class Curve:
    """The rows of curve.csv, and what is due with them: validations, checkpoints, saved states.

    The clock measures the steps only: validating and saving do not count as training time.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state, self.setup = state, state.setup
        run = self.setup.run
        self.validation = ValidationSet(
            run.tokens_folder, run.model.context, self.setup.config.validation_bytes
        )
        empty_figures(self.setup)  # refuses metrics of one name before the first step

    def start_clock(self) -> None:
        """Start timing steps."""
        self._started, self._first_step = time.perf_counter(), self.state.progress.step

    def take_time(self) -> float:
        """Add the time since the clock started to the run's time; returns the steps per second in it."""
        seconds = time.perf_counter() - self._started
        self.state.progress.seconds += seconds
        return (self.state.progress.step - self._first_step) / seconds

    def row_due(self) -> bool:
        """Whether the last step's row of the curve, and what goes with it, are still missing."""
        config, progress = self.setup.config, self.state.progress
        step, rows = progress.step, progress.rows
        if rows and rows[-1]["step"] == step:
            return False
        if step == 0:  # a run of no steps has this row alone
            return config.steps == 0
        return step in config.checkpoint_steps or any(
            step % every == 0 for every in (config.log_every, config.validate_every, config.save_every)
        )

    def add_row(self) -> dict[str, float]:
        """Add the last step's row; validate, keep a checkpoint and save the state if they are due."""
        config, state = self.setup.config, self.state
        progress = state.progress
        step, last = progress.step, progress.step == config.steps
        state.watch.drain()
        tokens_a_step = config.tokens_per_step(self.setup.run.model.context)
        speed = round(self.take_time() * tokens_a_step, 1) if step else None
        row = {"step": step, "tokens": step * tokens_a_step, "seconds": round(progress.seconds, 2)}
        if step:
            row |= {
                "tokens_per_second": speed,
                "learning_rate": learning_rate(config, step),
                **state.take_losses(),
                "grad_norm": round(state.norm.item(), 6),
            }
        if last or step % config.validate_every == 0:
            found = validate(self.setup, self.validation)
            row |= {key: round(value, 6) for key, value in found.row.items()}
            state.watch.add(step, found.layers)
        progress.rows.append(row)
        keeps = step in config.checkpoint_steps
        if keeps and self.setup.group.leads:
            keep_checkpoint(state)
        if last or keeps or step % config.save_every == 0:
            state.save()
        return row


class Validated(NamedTuple):
    """Metrics of the validation text: columns of the curve, and by layer columns of watch.csv."""

    row: dict[str, float]
    layers: dict[str, dict[str, float]]


@torch.no_grad()
def validate(setup: Setup, validation: ValidationSet) -> Validated:
    """Loss (nats per token), bits per byte, character and token perplexity on the validation documents, and
    the techniques' own metrics.

    End-of-text tokens are not counted: the metrics describe the text (design, "Scoring").
    """
    device = setup.device.device
    setup.model.eval()
    nats = torch.zeros((), device=device, dtype=torch.float64)
    figures = empty_figures(setup)
    for number, batch in enumerate(validation.batches(setup.config.batch_size)):
        if number % setup.group.size != setup.group.rank:
            continue
        tokens_BL, targets_BL, mask_BL = (torch.from_numpy(part).to(device) for part in batch)
        with setup.device.autocast():
            nats += setup.model.loss(tokens_BL, targets_BL, mask_BL).double()
            for technique in setup.run.techniques.values():
                found = technique.validated(setup.model, tokens_BL, targets_BL, mask_BL.bool())
                for name, sums in found.items():
                    figures[name] += sums
    setup.model.train()
    setup.group.sum([nats, *figures.values()])
    nats = nats.item()
    row = {
        "val_loss": nats / validation.n_tokens,
        "val_bits_per_byte": nats / math.log(2) / validation.n_bytes,
        "val_char_perplexity": math.exp(nats / validation.n_chars),
        "val_token_perplexity": math.exp(min(nats / validation.n_tokens, 700.0)),
        **{
            f"val_{name}": (total / count).item()
            for name, (total, count) in figures.items()
            if not total.ndim and count
        },
    }
    return Validated(row, _of_layers({name: sums for name, sums in figures.items() if sums.ndim > 1}))


def empty_figures(setup: Setup) -> dict[str, Tensor]:
    """Zeros for the sums and counts of each metric that techniques declare: [2], by layer [2, layers, X].

    Raises UserError if two of them have one name.
    """
    figures: dict[str, Tensor] = {}
    for technique in setup.run.techniques.values():
        own = {name: [2] for name in technique.figures}
        layered = technique.layer_figures(setup.model)
        own_by_layer = {name: [2, len(setup.model.blocks), numbers] for name, numbers in layered.items()}
        for name in [*own, *own_by_layer]:
            if name in figures:
                raise UserError(
                    f"run {setup.run.name}: techniques.{technique.key()}: a metric {name!r} is there "
                    "already; name it otherwise"
                )
        figures |= {
            name: torch.zeros(shape, device=setup.device.device, dtype=torch.float64)
            for name, shape in (own | own_by_layer).items()
        }
    return figures


def _of_layers(figures: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Block -> column -> mean, given sums and counts [2, layers, X] by name."""
    found: dict[str, dict[str, float]] = {}
    for name, (sums, counts) in figures.items():
        for layer, (totals, amounts) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            for number, (total, count) in enumerate(zip(totals, amounts, strict=True), start=1):
                if count:
                    found.setdefault(block_name(layer), {})[f"{name}_{number}"] = total / count
    return found


def keep_checkpoint(state: TrainingState) -> None:
    """Keep the last step's weights as a checkpoint, with the cost so far."""
    run, step = state.setup.run, state.progress.step
    tokens = step * run.training.tokens_per_step(run.model.context)
    name = checkpoint_name(step)
    depends = {
        role: {key: value for key, value in one.record.items() if key not in ("truncation", "inherited")}
        for role, one in state.setup.dependencies.items()
    }
    digest = save_checkpoint(
        state.output / "checkpoints" / name,
        state.setup.model,
        {
            "training": run.training.model_dump(mode="json"),
            **run.model_dump(
                mode="json", include={"study", "variant", "seed", "corpus", "tokenizer", "data"}
            ),
            "run": run.name,
            "step": step,
            "tokens": tokens,
            "flops": state.setup.extra_flops + (tokens and tokens * run.flops_per_token),
            **({"depends": depends} if depends else {}),
        },
    )
    kept = {"step": step, "tokens": tokens, "folder": name, "weights_sha256": digest}
    kept["bytes"] = (state.output / "checkpoints" / name / WEIGHTS).stat().st_size
    state.progress.checkpoints.append(kept)


def summary(state: TrainingState, validation: ValidationSet) -> dict[str, Any]:
    """The content of train.json."""
    setup, progress = state.setup, state.progress
    run, depends = setup.run, {role: one.record for role, one in setup.dependencies.items()}
    before = sum(record["seconds"] for record in setup.prepared.values())
    validated = next(row for row in reversed(progress.rows) if "val_loss" in row)
    layers = {row["layer"]: row for row in state.watch.rows if row["step"] == validated["step"]}
    measured = {
        key: value for one in run.techniques.values() for key, value in one.measured(setup.model).items()
    }
    remarks = [remark for one in run.techniques.values() for remark in one.remarks(layers)]
    return {
        **run.model_dump(include={"study", "variant", "label", "seed", "corpus", "tokenizer"}),
        "run": run.name,
        "parameters": run.parameters.record(),
        **({"depends": depends} if depends else {}),
        **({"prepared": setup.prepared} if setup.prepared else {}),
        "steps": run.training.steps,
        "tokens": run.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": run.tokens and round(run.tokens / (progress.seconds - before), 1),
        "flops": run.flops + setup.extra_flops,
        **(progress.parts or [state.environment])[-1],  # of the process that computed the last step
        # A run may have stopped and continued elsewhere, or with other code.
        **({"parts": progress.parts} if len(progress.parts) > 1 else {}),
        "precision": setup.device.precision,
        "compiled": progress.compiled,
        "kernels": progress.kernels,
        "threads": torch.get_num_threads(),
        "processes": setup.group.size,
        "model": run.model.model_dump(),
        "training": run.training.model_dump(mode="json"),
        "data": run.data.model_dump(mode="json"),
        **run.model_dump(mode="json", include={"techniques"}),
        "validation": validation.record,
        "final": {key: value for key, value in validated.items() if key.startswith(("train_", "val_"))},
        "checkpoints": progress.checkpoints,
        "loss_spikes": state.watch.spikes.found,
        **measured,
        **({"remarks": remarks} if remarks else {}),
    }
