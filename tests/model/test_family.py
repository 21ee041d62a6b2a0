"""The family of sizes: the rule, and the page that is generated from it."""

from __future__ import annotations

import closed_formulas
import pytest
import torch

from stlm.cli import main
from stlm.errors import UserError
from stlm.model.build import build_model
from stlm.model.byte_config import check_divides
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts
from stlm.model.family import FAMILY, TRAINING_BYTES, propose
from stlm.study.sizes import HEADER, SIZES_PAGE, family, parse_sizes, rows, sizes_page, text_table
from stlm.training.config import TrainingConfig
from stlm.training.optimizers import build_optimizer


def test_50m_is_the_papers_baseline():
    assert propose(FAMILY["50M"]) == ModelConfig(vocab_size=50257)  # the defaults are the paper's Table 1


@pytest.mark.parametrize(("vocab_size", "sizes"), [(50257, (10e6, 50e6, 100e6)), (4096, (1e6, 4e6, 1e7))])
def test_the_rule_chooses_the_best_of_all_shapes(vocab_size, sizes):
    for size in sizes:
        best = None
        for width in range(64, 1025, 64):
            heads = width // 32
            group = 4 if heads % 4 == 0 else 3
            if heads % group:
                continue
            for layers in range(1, 200):
                shape = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads // group}
                config = ModelConfig(**shape, ffn_width=3 * width, vocab_size=vocab_size)
                total = closed_formulas.parameter_counts(config).total  # of two thousand models
                if total > 1.1 * size:
                    break
                ratio = max(width / layers / 64, 64 / (width / layers))
                if total >= 0.9 * size and (best is None or ratio < best[0]):
                    best = ratio, config
        found = propose(size, vocab_size)
        assert found == best[1]
        assert abs(parameter_counts(found).total / size - 1) <= 0.1


def test_a_size_that_no_shape_has_is_refused():
    with pytest.raises(UserError, match=r"no model of the rule has 1,000,000 parameters, within 10%"):
        family({"1M": 1e6}, 50257)
    with pytest.raises(UserError, match=r"'20 M' is no number of parameters"):
        parse_sizes(["20 M"])
    with pytest.raises(UserError, match=r"--context: 1 tokens leave nothing"):
        family({"1M": 1e6}, 4096, context=1)
    assert parse_sizes(["20M", "1.5e6", "500k"]) == {"20M": 20e6, "1.5e6": 1.5e6, "500k": 5e5}


@pytest.mark.parametrize("text", ["1e400", "1e30", "1e16", "0", "9" * 5000, "1e" + "9" * 5000, "٢M", "nan"])
def test_a_size_beyond_all_bounds_is_refused_at_once(text):
    with pytest.raises(UserError, match="no number of parameters"):
        parse_sizes([text])


def test_a_size_of_more_layers_than_a_model_may_have_is_refused():
    with pytest.raises(ValueError, match="no model of the rule"):
        propose(1e15)


def test_the_nearest_divisor_of_a_huge_number_is_looked_for_nearby():
    with pytest.raises(ValueError, match=r"heads: 7 does not divide width: 10{17} \(nearest that does: 8\)"):
        check_divides("heads", 7, "width", 10**17)
    with pytest.raises(ValueError, match="nearest that does: 1\\)"):
        check_divides("heads", 10**17, "width", 10**18 - 11)


def test_the_tables_figures_are_those_of_models():
    """Of a small size: unique parameters, and the bytes of weights, gradients and optimizer in training."""
    models = family({"1M": 1e6}, 4096)
    shared = next(row for row in rows(models) if "ALBERT" in row[0])
    cells = dict(zip(HEADER, shared, strict=True))
    model = build_model(models["1M"].model_copy(update={"sharing": None}))
    unshared = sum(p.numel() for p in model.parameters())
    first = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks.1."))
    norms = 2 * 128  # each layer's own
    assert int(cells["parameters"].replace(",", "")) == first + norms
    embedding = int(cells["embedding"].replace(",", ""))
    assert int(cells["rest, each use"].replace(",", "")) == unshared - embedding
    model.loss(*torch.randint(0, 4096, (2, 2, 8))).backward()
    optimizer = build_optimizer(model, TrainingConfig())
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.numel() * t.element_size() for t in held) == TRAINING_BYTES * unshared
    assert text_table(models).count("\n") == len(rows(models))


def test_the_verb_prints_what_was_asked_for(capsys):
    assert main(["sizes", "4M", "--tokenizer", "bpe-4096", "--context", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        *("4M", "baseline", "4", "x", "256", "4,065,536", "1,048,576", "26%", "3,016,960", "3,016,960"),
        *("26.0M", "16", "MB", "8", "MB", "65", "MB"),
    ]
    assert main(["sizes"]) == 0
    assert capsys.readouterr().out.count("baseline") == len(FAMILY)


def test_a_size_shows_the_variants_that_it_can_have(capsys):
    """Of one layer: none that shares."""
    assert main(["sizes", "700k", "--tokenizer", "bpe-4096"]) == 0
    found = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert found == ["700k baseline", "700k head untied", "700k FFN of rank 64"]


def test_the_page_is_the_familys(root):
    page = (root / SIZES_PAGE).read_text(encoding="utf-8")
    assert page == sizes_page(), "docs/sizes.md is out of date: run `stlm document`"
