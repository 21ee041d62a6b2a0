"""Mixture of experts: a router sends each token through some of several feed-forward networks.

Shazeer et al. (2017), "Outrageously large neural networks: the sparsely-gated mixture-of-experts layer";
Fedus et al. (2022), "Switch transformers" (the loss that balances); Wang et al. (2024), "Auxiliary-loss-free
load balancing strategy for mixture-of-experts", and DeepSeek-V3 (2024; the bias that balances, the sigmoid
router, shared experts); Zoph et al. (2022), "ST-MoE" (the z-loss); Komatsuzaki et al. (2023), "Sparse
upcycling". Dropless, as in MegaBlocks (Gale et al. 2023): no expert has a capacity.

Shapes: B batch, L length, N = B L tokens, D width, E experts, K of them a token, R rows of the experts'
products: N K, sorted by expert, and padding; X layers with experts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.feed_forward import FFNS
from stlm.model.flops import forward_flops
from stlm.model.projection import INITIAL_STD, output_scale, projections, share
from stlm.model.transformer import Transformer
from stlm.techniques.base import Technique

if TYPE_CHECKING:
    from stlm.study.runs import Run
    from stlm.training.objective import Forward

# An expert is dead if its load is below this share of an even one.
DEAD_SHARE = 0.1
# The least sum that scores are divided by: sigmoids may all be 0.
MIN_SUM = 1e-20
# bfloat16 rows of an expert on a CPU are padded to a multiple of this: oneDNN compiles a product for each new
# number of rows, which took longer than the products.
ROWS = 64
# Of Fedus et al. (2022) and of Wang et al. (2024).
WEIGHT, RATE = 0.01, 0.001


class Experts(Technique):
    """A router sends each token through a few of several feed-forward networks: parameters grow, FLOPs a
    token do not. No token is dropped, and the router is in float32."""

    supports: ClassVar[frozenset[str]] = frozenset({"attention_within", "cache", "packing", "sharing"})
    role_keys: ClassVar[Mapping[str, str]] = {"start": "upcycle"}

    experts: int = Field(4, ge=1, le=1024, description="Experts E of a layer; 1: the plain network.")
    top: int = Field(1, ge=1, description="Experts K that a token passes. At most `experts`.")
    shared: int = Field(
        0, ge=0, description="Experts that every token passes in addition to the chosen ones, with weight 1."
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Hidden units of an expert. null: `model.ffn_width` / (`top` + `shared`), so that a "
        "token uses as many feed-forward weights as in the plain model; with `upcycle`: `model.ffn_width`.",
    )
    router: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="Scores of experts: the softmax over all of them, or the sigmoid of each logit.",
    )
    normalize: bool | None = Field(
        None,
        description="Whether the chosen experts' scores are divided by their sum, to be the weights of their "
        "outputs. null: where `top` is above 1, and with `upcycle`. With `top: 1` the weight is then 1, and "
        "the router gets the gradient of the score's logarithm.",
    )
    balance: Literal["loss", "bias", "none"] = Field(
        "loss",
        description="What keeps the load even: Switch's loss, or a bias for each expert, which is added to "
        "the scores where experts are chosen, and not to the weights of their outputs.",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Weight of Switch's loss of each layer; with `balance: loss` only. null: 0.01.",
    )
    rate: float | None = Field(
        None,
        gt=0,
        description="Step of the bias: each training step raises it for experts below the mean load and "
        "lowers it for those above; with `balance: bias` only. null: 0.001.",
    )
    z_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of each layer's z-loss, the mean square of the router's log-sum-exp; 0: none.",
    )
    every: int = Field(1, ge=1, description="Distance between layers with experts; 1: all have them.")
    first: int = Field(1, ge=1, description="The first layer with experts, counted from 1.")
    upcycle: str | None = Field(
        None,
        description="The variant whose last weights training begins with: each expert is a copy of its "
        "feed-forward network, the router is new. Its model is the run's, without experts. null: new "
        "weights.",
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> Experts:
        if self.top > self.experts:
            raise ValueError(f"top: {self.top} is more than experts: {self.experts}")
        if self.experts == 1:
            for key, plain in (("shared", 0), ("width", None), ("z_weight", 0.0), ("upcycle", None)):
                if getattr(self, key) != plain:
                    raise ValueError(
                        f"{key}: {getattr(self, key)}: with experts: 1 the network is the plain one"
                    )
        for key, balance in (("weight", "loss"), ("rate", "bias")):
            if getattr(self, key) is not None and self.balance != balance:
                raise ValueError(f"{key}: {getattr(self, key)}: only balance: {balance} has one")
        if self.upcycle is not None and self.shared:
            raise ValueError(
                f"shared: {self.shared}: with upcycle there is none, as experts begin as the whole network"
            )
        if self.upcycle is not None and self.normalize is False:
            raise ValueError(
                "normalize: false: with upcycle it is true, as the layer begins as the plain network only "
                "where weights sum to 1"
            )
        return self

    @property
    def normalized(self) -> bool:
        """`normalize`, with its default resolved."""
        return self.top > 1 or self.upcycle is not None if self.normalize is None else self.normalize

    def hidden_units(self, config: ModelConfig) -> int:
        """`width`, with its default resolved for a model."""
        if self.width is not None:
            return self.width
        return config.ffn_width // (1 if self.upcycle is not None else self.top + self.shared)

    def neutral(self) -> bool:
        """Whether there is one expert: then no network is changed."""
        return self.experts == 1

    def depends(self) -> dict[str, str]:
        """The variant that training begins with."""
        return {} if self.upcycle is None else {"start": self.upcycle}

    def check(self, run: Run, runs: Mapping[str, Run]) -> None:
        """See `Technique.check`."""
        if self.neutral():
            return
        model, width = run.model, self.hidden_units(run.model)
        if self.first > model.layers:
            raise ValueError(
                f"first: found {self.first}, expected at most the {model.layers} of model.layers"
            )
        if self.upcycle is not None and width != model.ffn_width:
            raise ValueError(
                f"width: found {width}, expected model.ffn_width: {model.ffn_width}, as experts begin as "
                "copies of the whole network (upcycle)"
            )
        parts = self.top + self.shared
        if self.width is None and self.upcycle is None and model.ffn_width % parts:
            raise ValueError(
                f"width: model.ffn_width: {model.ffn_width} cannot be divided by the {parts} experts that a "
                f"token passes; give a width (nearest: {max(1, round(model.ffn_width / parts))})"
            )
        if model.sharing and "ffn" in model.sharing.parts and (self.every, self.first) != (1, 1):
            raise ValueError(
                f"every: {self.every}, first: {self.first}: where layers share feed-forward networks "
                "(model.sharing), all have experts; set both to 1"
            )
        for units in (width, width * self.shared) if self.shared else (width,):
            try:
                ModelConfig.model_validate(model.model_dump() | {"ffn_width": units})
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"width: for {units} hidden units: {reason}") from None

    def build(self, model: Transformer) -> None:
        """See `Technique.build`. The plain network is the first expert, if its width is theirs."""
        if self.neutral():
            return
        sources = model.config.source_layers["ffn"]
        firsts: dict[int, Mixture] = {}
        for number in range(self.first - 1, len(model.blocks), self.every):
            block = model.blocks[number]
            block.ffn = Mixture(block.ffn, model.config, self)
            source = firsts.setdefault(sources[number], block.ffn)
            if source is not block.ffn:
                share(source, block.ffn)

    def inherited(self, model: Transformer, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Technique.inherited`: every expert gets the weights of its layer's plain network."""
        found = dict(given)
        for number, block in enumerate(model.blocks):
            if not isinstance(block.ffn, Mixture):
                continue
            prefix = f"blocks.{number}.ffn."
            for name in [name for name in given if name.startswith(prefix)]:
                weight, rest = found.pop(name), name.removeprefix(prefix)
                found |= {f"{prefix}experts.{expert}.{rest}": weight for expert in range(self.experts)}
        return found

    def extra_bytes_per_token(self, run: Run, narrow: int) -> float:
        """See `Technique.extra_bytes_per_token`: each choice keeps its expert's input, hidden units and
        output, and the router its input in float32."""
        if self.neutral():
            return 0.0
        model, width = run.model, self.hidden_units(run.model)
        kept = 3 if model.ffn == "swiglu" else 2
        added = kept * narrow * (width * (self.top + self.shared) - model.ffn_width)
        added += 2 * narrow * self.top * model.width
        if narrow == 2:  # a copy, beside the plain network's input if there is a shared network
            added += (4 if self.shared else 2) * model.width
        return len(range(self.first - 1, model.layers, self.every)) * added

    # Training

    def before_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.before_step`: the step's load is counted anew."""
        for mixture in mixtures(model):
            mixture.load_E.zero_()

    def step_sums(self, model: Transformer) -> list[Tensor]:
        """See `Technique.step_sums`: the load of each layer's experts, where the bias needs it."""
        return [mixture.load_E for mixture in mixtures(model) if mixture.bias is not None]

    @torch.no_grad()
    def after_step(self, model: Transformer, step: int, steps: int) -> None:
        """See `Technique.after_step`: each bias moves by `rate` (Wang et al. 2024, algorithm 1)."""
        for mixture in mixtures(model):
            if mixture.bias is not None:
                load_E = mixture.load_E
                mixture.bias.add_((load_E.mean() - load_E).sign(), alpha=self.rate or RATE)

    def objective(self, forward: Forward) -> dict[str, Tensor]:
        """The parts `balance` and `router_z`: weighted sums over the layers with experts."""
        if not forward.model.training or self.neutral():
            return {}
        _ = forward.hidden_ND  # what the routers did is of this forward pass
        routed = [mixture.take_routed() for mixture in mixtures(forward.model)]
        parts = {}
        if self.balance == "loss":
            load_XE = forward.sum_over_rows(torch.stack([one.load_E for one in routed]))
            loss_X = switch_loss(load_XE, torch.stack([one.probability_E for one in routed]))
            parts["balance"] = (self.weight or WEIGHT) * loss_X.sum()
        if self.z_weight:
            parts["router_z"] = self.z_weight * torch.stack([one.z_loss for one in routed]).sum()
        return parts

    # Records

    def layer_figures(self, model: Transformer) -> dict[str, int]:
        """See `Technique.layer_figures`: the experts' shares of the load, which sum to 1."""
        return {} if self.neutral() else {"load": self.experts}

    def validated(
        self, model: Transformer, tokens_BL: Tensor, targets_BL: Tensor, counted_BL: Tensor
    ) -> dict[str, Tensor]:
        """See `Technique.validated`. A layer's load: the choices of the counted tokens, K of each."""
        if self.neutral():
            return {}
        load_2XE = torch.zeros(
            2, len(model.blocks), self.experts, dtype=torch.float64, device=counted_BL.device
        )
        for number, block in enumerate(model.blocks):
            if isinstance(block.ffn, Mixture):
                chosen_MK = block.ffn.chosen_NK[counted_BL.flatten()]
                load_2XE[0, number] = torch.bincount(chosen_MK.flatten(), minlength=self.experts)
                load_2XE[1, number] = chosen_MK.numel()
        return {"load": load_2XE}

    def remarks(self, layers: Mapping[str, Mapping[str, float]]) -> list[str]:
        """See `Technique.remarks`: the dead experts."""
        least, found = DEAD_SHARE / self.experts, []
        for layer, row in layers.items():
            for number in range(1, self.experts + 1):
                load = row.get(f"load_{number}", least)
                if load < least:
                    found.append(
                        f"{layer}: expert {number} of {self.experts} is dead: it has {load:.2%} of the load "
                        f"on validation text, less than {least:.2%}, {DEAD_SHARE:.0%} of an even share"
                    )
        return found


def switch_loss(load_XE: Tensor, probability_XE: Tensor) -> Tensor:
    """Switch's loss [X] of each layer: E times the sum of f_i P_i (Fedus et al. 2022, eq. 4 to 6).

    f_i is the share of expert i in the `load_XE`, which has no gradient, and P_i its mean probability: both
    sum to 1 over the experts. The loss is 1 if either is uniform, and E if all tokens choose one expert with
    probability 1.
    """
    share_XE = load_XE / load_XE.sum(dim=1, keepdim=True)
    return share_XE.shape[1] * (share_XE * probability_XE).sum(dim=1)


class Routed(NamedTuple):
    """What a router did in a forward pass of training: choices of each expert, its mean probability, and the
    mean square of the log-sum-exp of its logits (`z_loss`, None where `z_weight` is 0)."""

    load_E: Tensor
    probability_E: Tensor
    z_loss: Tensor | None


class Mixture(nn.Module):
    """The sum of the chosen experts' outputs, weighted by the router's scores, and of the shared network's.

    The router is linear. `bias` [E], if any, is added to its scores only to choose experts; a rule
    changes it, and no gradient (`Experts.after_step`).
    """

    parameter_groups: ClassVar[dict[str, str]] = {"router": "router", "bias": "router"}

    def __init__(self, plain: nn.Module, config: ModelConfig, technique: Experts) -> None:
        super().__init__()
        count, width = technique.experts, technique.hidden_units(config)
        networks = [plain] if width == config.ffn_width else []
        while len(networks) < count:
            networks.append(_network(plain, config, width))
        self.experts = nn.ModuleList(networks)
        self.shared = _network(plain, config, width * technique.shared) if technique.shared else None
        self.router = nn.Parameter(torch.empty(count, config.width))
        nn.init.normal_(self.router, std=INITIAL_STD)
        self.bias = None
        if technique.balance == "bias":
            self.bias = nn.Parameter(torch.zeros(count), requires_grad=False)
        self.top, self.normalized = technique.top, technique.normalized
        self.sigmoid, self.with_z_loss = technique.router == "sigmoid", technique.z_weight > 0
        # The choices of each expert in this step's training; float32, as it is summed with the gradients.
        self.register_buffer("load_E", torch.zeros(count), persistent=False)
        # Of the last forward pass: in training what the losses need, in evaluation the chosen experts.
        self.routed: Routed | None = None
        self.chosen_NK: Tensor | None = None

    @property
    def active_shares(self) -> dict[str, float]:
        """See `stlm.model.counts`."""
        return {"experts": self.top / len(self.experts)}

    def flops(self, length: float) -> float:
        """Forward FLOPs of a sequence: the router, the shared network, and `top` experts for each token."""
        always = 2 * self.router.numel() * length
        if self.shared is not None:
            always += forward_flops(self.shared, length)
        return always + self.top * forward_flops(self.experts[0], length)

    def take_routed(self) -> Routed:
        """What the router did in the last forward pass in training, which is then forgotten."""
        routed, self.routed = self.routed, None
        assert routed is not None, "no forward pass in training since this was taken"
        return routed

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the dtype of the experts' outputs."""
        x_ND = x.flatten(0, -2)
        chosen_NK, weight_NK, load_E = self._route(x_ND)
        device = x.device.type
        if torch.is_autocast_enabled(device):  # once, and not for each expert
            x_ND = x_ND.to(torch.get_autocast_dtype(device))
        y_ND = self._mix(x_ND, chosen_NK, weight_NK, load_E.tolist())
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view(x.shape)

    def _route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen experts [N, K], the weights of their outputs [N, K], float32 under autocast too, and the
        number of choices of each expert [E]."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.router)
            scores_NE = logits_NE.sigmoid() if self.sigmoid else logits_NE.softmax(dim=1)
            ranked_NE = scores_NE.detach() if self.bias is None else scores_NE.detach() + self.bias
            chosen_NK = ranked_NE.topk(self.top, dim=1).indices
            weight_NK = scores_NE.gather(1, chosen_NK)
            if self.normalized:
                total_N1 = weight_NK.sum(dim=1, keepdim=True).clamp(min=MIN_SUM)
                # With one choice the quotient is 1; this leaves the gradient of the score's logarithm.
                weight_NK = weight_NK / (total_N1.detach() if self.top == 1 else total_N1)
            load_E = torch.bincount(chosen_NK.flatten(), minlength=len(self.experts))
            if self.training:
                self._keep(logits_NE, scores_NE, load_E.float())
            else:
                self.chosen_NK = chosen_NK
        return chosen_NK, weight_NK, load_E

    def _keep(self, logits_NE: Tensor, scores_NE: Tensor, load_E: Tensor) -> None:
        """Keep what the losses and the bias need."""
        self.load_E += load_E
        # The sigmoid's scores are probabilities once they are divided by their sum (DeepSeek-V3, eq. 19).
        probability_NE = scores_NE
        if self.sigmoid:
            probability_NE = scores_NE / scores_NE.sum(dim=1, keepdim=True).clamp(min=MIN_SUM)
        z_loss = logits_NE.logsumexp(dim=1).square().mean() if self.with_z_loss else None
        self.routed = Routed(load_E, probability_NE.mean(dim=0), z_loss)

    def _mix(self, x_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor, load: list[int]) -> Tensor:
        """The chosen experts' weighted outputs [N, D]: one product of each matrix with its expert's rows."""
        if x_ND.dtype == torch.bfloat16 and x_ND.device.type == "cpu":
            lengths = [-(-rows // ROWS) * ROWS for rows in load]
        else:
            lengths = load
        rows = _rows(chosen_NK, load, lengths)
        # Each part is a contiguous piece of one tensor, and so is its gradient.
        parts = _Dispatch.apply(x_ND, rows).split(lengths)
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)]
        if not outputs:
            return x_ND
        return _Combine.apply(torch.cat(outputs), weight_NK, rows)


def _network(plain: nn.Module, config: ModelConfig, width: int) -> nn.Module:
    """A new network of the kind and activation of `plain`, with so many hidden units."""
    network = FFNS[config.ffn](config.model_copy(update={"ffn_width": width}))
    network.activation = copy.deepcopy(plain.activation)
    if not next(network.parameters()).is_meta:
        for name, matrix in projections(network):
            matrix.initialize(INITIAL_STD * (output_scale(config) if name == "down" else 1.0))
            if matrix.adapter is not None:
                matrix.adapter.initialize()
    return network


def mixtures(model: Transformer) -> list[Mixture]:
    """The feed-forward networks of a model that have experts, in their order."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, Mixture)]


class _Rows(NamedTuple):
    """How tokens become rows, sorted by expert: `token_R` is the token of each row (of padding, any),
    `place_NK` the row of each choice. What is computed of padding is not used, and its gradient is zero."""

    token_R: Tensor
    place_NK: Tensor


def _rows(chosen_NK: Tensor, load: list[int], lengths: list[int]) -> _Rows:
    """The rows for the chosen experts; expert i has `load[i]` of them and padding up to `lengths[i]`."""
    device, K = chosen_NK.device, chosen_NK.shape[1]
    order_C = chosen_NK.flatten().argsort(stable=True)
    row_C = torch.arange(len(order_C), device=device)
    if lengths != load:
        padding = itertools.accumulate((a - b for a, b in zip(lengths, load, strict=True)), initial=0)
        before_E = torch.tensor(list(padding)[:-1], device=device)
        row_C = row_C + before_E.repeat_interleave(torch.tensor(load, device=device))
    place_C = torch.empty_like(order_C)
    place_C[order_C] = row_C
    token_R = order_C.new_zeros(sum(lengths))
    token_R[row_C] = order_C // K
    return _Rows(token_R, place_C.view_as(chosen_NK))


class _Dispatch(torch.autograd.Function):
    """Rows [R, D] of tokens [N, D]. The gradient is gathered, where autograd would scatter it."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return x_ND.index_select(0, rows.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RD: Tensor) -> tuple[Tensor, None]:
        return _sum_over_choices(_choices(dx_RD, ctx.rows)), None


class _Combine(torch.autograd.Function):
    """Weighted sums [N, D] of rows [R, D], each token's K.

    The weights are rounded to the dtype of the rows: products of two dtypes take several times as long.
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_NK: Tensor, rows: _Rows) -> Tensor:
        y_NKD, weight_NK = _choices(y_RD, rows), weight_NK.to(y_RD.dtype)
        ctx.save_for_backward(y_NKD, weight_NK)
        ctx.rows = rows
        return _sum_over_choices(y_NKD * weight_NK[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        (y_NKD, weight_NK), rows = ctx.saved_tensors, ctx.rows
        weight_R1 = weight_NK.new_zeros(len(rows.token_R), 1)
        weight_R1[rows.place_NK.flatten(), 0] = weight_NK.flatten()
        dweight_NK = (y_NKD * dy_ND[:, None]).sum(dim=-1, dtype=torch.float32)
        return dy_ND.index_select(0, rows.token_R) * weight_R1, dweight_NK, None


def _choices(y_RD: Tensor, rows: _Rows) -> Tensor:
    """The rows of each token's choices [N, K, D]."""
    N, K = rows.place_NK.shape
    return y_RD.index_select(0, rows.place_NK.flatten()).view(N, K, -1)


def _sum_over_choices(y_NKD: Tensor) -> Tensor:
    """[N, D]; for one choice without a pass over memory, for two six times as fast as `sum`."""
    if y_NKD.shape[1] > 2:
        return y_NKD.sum(dim=1)
    return y_NKD[:, 0] if y_NKD.shape[1] == 1 else y_NKD[:, 0] + y_NKD[:, 1]
