"""Masked next-token prediction: one model, causal and bidirectional (GPT-BERT, Charpentier and Samuel 2024).

Shapes: B rows, L positions, M = L + 1 tokens of a row with its last target.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from stlm.errors import nearest
from stlm.evaluation.benchmarks import BENCHMARKS
from stlm.model.counts import TRAINING_PASSES, build_on_meta
from stlm.model.flops import forward_flops
from stlm.model.prefixes import Prefixes, pair_flops
from stlm.model.rows import Rows, drawn_shares
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.evaluation.encoding import RequestEncoder
    from stlm.evaluation.pseudo_likelihood import PseudoLikelihood
    from stlm.study.runs import Run
    from stlm.training.distributed import Group
    from stlm.training.objective import Forward


# Benchmarks of short strings.
_SHORT = ("blimp", "synthetic_pairs")


class MaskedNextToken(Technique):
    """Some rows of each micro-batch have masked tokens and attention in both directions. Each masked token is
    predicted at the position before it, where the next token is predicted in the other rows, so that one
    model does both (GPT-BERT, Charpentier and Samuel 2024). It is scored and writes as any causal model;
    `masked` among its readouts scores short strings in both directions."""

    supports: ClassVar[frozenset[str]] = frozenset(
        {"attention_within", "batches", "cache", "export", "packing", "sharing"}
    )
    replaces_next_token: ClassVar[bool] = True

    share: float = Field(
        0.5, ge=0, le=1, description="Share of the rows that are masked; 0: the plain model."
    )
    rate: float = Field(
        0.3, gt=0, le=1, description="Share of a masked row's tokens that are masked, at the first step."
    )
    final_rate: float = Field(
        0.15, gt=0, le=1, description="The same at the last step; linear in the steps between."
    )
    span: int = Field(
        3,
        ge=1,
        description="Most tokens of a span, which is masked whole; lengths from 1 are equally likely.",
    )
    random: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the masked spans that read random tokens instead of the mask, as in BERT.",
    )
    kept: float = Field(0.1, ge=0, le=1, description="Share of them that read their own tokens, as in BERT.")
    scored: tuple[str, ...] | None = Field(
        None,
        description="Benchmarks of the study that the readout `masked` scores: those of short strings, as it "
        "reads a string once for each of its tokens. null: `blimp` and `synthetic_pairs`, where the study "
        "has them. Empty: there is no such readout.",
    )

    # The end-of-text token, which is never masked, and the size of the vocabulary: the mask's id.
    _eot: int = PrivateAttr(default=-1)
    _vocabulary: int = PrivateAttr(default=0)

    @model_validator(mode="after")
    def _keys_fit(self) -> MaskedNextToken:
        if self.random + self.kept > 1:
            raise ValueError(
                f"kept: found {self.kept:g} with random: {self.random:g}, expected at most "
                f"{1 - self.random:g}"
            )
        for number, name in enumerate(self.scored or ()):
            valid = [other for other, one in BENCHMARKS.items() if one.writing is None]
            if name not in BENCHMARKS:
                raise ValueError(f"scored: found {name!r}, expected a benchmark{nearest(name, valid)}")
            if name not in valid:
                raise ValueError(
                    f"scored: found {name!r}, before whose options a model writes a text, which reads from "
                    f"left to right; expected another benchmark{nearest(name, valid)}"
                )
            if name in self.scored[:number]:
                raise ValueError(f"scored: found {name!r} twice, expected each name once")
        return self

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The names `scored`, with their default resolved."""
        return _SHORT if self.scored is None else self.scored

    def check_scoring(self, benchmarks: Collection[str]) -> None:
        """See `Technique.check_scoring`."""
        valid = [name for name in benchmarks if BENCHMARKS[name].writing is None]
        for name in self.scored or ():
            if name not in benchmarks:
                raise ValueError(
                    f"scored: found {name!r}, expected of evaluation.benchmarks{nearest(name, valid)}"
                )

    def neutral(self) -> bool:
        """Whether no row is masked: then nothing is added."""
        return self.share == 0

    def build(self, model: Transformer) -> None:
        """See `Technique.build`: the mask is an added token."""
        if not self.neutral():
            model.add_tokens(1)

    def prepare(self, run: Run, device: Any, group: Group) -> None:
        """See `Technique.prepare`."""
        from stlm.tokens.shards import read_meta

        self._eot, self._vocabulary = read_meta(run.tokens_folder).eot, run.model.vocab_size

    def rate_at(self, step: int, steps: int) -> float:
        """The share of tokens that are masked at a step from 1, of `steps`."""
        return self.rate + (self.final_rate - self.rate) * (step - 1) / max(1, steps - 1)

    def rows(self, rows: Rows, step: int, steps: int) -> Rows:
        """See `Technique.rows`. Without a masked row, the given ones."""
        if self.neutral():
            return rows
        (B, L), device = rows.tokens_BL.shape, rows.tokens_BL.device
        masked_B = drawn_shares(B, [self.share]) == 0
        if not masked_B.any():
            return rows
        masked_B = masked_B.to(device)
        tokens_BM = rows.whole_BM
        chosen_BM, read_BM = self.masked(tokens_BM, self.rate_at(step, steps))
        chosen_BM &= masked_B[:, None]
        return rows._replace(
            tokens_BL=torch.where(chosen_BM, read_BM, tokens_BM)[:, :-1],
            layout=Prefixes(masked_B * L, L, documents=rows.layout),
            counted_BL=chosen_BM[:, 1:] | ~masked_B[:, None],
        )

    def masked(self, tokens_BM: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Which tokens of the rows are masked [B, M], and what is read in place of each if it is [B, M].

        A row is cut into spans of 1 to `span` tokens. Each is masked with the probability `rate`, and at
        least one in each row. Ends of text are not masked, and neither is a row's first token, before which
        there is no position to predict it.
        """
        (B, M), device = tokens_BM.shape, tokens_BM.device
        ends_BM = torch.randint(1, self.span + 1, (B, M)).cumsum(dim=1)
        # The number of each token's span: how many spans end before it.
        span_BM = torch.searchsorted(ends_BM, torch.arange(M).repeat(B, 1), right=True)
        level_BM, fate_BM = (torch.rand(B, M).gather(1, span_BM).to(device) for _ in range(2))
        other_BM = torch.randint(self._vocabulary - 1, (B, M)).to(device)
        other_BM += other_BM >= self._eot  # all but the end of text
        never_BM = tokens_BM == self._eot
        never_BM[:, 0] = True
        level_BM = level_BM.masked_fill(never_BM, 2.0)
        chosen_BM = (level_BM < rate) | (level_BM == level_BM.amin(dim=1, keepdim=True))
        read_BM = torch.full_like(tokens_BM, self._vocabulary)
        read_BM = torch.where(fate_BM < self.random + self.kept, tokens_BM, read_BM)
        read_BM = torch.where(fate_BM < self.random, other_BM, read_BM)
        return chosen_BM & ~never_BM, read_BM

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """See `Technique.objective`: the mean over the causal rows' targets and that over the masked tokens,
        each weighted by its share of the rows of the micro-batch."""
        if self.neutral():
            return {"next_token": forward.next_token_loss()}
        if forward.counted_BL is None:  # no row was masked
            zero = torch.zeros((), device=forward.tokens_BL.device)
            return {"next_token": forward.next_token_loss(), "masked": zero}
        masked_B = forward.layout.prefix_B > 0
        share = masked_B.float().mean()
        losses = [forward.mean_loss(rows[:, None] & forward.counted_BL) for rows in (~masked_B, masked_B)]
        return {"next_token": (1 - share) * losses[0], "masked": share * losses[1]}

    def extra_flops_per_token(self, run: Run) -> float:
        """See `Technique.extra_flops_per_token`: of a masked row, attention covers all pairs of positions and
        the head the masked tokens alone."""
        if self.neutral():
            return 0.0
        config, model = run.model, build_on_meta(run.model, (self,))
        # Without the few tokens that are never masked, a row's expected number of masked ones.
        rate = (self.rate + self.final_rate) / 2 if run.training.steps > 1 else self.rate
        attention = config.context / 2 * pair_flops(model)
        return TRAINING_PASSES * self.share * (attention - (1 - rate) * forward_flops(model.output, 1))

    def readouts(self, model: Transformer) -> dict[str, nn.Module]:
        """See `Technique.readouts`."""
        if self.neutral() or not self.benchmarks:
            return {}
        return {"masked": MaskedReadout(model, self.benchmarks)}


class MaskedReadout(nn.Module):
    """The model as one that predicts each masked token of a string from all others: see
    `stlm.evaluation.pseudo_likelihood`."""

    def __init__(self, model: Transformer, benchmarks: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.benchmarks = model, benchmarks
        self.config = model.config

    def flops(self, length: float) -> float:
        """FLOPs of scoring a string of `length` tokens: as many forward passes, each with one position's
        logits."""
        model = self.model
        head = forward_flops(model.output, 1)
        once = model.flops(length) - (length - 1) * head + length**2 / 2 * pair_flops(model)
        return length * once

    def language_model(
        self, encoder: RequestEncoder, device: str, precision: Any, batch_tokens: int | None
    ) -> PseudoLikelihood:
        """What scores strings."""
        from stlm.evaluation.pseudo_likelihood import PseudoLikelihood

        mask = self.config.vocab_size
        return PseudoLikelihood(self.model, mask, encoder, device, precision, batch_tokens)
