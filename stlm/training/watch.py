"""Watches a run while it trains: norms of each layer at some steps, and spikes in the loss of every step.

Nothing here changes the weights. The activations come from a separate forward pass without gradients and
without dropout, so it draws no random numbers, and without torch.compile, whose graphs hold no hooks. Only
`drain` waits for the device; it is called when a row of the curve is due, which waits anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stlm.model.block import Block
from stlm.model.transformer import Transformer
from stlm.training.spikes import Spikes

WATCH_COLUMNS = [
    "step",
    "layer",
    "residual_rms",
    "attention_rms",
    "ffn_rms",
    "attention_logit_max",
    "attention_entropy",
    "weight_rms",
    "grad_norm",
    "update_ratio",
]
EMBEDDING, HEAD, BLOCK = "embedding", "head", "block "
# Tokens of the extra forward pass: enough for a root mean square, and cheap compared with a step.
_TOKENS = 1024


def block_name(number: int) -> str:
    """The displayed name of a block, counted from 1; `number` counts from 0 as in the weights' names."""
    return f"{BLOCK}{number + 1}"


def layer_of(parameter: str) -> str:
    """The layer of a parameter, by its name: blocks.2.ffn.down.weight belongs to block 3."""
    first, _, rest = parameter.partition(".")
    if first == "blocks":
        return block_name(int(rest.partition(".")[0]))
    # All tables for looking up tokens or positions count as embedding.
    return EMBEDDING if "embedding" in first or first == "positions" else HEAD


