"""Everything that a process needs to train a run: device, data, objective, model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stlm.errors import UserError
from stlm.files import fingerprint, read_json
from stlm.model.build import build_model
from stlm.model.rows import Rows
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.tokens.shards import read_meta
from stlm.tokens.tokenizer import check_tokenizer, load_tokenizer, tokens_table
from stlm.training.changed_start import change_start
from stlm.training.config import RECORD_KEYS
from stlm.training.dependencies import Dependency, read_dependencies
from stlm.training.devices import Device, choose_device
from stlm.training.difficulty import Reference
from stlm.training.distributed import Group
from stlm.training.inherited import calibration_rows
from stlm.training.micro_batches import MicroBatches
from stlm.training.objective import Objective, total
from stlm.training.optimizers import build_optimizer
from stlm.training.warm_start import inherit_weights


class TrainingText:
    """What a run reads: its micro-batches, and the references that their choice and order depend on.

    `tokens_before`: those of the text that were read before, by what the run starts from.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        dependencies: Mapping[str, Dependency],
        group: Group | None = None,
    ) -> None:
        self.references = {
            role: Reference(run, device, group, role)
            for role in ("reference", "smaller")
            if role in dependencies
        }
        reference, smaller = (self.references.get(role) for role in ("reference", "smaller"))
        origin = dependencies.get("start")
        # The text may continue where the run that this one starts from stopped.
        self.tokens_before = origin.text_tokens if origin and origin.goes_on(run) else 0
        rows_before = self.tokens_before // run.model.context
        self.batches = MicroBatches(run, device, reference, rows_before, smaller)

    @property
    def scores(self) -> dict[str, str]:
        """Digests of the scores that the choice and the order of the text depend on."""
        names = {"reference": "difficulty", "smaller": "difficulty_smaller"}
        return {names[role]: reference.given for role, reference in self.references.items()}


class Setup:
    """Everything that training a run needs and that, except for the weights, never changes.

    `share` is this process's share of every step. `fingerprint` is equal for trainings that produce the same
    weights: a state is resumed only if its fingerprint matches.
    """

    def __init__(self, run: Run, group: Group) -> None:
        self.run, self.group, self.config = run, group, run.training
        self.share = group.share(run.training)
        self.device: Device = choose_device(run.training)
        if not all("compile" in technique.supported for technique in run.techniques.values()):
            self.device = replace(self.device, compiled=False)
        device = self.device.device
        self.dependencies = read_dependencies(run)
        text = TrainingText(run, device, self.dependencies, group)
        self.micro_batches = text.batches
        origin = self.dependencies.get("start")
        # It is copied to the checkpoints at the end; they are of no use without it.
        check_tokenizer(run.tokens_folder / "tokenizer", read_meta(run.tokens_folder).tokenizer_sha256)
        _check_vocabulary(run)
        self.objective = Objective(run)
        self.objective.prepare(device, group)
        self.model = _build(run, device)
        if origin:
            origin.record["text_tokens"] = text.tokens_before
            inherit_weights(self.model, origin, run, group)
        changed = change_start(run, self.model, self.dependencies, group)
        rows = partial(calibration_rows, run)
        begun = {name: one.at_start(self.model, run, rows) for name, one in run.techniques.items()}
        self.optimizer = build_optimizer(self.model, self.config, self.device.dtype)
        # What was computed for the run before its first step: by techniques, their stages, and of its text.
        prepared = {name: one.prepared(run) | begun[name] for name, one in run.techniques.items()} | changed
        prepared |= {
            f"data.{role}": {"seconds": one.seconds, "extra_flops": one.flops}
            for role, one in text.references.items()
        }
        if origin and (cut := origin.record.get("inherited")):
            prepared["training.inherit"] = {
                "seconds": cut["seconds"],
                "extra_flops": cut.get("flops", 0.0),
            }
        self.prepared = {name: record for name, record in prepared.items() if record}
        self.fingerprint = self._fingerprint(text)

    def _fingerprint(self, text: TrainingText) -> str:
        run, weights = self.run, {role: one.weights_sha256 for role, one in self.dependencies.items()}
        not_of_weights = {"label": True, "paper_row": True, "name": True, "study": True}
        return fingerprint(
            {
                "run": run.model_copy(update={"data": run.data.unlimited}).model_dump(
                    mode="json", exclude={**not_of_weights, "training": RECORD_KEYS}
                ),
                "tokens": read_json(run.tokens_folder / "meta.json"),
                "precision": self.device.precision,
                **({"depends": weights} if weights else {}),
                **text.scores,
                **({"prepared": prepared} if (prepared := self._prepared_sha256) else {}),
            }
        )

    @property
    def extra_flops(self) -> float:
        """The FLOPs of what was prepared that the run's FLOPs a token do not contain."""
        return sum(record.get("extra_flops", 0.0) for record in self.prepared.values())

    @property
    def _prepared_sha256(self) -> dict[str, str]:
        return {name: record["sha256"] for name, record in self.prepared.items() if "sha256" in record}

    def eager_hidden(self, tokens_BL: Tensor) -> Tensor:
        """The head's input as in training, but without torch.compile, whose graphs hold no hooks."""
        layout = self.micro_batches.layout(tokens_BL)
        for technique in self.run.techniques.values():
            layout = technique.watched(tokens_BL, layout)
        with self.device.autocast():
            return self.model.hidden(tokens_BL, layout)

    def losses(self, tokens_BM: Tensor, step: int) -> dict[str, Tensor]:
        """The parts of the objective for tokens [B, L + 1]."""
        with self.device.autocast():
            return self.objective(self.objective.read(self.model, self.rows(tokens_BM, step), step))

    def loss(self, tokens_BM: Tensor, step: int) -> Tensor:
        """The sum of the parts."""
        return total(self.losses(tokens_BM, step))

    def rows(self, tokens_BM: Tensor, step: int) -> Rows:
        """What a micro-batch of tokens [B, L + 1] reads and predicts, as techniques draw it."""
        return self.objective.rows(tokens_BM, self.micro_batches.layout(tokens_BM[:, :-1]), step)

    def loss_again(self, rows: Rows, step: int) -> Tensor:
        """The loss of rows that were drawn before, in this process alone and without torch.compile."""
        with self.device.autocast():
            return total(self.objective(self.objective.read(self.model, rows, step, alone=True)))


def _build(run: Run, device: torch.device) -> Transformer:
    """The run's model with new weights, drawn from its seed."""
    torch.manual_seed(run.seed)
    model = build_model(run.model, run.techniques.values()).to(device)
    if run.model.bytes is not None:
        model.use(tokens_table(load_tokenizer(run.tokens_folder / "tokenizer")))
    return model


def _check_vocabulary(run: Run) -> None:
    """Refuse token shards with ids that the model has no embedding for; a byte-level model reads any."""
    if run.model.bytes is not None:
        return
    meta = read_json(run.tokens_folder / "meta.json")
    if meta["vocab_size"] != run.model.vocab_size:
        raise UserError(
            f"{run.tokens_folder / 'meta.json'}: vocab_size: found {meta['vocab_size']}, expected "
            f"{run.model.vocab_size} as in {run.tokenizer}; tokenize again"
        )
