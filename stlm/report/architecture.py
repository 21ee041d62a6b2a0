"""The paper's Figure 2 for each model of a study: a diagram of its parts, drawn from its configuration.

Left, the whole model from the bottom up, a row a layer; right, one block in large. All places and sizes are
in inches from the lower left corner.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.names import count, some
from stlm.report.results import RunResult
from stlm.report.shapes import INK, Box, draw_arrow, draw_box, draw_plus, draw_square, draw_text
from stlm.report.style import figure, group_colour, heading, tint
from stlm.study.runs import Study

Span = tuple[float, float]
# What does not show: rates, and constants that no one sees.
_UNDRAWN = {"dropout", "attention_dropout", "norm_eps", "rope_theta", "zero_init"}
_WIDTH, _LEFT, _RIGHT = 9.0, 0.95, 4.05
_PANEL = 4.95
_GAP, _THIN, _TITLE = 0.2, 0.28, 0.62
# Widths of a block's networks, and of adapters beside them; the height of the drawing of heads.
_BRANCH, _ADAPTER, _HEADS = _WIDTH - 0.4 - _PANEL - 0.6, 0.75, 0.55
_GREY = "#666666"
_SETS = ("#56B4E9", "#F0E442", "#7B6BB0", "#D55E00", "#0072B2", "#8c8c8c")
_FFNS = {"swiglu": "SwiGLU", "gelu": "GELU", "relu2": "squared ReLU"}
_BYTE_UNITS = ("chunks of bytes", "next chunk, byte by byte")
_NETWORKS = {"attention": "attention", "ffn": "FFN"}
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


@dataclass(frozen=True)
class _Part:
    """A network of a block as it is drawn."""

    name: str
    lines: list[str]
    width: float
    height: float


def architectures(study: Study, results: Mapping[str, RunResult]) -> dict[str, list[str]]:
    """Variants by architecture: name of the first variant of each -> labels of all that have it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, result in results.items():
        key = study.runs[name].model.model_dump_json(exclude=_UNDRAWN)
        labels = found.setdefault(key, (result.train.variant, []))[1]
        if result.train.label not in labels:
            labels.append(result.train.label)
    return dict(found.values())


