"""Our scores are lm_eval's own: the same requests, tokens, log-probabilities, accuracies, standard errors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import harness_parity
import parity
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness_tasks import HARNESS_TASKS, task_manager, write_tasks
from lm_eval.api import metrics
from tiny_run import save_llama
from tricky_items import EXAMS, ITEMS

from stlm.corpora.synthetic import corpus
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.harness_model import StlmLM
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.study.catalogues import load_benchmarks
from stlm.tokens.bpe import train_bpe
from stlm.tokens.tokenizer import Tokenizer, gpt2_tokenizer
from stlm.training.checkpoints import load_checkpoint

CONTEXT = 128
# Real items of a benchmark that are compared; of BLiMP and MMLU two or more a paradigm or subject.
REAL = 12


class Sides(NamedTuple):
    """One model, as we and as lm_eval load it."""

    ours: TokenModel
    theirs: harness_parity.RecordingHFLM


def _sides(folder: Path, tokenizer: Tokenizer) -> Sides:
    checkpoint = save_llama(folder, tokenizer, CONTEXT)
    export_llama(checkpoint, folder / "llama")
    transformer, _ = load_checkpoint(checkpoint)
    return Sides(
        TokenModel(transformer, RequestEncoder(tokenizer)), harness_parity.RecordingHFLM(folder / "llama")
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return _sides(
        tmp_path_factory.mktemp("trained"), train_bpe("bpe-800", [*corpus(0, 300)["text"], str(ITEMS)])
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, mirror: Path) -> Sides:
    return _sides(tmp_path_factory.mktemp("gpt2"), gpt2_tokenizer(mirror / "tokenizers" / "gpt2"))


@pytest.fixture(params=["bpe", "gpt2"])
def sides(request: pytest.FixtureRequest) -> Sides:
    return request.getfixturevalue("trained" if request.param == "bpe" else "gpt2")


def _prepare(sides: Sides, name: str, raw: Path, folder: Path, share: float = 1.0) -> harness_parity.Sample:
    return harness_parity.prepare(name, raw, folder, sides.ours.encoder, CONTEXT, share, seed=3)


def _tricky(sides: Sides, name: str, folder: Path) -> harness_parity.Sample:
    split, rows = ITEMS[name]
    (folder / name).mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{split}.parquet")
    return _prepare(sides, name, folder / name, folder / "both")


def _check(result: dict) -> None:
    assert result["requests_text_differs"] == result["requests_tokens_differ"] == 0
    assert 0 < result["logprob_max_difference"] < 2e-4
    for metric in result["metrics"].values():
        assert metric["picks_differ"] == 0
        own, their = metric["stlm_first_of_ties"], metric["lm_eval"]
        assert own["value"] == pytest.approx(their["value"], rel=1e-12)
        assert own["stderr"] == pytest.approx(their["stderr"], rel=1e-9)
        assert metric["items_credited_otherwise"] <= metric["items_tied"]
    assert harness_parity.agrees(result)


@pytest.mark.parametrize("name", ITEMS)
def test_tricky_items(tmp_path: Path, sides: Sides, name: str) -> None:
    sample = _tricky(sides, name, tmp_path)
    result = harness_parity.compare(sides.ours, sides.theirs, sample)
    _check(result)
    assert result["items"] + result["items_left_out"] == len(ITEMS[name][1])
    assert result["requests"] == sum(len(item.options) for item in sample.items)
    assert result["items_truncated"] >= 1 or name == "blimp"
    assert set(result["metrics"]) == (
        {"acc", "acc_norm"} if "arc" in name or name == "hellaswag" else {"acc"}
    )


def test_ties_are_counted(tmp_path: Path, trained: Sides) -> None:
    """Two pairs of options and a pair of sentences are the same text: 1/k here, the first of them there."""
    result = harness_parity.compare(trained.ours, trained.theirs, _tricky(trained, "hellaswag", tmp_path))
    assert result["metrics"]["acc"]["items_tied"] >= 1
    assert result["items_left_out"] == 1  # lm_eval refuses an ending longer than the context


def test_the_reference_sees_what_the_exported_folder_says(sides: Sides) -> None:
    eot = sides.ours.encoder.tokenizer.eot
    assert sides.theirs.prefix_token_id == sides.theirs.eot_token_id == eot
    assert sides.theirs.max_length == CONTEXT
    assert sides.theirs.tok_encode("<|endoftext|> x") == sides.ours.encoder.tokenizer.encode(
        "<|endoftext|> x"
    )


def test_a_difference_is_found(tmp_path: Path, trained: Sides) -> None:
    sample = _tricky(trained, "winogrande", tmp_path)
    item = sample.items[0]
    changed = item._replace(options=(item.options[0]._replace(continuation=" other"), item.options[1]))
    result = harness_parity.compare(
        trained.ours, trained.theirs, sample._replace(items=[changed, *sample.items[1:]])
    )
    assert result["requests_text_differs"] == 1 and result["logprob_max_difference"] > 0.1
    assert not harness_parity.agrees(result)

    sample.encoded[1][0].tokens[-1] += 1
    result = harness_parity.compare(trained.ours, trained.theirs, sample)
    assert result["requests_text_differs"] == 0 and result["requests_tokens_differ"] == 1
    assert not harness_parity.agrees(result)


# The tasks of a benchmark; groups of many have the most items.
TASKS = {name: {"blimp": 67, "mmlu": 57}.get(name, 1) for name in ITEMS}


@pytest.mark.parametrize(
    ("sides", "name"),
    [("bpe" if tasks > 1 else "gpt2", name) for name, tasks in TASKS.items()]
    + [
        pytest.param("gpt2" if tasks > 1 else "bpe", name, marks=pytest.mark.exhaustive)
        for name, tasks in TASKS.items()
    ],
    indirect=["sides"],
)
def test_real_items(tmp_path: Path, root: Path, mirror: Path, sides: Sides, name: str) -> None:
    source = next(s for s in load_benchmarks(root)[name].sources if s.kind == "mirror")
    raw = mirror / source.path
    rows = pq.read_metadata(harness_parity.BENCHMARKS[name].files(raw)[1][0]).num_rows
    sample = _prepare(sides, name, raw, tmp_path, REAL / rows)
    assert len(sample.items) >= REAL - 5
    assert len(sample.tasks) == TASKS[name]
    _check(harness_parity.compare(sides.ours, sides.theirs, sample))


@pytest.mark.parametrize("weighted", [True, False])
def test_standard_errors_of_groups(weighted: bool) -> None:
    values = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    groups = [[0, 3], [1, 2, 4, 5, 6], [7, 8]]
    parts = [[values[i] for i in group] for group in groups]
    errors, sizes = [metrics.mean_stderr(part) for part in parts], [len(part) for part in parts]
    found = harness_parity.aggregate(values, groups, weighted)
    if weighted:
        assert found["stderr"] == pytest.approx(metrics.pooled_sample_stderr(errors, sizes), rel=1e-12)
        assert found["value"] == pytest.approx(4.5 / 9)
    else:
        assert found["stderr"] == pytest.approx(metrics.unweighted_mean_stderr(errors), rel=1e-12)
        assert found["value"] == pytest.approx((1 + 0.3 + 0.5) / 3)
    single = harness_parity.aggregate(values, [list(range(9))], True)
    assert single["stderr"] == pytest.approx(metrics.mean_stderr(values), rel=1e-12)
    assert harness_parity.aggregate(values, [[0], list(range(1, 9))], weighted)["stderr"] is None


def test_every_benchmark_has_its_task() -> None:
    assert set(ITEMS) <= set(HARNESS_TASKS)
    # The others are of our own making.
    own = {name for name in harness_parity.BENCHMARKS if not name.startswith(("synthetic", "steps"))}
    assert own - {"last_word"} <= set(HARNESS_TASKS)


def test_the_cloze_form_of_mmlu_has_its_tasks(tmp_path: Path) -> None:
    numbers = write_tasks("mmlu_cloze", pa.Table.from_pylist(EXAMS), tmp_path)
    loaded = task_manager(tmp_path).load(["mmlu_continuation"])
    assert {name: len(task.eval_docs) for name, task in loaded["tasks"].items()} == {
        name: len(own) for name, own in numbers.items()
    }
    task = loaded["tasks"]["mmlu_anatomy_continuation"]
    document = task.eval_docs[0]
    assert task.doc_to_text(document) == "Question: Which bone?\nAnswer:"
    assert task.doc_to_choice(document) == ["the femur", "the femur", "the tibia", "the femur"]


@pytest.mark.parametrize("name", ["blimp", "arc_easy", "mmlu"])
def test_our_model_in_the_harness_gives_the_same(tmp_path: Path, trained: Sides, name: str) -> None:
    """`lm_eval --model stlm` against `lm_eval --model hf`, tasks and metrics the harness's on both sides."""
    sample = _tricky(trained, name, tmp_path)
    ours = StlmLM(run=str(Path(trained.theirs.pretrained).parent), device="cpu")
    own, their = harness_parity.run_harness(ours, sample), harness_parity.run_harness(trained.theirs, sample)
    assert own.texts == their.texts and own.right == their.right
    for mine, other in zip(own.logprobs, their.logprobs, strict=True):
        assert mine == pytest.approx(other, abs=2e-4)
    key = "acc_stderr,none"
    assert own.results["acc,none"] == their.results["acc,none"] and own.results[key] == their.results[key]


