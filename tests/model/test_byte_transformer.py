"""The byte-level model: proper probabilities, no leaks, and packed chunks as chunks one at a time."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stlm.model.build import build_model
from stlm.model.byte_transformer import POOLINGS, ByteTransformer
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_groups, training_flops_per_token
from stlm.model.documents import Documents
from stlm.model.packed_chunks import Packing
from stlm.tokens.chunks import SYMBOLS, Chunker, Pieces, Spaces, Stride, Words, chunk_table

TINY = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": 32}
BYTES = {"width": 16, "heads": 2, "ffn_width": 24}
# Of a vocabulary of bytes and pairs of them.
PAIRS = Pieces("pairs", lambda content: [content[i : i + 2] for i in range(0, len(content), 2)], 2)
CHUNKERS = [Words(2), Spaces(2), Stride(2), PAIRS]
TEXT = b" it's 'so'. A\xc3\xa9 cat, a  dog;\n(the end)..."


def strong(own: dict[str, object] | None = None, **options: object) -> ByteTransformer:
    """A model whose every weight shows in the probabilities."""
    torch.manual_seed(0)
    config = ModelConfig(**{**TINY, **options}, vocab_size=SYMBOLS, bytes={**BYTES, **(own or {})})
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1.0))
    return model


def text_table(model: ByteTransformer, chunker: Chunker, text: bytes = TEXT) -> torch.Tensor:
    """Have the model read a text's chunks, after an end of text; their numbers [1, L]."""
    chunks = [b"", *chunker.split(text)]
    model.use(chunk_table(chunker, chunks))
    return torch.arange(len(chunks))[None]


@torch.no_grad()
def chunk_losses(model: ByteTransformer, numbers_1L: torch.Tensor, **options) -> torch.Tensor:
    """-log P [L - 1] of each chunk after the first."""
    x_ND = model.hidden(numbers_1L[:, :-1], **options)[0]
    return -model.log_probabilities(x_ND, numbers_1L[0, 1:], numbers_1L[0, :-1], ends=True)[0]


@pytest.mark.parametrize("chunker", CHUNKERS, ids=lambda c: c.name)
@torch.no_grad()
def test_probabilities_of_all_chunks_sum_to_one(chunker):
    model = strong(tied=chunker.name != "words")
    chunks = [b"", *(bytes(letters) for n in (1, 2) for letters in itertools.product(range(256), repeat=n))]
    model.use(chunk_table(chunker, chunks))
    context_1L = torch.tensor([[0, *map(chunks.index, chunker.split(b"it's. "))]])
    x_ND = model.hidden(context_1L)[0]
    for place, before in list(enumerate(context_1L[0]))[1:4]:
        total = 0.0
        for part_N in torch.arange(len(chunks)).split(8192):
            given = x_ND[place].expand(len(part_N), -1), part_N, before.expand(len(part_N))
            total += model.log_probabilities(*given, ends=True)[0].double().exp().sum().item()
        assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("chunker", [Words(), Spaces(), Stride(4), PAIRS], ids=lambda c: c.name)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_chunks_are_as_chunks_one_at_a_time(chunker, pooling):
    model = strong({"pooling": pooling}, qkv_shift=True, qk_norm=True)
    numbers_1L = text_table(model, chunker)
    with torch.no_grad():
        together_LD = model.embedding(numbers_1L)[0]
        alone_LD = torch.cat([model.embedding(number[None, None])[0] for number in numbers_1L[0]])
        torch.testing.assert_close(together_LD, alone_LD)
        x_LD = torch.randn(len(alone_LD), 32)
        given = x_LD[:-1], numbers_1L[0, 1:], numbers_1L[0, :-1]
        together_L, best_L = model.log_probabilities(*given, ends=True)
        one = [
            model.log_probabilities(*(own[i : i + 1] for own in given), ends=True)
            for i in range(len(x_LD) - 1)
        ]
    torch.testing.assert_close(together_L, torch.cat([own for own, _ in one]))
    assert torch.equal(best_L, torch.cat([own for _, own in one]))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_a_packing_is_attention_within_each_chunk(causal):
    torch.manual_seed(0)
    lengths_N = torch.tensor([3, 1, 4, 3, 1])
    packing = Packing(lengths_N, causal)
    q, k, v = torch.randn(3, 1, 12, 2, 8)
    chunk_T = torch.tensor([0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4])  # by length
    assert torch.equal(packing.chunk_T, chunk_T)
    assert torch.equal(lengths_N[packing.order_N], torch.tensor([1, 1, 3, 3, 4]))
    assert packing.place_T.tolist() == [0, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    sees_TT = chunk_T[:, None] == chunk_T
    if causal:
        sees_TT &= torch.ones(12, 12).tril().bool()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees_TT
    ).transpose(1, 2)
    torch.testing.assert_close(packing.attend(q, k, v), expected)


