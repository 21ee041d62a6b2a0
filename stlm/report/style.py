"""How plots look: their colours and sizes, the parts that several share, and how they are saved."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from stlm.files import write_text
from stlm.report.names import count
from stlm.report.results import Results
from stlm.report.table import csv_text

# The palette of Okabe & Ito for colour-blind readers, without its yellow, too faint on white.
_COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_LINES = ["-", "--", ":", "-."]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
GREY = "#444444"
# How often people agree with a benchmark's labels.
HUMAN = {"color": "#999999", "linewidth": 3.0, "solid_capstyle": "butt"}
# Of a legend's text: characters to the inch, on average, and how many of them a marker and its margins take.
_CHARACTERS, _ENTRY = 12, 8
# A reference line: the accuracy of guessing, or no difference.
CHANCE = {"color": "#666666", "linewidth": 1.2, "linestyle": (0, (1, 2))}
# The costs of a training, in every plot that compares them.
COST_LOOKS = {
    "parameters": {"color": "#009E73", "marker": "D"},
    "both": {"color": "#56B4E9", "marker": "v"},
    "tokens": {"color": "#0072B2", "marker": "o"},
    "flops": {"color": "#CC79A7", "marker": "^"},
    "seconds": {"color": "#D55E00", "marker": "s"},
}
# Groups of parameters whose colour is the same in every plot; other groups take the colours that are left.
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
    "norms": "#888888",
}
_OTHER_GROUPS = ["#882255", "#DDCC77", "#AA4499", "#6699CC", "#44AA99", "#117733"]

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


def styles(results: Results) -> dict[str, dict[str, object]]:
    """Colour, linestyle and marker by run: a variant's seeds share them, the baseline is black."""
    looks = {}
    for index, runs in enumerate(results.variants.values()):
        line, marker = _LINES[index // len(_COLOURS) % len(_LINES)], _MARKERS[index % len(_MARKERS)]
        look = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": line, "marker": marker}
        looks |= {run.name: look for run in runs}
    return looks


def tint(colour: str, strength: float) -> str:
    """`colour` mixed with white: 0 is white, 1 the colour itself."""
    return to_hex([1 - strength * (1 - channel) for channel in to_rgb(colour)])


def group_colours(groups: Iterable[str], strength: float = 0.6) -> dict[str, str]:
    """A colour for each group of parameters, light enough to write on."""
    others = cycle(_OTHER_GROUPS)
    return {group: tint(_GROUPS.get(group) or next(others), strength) for group in dict.fromkeys(groups)}


def legend_entry(label: str, **look: object) -> Line2D:
    """A legend's entry for a marker; with a `linestyle`, for a line."""
    return Line2D([], [], label=label, **({"color": GREY, "linestyle": "none", "markersize": 7} | look))


def plain_log_ticks(axes: Axes) -> None:
    """Numbers as people write them on a logarithmic axis of values, not powers of ten."""
    low, high = axes.get_ylim()
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    if high / low > 4:
        steps = (1, 2, 5) if high / low < 1000 else (1,)  # labels of four decades and more would touch
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def count_axis(axis: Axis, ticks: int = 5) -> None:
    """About `ticks` round numbers on an axis of counts, written as 10k or 2.5M."""
    axis.set_major_locator(MaxNLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def variant_rows(axes: Axes, labels: Sequence[str], bands: bool = True) -> None:
    """Make the vertical axis a list of names from the top; `bands`: with every second row in grey."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    for row in range(1, len(labels) if bands else 0, 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=0)


class Dot(NamedTuple):
    """A value in a row of a plot. `look`: its marker; `intervals`: bounds, and how wide the line is drawn."""

    row: float
    value: float
    look: Mapping[str, Any]
    intervals: Sequence[tuple[tuple[float, float], Mapping[str, Any]]] = ()

    def draw(self, axes: Axes) -> None:
        """Draw it; intervals end in butts, so that lines end where they do."""
        for bounds, look in self.intervals:
            line = {"color": self.look["color"], "solid_capstyle": "butt", "zorder": 2} | look
            axes.plot(bounds, [self.row, self.row], **line)
        look = {"markersize": 7, "zorder": 4} | self.look | {"linestyle": "none"}
        axes.plot([self.value], [self.row], **look)


def panels_of(drawing: Figure, number: int, columns: int, **shared: bool) -> list[Axes]:
    """A grid of `number` panels; places that are left in its last row stay empty."""
    grid = drawing.subplots(-(-number // columns), columns, squeeze=False, **shared)
    for axes in grid.flat[number:]:
        axes.set_axis_off()
    return list(grid.flat[:number])


def draw_differences(
    drawing: Figure, panels: Mapping[str, Sequence[Dot]], labels: Sequence[str], unit: str, columns: int
) -> None:
    """A panel of differences from zero for each title of `panels`, with a row for each label."""
    grid = panels_of(drawing, len(panels), columns, sharex=True, sharey=True)
    for place, (axes, (title, dots)) in enumerate(zip(grid, panels.items(), strict=True)):
        axes.set_title(title, loc="left")
        axes.axvline(0, zorder=1, **CHANCE)
        for dot in dots:
            dot.draw(axes)
        variant_rows(axes, labels)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        signed = FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if x else "0")
        axes.xaxis.set_major_formatter(signed)
        if place + columns >= len(panels):  # the lowest of its column
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel(unit)


@contextmanager
def figure(
    folder: Path, name: str, title: str, width: float, height: float, heading: str | None = None
) -> Iterator[Figure]:
    """A figure (inches) to draw on, saved as `folder`/`name`.svg when the block ends without an error.

    `heading` (default: `title`) is shown above it, on as many lines as its width requires; "": nothing is.
    """
    with matplotlib.rc_context(_RC):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawing)
        if shown := title if heading is None else heading:
            drawing.suptitle(textwrap.fill(shown, int(9.5 * width)), fontsize=13, x=0.01, ha="left")
        yield drawing
        # Once: savefig would lay the figure out twice more, to the same places, and with any engine, even one
        # that does nothing ("none"), draw it twice.
        drawing.get_layout_engine().execute(drawing)
        drawing.set_layout_engine(None)
        # No date and no version: the same numbers give the same bytes.
        drawing.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None, "Title": title})


def legend(drawing: Figure, handles: Sequence[Artist], columns: int = 1, **more: object) -> None:
    """A legend below the figure."""
    drawing.legend(handles=handles, loc="outside lower center", ncols=columns, **more)


def legend_columns(handles: Sequence[Artist], width: float) -> int:
    """The number of columns, three at most, in which a legend's labels fit into `width` inches."""
    lengths = [len(handle.get_label()) for handle in handles]
    for columns in range(min(3, len(lengths)), 1, -1):
        widest = [max(part) for part in np.array_split(lengths, columns)]
        if sum(widest) + _ENTRY * columns <= _CHARACTERS * width:
            return columns
    return 1


def legend_height(handles: Sequence[Artist], width: float) -> float:
    """Inches of a legend in as many columns as fit into `width` inches."""
    return 0.25 * -(-len(handles) // legend_columns(handles, width))


def write_data(folder: Path, name: str, records: Sequence[Mapping[str, object]]) -> None:
    """Write `folder`/data/`name`.csv, the numbers of a plot.

    `value` must be the last key: it is the column that DVC plots unless told otherwise.
    """
    write_text(folder / "data" / f"{name}.csv", csv_text(records))
