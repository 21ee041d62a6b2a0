"""Attention within documents: a document in a shared row is as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stlm.model.config import ModelConfig
from stlm.model.documents import Documents
from stlm.model.transformer import Transformer

EOT = 60
LENGTHS = [(5, 1, 9), (15,), (7, 8)]  # of documents, their end of text included; rows of 15


def rows(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    parts = [
        torch.cat([torch.tensor([EOT]), torch.randint(0, EOT, (length - 1,), generator=draw)])
        for lengths in LENGTHS
        for length in lengths
    ]
    return torch.cat(parts).view(len(LENGTHS), 15)


REDUCED = {"sharing": {"what": "all"}, "lora": {"rank": 2}, "low_rank": {"ffn": 6}, "embedding_rank": 8}


@pytest.fixture(params=["rope", "sinusoidal", "learned", "rope and shift", "rope reduced"])
def model(request) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        ffn_width=48,
        context=16,
        vocab_size=61,
        positions=request.param.split()[0],
        qkv_shift=request.param == "rope and shift",
        **(REDUCED if request.param == "rope reduced" else {}),
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Attention that prefers some tokens over others; factors multiply.
            parameter.mul_(3 if request.param == "rope reduced" else 8)
        for block in model.blocks:
            if block.attention.shift is not None:
                block.attention.shift.normal_()
    return model


def test_logits_and_gradients_are_those_of_each_document_alone(model: Transformer) -> None:
    x_BL = rows()
    y_BL = rows(seed=1)
    loss = model.loss(x_BL, y_BL, layout=Documents.of(x_BL, EOT))
    loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    hidden_BLD = model.hidden(x_BL, Documents.of(x_BL, EOT))
    model.zero_grad()
    total = 0.0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone_1LD = model.hidden(x_BL[row : row + 1, part])
            torch.testing.assert_close(hidden_BLD[row, part], alone_1LD[0], rtol=1e-4, atol=1e-4)
            total += F.cross_entropy(model.head(alone_1LD[0]), y_BL[row, part], reduction="sum")
            start += length
    total /= x_BL.numel()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)
    # And it is not what the model gives without the documents' borders.
    assert (model.hidden(x_BL) - hidden_BLD).abs().max() > 1e-2


def test_a_row_without_a_border_is_causal_attention(model: Transformer) -> None:
    x_BL = rows().clamp(max=EOT - 1)
    torch.testing.assert_close(
        model.hidden(x_BL, Documents.of(x_BL, EOT)), model.hidden(x_BL), rtol=1e-4, atol=1e-4
    )


def test_a_row_that_cuts_a_document() -> None:
    documents = Documents.of(torch.tensor([[3, 4, EOT, 5, EOT, EOT, 6]]), EOT)
    assert documents.positions.tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    owner = [0, 0, 1, 1, 2, 3, 3]
    for query in range(7):
        for key in range(7):
            expected = key <= query and owner[key] == owner[query]
            assert bool(documents.sees[0, 0, query, key]) == expected


def test_attention_dropout_applies_as_scheduled_and_in_training_alone(model: Transformer) -> None:
    x_BL = rows()
    documents = Documents.of(x_BL, EOT)
    plain = model.hidden(x_BL, documents)
    for block in model.blocks:
        block.attention.dropout = 0.5
    assert (plain - model.hidden(x_BL, documents)).abs().max() > 1e-2
    model.schedule_dropout(0.0)
    torch.testing.assert_close(model.hidden(x_BL, documents), plain, rtol=1e-4, atol=1e-4)
    model.schedule_dropout(1.0)
    assert (plain - model.hidden(x_BL, documents)).abs().max() > 1e-2
    torch.testing.assert_close(model.eval().hidden(x_BL, documents), plain, rtol=1e-4, atol=1e-4)
