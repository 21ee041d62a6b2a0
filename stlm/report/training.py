"""A page for each run on how it trained: plots of its curve and of its layers, and its loss spikes."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Sequence
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
from stlm.report.heat_maps import draw_heat_maps, numbered_columns
from stlm.report.names import count, plural
from stlm.report.results import Results, RunResult
from stlm.report.schema import LossSpike
from stlm.report.style import CHANCE, count_axis, figure, panels_of, plain_log_ticks
from stlm.report.table import Table, html_document, html_table

# Points of a line at most: more do not show, and a page has many lines.
_MOST_POINTS = 250
_BLUE, _ORANGE, _RED = "#0072B2", "#E69F00", "#D55E00"
_OUTER = {
    "embedding": {"color": "#000000", "linestyle": "--", "label": "embedding"},
    "head": {"color": "#777777", "linestyle": ":", "label": "head"},
}
# Column of watch.csv -> title of its panel, its axis, whether the axis is logarithmic. Other columns are
# drawn under their names.
_PANELS = {
    "residual_rms": ("residual stream after the layer", "root mean square", True),
    "weight_rms": ("weights", "root mean square", True),
    "attention_rms": ("attention's output", "root mean square", True),
    "ffn_rms": ("feed-forward network's output", "root mean square", True),
    "attention_logit_max": ("largest attention logit", "logit", False),
    "attention_entropy": ("entropy of attention weights", "nats, mean", False),
    "grad_norm": ("gradient, before clipping", "Euclidean norm", True),
    "update_ratio": ("update, relative to the weights", "norm / norm", True),
}
# Columns of curve.csv with a panel of their own, that are axes, or that are the validation loss in another
# unit; others, such as parts of the loss and a technique's metrics of the validation text, get one each.
_CURVE = {"step", "tokens", "seconds", "learning_rate", "train_loss", "grad_norm", "tokens_per_second"}
_CURVE |= {"val_loss", "val_bits_per_byte", "val_char_perplexity", "val_token_perplexity"}
_CSS = "img{max-width:100%;height:auto;display:block;margin:1em 0}h1{font-size:20px}table{margin:1em 0}"


def write_training_pages(folder: Path, results: Results) -> None:
    """Write `folder`/<run>.html for each run, with its plots within."""
    for name, run in results.items():
        study = f"study {results.study.name}"
        title = f"{run.label}: how it trained, {study}"
        body = [f"<h1>{html.escape(title)}</h1>", *html_table(_summary(run))]
        if run.train.steps:
            _curve(folder, f"{name}-curve", f"{run.label}: training, {study}", run)
            text = "Loss, learning rate, gradient norm and speed against optimizer steps"
            body.append(_embedded(folder / f"{name}-curve.svg", text))
        if not run.train.steps:
            body.append("<p>It took no step: its weights are those that it starts from.</p>")
        elif run.watch is not None:
            body += _watched(folder, name, f"{run.label}: layers, {study}", run.watch)
        else:
            text = "No layer was watched (training.watch_every), or an earlier version trained it."
            body.append(f"<p>{text}</p>")
        body += [f"<p>{html.escape(remark)}.</p>" for remark in run.train.remarks]
        if run.train.loss_spikes:
            body += html_table(_spikes(run.train.loss_spikes))
        write_text(folder / f"{name}.html", html_document(title, body, _CSS))


def _watched(folder: Path, name: str, title: str, watch: pd.DataFrame) -> list[str]:
    """The images of watch.csv: lines by layer, and a heat map of the figures that a layer has several of."""
    images, groups = [], numbered_columns(watch)
    lines = watch.drop(columns=[column for columns in groups.values() for column in columns])
    if lines.drop(columns=["step", "layer"]).notna().any(axis=None):
        _layers(folder, f"{name}-layers", title, lines)
        text = "Activations, weights and gradients by layer against optimizer steps"
        images.append(_embedded(folder / f"{name}-layers.svg", text))
    if groups:
        draw_heat_maps(folder, f"{name}-heat", title, watch, groups)
        text = f"By layer and number: {', '.join(groups).replace('_', ' ')}"
        images.append(_embedded(folder / f"{name}-heat.svg", text))
    return images


def _embedded(svg: Path, text: str) -> str:
    """The image in HTML, where it needs no file: `svg` is removed. `text` describes it."""
    data = b64encode(svg.read_bytes()).decode()
    svg.unlink()
    return f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}">'


def _summary(run: RunResult) -> Table:
    train, curve, norms = run.train, run.curve, run.curve["grad_norm"]
    validated, spikes = curve.dropna(subset="val_loss"), train.loss_spikes
    computed = [train.device, train.precision, "compiled" if train.compiled else None]
    computed += ["kernels in C" if train.kernels else None, train.threads and plural(train.threads, "thread")]
    computed += [f"{train.processes} processes" if train.processes > 1 else None]
    gradients = f"{norms.median():.3g} (median), {norms.max():.3g} (largest)" if train.steps else "–"
    rows = {
        "run": train.run,
        "seed": str(train.seed),
        "text": f"{train.corpus}, {train.tokenizer}",
        "parameters": f"{train.parameters.total:,}"
        + (f", of which a token uses {train.parameters.active:,}" if train.parameters.active else "")
        + (f"; in training {more:,} more" if (more := train.parameters.training_only) else ""),
        "training": f"{train.steps:,} steps, {count(train.tokens)} tokens, {train.seconds:,.0f} s",
        "speed": f"{train.tokens / train.seconds:,.0f} tokens/s" if train.seconds else "–",
        "on": ", ".join(filter(None, computed)),
        "last training loss": _last(curve["train_loss"].dropna(), " nats a token"),
        "last validation loss": _last(validated["val_loss"], " nats a token"),
        "last validation bits per byte": _last(validated["val_bits_per_byte"]),
        "validation text": "–" if train.validation is None else amount(train.validation),
        "gradient norm": gradients,
        "loss spikes": "not looked for" if spikes is None else str(len(spikes)),
    }
    return Table("facts", "Summary", ["", ""], list(rows.items()), texts=2)


def _last(values: pd.Series, unit: str = "") -> str:
    return f"{values.iloc[-1]:.4f}{unit}" if len(values) else "–"


def _spikes(spikes: Sequence[LossSpike]) -> Table:
    rows = []
    for spike in spikes:
        recovered = "never" if spike.recovered_after is None else f"{spike.recovered_after:,}"
        figures = (f"{spike.loss:.3f}", f"{spike.level:.3f}", f"+{spike.rise:.3f}", f"{spike.grad_norm:.3g}")
        rows.append([f"{spike.step:,}", *figures, recovered])
    header = ["step", "loss", "level before", "largest rise", "gradient norm", "steps until it was back"]
    note = (
        "A spike begins where a step's loss is above the median of the last 10 steps by more than 7 standard "
        "deviations of the noise and by 0.2 nats, and is over when the loss is back at that median."
    )
    return Table("spikes", "Loss spikes", header, rows, [note])


def _thinned(rows: pd.DataFrame) -> pd.DataFrame:
    """At most `_MOST_POINTS` rows, evenly spaced, with the last one."""
    if len(rows) <= _MOST_POINTS:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, _MOST_POINTS).round().astype(int)]


def _finish(axes: Axes, title: str, unit: str, legend: Sequence[Line2D] = ()) -> None:
    """A panel's title, axes and, where its lines or `legend` have labels, its legend, above the lines."""
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.set_xlim(left=0)
    if handles := legend or axes.get_legend_handles_labels()[0]:
        position = {"loc": "lower right", "bbox_to_anchor": (1, 0.99), "ncols": len(handles)}
        spacing = {"borderaxespad": 0.2, "handlelength": 1.4, "columnspacing": 1.0, "handletextpad": 0.5}
        axes.legend(handles=handles, **position, **spacing)


