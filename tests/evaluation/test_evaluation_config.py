"""The evaluation section of a study."""

import pytest
from pydantic import ValidationError

from stlm.evaluation.config import EvaluationConfig


def test_benchmarks_as_a_list_or_with_their_own_settings():
    assert EvaluationConfig(benchmarks=["blimp", "mmlu"]) == EvaluationConfig(
        benchmarks={"blimp": {}, "mmlu": None}
    )
    config = EvaluationConfig(benchmarks={"blimp": {"limit": 5}, "mmlu": {}}, limit=50, intermediate_limit=20)
    assert [config.limit_of("blimp", last=last) for last in (True, False)] == [5, 5]
    assert [config.limit_of("mmlu", last=last) for last in (True, False)] == [50, 20]
    assert EvaluationConfig(benchmarks=["mmlu"]).limit_of("mmlu", last=False) is None
    assert EvaluationConfig(benchmarks=["mmlu"], intermediate_limit=9).limit_of("mmlu", last=False) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        {"benchmarks": ["blimp", "blimp"]},
        {"modes": []},
        {"modes": ["harness", "harness"]},
        {"modes": ["accuracy"]},
        {"limit": 0},
        {"perplexity": {"stride": 0}},
        {"benchmarks": {"blimp": {"limits": 5}}},
        {"limits": 5},
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValidationError):
        EvaluationConfig(**wrong)
