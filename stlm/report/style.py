"""How plots look: one place for colours, sizes and deterministic output."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stlm.report.results import RunResult

# Okabe & Ito's colours, told apart by colour-blind readers too; the yellow is too faint on white.
_COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_LINES = ["-", "--", ":", "-."]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
HUMAN = {"color": "#999999", "linewidth": 3.0, "solid_capstyle": "butt"}
# A position that runs are held against: what guessing scores, no difference.
CHANCE = {"color": "#666666", "linewidth": 1.2, "linestyle": (0, (1, 2))}
# The costs of a training, wherever they are drawn together.
COST_LOOKS = {
    "parameters": {"color": "#009E73", "marker": "D"},
    "both": {"color": "#56B4E9", "marker": "v"},
    "tokens": {"color": "#0072B2", "marker": "o"},
    "flops": {"color": "#CC79A7", "marker": "^"},
    "seconds": {"color": "#D55E00", "marker": "s"},
}
# Where parameters are (stlm.model.counts.parameter_groups); a group not named here is grey.
_GROUPS = {
    "token embedding": "#0072B2",
    "byte embedding": "#332288",
    "byte encoder": "#F0E442",
    "positions": "#56B4E9",
    "value embeddings": "#7B6BB0",
    "attention": "#E69F00",
    "FFN": "#009E73",
    "adapters": "#CC79A7",
    "byte decoder": "#A0522D",
    "head": "#D55E00",
}

_RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # text stays text: searchable, readable aloud, small
    "svg.hashsalt": "stlm",  # the same ids, hence the same bytes, in every run
    "savefig.dpi": 144,
}


def styles(results: Mapping[str, RunResult]) -> dict[str, dict[str, object]]:
    """Colour, linestyle and marker by run: a variant's seeds share them, the baseline is black."""
    variants = list(dict.fromkeys(result.train.variant for result in results.values()))
    by_variant = {}
    for index, variant in enumerate(variants):
        by_variant[variant] = {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _LINES[index // len(_COLOURS) % len(_LINES)],
            "marker": _MARKERS[index % len(_MARKERS)],
        }
    return {name: by_variant[result.train.variant] for name, result in results.items()}


def tint(colour: str, strength: float) -> str:
    """`colour` mixed with white: 0 is white, 1 the colour itself."""
    return to_hex([1 - strength * (1 - channel) for channel in to_rgb(colour)])


def group_colour(group: str, strength: float = 0.3) -> str:
    """The colour of a group of parameters, light enough to write on."""
    return tint(_GROUPS.get(group, "#888888"), strength)


def plain_log_ticks(axes: Axes) -> None:
    """Numbers as people write them on a logarithmic axis of values, not powers of ten."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def variant_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Make the vertical axis a list of names from the top, with a band behind every second."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    for row in range(1, len(labels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=0)


@contextmanager
def figure(
    folder: Path,
    name: str,
    title: str,
    width: float,
    height: float,
    png: bool = True,
    layout: str | None = "constrained",
) -> Iterator[Figure]:
    """A figure (inches) to draw on, saved as `folder`/`name`.svg and .png when the block ends well."""
    with matplotlib.rc_context(_RC):
        drawing = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(drawing)
        yield drawing
        engine = drawing.get_layout_engine()
        if engine is not None:
            # Once for both files: savefig would draw each once more, to the same places.
            engine.execute(drawing)
            drawing.set_layout_engine("none")
        # No date and no version: the same numbers give the same bytes.
        drawing.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None, "Title": title})
        if png:
            drawing.savefig(folder / f"{name}.png", metadata={"Software": None, "Title": title})


def heading(drawing: Figure, title: str) -> None:
    """The figure's title, at the left, in as many lines as its width asks for."""
    characters = int(9.5 * drawing.get_figwidth())  # of 13 points
    drawing.suptitle(textwrap.fill(title, characters), fontsize=13, x=0.01, ha="left")
