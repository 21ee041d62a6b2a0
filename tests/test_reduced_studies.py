"""The studies of fewer parameters and of bytes: rows match as their comments say; where runs start from."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from stlm.engines import dvc_stages, train_inputs
from stlm.errors import UserError
from stlm.files import write_json
from stlm.model.family import FAMILY, propose
from stlm.report.equal_cost import is_size
from stlm.study.load import load_study

# Study -> groups of variants with equal parameters, and with equal FLOPs of the whole training.
SIZES = {
    "sharing": [
        ("baseline", "ffn-wide", "ffn-wide-flops", "all-wide", "all-wide-flops"),
        ("groups", "cyclic", "sandwich", "low-rank", "low-rank-flops", "svd", "mid", "mid-flops"),
        ("all", "small", "small-flops"),
    ],
    "paper_sharing": [
        (
            "baseline",
            "ffn-wide",
            "ffn-wide-flops",
            "ffn-deep",
            "ffn-deep-flops",
            "all-wide",
            "all-wide-flops",
        ),
        ("groups", "cyclic"),
        ("ffn", "low-rank", "svd"),
    ],
    "bytes": [
        ("baseline", "bytes-params"),
        ("bytes", "words", "spaces", "stride-4", "attention", "last", "query"),
    ],
    "paper_bytes": [("baseline", "bytes-deep"), ("bytes", "query", "stride-4")],
}
FLOPS = {
    "sharing": [
        ("baseline", "ffn", "all", "groups", "cyclic", "sandwich", "untied"),
        ("baseline", "ffn-wide-flops", "all-wide-flops", "low-rank-flops", "mid-flops", "small-flops"),
    ],
    "paper_sharing": [
        ("baseline", "ffn", "all", "groups", "cyclic", "sandwich", "untied"),
        ("baseline", "ffn-wide-flops", "ffn-deep-flops", "all-wide-flops"),
    ],
    "sizes": [
        ("size-4m", "size-1m-flops", "size-10m-flops"),
    ],
    "paper_sizes": [("size-50m", "size-10m-flops", "size-100m-flops")],
    "bytes": [("baseline", "bytes-flops", "words-flops"), ("bytes", "last", "attention")],
    "paper_bytes": [("bytes", "query")],
}
# Mean bytes of a chunk of the train split of gutenberg_children.
CHUNKS = {"bpe-4096": 3.473, "words": 4.623, "spaces": 5.330, "stride-4": 4.0}


@pytest.fixture
def cut(project):
    """The project with what tells, once the corpus is cut into chunks, how long they are."""
    corpus = "gutenberg_children"
    for tokenizer, size in CHUNKS.items():
        split = {"bytes": round(1e6 * size), "tokens": 1_000_100, "documents": 100}
        meta = {"components": {corpus: {"splits": {"train": split}}}}
        write_json(project / "data" / "tokens" / corpus / tokenizer / "meta.json", meta)


@pytest.mark.parametrize("name", FLOPS)
def test_matched_rows_match(name, cut):
    """Within 2% in parameters, 1% in FLOPs; all else than what is said to differ is equal."""
    runs = load_study(name, ["seeds=[0]"]).runs
    for group in SIZES.get(name, []):
        totals = [runs[variant].parameters.total for variant in group]
        assert max(totals) / min(totals) < 1.02, dict(zip(group, totals, strict=True))
    for group in FLOPS[name]:
        totals = [runs[variant].flops for variant in group]
        assert max(totals) / min(totals) < 1.01, dict(zip(group, totals, strict=True))
    new = [run for run in runs.values() if "start" not in run.depends]
    others = [run for run in new if not re.search("-(flops|time)", run.name)]
    assert len({run.tokens for run in others}) == 1


def test_bytes_cost_what_the_comments_say(cut):
    """Beside the baseline: parameters, those in the place of embedding and head, training FLOPs."""
    said = {
        "bytes": {"bytes": (0.81, None, 1.30)},
        "paper_bytes": {
            "bytes": (None, 0.013, None),
            "dimension-128": (None, 0.043, None),
            "bytes-deep": (0.98, 0.013, 1.04),
        },
    }
    for name, rows in said.items():
        runs = load_study(name, ["seeds=[0]"]).runs
        plain = runs["baseline"]
        for variant, expected in rows.items():
            own = runs[variant]
            found = (
                own.parameters.total / plain.parameters.total,
                own.parameters.embedding / plain.parameters.embedding,
                own.flops / plain.flops,
            )
            for ratio, wanted in zip(found, expected, strict=True):
                assert wanted is None or ratio == pytest.approx(wanted, abs=0.006), (name, variant, found)


@pytest.mark.parametrize(
    ("name", "cost", "expected"),
    [
        ("sharing", "tokens", {"mid", "small"}),
        ("sharing", "flops", {"mid-flops", "small-flops"}),
        ("sizes", "tokens", {"size-1m", "size-10m"}),
        ("sizes", "flops", {"size-1m-flops", "size-10m-flops"}),
    ],
)
def test_reports_take_the_rows_that_are_sizes_of_the_baseline_for_such(name, cost, expected, project):
    study = load_study(name, ["seeds=[0]"])

    def record(run):
        settings = {key: getattr(run, key).model_dump(mode="json") for key in ("model", "training")}
        cost, text = {"tokens": run.tokens, "flops": run.flops}, {"corpus": run.corpus, "data": None}
        train = SimpleNamespace(**settings, **cost, **text, techniques=dict(run.techniques))
        return SimpleNamespace(train=train, aligned=True, shifted=False, same_tokens=True)

    records = {run.variant: record(run) for run in study.runs.values()}
    base = records[study.runs[study.baseline].variant]
    assert {variant for variant, own in records.items() if is_size(own, base, cost)} == expected


def test_sizes_are_the_rules(project):
    for name, vocab_size, sizes in (
        ("sizes", 4096, {"size-1m": 1e6, "size-4m": 4e6, "size-10m": 1e7}),
        ("paper_sizes", 50257, {f"size-{size.lower()}": n for size, n in FAMILY.items()}),
    ):
        runs = load_study(name, ["seeds=[0]"]).runs
        for variant, size in sizes.items():
            found, rule = runs[variant].model, propose(size, vocab_size)
            for key in ("layers", "width", "heads", "kv_heads", "ffn_width"):
                assert getattr(found, key) == getattr(rule, key), (variant, key)
        # Rows of the same FLOPs are these models, trained for longer or shorter.
        longer = [run for variant, run in runs.items() if "-flops" in variant]
        assert longer and all(run.model == runs[run.variant.split("-flops")[0]].model for run in longer)


def test_what_a_run_starts_from_is_trained_first_in_both_engines(project):
    study = load_study("sharing")
    run = study.runs["svd-s1"]
    assert run.depends == {"start": "baseline-s1"}
    tokens = "data/tokens/gutenberg_children/bpe-4096"
    assert train_inputs(study, run) == [tokens, "results/sharing/runs/baseline-s1/checkpoints"]
    assert train_inputs(study, study.runs["low-rank-s1"]) == [tokens]
    stages = dvc_stages(study)
    assert stages["train-sharing-svd-s1"]["deps"] == train_inputs(study, run)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["variants.svd.training.start_from=baselin"],
            "svd-s0: training.start_from: 'baselin' is no.*'baseline'",
        ),
        (["variants.svd.training.start_from=svd"], "a run cannot depend on itself: svd-s0 -> svd-s0"),
        (
            ["variants.svd.training.start_from=small"],
            r"'small' has model.width: 80, the run 128; a model may be cut, not grown",
        ),
        (
            ["variants.svd.training.start_from=groups"],
            r"has model.sharing: {'what': 'all', 'order': 'groups', 'group': 2, .*, the run None",
        ),
        (
            ["variants.low-rank.model.low_rank.ffn=40", "variants.svd.training.start_from=low-rank"],
            r"has model.low_rank: .*40.*, the run .*48",
        ),
        (["variants.svd.corpus=wikitext2"], "has the corpus gutenberg_children, the run wikitext2"),
        (["variants.svd.tokenizer=bytes"], "has the tokenizer bpe-4096, the run bytes"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(overrides, expected, project):
    with pytest.raises(UserError, match=expected):
        load_study("sharing", overrides)


def test_a_rank_that_saves_nothing_with_the_tokenizers_vocabulary_is_refused(project):
    with pytest.raises(
        UserError, match=r"variants.factorized.model.embedding_rank: 125 .*\(4,096 x 128\).*at most 124"
    ):
        load_study("sharing", ["variants.factorized.model.embedding_rank=125"])
