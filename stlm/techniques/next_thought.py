"""Next thought: the core predicts the vector of the next sentence, and a decoder writes it.

Hillier et al. (2024), section 5.4; LCM team (2024), "Large Concept Models", arXiv 2412.08821. The model is
in `stlm.model.thoughts`. What keeps latents from collapse: a stopped gradient and moving averages (Grill et
al. 2020, "BYOL"), a variance term (Bardes et al. 2022, "VICReg"), codes (Mentzer et al. 2023, "FSQ").

Shapes: B rows, L tokens, K thoughts of a row at most, M thoughts that are predicted, D width, Z numbers of a
latent, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.nn import functional as F

from stlm.model.activations import block_activations
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.model.thoughts import Averages, Cut, Passed, Thoughts
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique
from stlm.tokens.interface import Tokenizer
from stlm.tokens.sentences import sentence_ends
from stlm.tokens.shards import read_split
from stlm.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward

# Levels of a code's numbers, and the decay of moving averages, by default.
LEVELS, DECAY = 8, 0.99
# Weight of the probe's loss. Adam's updates do not depend on it; it keeps the probe out of the gradient's
# norm.
PROBE = 0.01
# The thoughts among which the true one is ranked, and the most of a validation batch that are.
RANKED, MOST = 100, 2048
# Tokens of validation text that the mean length of thoughts is measured on.
_MEASURED = 2**18
# Of VICReg: added to the variance.
_EPSILON = 1e-4


class NextThought(Technique):
    """Text is cut into thoughts: sentences, or so many tokens. The first blocks encode each as one vector,
    the core's blocks predict the next one from those before, and the last blocks write it, token by token.
    The model gives the next token's probability as any other does (paper, section 5.4; Large Concept Models,
    2024)."""

    supports: ClassVar[frozenset[str]] = frozenset({"sharing"})
    figures: ClassVar[tuple[str, ...]] = (
        "latent_variance",
        "predicted_error",
        "reciprocal_rank",
        "thought_tokens",
    )

    cut: Literal["sentences", "tokens"] = Field(
        "sentences",
        description="Where a thought ends. `sentences`: after a token that ends a sentence by its own text "
        "(. ! ? with closing quotes, a line break), and after `length` tokens at most; `tokens`: after "
        "`length` tokens. After an end of text in any case.",
    )
    length: int = Field(
        32, ge=1, description="The most tokens of a thought; with `cut: tokens`, their number."
    )
    encoder: int = Field(
        1, ge=1, description="The first so many blocks encode thoughts; each token sees all of its thought."
    )
    decoder: int = Field(
        1,
        ge=1,
        description="The last so many blocks write thoughts. The blocks between them are the core.",
    )
    pool: Literal["mean", "last", "attention"] = Field(
        "mean",
        description="How a thought's tokens become one vector: their mean, the last one, or their mean with "
        "learned weights.",
    )
    decoder_input: Literal["prefix", "add"] = Field(
        "prefix",
        description="How the decoder gets the core's output: in the place of a token before the thought's "
        "first, or added to each token of it, as large as the token's own vector.",
    )
    prediction: float = Field(
        0.0,
        ge=0,
        description="Weight of a loss of the predicted vector: its mean square distance from the next "
        "thought's own, or with `codes` the cross-entropy of the next thought's. 0: none, the model learns "
        "through the decoder alone, and the prediction is a probe, which sends it no gradient.",
    )
    target: Literal["stopped", "average", "live"] | None = Field(
        None,
        description="The next thought's vector in that loss, with `prediction` and without `codes`: without "
        "gradient (`stopped`, null); by an encoder of moving averages (`average`); with gradient, which lets "
        "all vectors become equal (`live`).",
    )
    decay: float | None = Field(
        None, ge=0, lt=1, description="Decay of the moving averages for each step; null: 0.99."
    )
    variance: float = Field(
        0.0,
        ge=0,
        description="Weight of VICReg's variance term: by how much the standard deviation of each number of "
        "the vectors, over the thoughts of a micro-batch, is below 1, on average. Not with `codes`.",
    )
    codes: int | None = Field(
        None,
        ge=1,
        description="Numbers of a code: the vector of a thought is mapped to so many, each rounded to one of "
        "`levels` (finite scalar quantization, Mentzer et al. 2023). null: vectors of the model's width and "
        "of norm 1.",
    )
    levels: int | None = Field(
        None, ge=3, le=256, description="Levels of each number of a code; null: 8. With `codes`."
    )

    _ends: Tensor | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keys_fit(self) -> NextThought:
        if self.target is not None and (not self.prediction or self.codes is not None):
            raise ValueError(
                f"target: found {self.target}, expected null: only a loss of the predicted vector has one, "
                "with prediction above 0 and without codes"
            )
        if self.decay is not None and self.target != "average":
            raise ValueError(
                f"decay: found {self.decay} with target: {self.target or 'null'}, expected null: only "
                "target: average has one"
            )
        if self.codes is None and self.levels is not None:
            raise ValueError(f"levels: found {self.levels} without codes; expected null, or codes, too")
        if self.codes is not None and self.variance:
            raise ValueError(
                f"variance: found {self.variance:g}, expected 0 with codes, which have no variance term"
            )
        return self

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        model = run.model
        if self.encoder + self.decoder >= model.layers:
            raise ValueError(
                f"encoder: found {self.encoder} with decoder: {self.decoder}, which leave no core of "
                f"model.layers: {model.layers}; expected at most {model.layers - 1} together"
            )
        if self.length > model.context:
            raise ValueError(f"length: found {self.length}, expected at most model.context, {model.context}")
        for key, found, expected, why in (
            ("positions", model.positions, "rope", "tokens and thoughts would share a table"),
            (
                "value_embeddings",
                model.value_embeddings,
                0,
                "the decoder reads no token before it is written",
            ),
            ("attention_dropout", model.attention_dropout, 0.0, "attention within a thought has none"),
        ):
            if found != expected:
                raise ValueError(f"cut: model.{key}: found {found}, expected {expected}: {why}")

    # The model

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. Blocks keep their places and weights."""
        model.route = Thoughts(
            model.config,
            encoder=self.encoder,
            decoder=self.decoder,
            length=self.length,
            mean_length=self.length if self.cut == "tokens" else (1 + self.length) / 2,
            pool=self.pool,
            prefix=self.decoder_input == "prefix",
            codes=None if self.codes is None else (self.codes, self.levels or LEVELS),
        )
        blocks = model.blocks[: self.encoder]
        for block in blocks:
            block.attention.attended = 1.0  # a token sees its whole thought
        if self.target == "average":
            model.route.target = Averages(blocks, model.route.pooling)

    def ends(self, tokenizer: Tokenizer) -> Tensor:
        """Which tokens end a thought, 1 or 0, float32 [V]."""
        if self.cut == "sentences":
            return torch.from_numpy(sentence_ends(tokenizer)).float()
        return torch.arange(tokenizer.vocab_size).eq(tokenizer.eot).float()

    # Training

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`: the tokens that end thoughts."""
        self._ends = self.ends(load_tokenizer(run.tokens_folder / "tokenizer")).to(device)

    @torch.no_grad()
    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.before_step`."""
        assert self._ends is not None, "training begins with prepare"
        model.route.ends.copy_(self._ends)

    def after_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.after_step`: the averages follow the encoder."""
        route = model.route
        if route.target is not None:
            route.target.follow(
                model.blocks[: self.encoder], route.pooling, DECAY if self.decay is None else self.decay
            )

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `prediction` (or `probe`) and `variance`: means over the thoughts of a micro-batch that
        end in their row, without the row's first."""
        model = forward.model
        if not model.training:
            return {}
        _ = forward.hidden_ND  # what the route passed on is of this forward pass
        route, passed = model.route, model.route.take()
        thought_MD, latent_MZ = predicted_pairs(passed, passed.latent_BKZ)
        count, shares = forward.sum_over_rows(latent_MZ.new_tensor([len(latent_MZ), 1]))
        target_MZ = latent_MZ
        if route.target is not None:
            target_MZ = predicted_pairs(passed, route.targets(model, passed))[1]
        if self.target != "live":
            target_MZ = target_MZ.detach()
        if not self.prediction:
            thought_MD = thought_MD.detach()
        losses_M = route.latents.losses(route.predict(thought_MD), target_MZ)
        # Of processes that share the rows, each has some of the thoughts: their mean is that of all.
        loss = losses_M.sum() * shares / count.clamp(min=1)
        parts = {"prediction": self.prediction * loss} if self.prediction else {"probe": PROBE * loss}
        if self.variance:
            parts["variance"] = self.variance * variance_loss(latent_MZ, forward.sum_over_rows)
        return parts

    # Records

    @torch.no_grad()
    def validated(
        self, model: Transformer, tokens_BL: Tensor, targets_BL: Tensor, counted_BL: Tensor
    ) -> dict[str, Tensor]:
        """See `Technique.validated`. Computed in float32, as ranks are of close scores.

        `thought_tokens`: the mean tokens of a thought, ends of text included. The others are of the thoughts
        that end with a token of text, without each row's first: `latent_variance`, within a batch, the mean
        over a latent's numbers; `predicted_error`, as the loss; `reciprocal_rank` (see `reciprocal_ranks`),
        of batches with enough of them.
        """
        route, passed = model.route, model.route.take()
        # A token counts as text where it is a target, one place before. An end of text precedes text; padding
        # does neither.
        text_BL = F.pad(counted_BL[:, :-1], (1, 0), value=False)
        read_BL = text_BL | counted_BL
        thought_MD, latent_MZ = predicted_pairs(passed, passed.latent_BKZ, text_BL)
        number = len(latent_MZ)
        found = {"thought_tokens": [read_BL.sum(), (passed.cut.ends_BL & read_BL).sum()]}
        with torch.autocast(counted_BL.device.type, enabled=False):
            predicted_M = route.predict(thought_MD)
            if number:
                variance = latent_MZ.double().var(dim=0, correction=0).mean()
                found["latent_variance"] = [variance * number, number]
                found["predicted_error"] = [route.latents.losses(predicted_M, latent_MZ).sum(), number]
            if number >= RANKED:
                rank_M = reciprocal_ranks(route.latents.scores(predicted_M[:MOST], latent_MZ[:MOST]))
                found["reciprocal_rank"] = [rank_M.sum(), len(rank_M)]
        zero = torch.zeros((), dtype=torch.float64, device=counted_BL.device)
        return {name: torch.stack([zero + value for value in pair]) for name, pair in found.items()}

    # Cost

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: thoughts of the mean length in the tokenized text, which the
        model itself does not know; the prediction; the encoder of averages."""
        model, context = build_on_meta(run.model, (self,)), run.model.context
        route: Thoughts = model.route
        mean = mean_thought(run.tokens_folder, self) or route.mean_length
        thoughts = context / min(mean, context)
        # A probe passes no gradient on.
        passes = TRAINING_PASSES if self.prediction else TRAINING_PASSES - 1
        flops = passes * forward_flops(route.predict, thoughts)
        before = route.flops_through(model.blocks, context)
        flops += TRAINING_PASSES * (route.flops_through(model.blocks, context, mean) - before)
        if route.target is not None:
            flops += thoughts * sum(
                forward_flops(block, context / thoughts) for block in model.blocks[: self.encoder]
            ) + forward_flops(route.pooling, context)
        return flops / context

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: the core has a place for each thought, at the least one for
        `length` tokens."""
        core = run.model.layers - self.encoder - self.decoder
        return -core * (1 - 1 / self.length) * block_activations(run.model, narrow)

    def extra_bytes(self, run: Run) -> float:
        """See `Technique.extra_bytes`: averages have no moments and no gradients."""
        target = build_on_meta(run.model, (self,)).route.target
        if target is None:
            return 0.0
        moments = 8 if run.training.optimizer == "adamw" else 4
        return -(moments + 4) * sum(parameter.numel() for parameter in target.parameters())


