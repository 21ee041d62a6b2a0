"""The studies of fewer parameters: rows match as their comments say; what a run starts from is checked."""

from __future__ import annotations

import pytest

from stlm.errors import UserError
from stlm.model.family import FAMILY, propose
from stlm.pipeline import dvc_stages, train_inputs
from stlm.study import load_study

# Study -> groups of variants with equal parameters, and with equal FLOPs of the whole training.
SIZES = {
    "sharing": [
        ("baseline", "ffn-wide", "ffn-wide-flops", "all-wide", "all-wide-flops"),
        ("groups", "cyclic", "sandwich", "low-rank", "low-rank-flops", "svd"),
        ("all", "small"),
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
}
FLOPS = {
    "sharing": [
        ("baseline", "ffn", "all", "groups", "cyclic", "sandwich", "untied"),
        ("baseline", "ffn-wide-flops", "all-wide-flops", "low-rank-flops"),
    ],
    "paper_sharing": [
        ("baseline", "ffn", "all", "groups", "cyclic", "sandwich", "untied"),
        ("baseline", "ffn-wide-flops", "ffn-deep-flops", "all-wide-flops"),
    ],
    "sizes": [
        ("size-4m", "size-1m-flops", "size-10m-flops"),
        ("size-10m", "size-1m-flops2", "size-4m-flops2"),
    ],
    "paper_sizes": [("size-50m", "size-10m-flops", "size-100m-flops")],
}


@pytest.mark.parametrize("name", FLOPS)
def test_matched_rows_match(name, project):
    """Within 2% in parameters, 1% in FLOPs; all else than what is said to differ is equal."""
    runs = load_study(name, ["seeds=[0]"]).runs
    for group in SIZES.get(name, []):
        totals = [runs[variant].parameters.total for variant in group]
        assert max(totals) / min(totals) < 1.02, dict(zip(group, totals, strict=True))
    for group in FLOPS[name]:
        totals = [runs[variant].flops for variant in group]
        assert max(totals) / min(totals) < 1.01, dict(zip(group, totals, strict=True))
    tokens = {run.tokens for run in runs.values() if "flops" not in run.name and run.origin is None}
    assert len(tokens) == 1
    assert len(runs) <= 20


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
            assert runs[f"{variant}-flops"].model == found if f"{variant}-flops" in runs else True


def test_what_a_run_starts_from_is_trained_first_in_both_engines(project):
    study = load_study("sharing")
    run = study.runs["svd-s1"]
    assert run.origin == "baseline-s1"
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
        (["variants.svd.training.start_from=continued"], "'continued' is no variant that itself begins"),
        (["variants.svd.training.start_from=svd"], "'svd' is no variant that itself begins"),
        (["variants.svd.training.start_from=small"], r"'small' has model.width: 80, the run 128"),
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
        (["variants.svd.data={order: source}"], "only where neither has keys in data"),
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
