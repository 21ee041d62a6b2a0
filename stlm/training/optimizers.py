"""Optimizers: AdamW, and Muon for the blocks' matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stlm.model.transformer import Transformer
from stlm.training.config import TrainingConfig

# Coefficients of the quintic whose iteration brings singular values between 0 and 1 to within about 0.3 of 1
# (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_NRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices [N, R, C] with about the singular vectors of `g_NRC` and singular values near 1, in `dtype`.

    Newton-Schulz iteration (Jordan et al. 2024): for X = U S V', a X + (b A + c A A) X with A = X X' is
    U (a S + b S^3 + c S^5) V', so matrix products alone replace the decomposition.
    """
    a, b, c = QUINTIC
    x_NRC = g_NRC.to(dtype)
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    if tall:  # A is the smaller of the two Gram matrices
        x_NRC = x_NRC.mT
    # No singular value exceeds the Frobenius norm. A zero matrix stays zero.
    x_NRC = x_NRC / x_NRC.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-20).to(dtype)
    for _ in range(steps):
        a_NRR = torch.bmm(x_NRC, x_NRC.mT)
        b_NRR = torch.baddbmm(a_NRR, a_NRR, a_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, b_NRR, x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC


def _masked(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters with a mask, and the mask: bool, of the parameter's shape.

    A parameter's attribute `kept` marks the elements that are trained; the others are zero and stay zero, in
    gradients and moments too.
    """
    return ((p, kept) for p in parameters if (kept := getattr(p, "kept", None)) is not None)


def mask_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set to zero the gradients of what a parameter's mask leaves out, before their norm is taken."""
    for parameter, kept in _masked(parameters):
        parameter.grad.mul_(kept)


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """Strip the decorator from a method of torch's optimizers.

    The decorator imports torch's compiler, which takes most of a second, to keep the method out of graphs.
    """
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.Optimizer):
    """torch's fused AdamW (Loshchilov and Hutter 2019), for parameters that no compiled graph updates.

    torch.optim.AdamW computes the same, but imports the compiler at its first step.
    """

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """Each group has its `weight_decay`, `betas` and `eps`; `lr` is set before a step."""
        # fused: torch then keeps the step count, which AdamW needs, on the device in float32.
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "fused": True, "capturable": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masked = [(p, self.state[p], kept) for p, kept in _masked(self._parameters())]
        for _, state, kept in masked:
            # Moments of before the mask would go on moving the other elements: Muon mixes all of them.
            for moment in state.values():
                if moment.shape == kept.shape:
                    moment.mul_(kept)
        self._update()
        for parameter, _, kept in masked:
            parameter.mul_(kept)
        return loss

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _update(self) -> None:
        for group in self.param_groups:
            self._step_adamw(group)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the groups with `matrices: True`, AdamW for the others.

    For a matrix W with gradient G, momentum m and learning rate l: M <- m M + (1 - m) G, then Nesterov's U =
    m M + (1 - m) G, and W <- (1 - l weight_decay) W - l 0.2 sqrt(max(R, C)) orthogonal(U). The factor (Liu et
    al. 2025, "Muon is scalable for LLM training", eq. 4) gives updates of any shape [R, C] AdamW's root mean
    square of about 0.2, so both optimizers take learning rates of the same size.

    A group's `parts` are the numbers of rows of the matrices that are stacked in one parameter (query, key
    and value are one product): each matrix is orthogonalized by itself. Matrices of one shape, from all
    parameters, are orthogonalized in one batch.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype, newton_schulz: int = 5) -> None:
        """`dtype`: the iteration's, bfloat16 if the device multiplies it natively; not part of the state."""
        self.dtype, self.newton_schulz = dtype, newton_schulz
        super().__init__(groups)

    def _update(self) -> None:
        self._step_matrices([group for group in self.param_groups if group["matrices"]])
        for group in self.param_groups:
            if not group["matrices"]:
                self._step_adamw(group)

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
        for group in groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[p]["momentum"] for p in parameters]
            gradients = [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                parts = group["parts"] or [len(parameter)]
                for target, part in zip(parameter.split(parts), update.split(parts), strict=True):
                    # A wide matrix and its transpose are equivalent, so both go into one batch.
                    if part.shape[0] > part.shape[1]:
                        target, part = target.mT, part.mT
                    by_shape.setdefault(tuple(part.shape), []).append((target, part, group["lr"]))
        for shape, members in by_shape.items():
            stacked_NRC = torch.stack([part for _, part, _ in members])
            orthogonal_NRC = orthogonalize(stacked_NRC, self.newton_schulz, self.dtype)
            for (target, _, rate), orthogonal_RC in zip(members, orthogonal_NRC, strict=True):
                target.add_(orthogonal_RC, alpha=-rate * 0.2 * max(shape) ** 0.5)


def build_optimizer(
    model: Transformer, config: TrainingConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer of `config`: AdamW (Loshchilov and Hutter 2019) or Muon, which iterates in `dtype`.

    Weight decay acts on matrices and embeddings, not on gains. A group's `scale` is the ratio of its learning
    rate to the schedule's. The blocks' matrices form separate groups if their learning rate differs.
    """
    parts = model.matrix_parts() if config.optimizer == "muon" or config.matrix_learning_rate else {}
    matrices = {id(p) for members in parts.values() for p in members}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
    adam = {"scale": 1.0, "betas": tuple(config.betas), "eps": config.eps}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay, **adam},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, **adam},
    ]
    scale = (config.matrix_learning_rate or config.learning_rate) / config.learning_rate
    for rows, members in parts.items():
        settings = {"params": members, "weight_decay": config.weight_decay, **adam, "scale": scale}
        if config.optimizer == "muon":
            settings = {**settings, "matrices": True, "momentum": config.momentum, "parts": list(rows)}
        groups.append(settings)
    if config.optimizer == "muon":
        return Muon([{"matrices": False, **group} for group in groups], dtype)
    return AdamW(groups)
