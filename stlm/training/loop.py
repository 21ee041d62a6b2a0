"""Train one run: from token shards to checkpoints, a curve and a summary."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from stlm.errors import UserError
from stlm.files import atomic_directory, disk_errors, read_json, write_json
from stlm.model.config import training_flops_per_token
from stlm.model.transformer import Transformer
from stlm.study import Run
from stlm.tokens.batches import Batches, ValidationSet
from stlm.training.checkpoints import checkpoint_name, code_version, save_checkpoint
from stlm.training.config import RECORD_KEYS, TrainingConfig
from stlm.training.devices import Device, choose_device
from stlm.training.records import Records, progress_bar, write_curve
from stlm.training.schedules import learning_rate
from stlm.training.state import Progress, fingerprint, load_state, save_state


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices and embeddings, not on gains."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


class Trainer:
    """The state of one run and the steps that move it on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.training
        self.where: Device = choose_device(run.training)
        self.device = self.where.device
        context = run.model.context
        self.batches = Batches(run.tokens_folder, context, self.config.batch_size, run.seed)
        self.validation = ValidationSet(run.tokens_folder, context, self.config.validation_tokens)
        self.check_vocabulary()
        torch.manual_seed(run.seed)
        self.model = Transformer(run.model).to(self.device)
        self.loss = torch.compile(self.model.loss) if self.where.compiled else self.model.loss
        self.optimizer = build_optimizer(self.model, self.config)
        self.mark = fingerprint(
            {
                "run": run.model_dump(
                    mode="json",
                    exclude={
                        "label": True,
                        "paper_row": True,
                        "name": True,
                        "study": True,
                        "training": RECORD_KEYS,
                    },
                ),
                "tokens": read_json(run.tokens_folder / "meta.json"),
                "precision": self.where.precision,
            }
        )
        self.state_path = run.state_folder / "state.pt"
        self.output = run.state_folder / "output"
        self.progress = Progress()

    def check_vocabulary(self) -> None:
        """Refuse token shards whose ids the model has no embedding for."""
        meta = read_json(self.run.tokens_folder / "meta.json")
        if meta["vocab_size"] != self.run.model.vocab_size:
            raise UserError(
                f"{self.run.tokens_folder / 'meta.json'}: vocab_size: found {meta['vocab_size']}, expected "
                f"{self.run.model.vocab_size} as in {self.run.tokenizer}; tokenize again"
            )

    def resume(self) -> bool:
        """Go on from the last saved state of this very run, if there is one.

        The state of another recipe is set aside, in case it is wanted after all.
        """
        folder = self.run.state_folder
        progress = load_state(self.state_path, self.mark, self.model, self.optimizer)
        if progress is None:
            if self.state_path.exists():
                aside = folder.with_name(f"{folder.name}.aside")
                shutil.rmtree(aside, ignore_errors=True)
                folder.replace(aside)
                print(
                    f"{self.run.name}: the state in {folder} is of other parameters or data: "
                    f"set aside as {aside}, training from the start",
                    file=sys.stderr,
                )
            shutil.rmtree(folder, ignore_errors=True)
            return False
        for left in self.output.rglob(".*.partial"):  # of a checkpoint that a kill cut short
            shutil.rmtree(left, ignore_errors=True)
        self.progress = progress
        return True

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; the mean loss (nats) and the gradient's norm before clipping, on the device."""
        step = self.progress.step + 1
        # All randomness of a step (dropout) comes from the seed and the step: a resumed run draws the same.
        torch.manual_seed(self.run.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(self.config.accumulation):
            tokens = torch.from_numpy(self.batches.batch(step - 1, micro, self.config.accumulation))
            if self.device.type == "cuda":
                tokens = tokens.pin_memory()
            tokens = tokens.to(self.device, non_blocking=True)
            with self.where.autocast():
                loss = self.loss(tokens[:, :-1], tokens[:, 1:])
            (loss / self.config.accumulation).backward()
            loss_sum += loss.detach()
        limit = self.config.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        mean = loss_sum / self.config.accumulation
        if self.device.type == "cpu":
            # On a GPU this would wait for the device at every step; there `check` looks when a row is due.
            self.check(mean, norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step
        return mean, norm

    def check(self, loss: Tensor, norm: Tensor, step: int) -> None:
        """Stop at a loss or gradient that is not finite; what was saved before it stays."""
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            kept = self.progress.checkpoints
            last = f"{self.output / 'checkpoints' / kept[-1]['folder']}" if kept else "none was due yet"
            raise UserError(
                f"run {self.run.name}: step {step}: the loss is {loss.item()}, the gradient's norm "
                f"{norm.item()}: training diverged. Last good checkpoint: {last}. Lower "
                f"training.learning_rate (now {self.config.learning_rate}) or raise training.warmup_steps"
            )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss (nats a token), bits per byte, character and token perplexity on the validation documents.

        The end-of-text tokens are not counted: the figures are those of the text (design, "Scoring").
        """
        self.model.eval()
        nats = torch.zeros((), device=self.device, dtype=torch.float64)
        for x_BL, y_BL, mask_BL in self.validation.batches(self.config.batch_size):
            tensors = (torch.from_numpy(part).to(self.device) for part in (x_BL, y_BL, mask_BL))
            with self.where.autocast():
                nats += self.model.loss(*tensors).double()
        self.model.train()
        nats = nats.item()
        return {
            "val_loss": nats / self.validation.n_tokens,
            "val_bits_per_byte": nats / math.log(2) / self.validation.n_bytes,
            "val_char_perplexity": math.exp(nats / self.validation.n_chars),
            "val_token_perplexity": math.exp(min(nats / self.validation.n_tokens, 700.0)),
        }

    def keep_checkpoint(self) -> None:
        """Keep the weights of this step."""
        step = self.progress.step
        tokens = step * self.config.tokens_per_step(self.run.model.context)
        name = checkpoint_name(step)
        digest = save_checkpoint(
            self.output / "checkpoints" / name,
            self.model,
            {
                "training": self.config.model_dump(mode="json"),
                **self.run.model_dump(include={"study", "variant", "seed", "corpus", "tokenizer"}),
                "run": self.run.name,
                "step": step,
                "tokens": tokens,
            },
        )
        kept = {"step": step, "tokens": tokens, "folder": name, "weights_sha256": digest}
        self.progress.checkpoints.append(kept)

    def summary(self) -> dict[str, Any]:
        """The content of train.json."""
        run, counts = self.run, self.run.parameters
        validated = next(row for row in reversed(self.progress.rows) if "val_loss" in row)
        return {
            **run.model_dump(include={"study", "variant", "label", "seed", "corpus", "tokenizer"}),
            "run": run.name,
            "parameters": counts._asdict(),
            "steps": run.training.steps,
            "tokens": run.tokens,
            "seconds": round(self.progress.seconds, 1),
            "tokens_per_second": round(run.tokens / self.progress.seconds, 1),
            "flops": run.tokens * training_flops_per_token(run.model),
            "device": self.where.name,
            "precision": self.where.precision,
            "compiled": self.where.compiled,
            "threads": torch.get_num_threads(),
            "model": run.model.model_dump(),
            "training": run.training.model_dump(mode="json"),
            "final": {
                "train_loss": validated["train_loss"],
                **{key: value for key, value in validated.items() if key.startswith("val_")},
            },
            "checkpoints": self.progress.checkpoints,
            "code": code_version(),
        }

    def fit(self) -> None:
        """Train to the last step, saving, validating, recording and keeping checkpoints on the way."""
        config, progress = self.config, self.progress
        records = Records(self.run, self.output / "dvclive", progress.rows, self.mark)
        bar = progress_bar(self.run, progress.step)
        self.model.train()
        tokens_a_step = config.tokens_per_step(self.run.model.context)
        clock, row_clock, row_step = time.perf_counter(), time.perf_counter(), progress.step
        losses: list[Tensor] = []
        while progress.step < config.steps:
            loss, norm = self.step()
            losses.append(loss)
            step, last = progress.step, progress.step == config.steps
            bar.update()
            validates = last or step % config.validate_every == 0
            keeps = step in config.checkpoint_steps
            saves = last or keeps or step % config.save_every == 0
            if not (validates or saves or step % config.log_every == 0):
                continue
            self.check(loss, norm, step)
            speed = (step - row_step) * tokens_a_step / (time.perf_counter() - row_clock)
            progress.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            row = {
                "step": step,
                "tokens": step * tokens_a_step,
                "seconds": round(progress.seconds, 2),
                "learning_rate": learning_rate(config, step),
                "train_loss": round(torch.stack(losses).mean().item(), 6),
                "grad_norm": round(norm.item(), 6),
                "tokens_per_second": round(speed, 1),
            }
            losses = []
            if validates:
                row |= {key: round(value, 6) for key, value in self.validate().items()}
            progress.rows.append(row)
            records.log(row)
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            if keeps:
                self.keep_checkpoint()
            if saves:
                save_state(self.state_path, self.mark, self.model, self.optimizer, progress)
            # Time spent validating and saving is not training time.
            clock, row_clock, row_step = time.perf_counter(), time.perf_counter(), step
        bar.close()
        records.close()

    def publish(self) -> None:
        """Put the finished outputs in place, then forget the rolling state.

        Until all are in place the state keeps its own (linked, not moved): a kill in between, after which an
        engine deletes what was published, costs nothing.
        """
        folder = self.run.folder
        tokenizer = self.output / "checkpoints" / "tokenizer"
        shutil.rmtree(tokenizer, ignore_errors=True)
        shutil.copytree(self.run.tokens_folder / "tokenizer", tokenizer)
        for name in ("checkpoints", "dvclive"):
            with atomic_directory(folder / name) as temporary:
                shutil.copytree(self.output / name, temporary, copy_function=_link, dirs_exist_ok=True)
        write_curve(folder / "curve.csv", self.progress.rows)
        write_json(folder / "train.json", self.summary())
        self.state_path.unlink()
        shutil.rmtree(self.run.state_folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def train(run: Run) -> None:
    """Train ``run`` and write ``checkpoints/``, ``curve.csv``, ``dvclive/`` and ``train.json`` to its folder.

    Killed at any time, a second call goes on from the last saved state. Raises ``UserError`` for missing or
    damaged tokens or state, for a loss that is not finite, and while another process trains the same run.
    """
    lock = run.state_folder.with_name(f"{run.name}.lock")
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The system gives it back however the process ends.
        with FileLock(lock, timeout=0):
            _train(run)
    except Timeout:
        raise UserError(
            f"run {run.name}: another process is training it ({lock} is held); wait for it, or stop it"
        ) from None


def _train(run: Run) -> None:
    trainer = Trainer(run)
    resumed = trainer.resume()
    print(
        f"{run.name}: {run.parameters.total:,} parameters, {run.tokens:,} tokens, {trainer.where.name}, "
        f"{trainer.where.precision}{', compiled' if trainer.where.compiled else ''}"
        + (f", resuming after step {trainer.progress.step}" if resumed else ""),
        file=sys.stderr,
    )
    with disk_errors(run.folder):
        trainer.fit()
        trainer.publish()
    print(
        f"{run.name}: {trainer.progress.rows[-1]['val_bits_per_byte']:.4f} bits per byte on validation text "
        f"after {trainer.progress.seconds:,.0f} s of training; {run.folder}",
        file=sys.stderr,
    )
