"""Names beside the points of a plot, none on top of another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

# Where a name may stand: at these distances (points) from its mark, in these directions, the best first.
_DISTANCES = (9, 15, 24, 36, 50, 66, 84, 104, 126, 150)
_DIRECTIONS = (0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158, 68, -68, 112, -112)
# From here on a line leads from the name to its mark.
_LEADER = 20


def label_points(
    drawing: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    spans: Sequence[tuple[float, float]],
    size: float = 9,
) -> None:
    """Write `names` beside `points` (data coordinates), where they hide neither marks nor other names.

    `spans`: from where to where each mark reaches vertically. Call it when all else is drawn: names do not
    move the axes.
    """
    drawing.draw_without_rendering()  # so that the axes have their place
    renderer = drawing.canvas.get_renderer()
    pixel = drawing.dpi / 72
    inside = axes.get_window_extent(renderer)
    places = [tuple(axes.transData.transform(point)) for point in points]
    taken = []
    for (x, _), span in zip(points, spans, strict=True):
        (middle, low), (_, high) = (axes.transData.transform((x, end)) for end in span)
        taken.append(
            Bbox.from_extents(middle - 5 * pixel, low - 5 * pixel, middle + 5 * pixel, high + 5 * pixel)
        )
    for place in sorted(range(len(points)), key=lambda own: (-places[own][1], places[own][0])):
        text = axes.annotate(names[place], points[place], fontsize=size, va="center", zorder=5)
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        chosen, side, box = _free_place(places[place], (extent.width, extent.height), pixel, taken, inside)
        text.remove()
        far = math.hypot(*chosen) > _LEADER
        axes.annotate(
            names[place], points[place], xytext=chosen, textcoords="offset points", fontsize=size,
            ha=side, va="center", zorder=5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
            if far
            else None,
        ).set_in_layout(False)  # fmt: skip
        taken.append(box)


def _free_place(
    mark: tuple[float, float], extent: tuple[float, float], pixel: float, taken: Sequence[Bbox], inside: Bbox
) -> tuple[tuple[float, float], str, Bbox]:
    """The name's offset in points, the side that it is aligned at, and its box in pixels: the first that is
    free, or the one that hides least."""
    best = None
    for distance in _DISTANCES:
        for direction in _DIRECTIONS:
            angle = math.radians(direction)
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            side = "left" if dx > 1 else "right" if dx < -1 else "center"
            left = mark[0] + dx * pixel - {"left": 0, "right": extent[0], "center": extent[0] / 2}[side]
            box = Bbox.from_bounds(left, mark[1] + dy * pixel - extent[1] / 2, *extent)
            hidden = sum(_common(box, other) for other in taken) + (
                box.width * box.height - _common(box, inside)
            )
            if best is None or hidden < best[0]:
                best = hidden, ((dx, dy), side, box)
            if hidden <= 0.5:
                return best[1]
    return best[1]


def _common(one: Bbox, other: Bbox) -> float:
    """Pixels that two boxes share."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height
