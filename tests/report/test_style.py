"""Legends fit below their figures, and axes have labels that do not touch."""

import pytest
from matplotlib.figure import Figure

from stlm.report.style import legend_columns, legend_entry, legend_height, plain_log_ticks


@pytest.mark.parametrize(
    ("lengths", "columns"),
    [([], 1), ([12], 1), ([12, 12], 2), ([12] * 5, 3), ([40] * 26, 2), ([40, 40, 4, 4], 3), ([60] * 4, 1)],
)
def test_a_legend_has_as_many_columns_as_fit(lengths, columns):
    handles = [legend_entry("x" * length) for length in lengths]
    assert legend_columns(handles, 9.0) == columns
    assert legend_height(handles, 9.0) == 0.25 * -(-len(lengths) // columns)


@pytest.mark.parametrize(("high", "expected"), [(2.0, 1.5), (50.0, 20), (90.0, 0.5), (5000.0, 1000)])
def test_a_logarithmic_axis_has_few_labels(high, expected):
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(0.1 if high > 2 else 1.0, high)
    plain_log_ticks(axes)
    labels = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= high]
    assert any(tick == pytest.approx(expected) for tick in labels)
    assert len(labels) <= 10
