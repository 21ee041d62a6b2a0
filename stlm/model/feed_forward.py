"""Feed-forward networks. Shapes: B batch, L length, D width, F hidden units."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.fused import swiglu
from stlm.model.projection import projection


class SwiGLU(nn.Module):
    """Feed-forward network silu(x W_gate) * (x W_up), projected down (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # One product computes gate and up: larger products come closer to the hardware's peak.
        self.gate_up = projection(config, "ffn", "gate_up")
        self.down = projection(config, "ffn", "down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_BLD)))


class GELU(nn.Module):
    """Feed-forward network gelu(x W_up), projected down (Vaswani et al. 2017, with GELU as in GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = projection(config, "ffn", "up")
        self.down = projection(config, "ffn", "down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD)))


class SquaredReLU(nn.Module):
    """Feed-forward network relu(x W_up)^2, projected down (So et al. 2021, "Primer", section 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = projection(config, "ffn", "up")
        self.down = projection(config, "ffn", "down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BLD)).square())


FFNS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU, "relu2": SquaredReLU}
