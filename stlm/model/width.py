"""Cuts the width of a model: of the residual stream a subspace is left, and the heads that fill it.

The stream x [D] becomes B^T x [d]. B's columns are orthonormal: directions of the stream (principal
components; SliceGPT, Ashkboos et al. 2024, section 3) or single channels. SliceGPT has a rotation for each
layer, with a matrix on each skip connection; here one serves all layers, so the smaller model is an ordinary
one. What writes into the stream is multiplied by B^T. What reads it reads the norm's output g * x / rms(x):

- The gain g moves into the matrices that follow, as a rotated stream has other channels.
- rms(B^T x) is over d channels, which hold a part of x alone. So that the matrices get inputs of the size
  that they had, the new gain is sqrt(D / d) times the root mean square of |B^T x| / |x|, the same for all
  channels. (SliceGPT divides by D in place of d, which is the first factor.)
- The matrices are refitted to what is left of their inputs (`stlm.model.cut`).
- A tied head cannot take the last norm's gain, since the embedding has none. Its gain stays a vector: the one
  with the least squared error of the logits. That is exact where g is the same for all channels, and for
  channels that are kept as they are.

Shapes as in `stlm.model.cut`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stlm.model.cut import head_inputs, rebuilt, solve
from stlm.model.importance import second_moments
from stlm.model.transformer import Transformer

# Of the moments of the stream, which has far fewer channels than there are tokens; see `stlm.model.cut`.
_RIDGE = 1e-4
_EMBEDDINGS = ("embedding.weight", "positions.weight")


def readers(model: Transformer) -> dict[str, tuple[nn.Module, str]]:
    """Each norm's name -> the norm, and the name of the matrix that reads its output."""
    up = "gate_up" if model.config.ffn == "swiglu" else "up"
    found: dict[str, tuple[nn.Module, str]] = {}
    for number, block in enumerate(model.blocks):
        start = f"blocks.{number}"
        found[f"{start}.attention_norm"] = block.attention_norm, f"{start}.attention.qkv.weight"
        found[f"{start}.ffn_norm"] = block.ffn_norm, f"{start}.ffn.{up}.weight"
    return found | {"norm": (model.norm, "output.weight")}


def stream_moments(model: Transformer, rows_NM: Tensor) -> dict[str, Tensor]:
    """The second moments [D, D] of x / rms(x) before each norm."""
    norms = {name: norm for name, (norm, _) in readers(model).items()}
    return second_moments(model, rows_NM, norms, normalized=True)


def components(moments: Mapping[str, Tensor]) -> Tensor:
    """The principal components of the stream before all norms [D, D], the largest first."""
    _, vectors_DD = torch.linalg.eigh(sum(moments.values()))
    return vectors_DD.flip(1)


@torch.no_grad()
def channel_scores(model: Transformer, moments: Mapping[str, Tensor]) -> Tensor:
    """The importance of each channel of the stream [D]: its share of the size of what each matrix reads.

    It is the mean over matrices of E[(g x / rms(x))^2] |W's column|^2, each matrix's sum being one.
    """
    weights, scores = model.state_dict(), []
    for name, (norm, matrix) in readers(model).items():
        column_D = weights[matrix].double().square().sum(dim=0) * norm.weight.double().square()
        share_D = column_D.cpu() * moments[name].diagonal().cpu()
        scores.append(share_D / share_D.sum())
    return torch.stack(scores).mean(dim=0)


def channels(kept: Sequence[int], width: int) -> Tensor:
    """The basis [D, d] of single channels."""
    return torch.eye(width, dtype=torch.float64)[:, list(kept)]


