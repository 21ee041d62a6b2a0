"""Diagrams of architectures: what they show of a model's modules, those of unknown kinds too."""

import copy
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.architecture import (
    draw_architecture,
    module_tree,
    settings,
    write_architectures,
)
from stlm.report.results import read_results

SMALL = ModelConfig(layers=4, width=64, heads=4, kv_heads=2, ffn_width=96, context=64, vocab_size=512)


def small(**differs) -> ModelConfig:
    return ModelConfig.model_validate(SMALL.model_dump() | differs)


def texts(folder, model: nn.Module, note: str = "") -> list[str]:
    """The texts of a model's diagram, from the top down."""
    draw_architecture(folder, "model", "Small", module_tree(model), note)
    root = ElementTree.parse(folder / "model.svg").getroot()
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def drawn(folder, **differs) -> list[str]:
    config = small(**differs)
    return texts(folder, build_on_meta(config), settings(config))


def number_of(found: list[str], name: str) -> str:
    """The number of parameters that is written after a part's name."""
    return found[found.index(name) + 1]


def test_the_diagram_has_every_part_and_its_parameters(tmp_path):
    found, groups = drawn(tmp_path), parameter_groups(build_on_meta(SMALL))
    assert number_of(found, "embedding") == f"{groups['token embedding']:,}"
    assert number_of(found, "output") == "–" and "Linear: 64 → 512, weights of embedding" in found
    assert number_of(found, "attention") == f"{groups['attention']:,}"
    assert number_of(found, "ffn") == f"{groups['FFN']:,}"
    assert number_of(found, "model") == f"{sum(groups.values()):,}"
    for text in ("blocks 1–4", "SwiGLU", "Dense: 96 → 64", "Attention: heads 4, kv heads 2, head width 16"):
        assert text in found
    assert found[-1].startswith("from the top down; context 64") and "positions rope" in found[-1]


def test_an_untied_head_counts(tmp_path):
    found = drawn(tmp_path, tied=False, positions="learned")
    assert number_of(found, "output") == f"{512 * 64:,}"
    assert number_of(found, "positions") == f"{64 * 64:,}"
    assert "not tied" in found[-1] and "positions learned" in found[-1]


def test_layers_that_share_weights_have_the_same_number(tmp_path):
    sharing = {"what": "ffn", "order": "cyclic", "units": 2}
    found = drawn(tmp_path, sharing=sharing, lora={"rank": 4, "what": "ffn"})
    numbers = [text for text in found if text in ("1", "2")]
    assert numbers == ["1", "2", "1", "2"] * 2, "of gate and up, and of down"
    adapters = 4 * 4 * (64 + 2 * 96 + 96 + 64)
    assert number_of(found, "ffn") == f"{2 * 3 * 64 * 96 + adapters:,}"
    assert found.count("adapter") == 2 and "Linear: 96 → 4" in found


def test_low_ranks_show_their_factors(tmp_path):
    found = drawn(tmp_path, embedding_rank=16, low_rank={"ffn": 8})
    assert "Transformer: embedding up 16 × 64" in found and "Embedding: 512 × 16" in found
    assert "LowRank: 96 → 64" in found and "Linear: 8 → 64" in found


def test_a_byte_level_model_has_its_encoder_and_decoder(tmp_path):
    differs = {"bytes": {"width": 32, "heads": 2, "pooling": "query"}, "vocab_size": 258}
    found, groups = drawn(tmp_path, **differs), parameter_groups(build_on_meta(small(**differs)))
    order = [text for text in found if text in ("ChunkEncoder", "QueryPooling", "ByteDecoder", "blocks 1–4")]
    assert order == ["ChunkEncoder", "QueryPooling", "blocks 1–4", "ByteDecoder"]
    assert number_of(found, "bytes") == f"{groups['byte embedding']:,}"
    assert number_of(found, "decoder") == f"{groups['byte decoder']:,}"


class Router(nn.Module):
    """A technique that no one has told the report about."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.capacity = 8
        self.threshold = nn.Parameter(torch.zeros(3))
        self.inner = inner


def test_unknown_modules_are_drawn_by_their_class_name(tmp_path):
    model = copy.deepcopy(build_on_meta(SMALL))
    model.blocks[1], model.blocks[3] = Router(model.blocks[1]), Router(model.blocks[3])
    found = texts(tmp_path, model)
    assert "blocks 1, 3" in found and "blocks 2, 4" in found
    assert "Router: capacity 8, threshold 3" in found
    total = sum(parameter_groups(build_on_meta(SMALL)).values())
    assert number_of(found, "model") == f"{total + 2 * 3:,}"


def test_variants_of_one_architecture_share_a_diagram(make_study, tmp_path):
    study = make_study(benchmarks={})
    write_architectures(tmp_path, read_results(study))
    names = {path.stem.removeprefix("architecture-") for path in tmp_path.glob("*.svg")}
    assert names == {"baseline", "sincos", "learned", "simple-ffn"}
    assert "Baseline and DropoutFree" in (tmp_path / "architecture-baseline.svg").read_text()


@pytest.mark.parametrize("layers", [1, 32])
def test_few_and_many_layers(tmp_path, layers):
    assert ("blocks 1" if layers == 1 else "blocks 1–32") in drawn(tmp_path, layers=layers)
