"""Rows with a prefix that is visible in both directions."""

from __future__ import annotations

import pytest
import torch

from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.documents import Documents
from stlm.model.layout import Selection
from stlm.model.prefixes import Prefixes
from stlm.model.transformer import Transformer

L, EOT = 10, 0
OPTIONS = {
    "plain": {},
    "learned, shift, values": {"positions": "learned", "qkv_shift": True, "value_embeddings": 1},
    "sinusoidal, norm": {"positions": "sinusoidal", "qk_norm": True},
}


def random_model(**options: object) -> Transformer:
    torch.manual_seed(1)
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "ffn_width": 24, "context": L}
    model = build_model(ModelConfig(**{"vocab_size": 61, "dropout": 0.0, **sizes, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def tokens(rows: int = 4) -> torch.Tensor:
    return torch.randint(1, 61, (rows, L), generator=torch.Generator().manual_seed(2))


def test_a_prefix_sees_itself_and_the_rest_what_is_before():
    prefix, begin = torch.tensor([0, 4, L, 7]), torch.tensor([0, 0, 0, 3])
    read = tokens()
    read[:, 5] = EOT
    documents = Documents.of(read, EOT)
    layouts = [Prefixes(prefix, L), Prefixes(prefix, L, begin), Prefixes(prefix, L, begin, documents)]
    for number, layout in enumerate(layouts):
        for row in range(4):
            first = int(begin[row]) if number else 0
            for query in range(L):
                for key in range(L):
                    inside = all(first <= place < prefix[row] for place in (query, key))
                    expected = key <= query or inside
                    if number == 2:
                        expected = expected and (query < 5) == (key < 5)
                    assert layout.sees[row, 0, query, key] == expected, (number, row, query, key)
    assert layouts[0].positions == slice(L) and not layouts[0].in_rows
    assert torch.equal(layouts[2].positions, documents.positions)
    x = torch.randn(4, L, 3)
    assert torch.equal(layouts[2].before(x), documents.before(x))
    assert torch.equal(layouts[0].before(x)[:, 1:], x[:, :-1])
    some = torch.tensor([3, 1])
    for layout in layouts:
        assert torch.equal(layout.rows(some).sees, layout.sees[some])
        assert torch.equal(layout.rows(some).before(x[some]), layout.before(x)[some])
    with pytest.raises(NotImplementedError, match="Prefixes selects no tokens"):
        layouts[0].select(Selection(torch.zeros(4, 1, dtype=torch.int64)))
    with pytest.raises(NotImplementedError, match="Prefixes has no room"):
        layouts[0].stretch(torch.zeros(4, L, dtype=torch.int64))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_a_model_reads_in_both_directions_and_what_not(options):
    model, read, prefix = random_model(**options), tokens(), torch.tensor([0, 4, L, 1])
    for training in (False, True):  # by other kernels
        model.train(training)
        whole = model.hidden(read, Prefixes(prefix, L)).detach()
        causal = model.hidden(read).detach()
        torch.testing.assert_close(whole[[0, 3]], causal[[0, 3]], atol=1e-4, rtol=1e-4)
        for place in range(L):
            changed = read.clone()
            changed[:, place] = changed[:, place] % 60 + 1
            other = model.hidden(changed, Prefixes(prefix, L)).detach()
            moved = (other - whole).abs().amax(dim=2) > 1e-5
            for row in range(4):
                # A token changes what is at and after it, and of a prefix that it belongs to all.
                first = 0 if place < prefix[row] else place
                assert moved[row].tolist() == [query >= first for query in range(L)], (row, place)
    rows = torch.tensor([0, 13, 17, 38])
    some = model.eval().hidden(read, Prefixes(prefix, L), rows)
    torch.testing.assert_close(some, whole.flatten(0, 1)[rows], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_documents_in_a_row_are_read_alone():
    model, read = random_model(qkv_shift=True), tokens(2)
    read[:, 4] = EOT
    prefix = torch.tensor([L, 7])
    whole = model.hidden(read, Prefixes(prefix, L, documents=Documents.of(read, EOT)))
    first = model.hidden(read[:, :4], Prefixes(prefix.clamp(max=4), 4))
    second = model.hidden(read[:, 4:], Prefixes(prefix - 4, L - 4))
    torch.testing.assert_close(whole, torch.cat([first, second], dim=1), atol=1e-4, rtol=1e-4)
    across = model.hidden(read, Prefixes(prefix, L))
    assert (across - whole).abs().amax(dim=2).min() > 1e-3, "the test can fail"