def users(model: nn.Module) -> dict[nn.Parameter, tuple[str, list[str]]]:
    """The name of each parameter and the layers that use it, in order: several if blocks share it.

    The weight of a tied head belongs to the embedding.
    """
    found: dict[nn.Parameter, tuple[str, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = layer_of(name)
        layers = found.setdefault(parameter, (name, []))[1]
        if not layers or layer.startswith(BLOCK):
            layers.append(layer)
    return found


@contextmanager
def outputs(model: Transformer, visit: Callable[[str, str, Tensor], None]) -> Iterator[None]:
    """While entered, call `visit(layer, part, output)` for each part of a forward pass, in its order.

    Parts: `residual` (the stream that enters the first block counts for the embedding, the one after the last
    norm for the head), and `attention` and `ffn` (the outputs of a block's two networks). Outputs are [B, L,
    D], or fewer tokens if a technique gives a block only some of them.
    """

    def hook(layer: str, part: str) -> Callable[..., None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            visit(layer, part, output[0] if isinstance(output, tuple) else output)

        return after

    def enters(module: nn.Module, inputs: Any) -> None:
        visit(EMBEDDING, "residual", inputs[0])

    handles = [model.blocks[0].register_forward_pre_hook(enters)]
    for number, block in enumerate(model.blocks):
        layer = block_name(number)
        # A technique may have wrapped or replaced the block.
        for plain in (module for module in block.modules() if isinstance(module, Block)):
            handles.append(plain.attention.register_forward_hook(hook(layer, "attention")))
            handles.append(plain.ffn.register_forward_hook(hook(layer, "ffn")))
        handles.append(block.register_forward_hook(hook(layer, "residual")))
    handles.append(model.norm.register_forward_hook(hook(HEAD, "residual")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Attentions(TorchFunctionMode):
    """Passes on the queries and keys of each fused attention, since no module outputs the logits."""

    def __init__(self, visit: Callable[..., None]) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(self, function, types, arguments=(), keys=None):
        if function is F.scaled_dot_product_attention:
            self._visit(*arguments, **(keys or {}))
        return function(*arguments, **(keys or {}))


def attention_figures(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The largest logit of the first sequence, and the mean entropy (nats) of its attention weights.

    `query` [B, H, L, E] and `key` [B, K, L, E], where K divides H, are the inputs of torch's fused attention.
    Growing logits precede a divergence (Dehghani et al. 2023, section 2; Wortsman et al. 2023), and so does
    an entropy that falls to zero (Zhai et al. 2023).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        key_HLE = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        logits_HLL = query[0].float() @ key_HLE.transpose(1, 2) * scale
    if causal:
        unseen_LL = torch.ones(logits_HLL.shape[1:], dtype=torch.bool, device=query.device).triu(1)
        logits_HLL = logits_HLL.masked_fill(unseen_LL, -math.inf)
    elif mask is not None:
        mask_HLL = mask[0] if mask.dim() == 4 else mask
        logits_HLL = (
            logits_HLL.masked_fill(~mask_HLL, -math.inf)
            if mask_HLL.dtype == torch.bool
            else logits_HLL + mask_HLL
        )
    return logits_HLL.amax(), torch.special.entr(logits_HLL.softmax(dim=-1)).sum(dim=-1).mean()


def rms(x: Tensor) -> Tensor:
    """The root mean square of all values; stays on the device."""
    return x.float().square().mean().sqrt()


class Watch:
    """The records of a run apart from its curve: layers at every `watch_every` steps, and spikes of the loss.

    `hidden` computes the residual stream [B, L, D] from tokens [B, L], with training's precision and without
    torch.compile. `state` holds everything that a resumed run needs, in plain values: `rows`, those of
    watch.csv, and `spikes`. Call `before_update` and `after_update` around a step's clipping and update,
    `record` after each step, and `drain` before the state is saved.
    """

    def __init__(
        self,
        model: Transformer,
        every: int,
        hidden: Callable[[Tensor], Tensor],
        state: dict[str, Any],
    ) -> None:
        self._model, self._every, self._hidden = model, every, hidden
        self.rows: list[dict[str, Any]] = state.setdefault("rows", [])
        self.spikes = Spikes(state.setdefault("spikes", {}))
        blocks = [block_name(number) for number in range(len(model.blocks))]
        self._layers: dict[str, list[nn.Parameter]] = {layer: [] for layer in (EMBEDDING, *blocks)}
        for parameter, (_, layers) in users(model).items():
            for layer in layers:
                self._layers.setdefault(layer, []).append(parameter)
        self._steps: list[tuple[int, Tensor, Tensor]] = []
        self._observed: list[tuple[int, dict[tuple[str, str], Tensor]]] = []
        self._kept: dict[str, list[Tensor]] = {}

    def due(self, step: int) -> bool:
        """Whether the layers are measured at this step: at the first, and every `watch_every`."""
        return self._every > 0 and (step == 1 or step % self._every == 0)

    @torch.no_grad()
    def before_update(self, step: int, tokens_BL: Tensor) -> None:
        """If `step` is due, measure activations on some of its tokens, and the gradient before clipping."""
        if not self.due(step):
            return
        figures = self._activations(tokens_BL[: max(1, _TOKENS // tokens_BL.shape[1]), :-1])
        for layer, parameters in self._layers.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                figures[layer, "grad_norm"] = _norm(gradients)
            self._kept[layer] = [p.detach().clone() for p in parameters]
        self._observed.append((step, figures))

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """If `step` is due, measure the weights, and the size of the update relative to them."""
        if not self.due(step):
            return
        figures = self._observed[-1][1]
        for layer, parameters in self._layers.items():
            before, count = self._kept.pop(layer), sum(p.numel() for p in parameters)
            if not count:
                continue
            norm = _norm(before)
            figures[layer, "weight_rms"] = norm / math.sqrt(count)
            torch._foreach_sub_(before, parameters)
            figures[layer, "update_ratio"] = _norm(before) / norm

    def _activations(self, tokens_BL: Tensor) -> dict[tuple[str, str], Tensor]:
        """The metrics of one forward pass without dropout."""
        figures: dict[tuple[str, str], Tensor] = {}
        attentions: list[tuple[Tensor, Tensor]] = []

        def visit(layer: str, part: str, output: Tensor) -> None:
            figures[layer, f"{part}_rms"] = rms(output.detach())
            if part == "attention" and attentions:
                names = ("attention_logit_max", "attention_entropy")
                figures.update({(layer, name): v for name, v in zip(names, attentions.pop(), strict=True)})

        def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **others):
            attentions.append(attention_figures(query.detach(), key.detach(), attn_mask, is_causal, scale))

        training = self._model.training
        self._model.eval()
        # With gradients, as kernels for scoring show neither queries and keys nor whole outputs.
        with torch.enable_grad(), outputs(self._model, visit), _Attentions(attend):
            self._hidden(tokens_BL)
        self._model.train(training)
        return figures

    def record(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keep the loss and the gradient norm of a step on the device."""
        self._steps.append((step, loss, norm))

    def first_not_finite(self) -> tuple[int, Tensor, Tensor] | None:
        """The first step since the last `drain` whose loss or gradient is not finite, with both values."""
        return next(
            (entry for entry in self._steps if not (entry[1].isfinite() and entry[2].isfinite())), None
        )

    def add(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Add metrics by layer that were measured elsewhere to the rows of `step`, the latest; call `drain`
        first."""
        latest = {row["layer"]: row for row in self.rows[-len(self._layers) :] if row["step"] == step}
        for layer, figures in layers.items():
            if layer not in latest:
                latest[layer] = {"step": step, "layer": layer}
                self.rows.append(latest[layer])
            latest[layer].update({name: float(f"{value:.5g}") for name, value in figures.items()})

    def drain(self) -> None:
        """Copy the values that are still on the device into the rows and the spikes."""
        if self._steps:
            steps, losses, norms = zip(*self._steps, strict=True)
            pairs = torch.stack([torch.stack(losses), torch.stack(norms)]).tolist()
            for step, loss, norm in zip(steps, *pairs, strict=True):
                self.spikes.add(step, loss, norm)
        for step, figures in self._observed:
            values = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
            for layer in self._layers:
                row = {
                    name: float(f"{v:.5g}")
                    for (figure_layer, name), v in values.items()
                    if figure_layer == layer
                }
                self.rows.append({"step": step, "layer": layer, **row})
        self._steps, self._observed = [], []


def _norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all values together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
