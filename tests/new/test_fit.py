"""What fits a text and a time: the stated rules, on texts and machines of all sizes."""

from __future__ import annotations

import pytest

from stlm.model.counts import parameter_counts
from stlm.new.fit import EPOCHS, LEAST_STEPS, SHAPES, TOKENS_A_PARAMETER, TOKENS_OF_TEXT, Fit, TextSize, fit
from stlm.new.speed import parallel_runs
from stlm.tokens.names import vocabulary_size


def text(size: float, words: int = 10**6, document: int = 2000, most: int = 10**6) -> TextSize:
    ratios = {512: 2.2, 1024: 2.6, 2048: 3.0, 4096: 3.4, 8192: 3.7}
    return TextSize(int(size), words, document, lambda v: ratios.get(v, 4.0) if v <= most else None)


@pytest.mark.parametrize("size", [1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 4e10])
@pytest.mark.parametrize("flops", [0, 1e11, 1e13, 1e15, 1e18, 1e21])
def test_the_rules_hold_for_any_text_and_time(size: float, flops: float) -> None:
    found = fit(text(size), flops)
    assert vocabulary_size(f"bpe-{found.vocabulary}") == found.vocabulary
    assert found.vocabulary <= 512 or found.vocabulary <= size / 1000
    counts = parameter_counts(found.model)
    assert found.vocabulary == 512 or counts.embedding <= counts.total / 2
    assert 32 <= found.context <= 512 and found.context <= max(128, found.model.width)
    assert found.steps >= LEAST_STEPS and found.tokens_a_step % found.context == 0
    if found.steps > LEAST_STEPS:
        assert found.epochs <= EPOCHS * 1.05
        assert found.flops <= flops * 1.05 or found.limit == "least"
    if found.shape != SHAPES[0]:
        wanted = TOKENS_OF_TEXT if found.limit == "text" else TOKENS_A_PARAMETER
        assert found.tokens >= wanted * found.parameters


def test_more_text_or_time_never_means_a_smaller_model() -> None:
    def sizes(found: list[Fit]) -> list[int]:
        return [own.parameters for own in found]

    by_text = sizes([fit(text(10**power), 1e15) for power in range(4, 10)])
    by_time = sizes([fit(text(1e9), 10.0**power) for power in range(11, 20)])
    assert by_text == sorted(by_text) and by_time == sorted(by_time)
    assert by_time[-1] > 50e6 > 1e6 > by_time[0]


def test_what_limits_is_said() -> None:
    assert fit(text(1e6), 1e18).limit == "text"
    assert fit(text(1e9), 1e13).limit == "time"
    assert fit(text(1e9), 0).limit == fit(text(1e4), 1e18).limit == "least"


def test_a_vocabulary_is_one_that_the_text_is_enough_for() -> None:
    assert fit(text(1e8), 1e18).vocabulary > 2048
    assert fit(text(1e8, words=3000), 1e18).vocabulary == 2048
    assert fit(text(1e8, most=1024), 1e18).vocabulary == 1024
    assert fit(text(1e5, most=300), 1e18).vocabulary == 288
    assert fit(text(1e5, most=0), 1e18).vocabulary == 258


def test_short_documents_have_short_rows() -> None:
    assert fit(text(1e8, document=100), 1e18).context == 64
    assert fit(text(1e8, document=700), 1e18).context == 256


def test_runs_share_the_cores_as_snakemake_shares_them(monkeypatch) -> None:
    for cores, runs, expected in ((2, 5, (2, 1)), (16, 5, (5, 3)), (5, 5, (5, 1)), (1, 5, (1, 1))):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert parallel_runs(runs) == expected
