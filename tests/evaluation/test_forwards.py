"""Packed rows hold every sequence, once where they agree, and hide from each token what is not its own."""

import random

import numpy as np
import pytest

from stlm.evaluation.forwards import Forward, SharedPrefixes, pack


def random_forwards(n: int, letters: int = 3, longest: int = 9) -> list[Forward]:
    rng = random.Random(n)
    sequences = {tuple(rng.randrange(letters) for _ in range(rng.randint(1, longest))) for _ in range(n)}
    return [
        Forward(np.array(s, dtype=np.int32), rng.randrange(len(s)), [rng.randrange(9) for _ in range(2)])
        for s in sorted(sequences, key=lambda s: rng.random())
    ]


def common_prefix(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("n", [1, 2, 40, 300])
def test_the_neighbour_shares_most(n):
    forwards = random_forwards(n)
    shared = SharedPrefixes(forwards)
    assert sorted(shared.order) == list(range(len(forwards)))
    seen = []
    for number, common in zip(shared.order, shared.common, strict=True):
        own = forwards[number].tokens
        assert common == max((common_prefix(own, other) for other in seen), default=0)
        seen.append(own)


@pytest.mark.parametrize("capacity", [0, 4, 30, 10_000])
@pytest.mark.parametrize("n", [1, 2, 40, 300])
def test_a_row_lays_each_sequence_out_where_it_sees_itself_alone(n, capacity):
    forwards = random_forwards(n)
    shared = SharedPrefixes(forwards)
    rows = list(pack(forwards, shared.order, shared.common, capacity))
    assert [number for row in rows for number in row.numbers] == shared.order
    for row in rows:
        length = len(row.tokens)
        longest = max(len(forwards[number].tokens) for number in row.numbers)
        assert length <= max(capacity, longest)
        # A token of the row for each distinct beginning.
        beginnings = {tuple(forwards[k].tokens[:i]) for k in row.numbers for i in range(1, longest + 1)}
        assert length == len(beginnings) == sum(new for new, _ in row.segments)
        bounds = np.cumsum([0, *row.counts])
        used = 0
        for number, (new, path), low, high in zip(
            row.numbers, row.segments, bounds[:-1], bounds[1:], strict=True
        ):
            forward = forwards[number]
            assert path[-new:].tolist() == list(range(used, used + new))
            used += new
            assert row.tokens[path].tolist() == forward.tokens.tolist()
            assert row.positions[path].tolist() == list(range(len(forward.tokens)))
            assert row.picked[low:high].tolist() == [*path[forward.start :], path[-1]]
            assert row.targets[low:high].tolist() == [*forward.tokens[forward.start + 1 :], *forward.finals]


def test_unshared_rows_hold_one_sequence_each():
    forwards = random_forwards(50)
    rows = list(pack(forwards, range(len(forwards)), [0] * len(forwards), capacity=0))
    assert [row.numbers for row in rows] == [[number] for number in range(len(forwards))]
    assert all(np.array_equal(r.tokens, f.tokens) for r, f in zip(rows, forwards, strict=True))


def test_log_probabilities_left_to_a_neighbour_come_back():
    """Each log-probability is a function of the tokens up to it: what is shared is the same number."""
    forwards = random_forwards(200)
    value = lambda forward, place: float(hash(tuple(forward.tokens[: place + 2])) % 1000)  # noqa: E731

    def found(forward):
        inner = [value(forward, place) for place in range(forward.start, len(forward.tokens) - 1)]
        return np.array([*inner, -1.0, -2.0])

    shared = SharedPrefixes(forwards)
    assert sum(f.inner for f in shared.forwards) < sum(f.inner for f in forwards)
    restored = shared.restore([found(forward) for forward in shared.forwards])
    for forward, own in zip(forwards, restored, strict=True):
        assert own.tolist() == found(forward).tolist()
