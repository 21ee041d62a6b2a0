"""What a technique says of itself. docs/techniques.md says how to add one. Needs no torch.

A technique is one file of this folder, named as its key under `techniques` in params/, with one class, a
:class:`Technique`: its fields are the keys, its methods what it does. Nothing else is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr

from stlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward

# What a technique must name in `supports` before it is used together with it.
CAPABILITIES = {
    "attention_within": "attention within documents (data.attention: within)",
    "bytes": "byte-level models (model.bytes)",
    "cache": "generation with a cache of keys and values",
    "compile": "torch.compile (training.compile)",
    "export": "export to the format of transformers",
    "packing": "scoring several sequences in a row",
    "sharing": "layers that share weights (model.sharing)",
    "start_from": "weights of another run at the start (training.start_from)",
}


class Technique(BaseModel):
    """A technique as configured for one run; frozen, unknown keys are refused.

    What a subclass does not override does nothing. All that changes during training is a parameter or buffer
    of the model, or a function of the step: then a resumed run goes on as if it had not stopped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # The keys of CAPABILITIES that this technique works with; the others are refused by name.
    supports: ClassVar[frozenset[str]] = frozenset()
    # The techniques, by name, that it can be used together with; one of two naming the other is enough.
    combines_with: ClassVar[frozenset[str]] = frozenset()
    # Whether `objective` returns the part "next_token" itself, in the place of the plain cross-entropy.
    replaces_next_token: ClassVar[bool] = False
    # The figures of `validated`: columns `val_NAME` of the curve.
    figures: ClassVar[tuple[str, ...]] = ()

    # role -> the run that this one depends on, filled in when the study is loaded.
    _others: dict[str, Run] = PrivateAttr(default_factory=dict)

    def __hash__(self) -> int:
        """Of the settings, which may have lists: counts of models are kept by config and techniques."""
        return hash((type(self), self.model_dump_json()))

    def set_others(self, others: Mapping[str, Run]) -> None:
        """Tell which runs those of `depends` are, by their roles."""
        self._others.update(others)

    @property
    def others(self) -> Mapping[str, Run]:
        """The runs of `depends` by their roles, of a run that a study has."""
        return self._others

    @classmethod
    def key(cls) -> str:
        """The technique's name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    def neutral(self) -> bool:
        """Whether these settings change nothing; a run so configured is the plain one."""
        return False

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """ValueError for what does not fit `run` (one of the study's `runs`): the key, what was found, what
        is expected."""

    def depends(self) -> dict[str, str]:
        """Role -> variant of the study whose last checkpoint this run reads: it is trained before."""
        return {}

    def build(self, model: Transformer) -> None:
        """Add modules to a new model, or wrap its blocks, and initialize what is added.

        Weights that are there stay as they are, so that the plain model's are those of the same seed. A
        matrix within `model.blocks` is trained as the other matrices are, a vector as gains are.

        Parameters and FLOPs are counted on a model that this built on torch's `meta` device, where tensors
        have no values to read. What is added says which group its parameters belong to (stlm.model.counts),
        and by a method `flops` what it costs, where that is not three passes through its linear layers over
        all tokens (stlm.model.flops).
        """

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """Load what training needs besides the model (a teacher), in every process of the group."""

    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """Set what follows a schedule before step `step`, from 1, of `steps`."""

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """Named, weighted parts of the loss of a micro-batch, whose sum is minimized.

        They become the columns `train_NAME` of the curve.
        """
        return {}

    def validated(self, model: Transformer, counted_BL: Tensor) -> dict[str, Tensor]:
        """Figures of the validation batch that the model has just read: name -> [sum, count], float64.

        Each is averaged over the validation text. `counted_BL`: the tokens that count; the rest is padding.
        """
        return {}

    def extra_flops_per_token(self, run: Run) -> float:
        """Training FLOPs a token, averaged over training, besides three times the model's forward pass.

        Negative where part of that pass is left out.
        """
        return 0.0

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """Further language models within a trained one, by name, which are scored as it is: each has the
        `config`, `hidden`, `head` and `logit` of a `Transformer`."""
        return {}


def refuse(
    techniques: Iterable[Technique], capability: str, say: Callable[[str], Exception] = UserError
) -> None:
    """Raise what `say` makes of a message where one of the techniques does not support `capability`."""
    for technique in techniques:
        if capability not in technique.supports:
            raise say(f"techniques.{technique.key()} does not support {CAPABILITIES[capability]}")