def _curve(folder: Path, name: str, title: str, result: RunResult) -> None:
    """Panels of loss, learning rate, gradient norm, speed and what else training recorded; loss spikes."""
    curve, spikes = result.curve, result.train.loss_spikes or []
    others = [name for name in curve if name not in _CURVE]
    others = [name for name in others if curve[name].notna().any()]
    lines = 2 - (-len(others) // 2)
    rows, validated = _thinned(curve), curve.dropna(subset="val_loss")
    thin = {"color": _BLUE, "linewidth": 1.2}
    with figure(folder, name, title, 9.5, 0.6 + 2.9 * lines) as drawing:
        panels = panels_of(drawing, 4 + len(others), 2, sharex=True)
        loss, rate, gradient, speed, *rest = panels
        loss.plot(rows["step"], rows["train_loss"], label="training", **thin)
        marker = {"marker": "o" if len(validated) <= 60 else "", "markersize": 4}
        loss.plot(validated["step"], validated["val_loss"], color=_RED, label="validation", **marker)
        rate.plot(rows["step"], rows["learning_rate"], color=_BLUE)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        gradient.plot(rows["step"], rows["grad_norm"], **thin)
        if clip := result.train.training.get("clip"):
            gradient.axhline(clip, label="clipped above", zorder=1, **CHANCE)
        for number, spike in enumerate(spikes):
            for axes in (loss, gradient):
                label = None if number else "loss spike"
                axes.axvline(spike.step, color=_ORANGE, linewidth=1.0, alpha=0.7, zorder=1, label=label)
            gradient.plot([spike.step], [spike.grad_norm], color=_ORANGE, marker="v", zorder=3)
        speed.plot(rows["step"], rows["tokens_per_second"], **thin)
        speed.axhline(curve["tokens_per_second"].median(), label="median", zorder=1, **CHANCE)
        count_axis(speed.yaxis)
        for axes in (loss, gradient):
            _logarithmic_if_wide(axes)
        for axes in (rate, speed):
            axes.set_ylim(bottom=0)
        _finish(loss, "loss", "nats a token")
        _finish(rate, "learning rate", "")
        _finish(gradient, "gradient norm", "Euclidean norm")
        _finish(speed, "speed", "tokens a second")
        for axes, column in zip(rest, others, strict=True):
            if column.startswith("val_"):
                axes.plot(validated["step"], validated[column], color=_RED, **marker)
            else:
                axes.plot(rows["step"], rows[column], **thin)
            _finish(axes, column.removeprefix("val_").replace("_", " "), "")
        for axes in panels[2 * (lines - 1) :]:
            axes.set_xlabel("optimizer step")


def _logarithmic_if_wide(axes: Axes) -> None:
    """A logarithmic axis where the values, all above zero, differ by a factor of three or more."""
    low = min((line.get_ydata().min() for line in axes.get_lines() if len(line.get_ydata()) > 2), default=0.0)
    if 0 < 3 * low < axes.dataLim.y1:
        axes.set_yscale("log")
        plain_log_ticks(axes)


def _layers(folder: Path, name: str, title: str, watch: pd.DataFrame) -> None:
    """A panel for each column of watch.csv, a line for each layer; blocks are coloured by their depth."""
    columns = [column for column in watch if column not in ("step", "layer") and watch[column].notna().any()]
    columns.sort(key=lambda column: [*_PANELS, column].index(column))
    blocks = [layer for layer in dict.fromkeys(watch["layer"]) if layer not in _OUTER]
    colours = [colormaps["viridis"](x) for x in np.linspace(0, 0.92, max(len(blocks), 1))]
    looks = {layer: {"color": c} for layer, c in zip(blocks, colours, strict=False)} | _OUTER
    lines = -(-len(columns) // 2)
    with figure(folder, name, title, 9.5, 1.1 + 2.45 * lines) as drawing:
        panels = panels_of(drawing, len(columns), 2, sharex=True)
        outer = [Line2D([], [], linewidth=1.5, **look) for look in _OUTER.values()]
        for place, (axes, column) in enumerate(zip(panels, columns, strict=True)):
            text, unit, logarithmic = _PANELS.get(column, (column.replace("_", " "), "", False))
            for layer, rows in watch.dropna(subset=column).groupby("layer", sort=False):
                shown = _thinned(rows)
                look = {key: value for key, value in looks[layer].items() if key != "label"}
                axes.plot(shown["step"], shown[column], linewidth=1.5, **look)
            if logarithmic and (watch[column].dropna() > 0).any():
                axes.set_yscale("log")
                plain_log_ticks(axes)
            elif watch[column].min() >= 0:
                axes.set_ylim(bottom=0)
            _finish(axes, text, unit, outer if place == 1 else ())
        for axes in panels[-2:]:
            axes.set_xlabel("optimizer step")
            axes.tick_params(axis="x", labelbottom=True)
        _depth_bar(drawing, blocks, colours)


def _depth_bar(drawing: Figure, blocks: Sequence[str], colours: Sequence[tuple]) -> None:
    """A bar of the blocks' colours, numbered."""
    edges = np.arange(len(blocks) + 1) + 0.5
    scale = ScalarMappable(BoundaryNorm(edges, len(blocks)), ListedColormap(colours))
    bar = drawing.colorbar(scale, ax=drawing.axes, location="bottom", shrink=0.55, aspect=40, pad=0.02)
    numbers = [block.rpartition(" ")[2] for block in blocks]
    every = -(-len(blocks) // 16)
    bar.set_ticks(range(1, len(blocks) + 1, every), labels=numbers[::every])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.set_label("block, from the embedding up")
    bar.outline.set_visible(False)
