"""Train one run: from token shards to checkpoints, a curve and a summary."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stlm.errors import Interrupted, UserError
from stlm.files import disk_errors, fingerprint, read_json, remove_leftovers
from stlm.model.build import build_model
from stlm.model.documents import Documents
from stlm.provenance import code_version, processor_name
from stlm.study.runs import Run
from stlm.tokens.batches import Batches, ValidationSet
from stlm.tokens.shards import read_meta
from stlm.tokens.tokenizer import check_tokenizer, load_tokenizer, tokens_table
from stlm.training.checkpoints import check_checkpoints, checkpoint_name, save_checkpoint
from stlm.training.config import RECORD_KEYS
from stlm.training.devices import Device, choose_device, compiler_error
from stlm.training.difficulty import Reference
from stlm.training.distributed import Group, Share, processes
from stlm.training.divergence import explain
from stlm.training.optimizers import build_optimizer
from stlm.training.publish import publish
from stlm.training.records import NoRecords, Records
from stlm.training.schedules import dropout_factor, learning_rate
from stlm.training.signals import StopSignals
from stlm.training.state import Progress, draws, load_state, locked, save_state
from stlm.training.warm_start import Start
from stlm.training.watch import Watch


class Trainer:
    """The state of one run and the steps that move it on, in one process of the group that trains it."""

    def __init__(self, run: Run, group: Group | None = None) -> None:
        self.run = run
        self.group = group or Group()
        self.config = run.training
        self.share = self.group.share(run.training)
        self.where: Device = choose_device(run.training)
        self.device = self.where.device
        context = run.model.context
        reference = Reference(run, self.device, self.group) if run.reference else None
        rows = self.config.steps * self.config.accumulation * self.config.batch_size
        self.start = Start(run) if run.origin else None
        read = self.start.rows if self.start else 0
        self.batches = Batches(
            run.tokens_folder,
            context,
            self.config.batch_size,
            run.seed,
            run.data,
            rows + read,
            reference,
            read,
        )
        # The end of text where attention stays within documents.
        self.eot = read_meta(run.tokens_folder).eot if run.data.attention == "within" else None
        self.validation = ValidationSet(run.tokens_folder, context, self.config.validation_bytes)
        # Copied beside the checkpoints at the end, which are of no use without.
        check_tokenizer(run.tokens_folder / "tokenizer", read_meta(run.tokens_folder).tokenizer_sha256)
        self.check_vocabulary()
        torch.manual_seed(run.seed)
        self.model = build_model(run.model).to(self.device)
        if run.model.bytes is not None:
            self.model.use(tokens_table(load_tokenizer(run.tokens_folder / "tokenizer")))
        if self.start:
            self.start.give(self.model)
        self.loss = self.model.loss
        self.optimizer = build_optimizer(self.model, self.config, self.where.dtype)
        self.mark = fingerprint(
            {
                "run": run.model_copy(update={"data": run.data.unlimited}).model_dump(
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
                **(reference.mark if reference else {}),
                **(self.start.mark if self.start else {}),
            }
        )
        self.state_path = run.state_folder / "state.pt"
        self.output = run.state_folder / "output"
        # What computes from here on: the code as it is now, whatever is checked out while training goes on.
        self.made = {"device": self.where.name, "processor": processor_name(), "code": code_version()}
        self.progress = Progress(kernels=self.where.kernels, compiled=self.where.compiled)
        # Of the steps since the last row of the curve, on the device.
        self.losses: list[Tensor] = []
        self.norm = torch.tensor(math.nan)
        self.watch = self.watching()

    def watching(self) -> Watch:
        """What watches the run, going on from the records of the progress so far; the leader alone looks."""
        every = self.config.watch_every if self.group.leads else 0
        return Watch(self.model, every, self.eager_hidden, self.progress.watch)

    def compile(self) -> None:
        """Compile the loss, if the recipe wants it, by the first micro-batch's forward and backward pass.

        Where that fails in one process, for want of a compiler say, the whole group trains without, and the
        leader warns. Comes before `resume`, and is no part of the training time.
        """
        why_not = None
        if self.where.compiled:
            self.loss = torch.compile(self.model.loss)
            why_not = self.compile_failure()
        if not self.group.largest(int(why_not is not None)):
            return
        self.where = replace(self.where, compiled=False)
        self.loss = self.model.loss
        self.progress.compiled, self.progress.kernels = False, self.where.kernels
        if self.group.leads:
            reason = why_not or "another process could not"
            print(
                f"{self.run.name}: torch.compile failed, training without it, more slowly: {reason}",
                file=sys.stderr,
            )

    def compile_failure(self) -> str | None:
        """Why the first use of the compiled loss failed, in a line; None where it did not."""
        self.model.train()
        if self.config.dropout_schedule != "constant":
            self.model.schedule_dropout(dropout_factor(self.config, 1))
        tokens = next(self.micro_batches(1, self.share))
        try:
            with self.where.autocast():
                loss = self.loss(tokens[:, :-1], tokens[:, 1:], layout=self.documents(tokens[:, :-1]))
            loss.backward()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the compiler's many; training shows what it was not to blame for
            return compiler_error(error)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return None

    def check_vocabulary(self) -> None:
        """Refuse token shards whose ids the model has no embedding for; a byte-level one reads any."""
        if self.run.model.bytes is not None:
            return
        meta = read_json(self.run.tokens_folder / "meta.json")
        if meta["vocab_size"] != self.run.model.vocab_size:
            raise UserError(
                f"{self.run.tokens_folder / 'meta.json'}: vocab_size: found {meta['vocab_size']}, expected "
                f"{self.run.model.vocab_size} as in {self.run.tokenizer}; tokenize again"
            )

    def resume(self) -> bool:
        """Go on from the last saved state of this very run, if there is one.

        The state of another recipe is set aside, in case it is wanted after all. Every process of a group
        reads the same state, once the leader has tidied up around it.
        """
        if not self.group.agrees(int(self.mark[:15], 16)):
            raise UserError(
                f"run {self.run.name}: the processes found different parameters, data or precision"
            )
        if not self.group.agrees(self.where.kernels):
            raise UserError(
                f"run {self.run.name}: some processes have kernels in C, others not ({self.where.arithmetic} "
                "here); install a C compiler for all, or set STLM_KERNELS=0 for all"
            )
        progress = self.take_up() if self.group.leads else None
        self.group.wait()
        if not self.group.leads:
            progress = load_state(self.state_path, self.mark, self.model, self.optimizer)
        if not self.group.agrees(progress.step if progress else -1):
            raise UserError(
                f"{self.state_path}: not all processes find the same state: the folder must be on a file "
                "system that they share"
            )
        if progress is None:
            return False
        self.progress = progress
        if progress.compiled is None:  # a state of an earlier version
            progress.compiled = self.where.compiled
        if progress.compiled != self.where.compiled and progress.step < self.config.steps:
            if self.group.leads:
                so_far = "compiled" if progress.compiled else "not, or not all, compiled"
                now = "compiled" if self.where.compiled else "not"
                print(f"{self.run.name}: so far {so_far}, now {now}: rounding differs", file=sys.stderr)
            progress.compiled = progress.kernels = False
        elif progress.kernels != self.where.kernels and progress.step < self.config.steps:
            if self.group.leads:
                so_far = "with kernels in C" if progress.kernels else "not, or not all, with kernels in C"
                now = "with" if self.where.kernels else "without"
                print(f"{self.run.name}: so far {so_far}, now {now}: rounding differs", file=sys.stderr)
            progress.kernels = False
        self.losses = [torch.tensor(loss, device=self.device) for loss in progress.losses]
        self.norm = torch.tensor(progress.grad_norm)
        self.watch = self.watching()
        return True

    def take_up(self) -> Progress | None:
        """The leader's part of `resume`: read the state, and set aside or delete what is of no use."""
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
        else:
            remove_leftovers(folder)
            remove_leftovers(self.output / "checkpoints")
            check_checkpoints(self.output / "checkpoints", progress.checkpoints)
        return progress

    def save(self) -> None:
        """Save all that a resumed run needs, after any step."""
        self.watch.drain()
        self.progress.losses = [loss.item() for loss in self.losses]
        self.progress.grad_norm = self.norm.item()
        if self.group.leads:
            save_state(self.state_path, self.mark, self.model, self.optimizer, self.progress)

    def step(self) -> None:
        """One optimizer step, its loss and gradient's norm kept on the device."""
        step = self.progress.step + 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step) * group["scale"]
        if self.config.dropout_schedule != "constant":
            self.model.schedule_dropout(dropout_factor(self.config, step))
        parts = self.config.accumulation * self.share.parts
        mean = torch.zeros((), device=self.device)
        for tokens in self.micro_batches(step, self.share):
            with self.where.autocast():
                documents = self.documents(tokens[:, :-1])
                loss = self.loss(tokens[:, :-1], tokens[:, 1:], layout=documents)
            (loss / parts).backward()
            mean += loss.detach()
        mean /= parts
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        self.group.sum([*(parameter.grad for parameter in parameters), mean])
        self.watch.before_update(step, tokens)
        self.norm = nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)
        self.losses.append(mean)
        self.watch.record(step, mean, self.norm)
        if self.device.type == "cpu":
            # On a GPU this would wait for the device at every step; there `check` looks when a row is due.
            self.check(step)
        self.optimizer.step()
        self.watch.after_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step

    def micro_batches(self, step: int, share: Share) -> Iterator[Tensor]:
        """The tokens [B, L + 1] of a share of a step, its random numbers ready as each is given."""
        for micro in share.micros:
            # All randomness (dropout) comes from the seed and the place in training: a resumed run draws the
            # same, and so does a group of processes as long as each works on whole micro-batches.
            torch.manual_seed(draws(self.run.seed, step, micro, share.rows.start))
            rows = self.batches.batch(step - 1, micro, self.config.accumulation)[share.rows]
            tokens = torch.from_numpy(rows)
            if self.device.type == "cuda":
                tokens = tokens.pin_memory()
            yield tokens.to(self.device, non_blocking=True)

    def documents(self, tokens_BL: Tensor) -> Documents | None:
        """What keeps attention within the documents of inputs, where it is to stay there."""
        return None if self.eot is None else Documents.of(tokens_BL, self.eot)

    def eager_hidden(self, tokens_BL: Tensor) -> Tensor:
        """The residual stream as in training, outside of torch.compile, whose graphs hold no hooks."""
        with self.where.autocast():
            return self.model.hidden(tokens_BL, self.documents(tokens_BL))

    def eager_loss(self, tokens_BL: Tensor) -> Tensor:
        """The loss of tokens [B, L + 1], likewise."""
        with self.where.autocast():
            documents = self.documents(tokens_BL[:, :-1])
            return self.model.loss(tokens_BL[:, :-1], tokens_BL[:, 1:], layout=documents)

    def check(self, step: int) -> None:
        """Stop at a loss or gradient that is not finite; what was saved before it stays."""
        if math.isfinite(self.losses[-1].item()) and math.isfinite(self.norm.item()):
            return
        if not self.group.leads:
            self.group.wait()  # for the leader, who tells where it began and ends all
        step, loss, norm = self.watch.first_not_finite() or (step, self.losses[-1], self.norm)
        self.watch.drain()
        watched = self.watch.rows
        self.rewind(step)
        if self.config.dropout_schedule != "constant":
            self.model.schedule_dropout(dropout_factor(self.config, step))
        whole = Group().share(self.config)
        found = explain(
            self.run,
            self.model,
            self.batches,
            step,
            self.eager_loss,
            self.micro_batches(step, whole),
            watched,
        )
        kept = self.progress.checkpoints
        last = f"{self.output / 'checkpoints' / kept[-1]['folder']}" if kept else "none was due yet"
        raise UserError(
            f"run {self.run.name}: step {step}: the loss is {loss.item()}, the gradient's norm "
            f"{norm.item()}: training diverged. Last good checkpoint: {last}. Lower "
            f"training.learning_rate (now {self.config.learning_rate}) or raise training.warmup_steps.\n"
            f"{found}"
        )

    def rewind(self, step: int) -> None:
        """Where `step` has spoilt the weights before it was noticed, on a GPU: have those before it again.

        The steps since the last state are repeated. Where there is none, or other processes would have to
        take part, the weights stay as they are.
        """
        if self.group.size > 1 or all(bool(p.isfinite().all()) for p in self.model.parameters()):
            return
        progress = load_state(self.state_path, self.mark, self.model, self.optimizer)
        if progress is None or progress.step >= step:
            return
        self.optimizer.zero_grad(set_to_none=True)  # of the step that failed
        print(
            f"{self.run.name}: diverged at step {step}; repeating the steps since {progress.step} to find "
            "where",
            file=sys.stderr,
        )
        self.progress, self.losses, self.watch = progress, [], Watch(self.model, 0, self.eager_hidden, {})
        while self.progress.step < step - 1:
            self.step()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss (nats a token), bits per byte, character and token perplexity on the validation documents.

        The end-of-text tokens are not counted: the figures are those of the text (design, "Scoring").
        """
        self.model.eval()
        nats = torch.zeros((), device=self.device, dtype=torch.float64)
        for number, batch in enumerate(self.validation.batches(self.config.batch_size)):
            if number % self.group.size != self.group.rank:
                continue
            tensors = (torch.from_numpy(part).to(self.device) for part in batch)
            with self.where.autocast():
                nats += self.model.loss(*tensors).double()
        self.model.train()
        self.group.sum([nats])
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
            **({"start": self.start.record} if self.start else {}),
            "steps": run.training.steps,
            "tokens": run.tokens,
            "seconds": round(self.progress.seconds, 1),
            "tokens_per_second": round(run.tokens / self.progress.seconds, 1),
            "flops": run.flops,
            **(self.progress.parts or [self.made])[-1],  # of the last step, whoever publishes it
            # Where a run stopped and went on elsewhere, or by other code.
            **({"parts": self.progress.parts} if len(self.progress.parts) > 1 else {}),
            "precision": self.where.precision,
            "compiled": self.progress.compiled,
            "kernels": self.progress.kernels,
            "threads": torch.get_num_threads(),
            "processes": self.group.size,
            "model": run.model.model_dump(),
            "training": run.training.model_dump(mode="json"),
            "data": run.data.model_dump(mode="json"),
            "validation": self.validation.record,
            "final": {
                "train_loss": validated["train_loss"],
                **{key: value for key, value in validated.items() if key.startswith("val_")},
            },
            "checkpoints": self.progress.checkpoints,
            "loss_spikes": self.watch.spikes.found,
        }

    def fit(self, signals: StopSignals) -> None:
        """Train to the last step, saving, validating, recording and keeping checkpoints on the way.

        Raises ``Interrupted``, its state saved, after the step in which a signal came.
        """
        progress, records = self.progress, NoRecords()
        if progress.step < self.config.steps:  # the last of them is what takes the last step
            progress.parts = [part for part in progress.parts if part != self.made] + [self.made]
        if self.group.leads:
            records = Records(self.run, self.output / "dvclive", progress, self.mark)
        self.model.train()
        self.start_clock()
        stopped = 0
        while not stopped and (self.row_due() or progress.step < self.config.steps):
            if self.row_due():
                records.log(self.record())
                self.start_clock()
            else:
                self.step()
                records.advance()
            stopped = self.group.largest(signals.received)
        if stopped:
            self.take_time()
            if self.losses:
                self.check(progress.step)  # a GPU's steps are looked at when a row is due: save no ruins
            self.save()
            self.group.wait()  # where one process ends, torchrun ends all
        records.close()
        if stopped:
            raise Interrupted(
                f"{self.run.name}: stopped by {signal.Signals(stopped).name} after step {progress.step} of "
                f"{self.config.steps}, saved in {self.state_path}; the same command goes on from there",
                stopped,
            )

    def row_due(self) -> bool:
        """Whether the last step still wants its row of the curve, and what goes with it."""
        config, step, rows = self.config, self.progress.step, self.progress.rows
        if step == 0 or (rows and rows[-1]["step"] == step):
            return False
        return step in config.checkpoint_steps or any(
            step % every == 0 for every in (config.log_every, config.validate_every, config.save_every)
        )

    def record(self) -> dict[str, float]:
        """Add the last step's row to the curve; validate, keep a checkpoint and save where they are due."""
        config, step = self.config, self.progress.step
        last = step == config.steps
        self.check(step)
        self.watch.drain()
        tokens_a_step = config.tokens_per_step(self.run.model.context)
        row = {
            "step": step,
            "tokens": step * tokens_a_step,
            "tokens_per_second": round(self.take_time() * tokens_a_step, 1),
            "seconds": round(self.progress.seconds, 2),
            "learning_rate": learning_rate(config, step),
            "train_loss": round(torch.stack(self.losses).mean().item(), 6),
            "grad_norm": round(self.norm.item(), 6),
        }
        if last or step % config.validate_every == 0:
            row |= {key: round(value, 6) for key, value in self.validate().items()}
        self.progress.rows.append(row)
        self.losses = []
        keeps = step in config.checkpoint_steps
        if keeps and self.group.leads:
            self.keep_checkpoint()
        if last or keeps or step % config.save_every == 0:
            self.save()
        return row

    def start_clock(self) -> None:
        """Begin to time steps: the time of validating and saving is not training time."""
        self.clock, self.clock_step = time.perf_counter(), self.progress.step

    def take_time(self) -> float:
        """Add the time since the clock started to the run's; the steps a second in it."""
        seconds = time.perf_counter() - self.clock
        self.progress.seconds += seconds
        return (self.progress.step - self.clock_step) / seconds


