"""Heat maps of metrics with several values a layer, such as the load of its experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from stlm.report.style import figure

_NUMBERED = re.compile(r"(.+)_([1-9][0-9]*)")
# Cells have labels if a row has at most so many: more would overlap.
_MOST_LABELS = 16


def numbered_columns(watch: pd.DataFrame) -> dict[str, list[str]]:
    """Name -> the columns NAME_1, NAME_2, ... of watch.csv that have figures, in their order."""
    found: dict[str, dict[int, str]] = {}
    for column in watch:
        match = _NUMBERED.fullmatch(column)
        if match and watch[column].notna().any():
            found.setdefault(match[1], {})[int(match[2])] = column
    return {name: [columns[number] for number in sorted(columns)] for name, columns in found.items()}


def draw_heat_maps(
    folder: Path, name: str, title: str, watch: pd.DataFrame, groups: Mapping[str, Sequence[str]]
) -> None:
    """Write `folder`/`name`.svg: a panel for each group of columns, as last measured; layers from the top."""
    last = {key: _last(watch, columns) for key, columns in groups.items()}
    heights = [1.0 + 0.3 * len(rows) for rows in last.values()]
    with figure(folder, name, title, 9.5, 0.6 + sum(heights)) as drawing:
        grid = drawing.subplots(len(last), 1, squeeze=False, height_ratios=heights)
        for axes, (key, rows) in zip(grid[:, 0], last.items(), strict=True):
            values = rows[list(groups[key])].to_numpy(float)
            image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
            for (layer, number), value in np.ndenumerate(
                values if values.shape[1] <= _MOST_LABELS else np.empty((0, 0))
            ):
                colour = "black" if value > 0.6 * values.max() else "white"
                axes.text(number, layer, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=9)
            axes.set_title(f"{key.replace('_', ' ')}, step {rows['step'].iloc[0]:,}", loc="left")
            axes.set_yticks(range(len(rows)), list(rows["layer"]))
            axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x + 1:.0f}")
            axes.grid(False)
            axes.tick_params(length=0)
            drawing.colorbar(image, ax=axes, pad=0.01).outline.set_visible(False)


def _last(watch: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of the last step that has figures in `columns`."""
    rows = watch.dropna(subset=list(columns))
    return rows[rows["step"] == rows["step"].max()]
