import pytest

from stlm.report.names import benchmark_label, bounds, count, p_value, percent


@pytest.mark.parametrize(
    ("number", "text"),
    [(49_850_368, "49.85M"), (999, "999"), (0, "0"), (204_800, "204.8k"), (6_144_000_000, "6.144B")],
)
def test_count(number, text):
    assert count(number) == text


def test_percent_is_signed_on_request_and_never_minus_zero():
    assert percent(0.5574) == "55.7"
    assert percent(0.011, signed=True) == "+1.1"
    assert percent(-0.011, signed=True) == "−1.1"
    assert percent(-0.0001, signed=True) == "0.0"


def test_bounds_are_percents():
    assert bounds(0.5847, 0.6) == "[58.5, 60.0]"
    assert bounds(-0.031, 0.002, signed=True) == "[−3.1, +0.2]"


def test_p_value_and_labels():
    assert [p_value(p) for p in (0.00001, 0.0123, 0.456, 1.0)] == [
        "p < 0.001",
        "p = 0.012",
        "p = 0.46",
        "p = 1.00",
    ]
    assert benchmark_label("arc_easy") == "ARC-easy"
    assert benchmark_label("my_own") == "My own"