def test_the_script_goes_on_from_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe("bpe-300", corpus(0, 20)["text"])
    checkpoint = save_llama(tmp_path / "results" / "own" / "runs" / "tiny", tokenizer, CONTEXT)
    for name in ("winogrande", "arc_challenge"):
        split, rows = ITEMS[name]
        (tmp_path / "raw" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw" / name / f"{split}.parquet")
    output = tmp_path / "parity.json"
    arguments = [
        "parity.py",
        "--model",
        str(checkpoint),
        "--raw",
        str(tmp_path / "raw"),
        "--output",
        str(output),
    ]

    def run(*more: str) -> int:
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        return parity.main()

    assert run("--benchmark", "winogrande") == 0
    first = read_json(output)
    assert list(first["models"]) == ["own/tiny/step-0000001"]
    compared, compare = [], parity.compare
    monkeypatch.setattr(
        parity, "compare", lambda *both: compared.append(both[2].benchmark.name) or compare(*both)
    )
    assert run() == 0
    assert compared == ["arc_challenge"]
    content = read_json(output)
    assert content["summary"]["requests"] == sum(
        result["requests"] for result in content["models"]["own/tiny/step-0000001"]["benchmarks"].values()
    )
    assert content["summary"]["accuracy_max_difference_first_of_ties"] == 0
    assert str(tmp_path) not in output.read_text()
    assert run("--benchmark", "winogrand") == 2
