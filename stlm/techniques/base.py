"""The base class of techniques. docs/techniques.md says how to add one. Needs no torch.

A technique is one file in this folder, named like its key under `techniques` in params/, with one subclass of
:class:`Technique`: its fields are the keys, its methods define what it does. No other file is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr

from stlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stlm.model.config import ModelConfig
    from stlm.model.layout import Layout
    from stlm.model.rows import Rows
    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward

# A technique must name a capability in `supports` before it can be used together with it.
CAPABILITIES = {
    "attention_within": "attention within documents (data.attention: within)",
    "batches": "several texts at once (stlm generate --prompts)",
    "bytes": "byte-level models (model.bytes)",
    "cache": "generation with a cache of keys and values",
    "drafts": "speculative decoding (stlm generate --draft)",
    "compile": "torch.compile (training.compile)",
    "export": "export to the format of transformers",
    "packing": "scoring several sequences in a row",
    "sharing": "layers that share weights (model.sharing)",
    "start_from": "weights of another run at the start (training.start_from)",
}


class Technique(BaseModel):
    """A technique as configured for one run; frozen, unknown keys are refused.

    Methods that a subclass does not override have no effect. Anything that changes during training must be a
    parameter of the model, or a function of the step, so that a resumed run continues unchanged. What a rule
    of the technique changes, and no gradient, is a parameter with `requires_grad=False` (see `after_step`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # The keys of CAPABILITIES that this technique supports; the others are refused by name.
    supports: ClassVar[frozenset[str]] = frozenset()
    # The names of techniques that it can be combined with; it is enough that one of two names the other.
    combines_with: ClassVar[frozenset[str]] = frozenset()
    # Whether `objective` itself returns the part "next_token", replacing the plain cross-entropy.
    replaces_next_token: ClassVar[bool] = False
    # The names of the metrics of `validated`: columns `val_NAME` of the curve.
    figures: ClassVar[tuple[str, ...]] = ()
    # Whether evaluation compares the model's distributions with those of what the run starts from.
    keeps_near: ClassVar[bool] = False
    # Role of `depends` -> the key that names the variant, where the key is not named like the role.
    role_keys: ClassVar[Mapping[str, str]] = {}

    # Maps roles to the runs that this one depends on; set when the study is loaded.
    _others: dict[str, Run] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether the settings are equal: what training loads (a teacher) is no part of a technique."""
        return type(self) is type(other) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        """A hash of the settings, which may contain lists: counts of models are cached by techniques."""
        return hash((type(self), self.model_dump_json()))

    def set_others(self, others: Mapping[str, Run]) -> None:
        """Set the runs that `depends` names, by role."""
        self._others.update(others)

    @property
    def others(self) -> Mapping[str, Run]:
        """The runs that `depends` names, by role; available for runs of a loaded study."""
        return self._others

    @classmethod
    def key(cls) -> str:
        """The technique's name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @property
    def supported(self) -> frozenset[str]:
        """What of `supports` these settings support."""
        return self.supports

    def neutral(self) -> bool:
        """Whether these settings have no effect; such a run equals the plain one."""
        return False

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """Raise ValueError, with the key, what was found and what is expected, for settings that do not fit
        `run` (one of the study's `runs`)."""

    def check_scoring(self, benchmarks: Collection[str]) -> None:
        """Raise ValueError as `check` does, for settings that do not fit the names of the benchmarks of the
        study."""

    def depends(self) -> dict[str, str]:
        """Map roles to variants whose last checkpoints this run reads; they are trained first.

        Training begins with the weights of the role `start` (see `inherited`) and goes on in its text, as
        with `training.start_from`.
        """
        return {}

    def inputs(self, run: Run) -> list[Path]:
        """Folders that training reads besides tokens and the weights of other runs; both engines make them
        first, by the stage that `stlm.engines` has for them."""
        return []

    def prepared(self, run: Run) -> dict[str, Any]:
        """What a stage before training has computed for this run, as train.json records it; empty: nothing.

        Its `seconds` count as the run's own, before the first step. Its `sha256` is part of the run's
        fingerprint: weights depend on it.
        """
        return {}

    def build(self, model: Transformer) -> Transformer | None:
        """Add modules to a new model, or wrap its blocks, and initialize what is added.

        Returns another model that takes over the modules of this one where rows pass the blocks in another
        way than one after another; None: the model stays this one.

        Existing weights stay unchanged, so they equal the plain model's for the same seed. A matrix within
        `model.blocks` is trained like the other matrices, a vector like gains.

        Parameters and FLOPs are counted on a model that this method built on torch's `meta` device, where
        tensors have no values. Added modules state the group of their parameters (stlm.model.counts). They
        have a method `flops` unless they cost three passes through their linear layers over all tokens
        (stlm.model.flops).
        """

    def changes_start(self) -> bool:
        """Whether `change_start` changes anything."""
        return False

    def change_start(self, model: Transformer, run: Run) -> dict[str, Any]:
        """Change the weights that training begins with: new ones, or those of `start_from`.

        It is called once, in one process; the result is kept, and other processes and a resumed run read it.
        Returns what train.json records among `prepared`, such as `extra_flops`.
        """
        return {}

    def inherited(self, model: Transformer, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights `given` by a model without this technique, under the names that they have in `model`.

        Names that are left out keep the weights that they have.
        """
        return dict(given)

    def at_start(self, model: Transformer, run: Run, text: Callable[[int], Tensor]) -> dict[str, Any]:
        """Change the weights that training begins with: new ones of the run's seed, or inherited ones.

        Called once in every process, before there is an optimizer; also where the run goes on from a saved
        state, whose weights then take the place of these. Persistent buffers that are made here are part of
        that state, and of no checkpoint. `text(bytes)` gives rows [N, L + 1] of the training text, about so
        long.

        Returns what train.json records, as with `prepared`: its `seconds`, and its `extra_flops`. Empty:
        nothing was changed.
        """
        return {}

    def packed(self, model: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint stores instead of the model's `weights`, by name."""
        return dict(weights)

    def unpacked(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of which `packed` made `stored`, to the bit. `model` is on the meta device.

        Raises ValueError where they do not fit.
        """
        return dict(stored)

    def loaded(self, model: Transformer, stored: Mapping[str, Tensor]) -> None:
        """Called when a model has the weights of a checkpoint, in which `stored` is."""

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """Load what training needs in addition to the model (a teacher), in every process of the group."""

    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """Apply schedules before step `step`, from 1, of `steps`."""

    def rows(self, rows: Rows, step: int, steps: int) -> Rows:
        """Return what a micro-batch reads and predicts instead of `rows`, at step `step`, from 1, of `steps`.

        It is called once for each micro-batch of training, before the forward pass, and never in validation
        or scoring. torch's random numbers were seeded for the micro-batch: a resumed run draws the same ones.
        Draw them on the CPU, so that they are the same on every device. Where documents begin at other
        positions than before, return their layout, too.

        The next-token loss is the mean over the counted targets of the micro-batch's rows in this process.
        Micro-batches and processes have equal weight, however many targets each of them counts.
        """
        return rows

    def watched(self, tokens_BL: Tensor, layout: Layout | None) -> Layout | None:
        """The layout in which watch.csv's activations are measured, given that of rows of text.

        It draws no random numbers.
        """
        return layout

    def step_sums(self, model: Transformer) -> list[Tensor]:
        """float32 tensors to which the training forward passes of a step have added.

        Between the last backward pass and `after_step` they are summed over the processes, in place.
        """
        return []

    def after_step(self, model: Transformer, step: int, steps: int) -> None:
        """Update the parameters that no gradient trains, once a step, after the optimizer's update."""

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """Named, weighted parts of a micro-batch's loss, whose sum is minimized.

        They become the columns `train_NAME` of the curve.
        """
        return {}

    def validated(
        self, model: Transformer, tokens_BL: Tensor, targets_BL: Tensor, counted_BL: Tensor
    ) -> dict[str, Tensor]:
        """Metrics on the validation batch that the model has just read: name -> [sum, count], float64.

        Each is averaged over the validation text. `counted_BL` marks the targets that count; the rest is
        padding. Metrics by layer (`layer_figures`) are [2, layers, X]: sums, then counts, which are 0 where a
        layer has none. It is called under the autocast of training, and may read the batch again.
        """
        return {}

    def layer_figures(self, model: Transformer) -> dict[str, int]:
        """The metrics of `validated` that have X numbers for each block: name -> X.

        They are the columns NAME_1 to NAME_X of watch.csv, in rows of the validated steps. The run's page in
        the report draws each metric as a heat map.
        """
        return {}

    def measured(self, model: Transformer) -> dict[str, Any]:
        """Further keys of train.json, measured on the trained model."""
        return {}

    def remarks(self, layers: Mapping[str, Mapping[str, float]]) -> list[str]:
        """Sentences about a trained model that its user should read, such as a part that is never used.

        `layers`: the rows of watch.csv of the last step, by layer. The sentences are printed at the end of
        training, and are `remarks` of train.json.
        """
        return []

    def extra_flops_per_token(self, run: Run) -> float:
        """Training FLOPs per token, averaged over training, beyond three times the model's forward pass.

        Negative if part of that pass is skipped.
        """
        return 0.0

    def extra_bytes(self, run: Run) -> float:
        """Memory in bytes that training holds from the first step to the last, beyond the model with its
        gradients and moments: a teacher."""
        return 0.0

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """Memory in bytes per token that the backward pass needs beyond what it needs of the plain model.

        Negative if it needs less. `narrow`: bytes of a number in matrix products. The estimate before
        training, which refuses a run, is a lower bound: do not exceed what is surely kept.
        """
        return 0.0

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """Further language models within a trained one, by name, which are scored like the model.

        Each has the `config`, `hidden`, `head` and `logit` of a `Transformer`. One that scores texts in
        another way has instead its `config`, the names of the `benchmarks` that it scores, and a method
        `language_model(encoder, device, precision, batch_tokens)` that returns a
        `stlm.evaluation.interface.LanguageModel`; it has no perplexity and writes no text.
        """
        return {}

    def readout(self, model: Transformer, name: str) -> nn.Module | None:
        """The readout `name`, which may be one that evaluation does not score; None: there is none."""
        return self.readouts(model).get(name)

    def infilled(
        self, config: ModelConfig, eot: int, prefix: Sequence[int], suffix: Sequence[int]
    ) -> list[int] | None:
        """The tokens after which a model of `config` writes what stands between two texts, given as tokens,
        up to the end-of-text token `eot`; None: it was not trained to."""
        return None


def refuse(
    techniques: Iterable[Technique], capability: str, make_error: Callable[[str], Exception] = UserError
) -> None:
    """Raise `make_error(message)` if one of the techniques does not support `capability`."""
    for technique in techniques:
        if capability not in technique.supported:
            raise make_error(f"techniques.{technique.key()} does not support {CAPABILITIES[capability]}")
