"""Names beside the points of a plot, none on top of another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Where a name may stand: at these distances (points) from its mark, in these directions, the best first.
_DISTANCES = (9, 15, 24, 36, 50, 66, 84, 104, 126, 150)
_DIRECTIONS = (0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158, 68, -68, 112, -112)
# From here on a line leads from the name to its mark.
_LEADER = 20
# A pixel that a name hides is as bad as so many pixels' width of a name whose line to its mark is crossed.
_HIDING = 20
# A mark reaches so far (points) around its point.
_MARK = 5


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
    inside = np.array(axes.get_window_extent(renderer).extents)
    marks = axes.transData.transform(np.array(points, float))
    around = _MARK * pixel
    taken = []
    for (x, _), (low, high) in zip(points, spans, strict=True):
        ends = axes.transData.transform(np.array([(x, low), (x, high)], float))
        taken.append([*(ends[0] - around), *(ends[1] + around)])
    for place in sorted(range(len(points)), key=lambda own: (-marks[own][1], marks[own][0])):
        text = axes.annotate(names[place], points[place], fontsize=size)
        extent = text.get_window_extent(renderer)
        text.remove()
        others = np.array(taken[:place] + taken[place + 1 :]).reshape(-1, 4)
        own = np.array(taken[place])
        chosen, side, box = _best_place(
            marks[place], (extent.width, extent.height), pixel, own, others, inside
        )
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            names[place],
            points[place],
            xytext=chosen,
            textcoords="offset points",
            fontsize=size,
            ha=side,
            va="center",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            annotation_clip=False,
            arrowprops=line if math.hypot(*chosen) > _LEADER else None,
        ).set_in_layout(False)
        taken.append(box)


def _best_place(
    mark: np.ndarray,
    extent: tuple[float, float],
    pixel: float,
    own: np.ndarray,
    others: np.ndarray,
    inside: np.ndarray,
) -> tuple[tuple[float, float], str, list[float]]:
    """The name's offset in points, the side that it is aligned at, and its box in pixels (x0, y0, x1, y1).

    The first place at which it hides nothing of the boxes `own` and `others` [n, 4], leaves `inside` nowhere,
    and no line to it crosses another's box; or else the place where that comes to least.
    """
    best = math.inf, (0.0, 0.0), "left", [0.0] * 4
    everything = np.vstack([others, own])
    for distance in _DISTANCES:
        for direction in _DIRECTIONS:
            angle = math.radians(direction)
            offset = distance * math.cos(angle), distance * math.sin(angle)
            side = "left" if offset[0] > 1 else "right" if offset[0] < -1 else "center"
            end = mark + pixel * np.array(offset)
            left = end[0] - {"left": 0.0, "right": extent[0], "center": extent[0] / 2}[side]
            box = np.array([left, end[1] - extent[1] / 2, left + extent[0], end[1] + extent[1] / 2])
            outside = extent[0] * extent[1] - _common(box, inside[None])
            cost = _HIDING * (_common(box, everything) + outside)
            if distance > _LEADER:
                cost += extent[0] * _crossings(mark, end, others)
            if cost < best[0]:
                best = cost, offset, side, box.tolist()
            if cost <= 0.5:
                return best[1:]
    return best[1:]


def _common(box: np.ndarray, others: np.ndarray) -> float:
    """Pixels that a box shares with others [n, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.maximum(sides, 0), axis=1).sum())


def _crossings(start: np.ndarray, end: np.ndarray, boxes: np.ndarray) -> int:
    """How many boxes [n, 4] a straight line goes through, looked at in 20 places of it."""
    places = start + np.linspace(0, 1, 20)[:, None, None] * (end - start)
    within = (places > boxes[:, :2]) & (places < boxes[:, 2:])
    return int(within.all(axis=2).any(axis=0).sum())
