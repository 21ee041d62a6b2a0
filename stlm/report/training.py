"""A page a run: how it trained, in figures of its curve and of its layers, and its loss spikes."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stlm.files import write_text
from stlm.report.documents import amount
from stlm.report.names import count
from stlm.report.results import LossSpike, RunResult, run_label
from stlm.report.style import CHANCE, figure, heading, plain_log_ticks
from stlm.report.table import Cell, Table, html_document, html_table
from stlm.study.runs import Study

# More points than this on a line are hardly seen, and a page holds many lines.
_MOST_POINTS = 250
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_OUTER = {
    "embedding": {"color": "#000000", "linestyle": "--", "label": "embedding"},
    "head": {"color": "#777777", "linestyle": ":", "label": "head"},
}
# Column of watch.csv -> title of its panel, its axis, whether the axis is logarithmic.
_PANELS = {
    "residual_rms": ("residual stream after the layer", "root mean square", True),
    "weight_rms": ("weights", "root mean square", True),
    "attention_rms": ("attention's output", "root mean square", True),
    "ffn_rms": ("feed-forward network's output", "root mean square", True),
    "attention_logit_max": ("largest attention logit", "logit", False),
    "attention_entropy": ("entropy of attention weights", "nats, mean", False),
    "grad_norm": ("gradient, before clipping", "Euclidean norm", True),
    "update_ratio": ("update beside the weights", "norm / norm", True),
}
_CSS = "img{max-width:100%;height:auto;display:block;margin:1em 0}h1{font-size:20px}table{margin:1em 0}"


def write_training_pages(folder: Path, study: Study, results: Mapping[str, RunResult]) -> None:
    """Write `folder`/<run>.html for each run, and its figures beside it: <run>-{curve,layers}.svg."""
    for name, result in results.items():
        label = run_label(result, results)
        figures = {f"{name}-curve": "Loss, learning rate, gradient norm and speed against optimizer steps"}
        _curve(folder, f"{name}-curve", f"{label}: training, study {study.name}", result)
        if result.watch is not None:
            figures[f"{name}-layers"] = "Activations, weights and gradients by layer against optimizer steps"
            _layers(folder, f"{name}-layers", f"{label}: layers, study {study.name}", result.watch)
        title = f"{label}: how it trained, study {study.name}"
        write_text(folder / f"{name}.html", _page(folder, title, result, figures))


def _page(folder: Path, title: str, result: RunResult, figures: Mapping[str, str]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>", *html_table(_facts(result))]
    for name, text in figures.items():
        # As data: the page stands alone, in Snakemake's report too.
        data = b64encode((folder / f"{name}.svg").read_bytes()).decode()
        body.append(f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}">')
    if result.watch is None:
        body.append("<p>No layer was looked at (training.watch_every), or by an earlier version.</p>")
    if result.train.loss_spikes:
        body += html_table(_spikes(result.train.loss_spikes))
    return html_document(title, body, _CSS)


def _facts(result: RunResult) -> Table:
    train, curve, norms = result.train, result.curve, result.curve["grad_norm"]
    validated = curve.dropna(subset="val_loss")
    spikes = train.loss_spikes
    where = [
        train.device,
        train.precision,
        *(["compiled"] if train.compiled else []),
        *(["kernels in C"] if train.kernels else []),
        *([f"{train.threads} thread{'s'[: train.threads > 1]}"] if train.threads else []),
        *([f"{train.processes} processes"] if train.processes > 1 else []),
    ]
    facts = {
        "run": train.run,
        "seed": str(train.seed),
        "text": f"{train.corpus}, {train.tokenizer}",
        "parameters": f"{train.parameters.total:,}",
        "training": f"{train.steps:,} steps, {count(train.tokens)} tokens, {train.seconds:,.0f} s",
        "speed": f"{train.tokens / train.seconds:,.0f} tokens/s" if train.seconds else "–",
        "on": ", ".join(where),
        "last training loss": _last(curve["train_loss"], " nats a token"),
        "last validation loss": _last(validated["val_loss"], " nats a token"),
        "last validation bits per byte": _last(validated["val_bits_per_byte"]),
        "validation text": "–" if train.validation is None else amount(train.validation),
        "gradient norm": f"{norms.median():.3g} (median), {norms.max():.3g} (largest)",
        "loss spikes": "not looked for" if spikes is None else str(len(spikes)),
    }
    return Table(
        name="facts",
        title="In short",
        header=["", ""],
        rows=[[Cell(key), Cell(value)] for key, value in facts.items()],
        texts=2,
    )


def _last(values: pd.Series, unit: str = "") -> str:
    return f"{values.iloc[-1]:.4f}{unit}" if len(values) else "–"


def _spikes(spikes: Sequence[LossSpike]) -> Table:
    return Table(
        name="spikes",
        title="Loss spikes",
        header=["step", "loss", "level before", "largest rise", "gradient norm", "steps until it was back"],
        rows=[
            [
                Cell(f"{spike.step:,}"),
                Cell(f"{spike.loss:.3f}"),
                Cell(f"{spike.level:.3f}"),
                Cell(f"+{spike.rise:.3f}"),
                Cell(f"{spike.grad_norm:.3g}"),
                Cell("never" if spike.recovered_after is None else f"{spike.recovered_after:,}"),
            ]
            for spike in spikes
        ],
        notes=[
            "A spike begins where a step's loss is above the median of the last 10 steps by more than 7 "
            "standard deviations of the noise and by 0.2 nats, and is over when the loss is back at that "
            "median."
        ],
    )


def _thinned(rows: pd.DataFrame) -> pd.DataFrame:
    """At most so many rows, evenly, the last one among them."""
    if len(rows) <= _MOST_POINTS:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, _MOST_POINTS).round().astype(int)]


def _steps_axis(axes: Axes, label: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.set_xlim(left=0)
    if label:
        axes.set_xlabel("optimizer step")


def _above(axes: Axes, handles: Sequence[Line2D] = ()) -> None:
    """A legend, of the panel's lines or of `handles`, above it at the right, where no line runs."""
    handles = handles or axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1, 0.99),
            ncols=len(handles),
            borderaxespad=0.2,
            handlelength=1.4,
            columnspacing=1.0,
            handletextpad=0.5,
        )