@pytest.mark.parametrize("chunker", [Words(), Spaces(), Stride(4), PAIRS], ids=lambda c: c.name)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_predicted_sees_nothing_of_itself_or_of_what_follows(chunker, pooling):
    model = strong({"pooling": pooling})
    numbers_1L = text_table(model, chunker)
    chunks = [b"", *chunker.split(TEXT)]
    place = next(n for n in range(len(chunks) // 2, len(chunks)) if re.search(b"[a-y]", chunks[n]))
    before_L = chunk_losses(model, numbers_1L)
    # Another chunk of the same rules in that place: what comes before is as before, it and the rest not.
    changed = [*chunks]
    changed[place] = bytes(byte + 1 if chr(byte).isalpha() else byte for byte in chunks[place])
    assert changed[place] != chunks[place]
    model.use(chunk_table(chunker, changed))
    after_L = chunk_losses(model, numbers_1L)
    torch.testing.assert_close(after_L[: place - 1], before_L[: place - 1], rtol=0, atol=1e-6)
    assert (after_L[place - 1 :] != before_L[place - 1 :]).all()


@torch.no_grad()
def test_a_byte_is_predicted_from_those_before_it_in_its_chunk_alone():
    model = strong()
    model.use(chunk_table(Stride(4), [b"abcd", b"abxy", b"\x00bcd"]))
    x_ND = torch.randn(1, 32).expand(3, -1)
    _, y_TW = model._write(x_ND, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    y_CLW = y_TW.view(3, 4, -1)
    # A place reads the bytes before its own: the first three see a and b, or nothing.
    torch.testing.assert_close(y_CLW[0, :3], y_CLW[1, :3])
    torch.testing.assert_close(y_CLW[0, :1], y_CLW[2, :1])
    assert (y_CLW[0, 3] != y_CLW[1, 3]).all() and (y_CLW[0, 1:] != y_CLW[2, 1:]).all()


def test_rows_of_a_batch_do_not_see_each_other_nor_documents_in_a_row():
    model = strong()
    numbers_1L = text_table(model, Words())[:, :12]
    other_1L = numbers_1L.flip(1)
    with torch.no_grad():
        alone = model.hidden(numbers_1L)
        torch.testing.assert_close(model.hidden(torch.cat([other_1L, numbers_1L]))[1:], alone)
        row_1L = torch.cat([numbers_1L[:, :6], numbers_1L[:, :6]], dim=1)  # number 0 is the end of text
        within = model.hidden(row_1L, Documents.of(row_1L, 0))
    torch.testing.assert_close(within[:, 6:], alone[:, :6])


@pytest.mark.parametrize("chunker", [Words(), Spaces(), Stride(4), PAIRS], ids=lambda c: c.name)
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_mean_of_the_chunks_and_its_gradient_that_of_the_probabilities(chunker, tied):
    model = strong(tied=tied)
    chunks = [b"", *chunker.split(TEXT[:-3]), b"", *chunker.split(TEXT[3:])]
    model.use(chunk_table(chunker, chunks))
    numbers_BL = torch.arange(len(chunks) // 2 * 2).view(2, -1)[:, :14]
    tokens_BL, targets_BL = numbers_BL[:, :-1], numbers_BL[:, 1:]
    loss = model.loss(tokens_BL, targets_BL)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    x_ND = model.hidden(tokens_BL).flatten(0, 1)
    slow = -model.log_probabilities(x_ND, targets_BL.flatten(), tokens_BL.flatten(), ends=True)[0].mean()
    slow.backward()
    torch.testing.assert_close(loss, slow)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_validation_counts_the_text_alone():
    model = strong()
    # The last chunk is one that the text's end cuts short.
    chunks = [b"", *Stride(4).split(b"one two three"), b""]
    model.use(chunk_table(Stride(4), chunks))
    numbers_1L = torch.arange(len(chunks))[None]
    tokens_1L, targets_1L = numbers_1L[:, :-1], numbers_1L[:, 1:]
    text_1L = targets_1L != numbers_1L[0, -1]
    with torch.no_grad():
        summed = model.loss(tokens_1L, targets_1L, text_1L)
        x_ND = model.hidden(tokens_1L)[0]
        with_ends = -model.log_probabilities(x_ND, targets_1L[0], tokens_1L[0], ends=True)[0]
        text = -model.log_probabilities(x_ND, targets_1L[0], tokens_1L[0])[0]
    torch.testing.assert_close(summed, text[:-1].sum())
    # After "e" the text ends, which is said with "e"; then it is certain.
    assert with_ends[-2] > text[-2] and with_ends[-1] == 0 == text[-1]
    torch.testing.assert_close(with_ends[:-2], text[:-2])


def group_of(name: str) -> str:
    """The group of a parameter, by its place in the model."""
    if name.startswith("embedding."):
        return "byte embedding" if name == "embedding.bytes.weight" else "byte encoder"
    if name.startswith("decoder."):
        return "head" if name == "decoder.output.weight" else "byte decoder"
    if name == "positions.weight":
        return "positions"
    of = next(
        (own for own in ("norm", "gain", "shift", "attention", "ffn") if own in name.split(".", 1)[1]), ""
    )
    return {"shift": "shifts", "attention": "attention", "ffn": "FFN"}.get(of, "norms")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"ffn": "gelu", "norm": "layernorm", "positions": "learned", "qk_norm": True, "qkv_shift": True}],
    ids=["plain", "optional parts"],
)
def test_parameters_are_those_of_the_model_group_by_group(options, tied, pooling):
    model = strong({"pooling": pooling, "encoder_layers": 1, "decoder_layers": 3}, tied=tied, **options)
    found = Counter()
    for name, parameter in model.named_parameters():
        found[group_of(name)] += parameter.numel()
    assert parameter_groups(model) == found


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied, pooling, torch_operations):
    """Of different chunks of one length, each read once and written once; torch does not see into kernels."""
    own = {"pooling": pooling, "encoder_layers": 1, "decoder_layers": 3}
    model = strong(own, tied=tied, context=8).train()
    words = [bytes(letters) for letters in itertools.permutations(b"abcdef", 4)][:18]
    model.use(chunk_table(Words(), words))
    numbers_BL = torch.arange(18).view(2, 9)
    with FlopCounterMode(display=False) as counter:
        x_ND = model.hidden(numbers_BL[:, :-1]).flatten(0, 1)
        given = x_ND, numbers_BL[:, 1:].flatten(), numbers_BL[:, :-1].flatten()
        model.log_probabilities(*given)[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if "bmm" in str(operation))
    # Of a chunk: two products, six FLOPs each with the backward pass, layers x positions x positions x width.
    read, written, core = (6 * 2 * size for size in (1 * 4 * 4 * 16, 3 * 5 * 5 * 16, 2 * 8 * 32))
    assert attention / 16 == read + written + core
    # Torch counts what is masked, too: half of what the decoder and the core attend to.
    rest = training_flops_per_token(model.config, chunk_bytes=4) - read - written / 2 - core / 2
    assert (sum(counts.values()) - attention) / 16 == rest


