"""Diagrams of architectures: what they say of a configuration, and that nothing in them overlaps."""

from xml.etree import ElementTree

import pytest

from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.architecture import architectures, draw_architecture
from stlm.report.results import read_results

SMALL = ModelConfig(layers=4, width=64, heads=4, kv_heads=2, ffn_width=96, context=64, vocab_size=512)


def small(**differs) -> ModelConfig:
    return ModelConfig.model_validate(SMALL.model_dump() | differs)


def drawn(folder, **differs) -> list[str]:
    """The texts of the diagram of SMALL with the keys given."""
    draw_architecture(folder, "model", "Small", small(**differs))
    root = ElementTree.parse(folder / "model.svg").getroot()
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_diagram_has_every_part_and_its_parameters(tmp_path):
    texts = drawn(tmp_path)
    groups = parameter_groups(build_on_meta(SMALL))
    for text in ("token embedding", "512 × 64", "head", "tied: one matrix", "same matrix", "RoPE"):
        assert text in texts
    assert f"{groups['token embedding']:,}" in texts
    assert f"{groups['attention']:,} in 4 layers" in texts
    assert f"{groups['FFN']:,} in 4 layers" in texts
    assert "4 query heads of 16, 2 key/value heads" in texts
    assert "SwiGLU, 64 → 96 → 64" in texts
    assert texts.count("attention") == 4 + 1 and texts.count("FFN") == 4 + 1, "a row a layer, and the block"


def test_an_untied_head_counts_and_is_not_joined_to_the_embedding(tmp_path):
    texts = drawn(tmp_path, tied=False, positions="learned")
    assert "tied: one matrix" not in texts and "same matrix" not in texts
    assert texts.count(f"{512 * 64:,}") == 2
    assert "+ learned positions" in texts and "RoPE" not in texts


def test_layers_of_the_same_weights_have_the_same_number(tmp_path):
    sharing = {"what": "ffn", "order": "cyclic", "units": 2}
    texts = drawn(tmp_path, sharing=sharing, lora={"rank": 4, "what": "ffn"})
    numbered = [text for text in texts if text in ("FFN 1", "FFN 2")]
    assert numbered == ["FFN 1", "FFN 2", "FFN 1", "FFN 2"], "from the lowest layer"
    assert texts.count("attention") == 4 + 1
    assert f"{2 * 3 * 64 * 96:,} in 2 sets" in texts
    assert texts.count("LoRA") == 4 + 1 and "rank 4" in texts
    assert "same colour and number: same weights" in texts


def test_low_ranks_are_named(tmp_path):
    texts = drawn(tmp_path, embedding_rank=16, low_rank={"ffn": 8})
    assert "factorized embedding" in texts and "512 × 16, then 16 × 64" in texts
    assert "rank 8" in texts
    texts = drawn(tmp_path, low_rank={"ffn": 8, "down": 9, "qkv": 7})
    assert "up of rank 8, down of rank 9" in texts and "RoPE, qkv of rank 7" in texts


def test_a_byte_level_model_is_drawn_around_its_core(tmp_path):
    differs = {"bytes": {"width": 32, "heads": 2, "pooling": "query"}, "vocab_size": 258}
    texts, groups = drawn(tmp_path, **differs), parameter_groups(build_on_meta(small(**differs)))
    order = [
        "byte embedding",
        "chunk encoder",
        "query pooling, 32 → 64 a chunk",
        "byte decoder",
        "head",
    ]
    assert [text for text in texts if text in order] == order, "from the bottom up"
    for group in ("byte embedding", "byte encoder", "byte decoder"):
        assert f"{groups[group]:,}" in texts
    assert "32 × 258" in texts and "tied: one matrix" in texts and "next chunk, byte by byte" in texts


def test_variants_of_one_architecture_share_a_diagram(make_study):
    study = make_study(benchmarks={})
    assert architectures(study, read_results(study)) == {
        "baseline": ["Baseline", "DropoutFree"],
        "sincos": ["SinCos PE"],
        "learned": ["Learned PE"],
        "simple-ffn": ["Simple FFN"],
    }


@pytest.mark.parametrize("layers", [1, 32])
def test_few_and_many_layers(tmp_path, layers):
    texts = drawn(tmp_path, layers=layers)
    assert str(layers) in texts
