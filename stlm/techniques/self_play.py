"""Self-play: a run learns to tell real continuations of a text from those that its opponent writes.

Chen et al. (2024), "Self-play fine-tuning converts weak language models to strong language models" (SPIN),
arXiv 2401.01335. The opponent is the model that training begins with, frozen.

Shapes: B rows of L tokens, R pieces of rows, P tokens of a prompt, C of a continuation, M = P + C, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.nn import functional as F

from stlm.generation.sampling import Sampling
from stlm.generation.together import continuations
from stlm.model.activations import block_activations
from stlm.model.counts import TRAINING_PASSES, build_on_meta, parameter_counts
from stlm.model.flops import forward_flops
from stlm.model.log_probs import token_log_probs
from stlm.model.rows import Rows
from stlm.techniques.base import Technique, refuse

if TYPE_CHECKING:
    from stlm.model.config import ModelConfig
    from stlm.model.transformer import Transformer
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward

# The head's products of log-probabilities with gradients, in forward passes: see `stlm.model.log_probs`.
_HEAD_PASSES = 4


class SelfPlay(Technique):
    """Training begins with another run's weights; that run, frozen, is the opponent. It continues prompts of
    the text, and the model learns to raise the probability of the real continuation, relative to the
    opponent's, above that of the continuation which the opponent wrote (SPIN, Chen et al. 2024)."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"batches", "cache", "drafts", "export", "packing", "sharing", "start_from"}
    )
    role_keys: ClassVar[Mapping[str, str]] = {"start": "opponent"}
    replaces_next_token: ClassVar[bool] = True

    opponent: str = Field(
        description="The variant, or the model in params/models.yaml, that training begins with and that "
        "writes continuations, frozen. A further round of self-play has the run of the round before."
    )
    prompt: int = Field(64, ge=1, description="Tokens P of a prompt.")
    continuation: int = Field(
        64,
        ge=1,
        description="Tokens C of a continuation. A row is cut into as many pieces of P + C tokens as fit; "
        "what is left over is not read.",
    )
    scale: float = Field(
        0.1,
        gt=0,
        description="The paper's lambda, which multiplies margins between sums of log-probabilities over C "
        "tokens; for means over tokens, set lambda / C.",
    )
    temperature: float = Field(
        1.0, ge=0, description="Temperature at which the opponent draws; 0: its most probable tokens."
    )
    weight: float = Field(
        1.0, ge=0, description="Weight of self-play's loss; 0: the opponent writes nothing."
    )
    supervised: float = Field(
        0.0,
        ge=0,
        description="Weight of the plain next-token loss of the whole rows. With `weight: 0`, 1 is "
        "supervised training alone: the control.",
    )

    _opponent: Transformer | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _something_is_learned(self) -> SelfPlay:
        if not self.weight and not self.supervised:
            raise ValueError(
                "supervised: found 0 with weight: 0, so that nothing is learned; expected one above 0"
            )
        return self

    @property
    def length(self) -> int:
        """M, the tokens of a piece."""
        return self.prompt + self.continuation

    def neutral(self) -> bool:
        """Whether training is plain supervised training from the opponent's weights."""
        return self.weight == 0 and self.supervised == 1

    def depends(self) -> dict[str, str]:
        """The opponent, whose weights training begins with."""
        return {"start": self.opponent}

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`. The opponent's tokens and model are checked as those of any start are."""
        if not self.weight:
            return
        opponent = self.others["start"]
        refuse(
            opponent.techniques.values(),
            "cache",
            lambda what: ValueError(
                f"opponent: found {self.opponent!r}, whose {what}; expected one without this technique"
            ),
        )
        for whose, model in (("model.context", run.model), ("the opponent's context", opponent.model)):
            if self.length > model.context:
                raise ValueError(
                    f"continuation: found {self.continuation} after prompt: {self.prompt}, {self.length} "
                    f"tokens together; expected at most {whose}, {model.context}"
                )
        for name in ("dropout", "attention_dropout"):
            if rate := getattr(run.model, name):
                raise ValueError(
                    f"weight: found model.{name}: {rate}, expected 0, as the loss compares log-probabilities "
                    "with the opponent's; or weight: 0"
                )

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """Load the opponent: the model that training begins with."""
        if not self.weight:
            return
        # Training comes after techniques: what it has is imported where it is used.
        from stlm.training.dependencies import Dependency
        from stlm.training.inherited import inherited_model

        origin = inherited_model(run, Dependency.read(run, "start"), group)
        self._opponent = origin.to(device).eval().requires_grad_(False)

    # The loss

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `next_token`, 0 without `supervised`, and `self_play` unless its weight is 0."""
        next_token = torch.zeros((), device=forward.tokens_BL.device)
        if self.supervised:
            next_token = self.supervised * forward.next_token_loss()
        if not self.weight:
            return {"next_token": next_token}
        real_RM = self.pieces(Rows(forward.tokens_BL, forward.targets_BL).whole_BM)
        margin_R = self.margins(forward.model, real_RM, self.made(real_RM))
        loss = F.softplus(-self.scale * margin_R).mean()
        return {"next_token": next_token, "self_play": self.weight * loss}

    def pieces(self, tokens_BM: Tensor) -> Tensor:
        """Pieces [R, M] of rows of L + 1 tokens: as many of each as L holds."""
        M = self.length
        count = (tokens_BM.shape[1] - 1) // M
        return tokens_BM[:, : count * M].reshape(-1, M)

    def made(self, real_RM: Tensor) -> Tensor:
        """The pieces [R, M] with continuations that the opponent writes."""
        prompts_RP = real_RM[:, : self.prompt]
        sampling = Sampling(temperature=self.temperature)
        made_RC = continuations(self._opponent, prompts_RP, self.continuation, sampling)
        return torch.cat([prompts_RP, made_RC], dim=1)

    def margins(self, model: Transformer, real_RM: Tensor, made_RM: Tensor) -> Tensor:
        """How much more the model prefers each real continuation to the made one than the opponent does [R],
        float32: (log p - log p') of the real one, minus that of the made one (eq. 4.7, without lambda)."""
        both = torch.cat([real_RM, made_RM])
        gained = self.log_probs(model, both)
        with torch.no_grad():
            opponents = self.log_probs(self._opponent, both)
        real_R, made_R = (gained - opponents).chunk(2)
        return real_R - made_R

    def log_probs(self, model: Transformer, texts_RM: Tensor) -> Tensor:
        """The log-probability [R], float32, of each piece's continuation after its prompt."""
        x_RCD = model.residuals(texts_RM[:, :-1])[-1][:, self.prompt - 1 :]
        x_ND, targets_N = model.finish(x_RCD).flatten(0, 1), texts_RM[:, self.prompt :].flatten()
        log_p_N = token_log_probs(x_ND, model.output.weight, targets_N, model.config.logit_softcap)
        return log_p_N.view(-1, self.continuation).sum(dim=1)

    # Cost

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: the pieces' passes through the model and the opponent, and
        writing, all blocks for all tokens; without the plain pass through rows where nothing reads them."""
        if not self.weight:
            return 0.0
        context, techniques = run.model.context, self.others["start"].techniques
        model = build_on_meta(run.model, (self,))
        other = build_on_meta(self._opponents_model(run), tuple(techniques.values()))
        M, C = self.length, self.continuation
        heads = C * _head_flops(model)
        # Of the real piece and of the made one.
        piece = 2 * (TRAINING_PASSES * _body_flops(model, M - 1, C) + _HEAD_PASSES * heads)
        # The same without gradients, and once more token by token.
        piece += 3 * (_body_flops(other, M - 1, C) + C * _head_flops(other))
        flops = (context // M) * piece / context
        return flops - (0.0 if self.supervised else TRAINING_PASSES * forward_flops(model, context) / context)

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: the opponent's weights, in float32."""
        return 4 * parameter_counts(self._opponents_model(run)).total if self.weight else 0.0

    def _opponents_model(self, run: Run) -> ModelConfig:
        """The opponent's, with the run's vocabulary: the tokens that the run does not have are cut."""
        return self.others["start"].model.model_copy(update={"vocab_size": run.model.vocab_size})

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: both pieces instead of the row, or beside it.

        Writing's cache is not added: it is freed before the pieces are read, and smaller than what they keep.
        """
        if not self.weight:
            return 0.0
        context = run.model.context
        read = 2 * (context // self.length) * (self.length - 1) / context
        return (read - (not self.supervised)) * run.model.layers * block_activations(run.model, narrow)


def _head_flops(model: Transformer) -> float:
    """Forward FLOPs of a token's logits."""
    return forward_flops(model.output, 1)


def _body_flops(model: Transformer, positions: int, finished: int) -> float:
    """Forward FLOPs of a sequence without its logits; so many of its positions are prepared for the head."""
    flops = forward_flops(model, positions) - positions * _head_flops(model)
    if model.embedding_up is not None:
        flops -= 2 * model.embedding_up.numel() * (positions - finished)
    return flops