def _curve(folder: Path, name: str, title: str, result: RunResult) -> None:
    """Four panels: loss, learning rate, gradient norm, speed; spikes marked in the first and the third."""
    curve = result.curve
    rows, validated = _thinned(curve), curve.dropna(subset="val_loss")
    spikes = result.train.loss_spikes or []
    clip = result.train.training.get("clip")
    with figure(folder, name, title, 9.5, 6.4, png=False) as drawing:
        (loss, rate), (gradient, speed) = drawing.subplots(2, 2, sharex=True)
        loss.plot(rows["step"], rows["train_loss"], color=_BLUE, linewidth=1.2, label="training")
        marker = "o" if len(validated) <= 60 else ""
        loss.plot(
            validated["step"],
            validated["val_loss"],
            color=_RED,
            marker=marker,
            markersize=4,
            label="validation",
        )
        loss.set_ylabel("nats a token")
        _headed(loss, "loss")
        rate.plot(rows["step"], rows["learning_rate"], color=_BLUE)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        _headed(rate, "learning rate")
        gradient.plot(rows["step"], rows["grad_norm"], color=_BLUE, linewidth=1.2)
        if clip:
            gradient.axhline(clip, label="clipped above", zorder=1, **CHANCE)
        gradient.set_ylabel("Euclidean norm")
        _headed(gradient, "gradient norm")
        for axes in (loss, gradient):
            _mark_spikes(axes, spikes)
        if spikes:
            points = [[spike.step for spike in spikes], [spike.grad_norm for spike in spikes]]
            gradient.plot(*points, color=_ORANGE, marker="v", linestyle="none", zorder=3)
        speed.plot(rows["step"], rows["tokens_per_second"], color=_BLUE, linewidth=1.2)
        speed.axhline(curve["tokens_per_second"].median(), label="median", zorder=1, **CHANCE)
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y)))
        speed.set_ylabel("tokens a second")
        _headed(speed, "speed")
        for axes in (loss, gradient):
            _logarithmic_if_wide(axes)
        for place, axes in enumerate((loss, rate, gradient, speed)):
            _steps_axis(axes, label=place >= 2)
            _above(axes)
        heading(drawing, title)


