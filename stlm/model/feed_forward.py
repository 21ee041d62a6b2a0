"""Feed-forward networks. Shapes: B batch, L length, D width, F hidden units; "..." any positions.

Each has an `activation`, a function of hidden units [..., F] that a technique may replace, by a module too.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.fused import swiglu
from stlm.model.projection import projection

Activation = Callable[[Tensor], Tensor]


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, "Primer", section 4)."""
    return F.relu(x).square()


class SwiGLU(nn.Module):
    """Feed-forward network silu(x W_gate) * (x W_up), projected down (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Of the gate.
        self.activation: Activation = F.silu
        # One product computes gate and up: larger products come closer to the hardware's peak.
        self.joint_rows = {"gate_up": (config.ffn_width, config.ffn_width)}
        self.gate_up = projection(config, "ffn", "gate_up")
        self.down = projection(config, "ffn", "down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_up = self.gate_up(x_BLD)
        if self.activation is F.silu:
            return self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class GELU(nn.Module):
    """Feed-forward network gelu(x W_up), projected down (Vaswani et al. 2017, with GELU as in GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation: Activation = F.gelu
        self.up = projection(config, "ffn", "up")
        self.down = projection(config, "ffn", "down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BLD)))


class SquaredReLU(nn.Module):
    """Feed-forward network relu(x W_up)^2, projected down (So et al. 2021, "Primer", section 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation: Activation = squared_relu
        self.up = projection(config, "ffn", "up")
        self.down = projection(config, "ffn", "down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BLD)))


FFNS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU, "relu2": SquaredReLU}


def hidden_numbers(ffn: nn.Module) -> int:
    """How many hidden numbers one of these networks computes for a token: SwiGLU's gate and up count both."""
    width = ffn.down.in_features
    return 2 * width if isinstance(ffn, SwiGLU) else width


def is_plain(ffn: nn.Module) -> bool:
    """Whether `ffn` is one of these networks, as configured: a token's output depends on it alone."""
    return type(ffn) in FFNS.values() and not isinstance(ffn.activation, nn.Module)