def predicted_pairs(
    passed: Passed, latent_BKZ: Tensor, counted_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The core's output [M, D] after each thought but the last of its row, and the latent [M, Z] of the next.

    With `counted_BL`, of thoughts whose last token is marked there.
    """
    here_BK = passed.cut.ended(counted_BL)
    here_BK[:, 0] = False  # nothing comes before a row's first thought
    index_M = here_BK.flatten().nonzero()[:, 0]
    thought_MD = F.embedding(index_M - 1, passed.thought_BKD.flatten(0, 1))
    return thought_MD, F.embedding(index_M, latent_BKZ.flatten(0, 1))


def variance_loss(latent_MZ: Tensor, sum_over_rows: Any = lambda tensor: tensor) -> Tensor:
    """VICReg's variance term (Bardes et al. 2022, eq. 1, with gamma 1): the mean over the numbers of latents
    of max(0, 1 - sqrt(var + 1e-4)), 0.99 where all latents are equal.

    `sum_over_rows` sums over the processes that have others of the latents; their gradients are averaged.
    """
    count = latent_MZ.new_full((1, latent_MZ.shape[1]), len(latent_MZ))
    own_3Z = torch.cat([torch.stack([latent_MZ.sum(dim=0), latent_MZ.square().sum(dim=0)]), count])
    fixed_3Z = own_3Z.detach()
    shares = sum_over_rows(torch.ones_like(fixed_3Z))
    sum_3Z = sum_over_rows(fixed_3Z) + shares * (own_3Z - fixed_3Z)
    sum_Z, square_Z, count_Z = sum_3Z
    variance_Z = (square_Z - sum_Z.square() / count_Z.clamp(min=1)) / (count_Z - 1).clamp(min=1)
    return F.relu(1 - (variance_Z.clamp(min=0) + _EPSILON).sqrt()).mean()


def reciprocal_ranks(score_MM: Tensor, ranked: int = RANKED) -> Tensor:
    """[M], float64: the reciprocal rank of each row's diagonal entry among it and `ranked` - 1 others of the
    row, M at least `ranked`.

    Others are drawn once for all, without torch's own random numbers. Equal scores count as if their order
    were drawn: the mean over all orders. So constant scores have, as random ones on average, the chance level
    H(ranked) / ranked, of the harmonic number H: 0.0519 for 100.
    """
    M, device = len(score_MM), score_MM.device
    generator = torch.Generator().manual_seed(0)
    order_M, steps_R = torch.randperm(M, generator=generator), torch.randperm(M - 1, generator=generator)
    place_MR = torch.arange(M)[:, None] + 1 + steps_R[: ranked - 1]
    other_MR = torch.empty_like(place_MR)
    other_MR[order_M] = order_M[place_MR % M]
    own_M1, score_MR = score_MM.diagonal()[:, None], score_MM.gather(1, other_MR.to(device))
    # What is no number is above all others.
    above_M, equal_M = (~(score_MR <= own_M1)).sum(dim=1), (score_MR == own_M1).sum(dim=1)
    harmonic = torch.arange(ranked + 1, dtype=torch.float64, device=device).reciprocal()
    harmonic[0] = 0.0
    harmonic = harmonic.cumsum(dim=0)
    return (harmonic[above_M + equal_M + 1] - harmonic[above_M]) / (equal_M + 1)


def mean_thought(folder: Path, technique: NextThought) -> float | None:
    """The mean tokens of a thought in a folder's validation text, by the shares of a mix; None: the text is
    not tokenized yet."""
    meta = folder / "meta.json"
    return _mean_thought(folder, technique, meta.stat().st_mtime_ns) if meta.is_file() else None


@lru_cache(maxsize=64)
def _mean_thought(folder: Path, technique: NextThought, changed: int) -> float:
    """`changed`: when the text was tokenized, as results are kept."""
    ends_V = technique.ends(load_tokenizer(folder / "tokenizer"))
    rates, weights = [], []
    for component in read_split(folder, "val"):
        parts = [torch.from_numpy(shard.values[:_MEASURED].astype("int64")) for shard in component.shards]
        if not parts:
            continue
        tokens_1L = torch.cat(parts)[None, :_MEASURED]
        rates.append(Cut.of(tokens_1L, ends_V, technique.length).ends_BL.double().mean().item())
        weights.append(component.weight)
    # An end of text ends a thought, so that no rate is 0.
    return sum(weights) / sum(rate * weight for rate, weight in zip(rates, weights, strict=True))
