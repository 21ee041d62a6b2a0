"""A block that is handed some of a row's tokens: they attend to one another as their layout says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stlm.model.block import Attention
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.documents import Documents
from stlm.model.layout import CausalRows, Layout, Selection
from stlm.model.rotary import angles_at
from stlm.model.segments import Segments
from stlm.model.transformer import Transformer

B, L, EOT = 3, 12, 0
CONFIG = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=16, vocab_size=61, qkv_shift=True
)


@pytest.fixture(name="attention")
def _attention() -> Attention:
    torch.manual_seed(0)
    attention = Transformer(CONFIG).eval().blocks[0].attention
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return attention


def alone(attention: Attention, x_LD: Tensor, rope, before: list[int]) -> Tensor:
    """The last token's result, of the tokens `before` (its sequence, itself last) in a row without others."""
    chosen = [table[0, before] if table.dim() == 4 else table[before] for table in rope]
    return attention(x_LD[None, before], tuple(chosen), CausalRows(len(before)))[0, -1]


def angles(positions_BL: Tensor | slice):
    model = Transformer(CONFIG)
    return model.cos_LE[positions_BL].unsqueeze(-2), model.sin_LE[positions_BL].unsqueeze(-2)


def test_a_selection_takes_tokens_in_order_and_adds_to_them_alone():
    chosen_BL = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])
    selection = Selection.of(chosen_BL)
    assert selection.index_BS[0].tolist() == [0, 2, 3]
    assert selection.index_BS[1, 0] == 1
    assert selection.kept_BS.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    x_BLX = torch.randn(3, 4, 5)
    added = selection.add_to(x_BLX, torch.ones(3, 3, 5))
    torch.testing.assert_close(added, x_BLX + chosen_BL[..., None].float())
    assert torch.equal(added[~chosen_BL], x_BLX[~chosen_BL])
    assert Selection.of(torch.ones(2, 4, dtype=torch.bool)).kept_BS is None
    assert Selection.of(torch.zeros(2, 4, dtype=torch.bool)).index_BS.shape == (2, 0)


def layouts() -> dict[str, tuple[Layout, Tensor | slice, list[list[list[int]]]]]:
    """Layouts of 12 tokens a row, their positions, and for each token the sequence that it ends."""
    rows = [[list(range(place + 1)) for place in range(L)]] * B
    tokens_BL = torch.randint(1, 61, (B, L), generator=torch.Generator().manual_seed(1))
    tokens_BL[0, 4] = tokens_BL[1, 7] = tokens_BL[1, 8] = EOT
    documents = Documents.of(tokens_BL, EOT)
    within = []
    for b in range(B):
        first = 0
        within.append([])
        for place in range(L):
            first = place if tokens_BL[b, place] == EOT else first
            within[b].append(list(range(first, place + 1)))
    paths = [np.arange(5), np.array([*range(3), 5, 6, 7]), np.array([*range(3), 5, 6, 8, 9, 10, 11])]
    positions = np.array([0, 1, 2, 3, 4, 3, 4, 5, 5, 6, 7, 8])
    trie = Segments(positions, [(5, paths[0]), (3, paths[1]), (4, paths[2])], torch.device("cpu"))
    branches = [[list(range(place + 1)) for place in range(5)]]
    branches[0] += [[0, 1, 2, *range(5, place + 1)] for place in (5, 6, 7)]
    branches[0] += [[0, 1, 2, 5, 6, *range(8, place + 1)] for place in range(8, 12)]
    return {
        "rows": (CausalRows(L), slice(L), rows),
        "documents": (documents, documents.positions, within),
        "trie": (trie, trie.positions, branches),
    }


@pytest.mark.parametrize("kind", ["rows", "documents", "trie"])
@torch.no_grad()
def test_selected_tokens_attend_to_the_selected_ones_of_their_sequence(attention, kind):
    layout, positions, sequences = layouts()[kind]
    batch = len(sequences)
    torch.manual_seed(2)
    x_BLD = torch.randn(batch, L, CONFIG.width)
    rope = angles(positions)
    for _ in range(3):
        chosen_BL = torch.rand(batch, L) < 0.6
        chosen_BL[0, 0] = False
        selection = Selection.of(chosen_BL)
        index_BS = selection.index_BS
        y_BSD = attention(selection.take(x_BLD), angles_at(rope, index_BS), layout.select(selection))
        kept_BS = torch.ones_like(index_BS).bool() if selection.kept_BS is None else selection.kept_BS
        assert kept_BS.sum() == chosen_BL.sum()
        for b, s in kept_BS.nonzero().tolist():
            sequence = [place for place in sequences[b][index_BS[b, s]] if chosen_BL[b, place]]
            row_rope = tuple(table[b : b + 1] if table.dim() == 4 else table for table in rope)
            expected_D = alone(attention, x_BLD[b], row_rope, sequence)
            torch.testing.assert_close(y_BSD[b, s], expected_D, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_of_a_cache_that_is_handed_some_tokens_holds_them_alone(attention):
    torch.manual_seed(3)
    x_BLD, chosen_BL = torch.randn(B, L, CONFIG.width), torch.rand(B, L) < 0.5
    chosen_BL[:, 0] = torch.tensor([True, False, False])
    cos_L1E, sin_L1E = angles(slice(L))
    cache = Cache(CONFIG, B, torch.device("cpu"))
    for _ in range(2):  # the second time after `clear`
        cache.clear()
        begin = 0
        for count in (3, 1, 1, 5, 2):
            layer = cache.extend(count).layer(0)
            part = slice(begin, begin + count)
            selection = Selection.of(chosen_BL[:, part])
            selected = layer.select(selection)
            index_BS = selection.index_BS + begin
            kept_BS = torch.ones_like(index_BS).bool() if selection.kept_BS is None else selection.kept_BS
            if index_BS.shape[1]:
                taken_BSD = x_BLD.gather(1, index_BS[..., None].expand(-1, -1, CONFIG.width))
                y_BSD = attention(taken_BSD, angles_at((cos_L1E, sin_L1E), index_BS), selected)
                for b, s in kept_BS.nonzero().tolist():
                    sequence = [place for place in range(index_BS[b, s] + 1) if chosen_BL[b, place]]
                    expected_D = alone(attention, x_BLD[b], (cos_L1E, sin_L1E), sequence)
                    torch.testing.assert_close(y_BSD[b, s], expected_D, atol=1e-5, rtol=1e-4)
            begin += count


@torch.no_grad()
def test_rows_of_a_batch_are_the_rows(attention):
    layout, positions, _ = layouts()["documents"]
    x_BLD, rows_R = torch.randn(B, L, CONFIG.width), torch.tensor([2, 0])
    cos, sin = angles(positions)
    whole_BLD = attention(x_BLD, (cos, sin), layout)
    some_RLD = attention(x_BLD[rows_R], (cos[rows_R], sin[rows_R]), layout.rows(rows_R))
    torch.testing.assert_close(some_RLD, whole_BLD[rows_R])
    assert CausalRows(L).rows(rows_R).positions == slice(L)


def test_a_layout_that_selects_nothing_says_so():
    from stlm.model.packed_chunks import Packing

    packing = Packing(torch.tensor([2, 3]), causal=True)
    with pytest.raises(NotImplementedError, match="Packing"):
        packing.select(Selection.of(torch.ones(1, 5, dtype=torch.bool)))
