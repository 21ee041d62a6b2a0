"""What diagrams are drawn with: boxes with text, arrows, signs. Places and sizes are in the axes' units."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

INK = "#222222"


@dataclass(frozen=True)
class Box:
    """A part of the left column; `number`: its parameters in words."""

    title: str
    detail: str
    number: str
    colour: str
    height: float = 0.52
    name: str = ""


def draw_box(axes: Axes, x: float, y: float, width: float, box: Box) -> None:
    """The box, its lower left corner at x, y: title and detail at the left, the number at the right."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            box.height,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=box.colour,
            edgecolor="#888888",
            linewidth=1,
            zorder=2,
        )
    )
    if box.detail:
        draw_text(axes, x + 0.12, y + box.height / 2 + 0.1, box.title, side="left", weight="bold")
        draw_text(axes, x + 0.12, y + box.height / 2 - 0.11, box.detail, size=9, side="left")
    elif box.title:
        draw_text(axes, x + width / 2, y + box.height / 2, box.title)
    if box.number:
        draw_text(axes, x + width - 0.12, y + box.height / 2 + 0.1, box.number, size=9, side="right")


def draw_text(
    axes: Axes, x: float, y: float, text: str, size: float = 10, colour: str = INK, side: str = "center",
    weight: str = "normal",
) -> None:  # fmt: skip
    """Text in one line, its middle (or `side`) at x, y; the size in points."""
    axes.text(x, y, text, ha=side, va="center", fontsize=size, color=colour, fontweight=weight, zorder=5)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow with its head at `end`."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            linewidth=1.1,
            color=INK,
            zorder=4,
            shrinkA=0,
            shrinkB=0,
        )
    )


def draw_plus(axes: Axes, x: float, y: float) -> None:
    """A plus in a circle around x, y: a sum."""
    axes.add_patch(Circle((x, y), 0.09, facecolor="white", edgecolor=INK, linewidth=1.2, zorder=4))
    axes.plot([x - 0.05, x + 0.05], [y, y], color=INK, linewidth=1.2, zorder=5)
    axes.plot([x, x], [y - 0.05, y + 0.05], color=INK, linewidth=1.2, zorder=5)


def draw_square(axes: Axes, x: float, y: float, side: float, colour: str) -> None:
    """A square centred at x, its lower edge at y."""
    axes.add_patch(
        Rectangle((x - side / 2, y - side / 2), side, side, facecolor=colour, edgecolor="none", zorder=3)
    )