def _logarithmic_if_wide(axes: Axes) -> None:
    """A logarithmic axis where the values, all above zero, differ by a factor of three or more."""
    low = min((line.get_ydata().min() for line in axes.get_lines() if len(line.get_ydata()) > 2), default=0.0)
    high = axes.dataLim.y1
    if low > 0 and high > 3 * low:
        axes.set_yscale("log")
        plain_log_ticks(axes)


def _headed(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")


def _mark_spikes(axes: Axes, spikes: Sequence[LossSpike]) -> None:
    for place, spike in enumerate(spikes):
        label = "loss spike" if place == 0 else None
        axes.axvline(spike.step, color=_ORANGE, linewidth=1.0, alpha=0.7, zorder=1, label=label)


def _layers(folder: Path, name: str, title: str, watch: pd.DataFrame) -> None:
    """A panel a figure of watch.csv, a line a layer; blocks are coloured by their depth."""
    panels = {c: p for c, p in _PANELS.items() if c in watch and watch[c].notna().any()}
    blocks = [layer for layer in dict.fromkeys(watch["layer"]) if layer not in _OUTER]
    colours = [colormaps["viridis"](x) for x in np.linspace(0, 0.92, max(len(blocks), 1))]
    looks = {layer: {"color": c} for layer, c in zip(blocks, colours, strict=False)} | _OUTER
    lines = -(-len(panels) // 2)
    with figure(folder, name, title, 9.5, 1.1 + 2.45 * lines, png=False) as drawing:
        grid = drawing.subplots(lines, 2, sharex=True, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_axis_off()
                continue
            column, (name, unit, logarithmic) = list(panels.items())[place]
            for layer, rows in watch.dropna(subset=column).groupby("layer", sort=False):
                shown = _thinned(rows)
                axes.plot(shown["step"], shown[column], linewidth=1.5, **looks[layer])
            if logarithmic and (watch[column].dropna() > 0).any():
                axes.set_yscale("log")
                plain_log_ticks(axes)
            else:
                axes.set_ylim(bottom=0)
            axes.set_ylabel(unit)
            _headed(axes, name)
            _steps_axis(axes, label=place >= len(panels) - 2)
        _above(grid.flat[1], [Line2D([], [], linewidth=1.5, **look) for look in _OUTER.values()])
        _depth_bar(drawing, grid, blocks, colours)
        heading(drawing, title)


def _depth_bar(drawing: Figure, grid: np.ndarray, blocks: Sequence[str], colours: Sequence[tuple]) -> None:
    """A bar of the blocks' colours, numbered."""
    edges = np.arange(len(blocks) + 1) + 0.5
    scale = ScalarMappable(BoundaryNorm(edges, len(blocks)), ListedColormap(colours))
    bar = drawing.colorbar(scale, ax=grid, location="bottom", shrink=0.55, aspect=40, pad=0.02)
    numbers = [int(block.rpartition(" ")[2]) for block in blocks]
    every = -(-len(blocks) // 16)
    bar.set_ticks(range(1, len(blocks) + 1, every), labels=numbers[::every])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.set_label("block, from the embedding up")
    bar.outline.set_visible(False)