@pytest.mark.parametrize(
    "options", [{"ffn": "gelu", "norm": "layernorm"}, {"positions": "sinusoidal"}], ids=str
)
def test_starts_with_all_symbols_about_as_probable(options):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY, **options, vocab_size=SYMBOLS, bytes=BYTES))
    losses_L = chunk_losses(model, text_table(model, Stride(4)))[:-1]
    assert losses_L.mean().item() == pytest.approx(4 * np.log(257), rel=0.2)


def test_dropout_and_its_schedule_act_in_the_core_alone():
    model = strong(dropout=0.5).train()
    numbers_1L = text_table(model, Words())[:, :12]
    torch.testing.assert_close(model.embedding(numbers_1L), model.embedding(numbers_1L), rtol=0, atol=0)
    assert not torch.equal(model.hidden(numbers_1L), model.hidden(numbers_1L))
    model.schedule_dropout(0.0)
    torch.testing.assert_close(model.hidden(numbers_1L), model.hidden(numbers_1L), rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_it_is_the_same():
    model = strong()
    numbers_1L = text_table(model, Words())[:, :12]
    tokens_1L, targets_1L = numbers_1L[:, :-1], numbers_1L[:, 1:]
    compiled = torch.compile(model.loss)
    torch.testing.assert_close(compiled(tokens_1L, targets_1L), model.loss(tokens_1L, targets_1L))
    compiled(tokens_1L, targets_1L).backward()
    assert all(p.grad is not None for p in model.parameters())
