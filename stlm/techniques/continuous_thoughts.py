"""Continuous thoughts: hidden states that a model reads instead of written steps, before its answer.

Hao et al. (2024), "Training Large Language Models to Reason in a Continuous Latent Space" (Coconut), arXiv
2412.06769. `stlm.model.latent_places` computes them; this file says which steps they replace in training,
and when.

Shapes: B rows, L tokens, M places, D width, N targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from stlm.corpora.steps import MARKER
from stlm.errors import UserError
from stlm.model.activations import block_activations
from stlm.model.counts import TRAINING_PASSES, build_on_meta, training_flops_per_token
from stlm.model.documents import Documents
from stlm.model.flops import children_flops, forward_flops
from stlm.model.latent_places import BEGIN, END, MARKS, THOUGHT, TOKEN, InsertedThoughts, Places
from stlm.model.rows import Rows, document_parts
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique
from stlm.tokens.batches import Batches
from stlm.tokens.shards import read_meta
from stlm.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward

# The share of a stage, where none is given.
_SHARE = 0.15
# Thoughts before an answer, at most.
_MOST = 1000
# Rows of the training text on which the mean cost is measured, and by which the text is checked.
_SAMPLE = 64
# Tokens of a document where there is no text yet: a guess for the cost.
_GUESSED_TOKENS = 60
# Of a place that is no target.
_NO_TARGET = -1


class Form(NamedTuple):
    """How documents with steps look in tokens: the end of text that begins each, and how an answer's line
    begins. Lines begin with the same token, the end of a line."""

    eot: int
    marker: tuple[int, ...]

    def lines(self, document: np.ndarray) -> list[np.ndarray] | None:
        """The question, the steps and the answer of a document; None if it is none of such."""
        lines = np.split(document, np.flatnonzero(document == self.marker[0]))
        if len(lines) == 1 or tuple(lines[-1][: len(self.marker)].tolist()) != self.marker:
            return None
        return lines


class ContinuousThoughts(Technique):
    """Hidden states that a model reads in place of tokens, between a question and its answer. In training
    they replace written steps, one more at each stage of a curriculum (Coconut, Hao et al. 2024). The corpus
    must consist of questions with written-out steps (`steps_written`), and `data.attention` be `within`."""

    supports: ClassVar[frozenset[str]] = frozenset({"attention_within", "cache", "sharing"})
    replaces_next_token: ClassVar[bool] = True

    thoughts: int = Field(
        1, ge=0, description="Thoughts in place of each written step; 0: the plain model, trained as such."
    )
    stages: int = Field(
        4,
        ge=1,
        description="Stages after the one in which all steps are written: in stage s, the first s steps of "
        "each document are replaced by s times `thoughts` thoughts, and in the last stage all its steps. "
        "Inference has as many thoughts as the last stage, whatever the question.",
    )
    curriculum: bool = Field(
        True, description="Whether training goes through the stages; false: the last one from the beginning."
    )
    share: float = Field(
        _SHARE,
        gt=0,
        lt=1,
        description="With a curriculum, the share of the training steps of each stage before the last; that "
        "without thoughts is one of them.",
    )
    questions: bool = Field(
        False,
        description="Whether the questions' tokens are targets, too, as in plain training. In the paper the "
        "steps and the answer alone are.",
    )
    scored: tuple[int, ...] = Field(
        (),
        description="Numbers of thoughts at which evaluation scores the last checkpoint, too, as "
        "`thoughts-N`; 0: without any.",
    )

    _form: Form | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keys_fit(self) -> ContinuousThoughts:
        if self.count > _MOST:
            raise ValueError(
                f"thoughts: found {self.thoughts} for each of {self.stages} stages, {self.count} in all; "
                f"expected at most {_MOST // self.stages} for each, {_MOST} in all"
            )
        if self.curriculum and self.share * self.stages >= 1:
            raise ValueError(
                f"share: found {self.share:g} for each of the {self.stages} stages before the last, which "
                f"leaves nothing for the last; expected less than {1 / self.stages:g}"
            )
        if not self.curriculum and self.share != _SHARE:
            raise ValueError(
                f"share: found {self.share:g} with curriculum: false, expected {_SHARE}, the default, or "
                "curriculum: true"
            )
        if self.neutral() and self.questions:
            raise ValueError(
                "questions: found true with thoughts: 0, whose training is plain and has them; expected "
                "false, or thoughts above 0"
            )
        if min(self.scored, default=0) < 0 or len(set(self.scored)) < len(self.scored):
            raise ValueError(f"scored: found {list(self.scored)}, expected numbers of at least 0, each once")
        most = _MOST if self.count else 0
        if max(self.scored, default=0) > most:
            raise ValueError(f"scored: found {max(self.scored)}, expected at most {most} thoughts")
        return self

    @property
    def count(self) -> int:
        """The thoughts before an answer at inference."""
        return self.thoughts * self.stages

    def neutral(self) -> bool:
        """Whether there are no thoughts: then nothing is added, and training is plain."""
        return self.thoughts == 0

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        if self.neutral():
            return
        if run.data.attention != "within":
            raise ValueError(
                "thoughts: a thought sees its own document alone: found data.attention: "
                f"{run.data.attention}, expected within"
            )
        if run.model.positions == "sinusoidal":
            raise ValueError(
                "thoughts: found model.positions: sinusoidal, with which embeddings are scaled, and hidden "
                "states are not; expected rope or learned"
            )
        if run.model.value_embeddings:
            raise ValueError(
                f"thoughts: found model.value_embeddings: {run.model.value_embeddings}, which no thought "
                "has; expected 0"
            )
        if run.model.positions == "learned" and max(self.scored, default=0) > self.count:
            raise ValueError(
                f"scored: found {max(self.scored)}, expected at most {self.count}: with model.positions: "
                "learned, positions are learned for as many thoughts"
            )
        if self.curriculum and 0 in self.steps_of_stages(run.training.steps):
            raise ValueError(
                f"share: found {self.share:g} of training.steps: {run.training.steps}, which is no step; "
                f"expected at least {1 / run.training.steps:g}"
            )

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. Learned positions of the context keep their values."""
        if not self.neutral():
            model.insert(InsertedThoughts(self.count, model.config.width))
            model.reads_answers = model.thinks = True

    # Training

    def stage_at(self, step: int, steps: int) -> int:
        """The stage of training step `step`, from 1, of `steps`: how many steps are replaced."""
        if not self.curriculum:
            return self.stages
        begins = [round(self.share * steps * stage) for stage in range(1, self.stages + 1)]
        return sum(step > begin for begin in begins)

    def steps_of_stages(self, steps: int) -> list[int]:
        """The training steps of each stage, from that without thoughts on."""
        if not self.curriculum:
            return [0] * self.stages + [steps]
        begins = [0, *(round(self.share * steps * stage) for stage in range(1, self.stages + 1)), steps]
        return [end - begin for begin, end in pairwise(begins)]

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`. Raises UserError for a text that has other documents than questions with
        their steps and answers."""
        if self.neutral():
            return
        self._form = form_of(run.tokens_folder)
        rows = _sample(run.tokens_folder, run.model.context)
        found = [document for row in rows for document in whole_documents(row, self._form.eot)]
        place = f"run {run.name}: techniques.{self.key()}: corpus: found {run.corpus}"
        if not found:
            raise UserError(
                f"{place}, of which no document fits a row of model.context: {run.model.context} tokens; "
                "expected a context several times as long as a document, of "
                f"{_mean_document(run.tokens_folder):.0f} tokens on average"
            )
        items = [self._form.lines(document) for document in found]
        if None in items or all(len(item) == 2 for item in items):
            what = "other text" if None in items else "no written steps"
            raise UserError(
                f"{place}, which has {what}; expected documents of a question, a line for each step, and a "
                f"line {MARKER.strip()!r} with the answer, as steps_written has"
            )

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The mean cross-entropy of the targets of the step's stage; see `arrange`."""
        if self.neutral():
            return {}
        assert self._form is not None, "training begins with prepare"
        stage = self.stage_at(forward.step, forward.steps)
        tokens_BL, model = forward.tokens_BL, forward.model
        full_BM = Rows(tokens_BL, forward.targets_BL).whole_BM.cpu().numpy()
        arranged = self.arrange(full_BM, stage, self._form)
        rows = Places(*(torch.from_numpy(part).to(tokens_BL.device) for part in arranged[:-1]))
        targets = torch.from_numpy(arranged.targets_BM).to(tokens_BL.device)
        place_N = (targets.flatten() != _NO_TARGET).nonzero()[:, 0]
        # Several processes may have rows of this micro-batch, with other numbers of targets.
        targets_and_parts = forward.sum_over_rows(
            torch.tensor([len(place_N), 1], dtype=torch.float32, device=tokens_BL.device)
        )
        if not len(place_N):
            return {"next_token": 0.0 * model.norm.weight.sum()}
        if stage == 0:
            layout = Documents.of(rows.tokens_BM, self._form.eot)
            x_BMD = model.residuals(rows.tokens_BM, layout)[-1]
        else:
            x_BMD = model.inserted_embeddings.read(model, rows)
        x_ND = model.finish(x_BMD.flatten(0, 1)[place_N])
        loss = model.hidden_loss(x_ND, rows.tokens_BM, targets.flatten()[place_N])
        return {"next_token": loss * (len(place_N) * targets_and_parts[1] / targets_and_parts[0])}

    def arrange(self, tokens_BL: np.ndarray, stage: int, form: Form) -> Arranged:
        """The whole documents of rows as they are trained on at a stage; `tokens_BL` with the last target.

        Each is its question, the stage's thoughts instead of its first steps, and what is left of it. What is
        left, and the end of text after it, are the targets, with `questions` also those. The documents that
        a row cuts are left out.
        """
        rows: list[list[np.ndarray]] = []
        for row in tokens_BL:
            found = map(form.lines, whole_documents(row, form.eot))
            rows.append([self._document(lines, stage, form.eot) for lines in found if lines is not None])
        return _in_rows(rows, form.eot)

    def _document(self, lines: list[np.ndarray], stage: int, eot: int) -> np.ndarray:
        """[5, places]: tokens, kinds, passes, positions and targets of a document."""
        steps = len(lines) - 2
        replaced = steps if stage == self.stages else min(stage, steps)
        question, rest = lines[0], np.concatenate(lines[1 + replaced :])
        thoughts = stage * self.thoughts
        kinds = [BEGIN, *[THOUGHT] * thoughts, END] if thoughts else []
        last_pass = thoughts + 1 if thoughts else 0
        places = len(question) + len(kinds) + len(rest)
        found = np.zeros((5, places), np.int64)
        tokens, of_kind, passes, positions, targets = found
        begin, end = len(question), len(question) + len(kinds)
        tokens[:begin], tokens[end:] = question, rest
        of_kind[:], of_kind[begin:end] = TOKEN, kinds
        passes[begin:end], passes[end:] = np.arange(len(kinds)), last_pass
        positions[:] = np.arange(places)
        targets[:end] = _NO_TARGET
        if self.questions:
            targets[: begin - 1] = question[1:]
        targets[end - 1 :] = [*rest, eot]
        return found

    # Cost

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: training computes the places of its stages, and logits for
        their targets alone. A guess before the text is tokenized."""
        if self.neutral():
            return 0.0
        model, context = build_on_meta(run.model, (self,)), run.model.context
        factors = 0 if model.embedding_up is None else 2 * model.embedding_up.numel()
        row = 0.0
        for steps, (places, targets) in zip(
            self.steps_of_stages(run.training.steps), self._means(run), strict=True
        ):
            logits = children_flops(model, targets, without=("blocks",))
            forward = forward_flops(model.blocks, places) + logits + factors * (places + targets)
            row += steps / run.training.steps * forward
        return TRAINING_PASSES * row / context - training_flops_per_token(run.model, techniques=(self,))

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: of the stage with the most places."""
        if self.neutral():
            return 0.0
        steps = self.steps_of_stages(run.training.steps)
        most = max(places for count, (places, _) in zip(steps, self._means(run), strict=True) if count)
        return (most / run.model.context - 1) * run.model.layers * block_activations(run.model, narrow)

    def _means(self, run: Run) -> list[tuple[float, float]]:
        """The mean places and targets of a row at each stage; a guess where there is no text."""
        folder, context = run.tokens_folder.resolve(), run.model.context
        if (folder / "meta.json").is_file():
            try:
                return _measured(self, folder, (folder / "meta.json").stat().st_mtime_ns, context)
            except UserError:
                pass  # training will say what is wrong
        documents = context / _GUESSED_TOKENS
        inserted = [stage * self.thoughts + MARKS if stage else 0 for stage in range(self.stages + 1)]
        return [(context + documents * places, context / 2) for places in inserted]

    # Inference

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """See `Technique.readouts`."""
        numbers = [number for number in self.scored if number != self.count]  # those of the model itself
        return {f"thoughts-{number}": self.with_thoughts(model, number) for number in numbers}

    def readout(self, model: Transformer, name: str) -> nn.Module | None:
        """See `Technique.readout`: any number of thoughts that there are positions for."""
        found = re.fullmatch("thoughts-(0|[1-9][0-9]{0,3})", name)
        most = self.count if self.neutral() or model.config.positions == "learned" else _MOST
        return None if found is None or int(found[1]) > most else self.with_thoughts(model, int(found[1]))

    def with_thoughts(self, model: Transformer, count: int) -> Transformer:
        """The model with another number of thoughts before an answer, and the same weights."""
        other = model.view()
        if count == 0:
            other.inserted_embeddings, other.reads_answers, other.thinks = None, False, False
        else:
            other.inserted_embeddings = model.inserted_embeddings.times(count)
            if count > self.count:
                other.make_positions(other.most_places)
        return other


def form_of(tokens_folder: Path) -> Form:
    """The form of documents in a folder's tokens. Raises UserError if its tokenizer joins the end of a line
    with what follows."""
    tokenizer = load_tokenizer(tokens_folder / "tokenizer")
    marker = tokenizer.encode(MARKER)
    if tokenizer.encode("\n") != marker[:1]:
        raise UserError(
            f"{tokens_folder}: techniques.continuous_thoughts: tokenizer: found {tokenizer.name}, which "
            "joins the end of a line with other text; expected bytes, bpe-N or gpt2"
        )
    return Form(read_meta(tokens_folder).eot, tuple(marker))


class Arranged(NamedTuple):
    """The parts of `Places`, and the target after each place, or -1: int64 [B, M] each."""

    tokens_BM: np.ndarray
    kinds_BM: np.ndarray
    passes_BM: np.ndarray
    positions_BM: np.ndarray
    sequences_BM: np.ndarray
    targets_BM: np.ndarray


def _in_rows(rows: list[list[np.ndarray]], eot: int) -> Arranged:
    """Documents one after the other in their rows, padded at the end with ends of text."""
    M = max(1, *(sum(document.shape[1] for document in row) for row in rows))
    tokens, kinds, passes, positions, sequences, targets = (
        np.full((len(rows), M), value, np.int64) for value in (eot, TOKEN, -1, 0, -1, _NO_TARGET)
    )
    for number, row in enumerate(rows):
        begin = 0
        for sequence, document in enumerate(row):
            here = slice(begin, begin + document.shape[1])
            for part, values in zip((tokens, kinds, passes, positions, targets), document, strict=True):
                part[number, here] = values
            sequences[number, here] = sequence
            begin = here.stop
    return Arranged(tokens, kinds, passes, positions, sequences, targets)


def whole_documents(row: np.ndarray, eot: int) -> Iterator[np.ndarray]:
    """The documents of a row whose end it has, too, each after the end of text before it."""
    for part in document_parts(row, eot)[1:-1]:
        yield row[part.start - 1 : part.stop]


def _sample(tokens_folder: Path, context: int) -> np.ndarray:
    """Rows of the training text, each with its last target; the same for all runs."""
    return Batches(tokens_folder, context, _SAMPLE, seed=0).batch(0)


def _mean_document(tokens_folder: Path) -> float:
    """The mean tokens of a document of the training text."""
    components = read_meta(tokens_folder).components.values()
    shards = [shard for component in components for shard in component.splits.train.shards]
    return sum(shard.tokens for shard in shards) / sum(shard.documents for shard in shards)


@lru_cache(maxsize=64)
def _measured(
    technique: ContinuousThoughts, folder: Path, changed: int, context: int
) -> list[tuple[float, float]]:
    """The mean places and targets of a row at each stage, on a sample of the text.

    `changed`: when its description was written, so that other text in the same folder is measured anew.
    """
    form, rows = form_of(folder), _sample(folder, context)
    arranged = [technique.arrange(rows, stage, form) for stage in range(technique.stages + 1)]
    return [
        (float((one.passes_BM >= 0).sum(axis=1).mean()), float((one.targets_BM >= 0).sum(axis=1).mean()))
        for one in arranged
    ]