def write_architectures(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Write `folder`/architecture-<variant>.{svg,png}, one of each architecture."""
    models = {result.train.variant: study.runs[name].model for name, result in reversed(results.items())}
    for variant, labels in architectures(study, results).items():
        draw_architecture(folder, f"architecture-{variant}", some(labels), models[variant])


def draw_architecture(folder: Path, name: str, label: str, config: ModelConfig) -> None:
    """Write `folder`/`name`.{svg,png}: the diagram of `config`."""
    groups = parameter_groups(build_on_meta(config))
    below, above, parts = _below(config, groups), _above(config, groups), _parts(config, groups)
    notes = _notes(config, groups)
    row = min(0.3, max(0.14, 3.2 / config.layers))
    column = sum(box.height + _GAP for box in (*below, *above)) + config.layers * row + 0.9
    panel = _panel_height(parts) + 0.65 + 0.2 * len(notes)
    height = max(column, panel) + _TITLE
    title = f"{label}: {count(sum(groups.values()))} parameters"
    with figure(folder, name, f"Architecture of {title}", _WIDTH, height, layout=None) as drawing:
        axes = drawing.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(0, height))
        axes.set_axis_off()
        places, core = _column(axes, config, below, above, row, max(0.0, panel - column) / 2)
        if config.tied:
            _tie(axes, places["embedding"], places["head"])
        low = max(0.0, column - panel) / 2
        for line, note in enumerate(reversed(notes)):
            draw_text(axes, _PANEL + 0.1, low + 0.18 + 0.2 * line, note, size=9, colour=_GREY, side="left")
        bottom = core + (config.layers // 2) * row
        _panel(axes, config, parts, low + 0.35 + 0.2 * len(notes), (bottom, bottom + row))
        heading(drawing, title)


def _below(config: ModelConfig, groups: Mapping[str, int]) -> list[Box]:
    """What a token meets before the first layer, from the bottom."""
    width, positions = config.width, config.positions
    boxes = _embedding(config, groups) if config.bytes is None else _byte_encoder(config, groups)
    if positions != "rope":
        number = f"{groups['positions']:,}" if positions == "learned" else "none"
        shape = f"{config.context} × {width}"
        boxes.append(Box(f"+ {positions} positions", shape, number, group_colour("positions")))
    return boxes


def _embedding(config: ModelConfig, groups: Mapping[str, int]) -> list[Box]:
    vocabulary, width, rank = config.vocab_size, config.width, config.embedding_rank
    shape = f"{vocabulary:,} × {width}" if rank is None else f"{vocabulary:,} × {rank}, then {rank} × {width}"
    title = "token embedding" if rank is None else "factorized embedding"
    colour = group_colour("token embedding")
    return [Box(title, shape, f"{groups['token embedding']:,}", colour, name="embedding")]


def _byte_encoder(config: ModelConfig, groups: Mapping[str, int]) -> list[Box]:
    own, colour = config.bytes, group_colour("byte encoder")
    embedding = group_colour("byte embedding")
    shape, number = f"{config.vocab_size} × {own.width}", f"{groups['byte embedding']:,}"
    return [
        Box("byte embedding", shape, number, embedding, name="embedding"),
        Box("chunk encoder", _byte_blocks(config, own.encoder_layers), f"{groups['byte encoder']:,}", colour),
        Box(f"{own.pooling} pooling, {own.width} → {config.width} a chunk", "", "", colour, _THIN),
    ]


def _byte_blocks(config: ModelConfig, layers: int) -> str:
    own = config.bytes
    return f"{layers} layer{'s'[: layers > 1]} of {own.width}, {own.heads} heads, FFN {own.ffn_width}"


def _above(config: ModelConfig, groups: Mapping[str, int]) -> list[Box]:
    """What a token meets after the last layer."""
    width, rank, embedding = config.width, config.embedding_rank, "token embedding"
    boxes = [Box(f"final {_NORMS[config.norm]}", "", "", group_colour("norms"), _THIN)]
    if config.bytes is not None:
        width, embedding, layers = config.bytes.width, "byte embedding", config.bytes.decoder_layers
        number, colour = f"{groups['byte decoder']:,}", group_colour("byte decoder")
        boxes.append(Box("byte decoder", _byte_blocks(config, layers), number, colour))
    vocabulary = f"{config.vocab_size:,}"
    shape = f"{width} × {vocabulary}" if rank is None else f"{width} × {rank}, then {rank} × {vocabulary}"
    if config.logit_softcap:
        shape += f", capped at {config.logit_softcap:g}"
    number = "same matrix" if config.tied else f"{groups['head']:,}"
    return [
        *boxes,
        Box("head", shape, number, group_colour(embedding if config.tied else "head"), name="head"),
    ]


def _column(
    axes: Axes, config: ModelConfig, below: Sequence[Box], above: Sequence[Box], row: float, low: float
) -> tuple[dict[str, Span], float]:
    """Draw the model from `low` up; the lower and upper edges of named boxes, and the lower of the layers."""
    middle = (_LEFT + _RIGHT) / 2
    places: dict[str, Span] = {}
    y = low + 0.48
    units, following = ("tokens", "next token") if config.bytes is None else _BYTE_UNITS
    draw_text(axes, middle, low + 0.18, f"{units}, {config.context} at most", colour=_GREY)

    def stack(boxes: Sequence[Box]) -> None:
        nonlocal y
        for box in boxes:
            draw_arrow(axes, (middle, y - _GAP + 0.02), (middle, y))
            draw_box(axes, _LEFT, y, _RIGHT - _LEFT, box)
            places[box.name] = (y, y + box.height)
            y += box.height + _GAP

    stack(below)
    core = y
    draw_arrow(axes, (middle, y - _GAP + 0.02), (middle, y))
    _layers(axes, config, y, row)
    y = core + config.layers * row + _GAP
    stack(above)
    draw_arrow(axes, (middle, y - _GAP + 0.02), (middle, y))
    draw_text(axes, middle, y + 0.12, following, colour=_GREY)
    return places, core


def _layers(axes: Axes, config: ModelConfig, bottom: float, row: float) -> None:
    """A row a layer, the first at the bottom: attention and FFN, coloured and numbered where shared."""
    half = (_RIGHT - _LEFT) / 2
    size = 9 if row >= 0.2 else 7
    for place, (part, name) in enumerate(_NETWORKS.items()):
        homes = config.homes[part]
        shared = [home for home in dict.fromkeys(homes) if homes.count(home) > 1]
        adapters = config.adapters(part)
        for layer, home in enumerate(homes):
            number = shared.index(home) + 1 if home in shared else None
            colour = tint(_SETS[(number - 1) % len(_SETS)], 0.55) if number else group_colour(name)
            x, y = _LEFT + place * half, bottom + layer * row
            axes.add_patch(Rectangle((x, y), half, row, facecolor=colour, edgecolor="white", linewidth=1.2))
            if row >= 0.14:
                text = f"{name} {number}" if number else name
                draw_text(axes, x + (half - (0.45 if adapters else 0)) / 2, y + row / 2, text, size=size)
            if adapters:
                tab = (x + half - 0.47, y + 0.025)
                colour = group_colour("adapters")
                axes.add_patch(Rectangle(tab, 0.45, row - 0.05, facecolor=colour, edgecolor="none"))
                if row >= 0.14:
                    draw_text(axes, tab[0] + 0.225, y + row / 2, "LoRA", size=size - 1)
    for layer in range(config.layers):
        if config.layers <= 16 or layer in (0, config.layers - 1):
            y = bottom + (layer + 0.5) * row
            draw_text(axes, _LEFT - 0.08, y, str(layer + 1), size=size, colour=_GREY, side="right")


def _tie(axes: Axes, embedding: Span, head: Span) -> None:
    """The one matrix of embedding and head: a line between the two boxes."""
    x, colour = 0.45, "#0072B2"
    low, high = sum(embedding) / 2, sum(head) / 2
    axes.plot([_LEFT, x, x, _LEFT], [low, low, high, high], color=colour, linewidth=2.2, zorder=1)
    axes.text(
        x - 0.13, (low + high) / 2, "tied: one matrix", rotation=90, ha="center", va="center",
        fontsize=9, color=colour,
    )  # fmt: skip


def _attention_lines(config: ModelConfig) -> list[str]:
    heads = f"{config.heads} query heads of {config.head_width}"
    if config.kv_heads != config.heads:
        heads += f", {config.kv_heads} key/value head{'s'[: config.kv_heads > 1]}"
    parts = {
        "RoPE": config.positions == "rope",
        "QK-norm": config.qk_norm,
        "QKV shift": config.qkv_shift,
    }
    used = [name for name, has in parts.items() if has]
    lines = [heads, ", ".join([*used, *_ranks(config, "attention")])]
    if config.value_embeddings:
        lines.append(f"values + an embedding of the token, last {config.value_embeddings} layers")
    return [line for line in lines if line]


def _ffn_lines(config: ModelConfig) -> list[str]:
    lines = [f"{_FFNS[config.ffn]}, {config.width} → {config.ffn_width:,} → {config.width}"]
    ranks = _ranks(config, "ffn")
    return [*lines, ", ".join(ranks)] if ranks else lines


def _ranks(config: ModelConfig, part: str) -> list[str]:
    """The low ranks of a part's matrices: one for all, or each one's."""
    ranks = {name.removeprefix("gate_"): config.rank(part, name) for name in config.matrices[part]}
    if len(set(ranks.values())) == 1:
        return [f"rank {rank}" for rank in set(ranks.values()) if rank]
    return [f"{name} of rank {rank}" for name, rank in ranks.items() if rank]


def _parts(config: ModelConfig, groups: Mapping[str, int]) -> dict[str, _Part]:
    """A block's two networks, from the lower one up."""
    lines = {"attention": _attention_lines(config), "ffn": _ffn_lines(config)}
    parts = {}
    for part, name in _NETWORKS.items():
        width = _BRANCH - (_ADAPTER + 0.2 if config.adapters(part) else 0)
        shown = [_shared_number(groups[name], config.homes[part]), *lines[part]]
        wrapped = [row for line in shown for row in textwrap.wrap(line, int(14.5 * (width - 0.24)))]
        drawing = _HEADS if part == "attention" else 0.0
        parts[part] = _Part(name, wrapped, width, 0.5 + 0.2 * len(wrapped) + drawing)
    return parts


def _panel(axes: Axes, config: ModelConfig, parts: Mapping[str, _Part], bottom: float, layer: Span) -> None:
    """One block in large, from `bottom` up, joined to the layer that it shows."""
    right, top = _WIDTH - 0.2, bottom + _panel_height(parts)
    axes.add_patch(
        FancyBboxPatch(
            (_PANEL, bottom),
            right - _PANEL,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="#fcfcfc",
            edgecolor="#bbbbbb",
            linewidth=1.2,
            zorder=0,
        )
    )
    for near, far in ((layer[0], bottom + 0.12), (layer[1], top - 0.12)):
        axes.plot(
            [_RIGHT, _PANEL], [near, far], color="#bbbbbb", linewidth=1, linestyle=(0, (4, 2)), zorder=0
        )
    axes.plot([_RIGHT, _RIGHT], layer, color="#999999", linewidth=2, zorder=3)

    stream, left = _PANEL + 0.3, _PANEL + 0.6
    axes.plot([stream, stream], [bottom - 0.2, top], color=INK, linewidth=1.4, zorder=1)
    draw_arrow(axes, (stream, top), (stream, top + 0.22))
    y = bottom + 0.15
    for key, part in parts.items():
        middle = left + part.width / 2
        draw_arrow(axes, (stream, y + 0.13), (left, y + 0.13))
        draw_box(axes, left, y, _BRANCH, Box(_NORMS[config.norm], "", "", group_colour("norms"), height=0.26))
        y += 0.26 + 0.16
        draw_arrow(axes, (middle, y - 0.16), (middle, y))
        _network(axes, left, y, part)
        if key == "attention":
            _heads(axes, config, middle, y + 0.17, part.width - 0.3)
        if adapters := config.adapters(key):
            x = left + part.width + 0.2
            draw_text(axes, x - 0.1, y + part.height / 2, "+", size=13)
            draw_box(axes, x, y, _ADAPTER, Box("", "", "", group_colour("adapters"), part.height))
            for line, text in enumerate(("LoRA", f"rank {adapters.rank}")):
                draw_text(axes, x + _ADAPTER / 2, y + part.height / 2 + 0.1 - 0.2 * line, text, size=9)
        y += part.height + 0.2
        axes.plot([middle, middle], [y - 0.2, y], color=INK, linewidth=1.1, zorder=1)
        draw_arrow(axes, (middle, y), (stream + 0.08, y))
        draw_plus(axes, stream, y)
        y += 0.28


def _panel_height(parts: Mapping[str, _Part]) -> float:
    return sum(part.height for part in parts.values()) + 0.15 + 2 * (0.26 + 0.16 + 0.2 + 0.28) - 0.02


def _shared_number(total: int, homes: Sequence[int]) -> str:
    """196,608 in 4 layers; or, where layers share: 98,304 in 2 sets."""
    sets, layers = len(set(homes)), len(homes)
    if sets == layers:
        return f"{total:,} in {layers} layer{'s'[: layers > 1]}"
    return f"{total:,} in {sets} set{'s'[: sets > 1]}"


def _network(axes: Axes, x: float, y: float, part: _Part) -> None:
    draw_box(axes, x, y, part.width, Box("", "", "", group_colour(part.name), part.height))
    top = y + part.height - 0.19
    draw_text(axes, x + 0.12, top, part.name, size=11, side="left", weight="bold")
    for line, text in enumerate(part.lines, start=1):
        draw_text(axes, x + 0.12, top - 0.04 - 0.2 * line, text, size=9, side="left")


def _heads(axes: Axes, config: ModelConfig, middle: float, y: float, width: float) -> None:
    """Query heads as squares, above the key/value head that they share."""
    group = config.heads // config.kv_heads
    slot = min(0.22, width / (config.heads + 0.6 * (config.kv_heads - 1)))
    side, between = 0.8 * slot, 0.6 * slot
    x = middle - (config.heads * slot + (config.kv_heads - 1) * between) / 2
    for _ in range(config.kv_heads):
        below = x + group * slot / 2
        for head in range(group):
            centre = x + (head + 0.5) * slot
            axes.plot([below, centre], [y + side / 2, y + 0.28], color=_GREY, linewidth=0.8, zorder=2)
            draw_square(axes, centre, y + 0.28, side, "#E69F00")
        draw_square(axes, below, y, side, "#8c5a00")
        x += group * slot + between


def _notes(config: ModelConfig, groups: Mapping[str, int]) -> list[str]:
    """Groups that no box counts, and what colours and numbers mean."""
    names = {"adapters": "each layer's own adapters"}
    rest = [name for name in ("value embeddings", "adapters", "shifts", "norms") if name in groups]
    notes = ["also " + ", ".join(f"{names.get(name, name)}: {groups[name]:,}" for name in rest)]
    if any(len(set(homes)) < len(homes) for homes in config.homes.values()):
        notes.append("same colour and number: same weights")
    return notes
