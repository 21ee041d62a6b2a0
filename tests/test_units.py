"""Numbers for people: sizes, counts, and tables for the terminal."""

import pytest

from stlm.text_table import text_table
from stlm.units import byte_size, count


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (8_589_934_592, "8.59 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_bytes_have_the_unit_that_keeps_them_below_a_thousand(n_bytes, shown):
    assert byte_size(n_bytes) == shown


def test_digits_are_as_asked():
    assert byte_size(715_269, digits=4) == "715.3 kB"
    assert byte_size(4_801_234, digits=4) == "4.801 MB"
    assert (count(49_850_368), count(49_850_368, digits=3)) == ("49.85M", "49.9M")


def test_columns_of_a_table_are_aligned_on_their_side():
    rows = [("a", "count", "note"), ("longer", "7", "x"), ("b", "1,000", "")]
    assert text_table(rows, left={0, 2}) == ["a       count  note", "longer      7  x", "b       1,000"]
    assert text_table(rows[:2], gap="|") == ["a     |count|note", "longer|    7|   x"]


def test_rows_have_equally_many_cells():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        text_table([("a", "b"), ("c",)])