def train(run: Run, check: Callable[[], None] = lambda: None) -> None:
    """Train ``run``; write ``checkpoints/``, ``dvclive/``, {curve,watch}.csv and train.json to its folder.

    Killed at any time, a second call goes on from the last saved state; so does one after ``Interrupted``,
    which is raised where a signal asked to stop. Started by `torchrun`, all its processes train the run
    together. Each calls ``check`` first: a ``UserError`` that all of them raise is told once.

    Raises ``UserError`` for missing or damaged tokens or state, for a loss that is not finite, and while
    another training of the same run is at work.
    """
    with processes() as group:
        check()
        with StopSignals(tells=group.leads) as signals, locked(run) if group.leads else nullcontext():
            _train(run, group, signals)


def _train(run: Run, group: Group, signals: StopSignals) -> None:
    trainer = Trainer(run, group)
    trainer.compile()
    resumed = trainer.resume()
    if group.leads:
        print(
            f"{run.name}: {run.parameters.total:,} parameters, {run.tokens:,} tokens, {trainer.where.name}, "
            f"{trainer.where.arithmetic}"
            + (f", {group.size} processes" if group.size > 1 else "")
            + (f", resuming after step {trainer.progress.step}" if resumed else ""),
            file=sys.stderr,
        )
    with disk_errors(run.folder):
        trainer.fit(signals)
        if group.leads:
            publish(
                run,
                trainer.output,
                trainer.state_path,
                trainer.progress.rows,
                trainer.watch.rows,
                trainer.summary(),
            )
    if group.leads:
        print(
            f"{run.name}: {trainer.progress.rows[-1]['val_bits_per_byte']:.4f} bits per byte on validation "
            f"text after {trainer.progress.seconds:,.0f} s of training; {run.folder}",
            file=sys.stderr,
        )