@torch.no_grad()
def cut_width(
    model: Transformer,
    basis_Dd: Tensor,
    moments: Mapping[str, Tensor],
    heads: Sequence[Sequence[int]],
    kv_heads: Sequence[Sequence[int]],
    refit: bool = True,
    tied: bool | None = None,
) -> Transformer:
    """The model whose stream is what `basis_Dd` spans, with these heads in each layer.

    `moments`: those of the stream before each norm (`stream_moments`); `refit`: whether the matrices are
    fitted to what is left of their inputs. `tied` is that of the new model; None: as it was.
    """
    config, weights = model.config, _of_heads(model, heads, kv_heads)
    tied = config.tied if tied is None else tied
    d, device = basis_Dd.shape[1], model.embedding.weight.device
    basis_Dd = basis_Dd.double().to(device)
    for name in _EMBEDDINGS:
        if name in weights:
            weights[name] = _as(weights[name], weights[name].double() @ basis_Dd)
    for number in range(config.layers):
        for name in (f"blocks.{number}.attention.out.weight", f"blocks.{number}.ffn.down.weight"):
            weights[name] = _as(weights[name], basis_Dd.T @ weights[name].double())
    for name, (norm, matrix) in readers(model).items():
        moment_DD, gain_D = moments[name].to(device), norm.weight.double()
        moment_dd = basis_Dd.T @ moment_DD @ basis_Dd
        scale = math.sqrt(moment_dd.trace().item() / d)
        read_YD = weights[matrix].double() * gain_D
        gain_d = torch.full((d,), scale, dtype=torch.float64, device=device)
        if name == "norm" and tied:
            gain_d *= _tied_gain(weights[matrix].double(), gain_D, basis_Dd, moment_DD)
            weights[matrix] = weights["embedding.weight"]
        else:
            read_Yd = read_YD @ basis_Dd
            if refit:
                lost_Dd = moment_DD @ basis_Dd - basis_Dd @ moment_dd
                read_Yd = read_Yd + read_YD @ solve(moment_dd, lost_Dd, _RIDGE)
            weights[matrix] = _as(weights[matrix], read_Yd)
        weights[f"{name}.weight"] = _as(norm.weight, gain_d)
    sizes = {"width": d, "heads": len(heads[0]), "kv_heads": len(kv_heads[0]), "tied": tied}
    return rebuilt(model, sizes, weights)


def _as(like: Tensor, x: Tensor) -> Tensor:
    return x.to(like.dtype)


def _tied_gain(table_VD: Tensor, gain_D: Tensor, basis_Dd: Tensor, moment_DD: Tensor) -> Tensor:
    """The gain g' [d] with the least mean squared error of the logits T diag(g') z of a tied head.

    T = E B is the table that is left, z = B^T x, and the logits were E diag(g) x. The error is quadratic in
    g'.
    """
    gram_dD = basis_Dd.T @ (table_VD.T @ table_VD)
    left_dd = (gram_dD @ basis_Dd) * (basis_Dd.T @ moment_DD @ basis_Dd)
    wanted_d = (gram_dD @ (gain_D[:, None] * moment_DD @ basis_Dd)).diagonal()
    # The gains of channels that are kept as they are; what they miss is solved for.
    first_d = basis_Dd.square().T @ gain_D
    return first_d + solve(left_dd, (wanted_d - left_dd @ first_d)[None], _RIDGE)[0]


def _of_heads(
    model: Transformer, heads: Sequence[Sequence[int]], kv_heads: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The weights with these query and key/value heads in each layer (`stlm.model.cut.choose_heads`)."""
    config, weights = model.config, dict(model.state_dict())
    E, H, K = config.head_width, config.heads, config.kv_heads
    for number in range(config.layers):
        q, kv = head_inputs(heads[number], E), head_inputs(kv_heads[number], E)
        rows, name = torch.cat([q, H * E + kv, (H + K) * E + kv]), f"blocks.{number}.attention"
        for joint in (f"{name}.qkv.weight", f"{name}.shift"):
            if joint in weights:
                weights[joint] = weights[joint][rows]
        weights[f"{name}.out.weight"] = weights[f"{name}.out.weight"][:, q]
        table = f"value_embeddings.{number - config.layers + config.value_embeddings}.weight"
        if table in weights:
            weights[table] = weights[table][:, kv]
    return weights
