"""The sides of benchmarks/training.py: each a training step on the same shapes, tokens and arithmetic.

nanoGPT is on no package index; `NanoGPT` is written anew with the choices of its model.py and train.py at the
time of writing: a GPT-2 with layer norms without bias, GELU of four widths, learned positions, tied head,
torch's fused attention, logits whole, AdamW (fused on CUDA alone), the gradient's norm clipped at 1.
`transformers` is its Llama of the very shape of ours, its default (fused) attention, under the same loop.
`first` is this project's own first version: whole logits, torch's attention and the plain operations.
`untuned` is ours without what `stlm.cpu_runtime` sets, `without kernels` ours with torch's operations.

Shapes: B batch, L length, D width, H heads, E head width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stlm.kernels.library import SWITCH
from stlm.model.config import ModelConfig

Step = Callable[[Tensor], float]
CLIP = 1.0


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.c_fc, self.mlp_proj = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        q, k, v = (
            part.view(B, L, self.heads, D // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x_BLD)).split(D, dim=2)
        )
        y_BHLE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.c_proj(y_BHLE.transpose(1, 2).reshape(B, L, D))
        return x_BLD + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x_BLD))))


class NanoGPT(nn.Module):
    """A GPT-2 as nanoGPT builds it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList([_Block(config.width, config.heads) for _ in range(config.layers)])
        self.ln_f = nn.LayerNorm(config.width, bias=False)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """The mean loss."""
        x_BLD = self.wte(tokens_BL) + self.wpe(torch.arange(tokens_BL.shape[1], device=tokens_BL.device))
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits_BLV = self.lm_head(self.ln_f(x_BLD))
        return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())


def _step(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    device: str,
    dtype: str,
) -> Step:
    def step(tokens_BL: Tensor) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(tokens_BL[:, :-1], tokens_BL[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def _adamw(parameters: list[nn.Parameter], fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def nanogpt(config: ModelConfig, device: str, dtype: str, compiled: bool) -> tuple[Step, int]:
    """nanoGPT's step, and its number of parameters."""
    model = NanoGPT(config).to(device)
    parameters = list(model.parameters())
    loss = torch.compile(model) if compiled else model
    step = _step(loss, _adamw(parameters, device == "cuda"), parameters, device, dtype)
    return step, sum(p.numel() for p in parameters)


def llama(config: ModelConfig, device: str, dtype: str, compiled: bool) -> tuple[Step, int]:
    """A plain loop over transformers' Llama of our shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=config.tied,
        )
    ).to(device)
    parameters = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def loss(tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        logits_BLV = forward(input_ids=tokens_BL, use_cache=False).logits
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), targets_BL.flatten())

    return _step(loss, _adamw(parameters, device == "cuda"), parameters, device, dtype), sum(
        p.numel() for p in parameters
    )


def stlm(config: ModelConfig, device: str, dtype: str, compiled: bool) -> tuple[Step, int]:
    """What Trainer.step does."""
    from stlm.model.transformer import Transformer
    from stlm.training.config import TrainingConfig
    from stlm.training.optimizers import build_optimizer

    model = Transformer(config).to(device)
    parameters = list(model.parameters())
    loss = torch.compile(model.loss) if compiled else model.loss
    step = _step(loss, build_optimizer(model, TrainingConfig()), parameters, device, dtype)
    return step, sum(p.numel() for p in parameters)


def without_kernels(config: ModelConfig, device: str, dtype: str, compiled: bool) -> tuple[Step, int]:
    """`stlm` where no kernels can be compiled. The side's process is its own."""
    os.environ[SWITCH] = "0"
    return stlm(config, device, dtype, compiled)


def first(config: ModelConfig, device: str, dtype: str, compiled: bool) -> tuple[Step, int]:
    """Our own first version: `Transformer` with whole logits and torch's fused attention."""
    from stlm.model.transformer import Transformer

    os.environ[SWITCH] = "0"
    model = Transformer(config).to(device)
    # What keeps blocks of attention away: in evaluation mode it is torch's. There is no dropout here.
    model.eval()
    parameters = list(model.parameters())

    def whole(tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens_BL).flatten(0, 1).float(), targets_BL.flatten())

    loss = torch.compile(whole) if compiled else whole
    return _step(loss, _adamw(parameters, True), parameters, device, dtype), sum(
        p.numel() for p in parameters
    )


SIDES = {
    "stlm": stlm,
    "without kernels": without_kernels,
    "untuned": stlm,
    "first": first,
    "nanogpt": nanogpt,
    "transformers": llama,
}
