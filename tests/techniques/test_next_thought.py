"""Next thought: proper probabilities, no leaks, losses, metrics, cost, training and evaluation."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, last_checkpoint, same_weights, train_in_parts, train_in_two_processes

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import active_parameters, build_on_meta, parameter_groups
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.inference import why_not
from stlm.model.latents import Codes, UnitVectors
from stlm.model.layout import CausalRows
from stlm.model.thoughts import Cut, Thoughts
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.next_thought import (
    NextThought,
    mean_thought,
    predicted_pairs,
    reciprocal_ranks,
    variance_loss,
)
from stlm.tokens.sentences import sentence_ends
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.loop import train
from stlm.training.objective import Forward

# The tokens of a tiny alphabet: the second ends a sentence, the last a text.
V, STOP, EOT, L = 7, 1, 6, 20
TINY = {"layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 24, "context": L}
KINDS = {
    "sentences": NextThought(length=4),
    "tokens": NextThought(cut="tokens", length=3),
    "attention, add": NextThought(length=4, pool="attention", decoder_input="add"),
    "codes": NextThought(length=4, pool="last", codes=3, levels=4),
    "two blocks each, add": NextThought(length=5, encoder=2, decoder=2, decoder_input="add"),
}
each_kind = pytest.mark.parametrize("technique", KINDS.values(), ids=KINDS)


def new_model(technique: NextThought, vocabulary: int = V, **options: object) -> Transformer:
    torch.manual_seed(1)
    layers = technique.encoder + technique.decoder + 1
    model = build_model(
        ModelConfig(**({"vocab_size": vocabulary} | TINY | {"layers": layers} | options)), [technique]
    )
    with torch.no_grad():
        model.route.ends[vocabulary - 1] = 1
        model.route.ends[STOP] = technique.cut == "sentences"
    return model


def random_model(technique: NextThought, vocabulary: int = V, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts."""
    model = new_model(technique, vocabulary, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.7))
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


def some_tokens(rows: int = 3, length: int = L) -> torch.Tensor:
    tokens_BL = torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(2))
    tokens_BL[:, 0] = EOT
    return tokens_BL


def parts_of(model: Transformer, technique: NextThought, tokens_BM: torch.Tensor) -> dict[str, torch.Tensor]:
    forward = Forward(model.train(), tokens_BM[:, :-1], tokens_BM[:, 1:], None, 1, 1)
    return technique.objective(forward) | {"next_token": forward.next_token_loss()}


def gradients(loss: torch.Tensor, model: Transformer) -> dict[str, torch.Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(wanted.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(wanted, found, strict=True))


# Where thoughts end


def test_thoughts_end_at_marks_and_at_their_length():
    tokens_BL, ends_V = some_tokens(20), torch.zeros(V)
    ends_V[[STOP, EOT]] = 1
    for length in (1, 2, 3, 7, L):
        expected, since = [], 0
        for row in tokens_BL.tolist():
            since = 0
            for token in row:
                since += 1
                expected.append(token in (STOP, EOT) or since == length)
                since = 0 if expected[-1] else since
        cut = Cut.of(tokens_BL, ends_V, length)
        assert cut.ends_BL.flatten().tolist() == expected
        for begin in (5, 9):  # it is a function of the tokens so far
            assert torch.equal(Cut.of(tokens_BL[:, :begin], ends_V, length).ends_BL, cut.ends_BL[:, :begin])


def test_rows_are_packed_by_thought_and_put_back():
    cut = Cut(torch.tensor([[0, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.bool))
    x_FX = torch.arange(8.0)[:, None]
    for packed, thoughts in (
        (cut.read(), [[0, 1], [2, 3], [4], [5, 6], [7]]),
        (cut.written(), [[0], [1, 2, 3], [4, 5], [6], [7]]),
    ):
        found = [part.flatten(1).tolist() for part in packed.packing.split(packed.take(x_FX))]
        assert sorted(itertools.chain(*found)) == sorted(thoughts)
        assert torch.equal(packed.put_back(packed.take(x_FX)), x_FX)
        assert packed.put_back(packed.take(x_FX), torch.tensor([6, 1])).flatten().tolist() == [6, 1]
        numbers_NX = torch.arange(5.0)[:, None]
        owner_TX = packed.spread(numbers_NX)
        assert [[x for x in range(8) if packed.put_back(owner_TX)[x] == n] for n in range(5)] == thoughts
    assert cut.by_row(torch.arange(5)[:, None].float())[..., 0].tolist() == [[0, 1, 2], [2, 3, 4]]
    assert cut.ended().tolist() == [[True, False, False], [True, True, True]]
    counted_BL = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    assert cut.ended(counted_BL).tolist() == [[True, False, False], [False, False, True]]


def test_tokens_that_end_a_sentence():
    class Pieces(ByteTokenizer):
        pieces = (".", '."', " a", "?”", "!)", "\n", "\n\n  ", ".b", "。", "a.", "...", ",", "\n}", "")
        vocab_size, eot = len(pieces), len(pieces) - 1

        def decode_bytes(self, ids):
            assert self.eot not in ids, "its spelling is not text"
            return "".join(self.pieces[i] for i in ids).encode()

    found = [piece for piece, ends in zip(Pieces.pieces, sentence_ends(Pieces()), strict=True) if ends]
    assert found == [".", '."', "?”", "!)", "\n", "\n\n  ", "。", "a.", "...", ""]
    ends_V = sentence_ends(ByteTokenizer())
    assert bytes(ends_V.nonzero()[0][:-1].tolist()) == b"\n!.?" and ends_V[256]
    assert NextThought(cut="tokens").ends(ByteTokenizer()).nonzero().tolist() == [[256]]


# A language model over tokens


@each_kind
@torch.no_grad()
def test_probabilities_of_all_texts_sum_to_one(technique):
    """Of each string together, the whole of it being read: what saw a later token would add up to more."""
    vocabulary, longest = 3, 5
    model = random_model(technique, vocabulary)
    strings = torch.tensor(list(itertools.product(range(vocabulary), repeat=longest)))
    rows_BL = F.pad(strings, (1, 0), value=vocabulary - 1)
    log_BLV = model(rows_BL[:, :-1]).double().log_softmax(dim=-1)
    log_BL = log_BLV.gather(-1, strings[..., None])[..., 0]
    assert log_BL.sum(dim=1).exp().sum().item() == pytest.approx(1, abs=1e-6)
    loss = model.loss(rows_BL[:, :-1], strings, torch.ones_like(strings))
    assert loss.item() == pytest.approx(-log_BL.sum().item(), rel=1e-5)
    for length in range(1, longest):  # a prefix is as probable as its continuations together
        heads = rows_BL[:: vocabulary ** (longest - length), : length + 1]
        alone_B = model(heads[:, :-1]).double().log_softmax(dim=-1).gather(-1, heads[:, 1:, None]).sum((1, 2))
        together_B = log_BL.sum(dim=1).exp().view(len(heads), -1).sum(dim=1)
        torch.testing.assert_close(together_B, alone_B.exp(), rtol=1e-4, atol=1e-9)


def first_changes(model: Transformer, row_L: torch.Tensor) -> list[int]:
    """For each place, the first at which logits move if another token stands in it."""
    rows_BL = row_L.repeat(L + 1, 1)
    places = torch.arange(L)
    # No kind of token: where thoughts end stays the same.
    rows_BL[places, places] = torch.where(row_L > STOP, 2 + (row_L - 1) % 4, 0)
    rows_BL[places[row_L == STOP], places[row_L == STOP]] = STOP
    logits_BLV = model(rows_BL)
    moved_BL = (logits_BLV[:-1] - logits_BLV[-1]).abs().amax(dim=-1) > 1e-4
    return [int(moved_L.nonzero()[0]) if moved_L.any() else L for moved_L in moved_BL]


ROW = torch.tensor([2, 3, 4, 1, 5, 2, 1, 3, 4, 5, 2, 1, 3, 2, 5, 1, 4, 3, 2, 5])


@each_kind
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_later_tokens_move_nothing(technique, training):
    model = random_model(technique).train(training)
    ends_L = Cut.of(ROW[None], model.route.ends, technique.length).ends_BL[0]
    changes = first_changes(model, ROW)
    for place, changed in enumerate(changes):
        if ROW[place] == STOP:
            continue  # it was not changed
        # Within its thought a token is read from its own place on; the last is known from the latent alone,
        # which may round a change away (codes).
        assert changed >= place
        assert changed == place or ends_L[place]


@torch.no_grad()
def test_without_the_shift_of_predicted_vectors_the_leak_is_seen(monkeypatch):
    technique = KINDS["sentences"]
    think = Thoughts._think
    monkeypatch.setattr(Thoughts, "_think", lambda *given: think(*given).roll(-1, dims=1))
    changes = first_changes(random_model(technique), ROW)
    assert any(changed < place for place, changed in enumerate(changes))


@each_kind
@torch.no_grad()
def test_rows_of_a_batch_and_padding_change_nothing(technique):
    model, tokens_BL = random_model(technique, qkv_shift=True, qk_norm=True, embedding_rank=4), some_tokens(4)
    whole_BLD = model.hidden(tokens_BL)
    for row_L, expected_LD in zip(tokens_BL, whole_BLD, strict=True):
        for length in (1, 7):
            found_LD = model.hidden(row_L[None, :length])[0]
            torch.testing.assert_close(found_LD, expected_LD[:length], atol=2e-4, rtol=1e-3)
    rows_N = torch.tensor([0, 5, 17, 63, 79])
    expected_ND = whole_BLD.flatten(0, 1)[rows_N]
    torch.testing.assert_close(model.hidden(tokens_BL, None, rows_N), expected_ND, atol=2e-4, rtol=1e-3)


@each_kind
@torch.no_grad()
def test_earlier_thoughts_are_known_through_the_core_alone(technique):
    model = random_model(technique)
    ends = Cut.of(ROW[None], model.route.ends, technique.length).ends_BL[0].nonzero()[:, 0].tolist()
    changed_L = ROW.clone()
    changed_L[0], changed_L[ends[0] + 1] = 5, 3  # in the first two thoughts
    later = slice(ends[2], None)

    def moved() -> float:
        return float((model(ROW[None]) - model(changed_L[None]))[0, later].abs().max())

    assert moved() > 1e-3
    model.route.give.weight.zero_()
    assert moved() == 0


@torch.no_grad()
def test_what_is_added_is_as_large_as_the_tokens_vector():
    model, streams = random_model(KINDS["attention, add"]), []
    model.route.given_norm.weight.fill_(1)
    model.blocks[-1].register_forward_pre_hook(lambda _, given: streams.append(given[0][0]))
    cut = Cut.of(ROW[None], model.route.ends, 4)
    token_TD = torch.where(cut.ends_BL[0, :, None], model.route.start, model.embedding(ROW))
    token_TD = cut.written().take(token_TD)
    for factor in (1, 1000):
        model.route.give.weight.mul_(factor)
        model.hidden(ROW[None])
        torch.testing.assert_close(
            (streams[-1] - token_TD).norm(dim=1), token_TD.norm(dim=1), rtol=1e-3, atol=1e-3
        )
    torch.testing.assert_close(*streams, atol=1e-3, rtol=1e-3)


# Latents


def test_what_is_pooled_does_not_depend_on_order_unless_it_is_the_last():
    cut = Cut(torch.tensor([[0, 0, 1, 0, 0, 0, 1]], dtype=torch.bool))
    packed, x_FD = cut.read(), torch.randn(7, 16)
    moved_FD = x_FD[[1, 0, 2, 6, 3, 5, 4]]
    for pool, same in (("mean", [True, True]), ("attention", [True, True]), ("last", [True, False])):
        pooling = random_model(NextThought(pool=pool, length=4)).route.pooling
        found = [pooling(packed.take(one), packed) for one in (x_FD, moved_FD)]
        assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True)] == same
        if pool == "mean":
            torch.testing.assert_close(found[0][0], pooling.norm(x_FD[:3]).mean(dim=0))


@each_kind
@torch.no_grad()
def test_a_latent_is_that_of_its_thought_alone(technique):
    model = random_model(technique)
    model.hidden(ROW[None])
    passed = model.route.take()
    ends = passed.cut.ends_BL[0].nonzero()[:, 0].tolist()
    for number, (begin, end) in enumerate(itertools.pairwise([-1, *ends])):
        model.hidden(ROW[None, begin + 1 : end + 1])
        torch.testing.assert_close(model.route.take().latent_BKZ[0, 0], passed.latent_BKZ[0, number])


@pytest.mark.parametrize("levels", [3, 4, 8, 9])
def test_codes_are_levels_with_the_gradient_of_the_bound(levels):
    torch.manual_seed(0)
    codes = Codes(16, 2, levels)
    x_ND = (20 * torch.randn(400, 16)).requires_grad_()
    latent_NZ = codes(x_ND)
    level_NZ = codes.levels_of(latent_NZ)
    assert level_NZ.unique().tolist() == list(range(levels))
    torch.testing.assert_close((level_NZ - levels // 2) / (levels // 2), latent_NZ.detach())
    assert torch.equal(codes(torch.zeros(1, 16)), torch.zeros(1, 2))
    (codes(x_ND / 50)).sum().backward()
    assert x_ND.grad.abs().min() > 0
    # The cross-entropy and the scores are those of the same distribution.
    predicted_NX = torch.randn(400, codes.predicted)
    losses_N = codes.losses(predicted_NX, latent_NZ)
    torch.testing.assert_close(codes.scores(predicted_NX, latent_NZ).diagonal() / -2, losses_N)
    torch.testing.assert_close(
        losses_N.mean(), F.cross_entropy(predicted_NX.view(-1, levels), level_NZ.flatten())
    )


def test_scores_of_vectors_order_them_by_distance():
    torch.manual_seed(0)
    vectors = UnitVectors(8)
    latent_NZ, predicted_MZ = vectors(torch.randn(30, 8)), torch.randn(5, 8)
    torch.testing.assert_close(latent_NZ.square().mean(dim=1), torch.ones(30))
    order = torch.cdist(predicted_MZ, latent_NZ).argsort(dim=1)
    assert torch.equal(vectors.scores(predicted_MZ, latent_NZ).argsort(dim=1, descending=True), order)


# Losses


def test_a_probe_changes_no_gradient_of_the_model():
    technique = KINDS["sentences"]
    model = random_model(technique)
    parts = parts_of(model, technique, some_tokens())
    assert set(parts) == {"probe", "next_token"}
    moved = {name for name, gradient in gradients(parts["probe"], model).items() if gradient.any()}
    assert moved == {"route.predict.weight"}


@pytest.mark.parametrize("target", ["stopped", "average", "live"])
def test_the_target_gets_a_gradient_only_where_it_is_live(target):
    technique = NextThought(length=4, prediction=2.0, target=target)
    model = random_model(technique)
    with torch.no_grad():
        model.route.think.weight.zero_()  # so the encoder is known through targets alone
    parts = parts_of(model, technique, some_tokens())
    found = gradients(parts["prediction"], model)
    assert found["blocks.0.attention.qkv.weight"].any() == (target == "live")
    # The loss is the mean over the thoughts that end in the row, without the first.
    if target != "average":
        model.hidden(some_tokens()[:, :-1])
        passed = model.route.take()
        errors = [
            (model.route.predict(passed.thought_BKD[row, k - 1]) - passed.latent_BKZ[row, k]).square().mean()
            for row, count in enumerate(passed.cut.count_B.tolist())
            for k in range(1, count)
        ]
        torch.testing.assert_close(parts["prediction"], 2 * torch.stack(errors).mean())


def test_averages_start_as_the_encoder_and_follow_it():
    technique = NextThought(length=4, prediction=1.0, target="average", decay=0.75)
    model = new_model(technique, dropout=0.3).train()
    route, tokens_BL = model.route, some_tokens()
    assert not any(part.training for part in route.target.modules())
    model.eval().hidden(tokens_BL)
    passed = route.passed
    torch.testing.assert_close(route.targets(model, passed), passed.latent_BKZ)
    own, average = model.blocks[0].attention.qkv.weight, route.target.parts[0].attention.qkv.weight
    assert not average.requires_grad
    start = average.clone()
    with torch.no_grad():
        for parameter in (own, route.pooling.norm.weight):
            parameter.add_(1.0)
    technique.after_step(model, 1, 2)
    torch.testing.assert_close(average.data, start + 0.25)
    technique.after_step(model, 2, 2)
    torch.testing.assert_close(average.data, start + 0.25 + 0.75 * 0.25)
    torch.testing.assert_close(route.target.parts[1].norm.weight.data, torch.full((16,), 1.4375))
    assert torch.equal(own.data, start + 1)


def test_the_variance_term_is_the_papers_and_that_of_all_rows():
    torch.manual_seed(0)
    latent_MZ = (0.3 * torch.randn(9, 5) + 1).requires_grad_()
    loss = variance_loss(latent_MZ)
    expected = (1 - (latent_MZ.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean()
    torch.testing.assert_close(loss, expected)
    assert variance_loss(torch.ones(9, 5)).item() == pytest.approx(0.99)
    assert variance_loss(latent_MZ[:0]).isfinite()
    (whole,) = torch.autograd.grad(loss, latent_MZ)
    # Two processes with 4 and 5 of them: each loss is the whole, and gradients are averaged.
    halves, found = latent_MZ.split([4, 5]), torch.zeros_like(latent_MZ)
    for half, other in (halves, halves[::-1]):

        def sum_over_rows(own, other=other, half=half):
            if torch.equal(own, torch.ones_like(own)):
                return 2 * own
            counts = own.new_full((1, 5), len(other))
            return own + torch.cat([torch.stack([other.sum(0), other.square().sum(0)]), counts]).detach()

        part = variance_loss(half, sum_over_rows)
        torch.testing.assert_close(part, loss)
        found += torch.autograd.grad(part, latent_MZ, retain_graph=True)[0] / 2
    torch.testing.assert_close(found, whole)


def test_all_losses_have_finite_gradients_in_bfloat16():
    for technique in (
        NextThought(length=4, prediction=1.0, target="average", variance=1.0, pool="attention"),
        NextThought(length=4, prediction=1.0, codes=3, decoder_input="add"),
    ):
        model, streams = random_model(technique), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, given, own=streams: own.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            parts = parts_of(model, technique, some_tokens())
            sum(parts.values()).backward()
        assert set(streams) == {torch.float32}
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


# Metrics


def test_ranks_have_their_chance_level_and_one_where_predictions_are_right():
    torch.manual_seed(0)
    chance = sum(1 / n for n in range(1, 101)) / 100
    assert chance == pytest.approx(0.0519, abs=5e-5)
    latent_MZ = torch.randn(1500, 64)
    assert reciprocal_ranks(latent_MZ @ latent_MZ.T).eq(1).all()
    assert reciprocal_ranks(torch.zeros(150, 150)).tolist() == pytest.approx([chance] * 150)
    random_M = reciprocal_ranks(torch.randn(1500, 1500))
    assert random_M.mean().item() == pytest.approx(chance, abs=4 * random_M.std().item() / 1500**0.5)
    assert reciprocal_ranks(torch.full((150, 150), math.nan)).tolist() == pytest.approx([0.01] * 150)
    # Among all others: the rank is that of the whole row.
    score_MM = torch.randn(20, 20)
    rank_M = 1 + (score_MM > score_MM.diagonal()[:, None]).sum(dim=1)
    torch.testing.assert_close(reciprocal_ranks(score_MM, 20), 1 / rank_M.double())
    state = torch.get_rng_state()
    reciprocal_ranks(score_MM, 10)
    assert torch.equal(torch.get_rng_state(), state)


def metrics(model: Transformer, technique: NextThought, tokens_BL: torch.Tensor, counted_BL: torch.Tensor):
    with torch.no_grad():
        model.hidden(tokens_BL)
    passed = model.route.passed
    found = technique.validated(model, tokens_BL, tokens_BL, counted_BL)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.route.passed = passed
        again = technique.validated(model, tokens_BL, tokens_BL, counted_BL)
    assert all(torch.equal(again[name], found[name]) for name in found), "in full precision"
    assert found.keys() <= set(technique.figures) and all(x.dtype == torch.float64 for x in found.values())
    return {name: (total / count).item() for name, (total, count) in found.items()}


def test_metrics_are_of_the_thoughts_that_count():
    technique, tokens_BL = KINDS["sentences"], some_tokens(60)
    model, counted_BL = random_model(technique), torch.ones(60, L, dtype=torch.bool)
    counted_BL[:, 15:] = False
    found = metrics(model, technique, tokens_BL, counted_BL)
    with torch.no_grad():
        model.hidden(tokens_BL)
    cut, thoughts, latents, _ = model.route.take()
    ends, pairs = cut.ends_BL.clone(), []
    ends[:, 16:] = False  # the last are padding
    assert found["thought_tokens"] == pytest.approx(60 * 16 / ends.sum().item())
    ends[:, 0] = False  # the first token is no target
    for row, place in ends.nonzero().tolist():
        if (number := int(cut.before_BL[row, place])) > 0:
            pairs.append((thoughts[row, number - 1], latents[row, number]))
    given, true = (torch.stack(part) for part in zip(*pairs, strict=True))
    assert found["latent_variance"] == pytest.approx(true.var(dim=0, correction=0).mean().item())
    assert 0.1 < found["latent_variance"] <= 1
    error = (model.route.predict(given) - true).square().mean()
    assert found["predicted_error"] == pytest.approx(error.item())
    assert 0.01 < found["reciprocal_rank"] < 0.3
    few = metrics(model, technique, tokens_BL[:2], counted_BL[:2])
    assert "reciprocal_rank" not in few, "there are less than a hundred"
    none = metrics(model, technique, tokens_BL[:2], counted_BL[:2] & False)
    assert set(none) == {"thought_tokens"} and math.isnan(none["thought_tokens"])


def test_scoring_in_bfloat16_rounds_to_the_codes_of_training():
    model = new_model(KINDS["codes"]).eval()
    half = TokenModel(model, lambda requests: [], "cpu", "bfloat16").transformer
    assert half.blocks[0].attention.qkv.weight.dtype == torch.bfloat16
    pooled_ND = torch.randn(5000, 16)
    assert torch.equal(half.route.latents(pooled_ND), model.route.latents(pooled_ND))
    # With a rounded weight some codes differ, so that the test can fail.
    half.route.latents.into.weight.data = half.route.latents.into.weight.data.bfloat16()
    assert not torch.equal(half.route.latents(pooled_ND), model.route.latents(pooled_ND))


@pytest.mark.parametrize("technique", [KINDS["sentences"], KINDS["codes"]], ids=["vectors", "codes"])
def test_collapsed_latents_have_no_variance_and_the_rank_of_chance(technique):
    model, tokens_BL = random_model(technique), some_tokens(60)
    with torch.no_grad():
        if technique.codes is None:
            model.route.pooling.norm.weight.zero_()
        else:
            model.route.latents.into.weight.zero_()
    found = metrics(model, technique, tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool))
    assert found["latent_variance"] == 0
    assert found["reciprocal_rank"] == pytest.approx(sum(1 / n for n in range(1, 101)) / 100)


@torch.no_grad()
def test_a_right_prediction_has_rank_one():
    """The next thought is the one before it: the core's output, its latent, is the prediction."""
    technique = KINDS["sentences"]
    model = random_model(technique, layers=3)
    thoughts = torch.randint(2, EOT, (150, 3), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    row_3 = F.pad(thoughts, (0, 1), value=STOP)
    tokens_BL = torch.cat([torch.full((len(row_3), 1), EOT), row_3, row_3], dim=1)
    for matrix in (model.blocks[1].attention.out, model.blocks[1].ffn.down):
        matrix.weight.zero_()
    for matrix in (model.route.think, model.route.predict):
        matrix.weight.copy_(torch.eye(16))
    model.route.norm.weight.fill_(1)
    counted_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    counted_BL[:, 7] = True  # the second of the two
    assert len(tokens_BL) >= 40
    model.hidden(tokens_BL)
    route, passed = model.route, model.route.take()
    given, true = predicted_pairs(passed, passed.latent_BKZ, F.pad(counted_BL[:, :-1], (1, 0)))
    assert len(true) == len(tokens_BL)
    assert reciprocal_ranks(route.latents.scores(route.predict(given), true), 40).min() > 0.999


# Cost


@pytest.mark.parametrize("name", ["tokens", "attention, add", "codes"])
def test_flops_are_torchs_but_for_attention_within_thoughts(name, torch_operations):
    length, K = 4, L // 4
    technique = KINDS[name].model_copy(update={"cut": "tokens", "length": length})
    model, width = random_model(technique), 16
    row = torch.full((1, L), 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(row)
    # Two products a pair of positions. Those of the core's and the decoder's later keys are counted by torch
    # alone; the first thought that is written has one token less, the last one begins with the row's end.
    pairs_counted = K * length**2 + K**2 / 2 + K * length**2 / 2
    pairs_of_torch = K * length**2 + K**2 + ((length - 1) ** 2 + (K - 1) * length**2 + 1)
    expected = forward_flops(model, L) + 4 * width * (pairs_of_torch - pairs_counted)
    assert counter.get_total_flops() == pytest.approx(expected)
    plain = build_model(model.config)
    assert forward_flops(model, L) < forward_flops(plain, L)


def test_parameters_are_counted_by_what_they_are_for():
    for technique in (*KINDS.values(), NextThought(length=4, prediction=1.0, target="average")):
        model = new_model(technique)
        plain = build_model(model.config)
        groups = parameter_groups(model)
        assert parameter_groups(build_on_meta(model.config, (technique,))) == groups
        average = groups.pop("target encoder", 0)
        encoder = sum(p.numel() for p in plain.blocks[0].parameters()) + 16
        assert average == (encoder if technique.target == "average" else 0)
        added = sum(p.numel() for p in model.route.parameters()) - average
        assert groups.pop("thoughts") == added and groups == parameter_groups(plain)
        unused = average + model.route.predict.weight.numel()
        assert active_parameters(model) == sum(p.numel() for p in model.parameters()) - unused
        # The plain model's weights are those of its seed.
        torch.manual_seed(1)
        plain = build_model(model.config)
        for name, parameter in plain.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)


def test_flops_are_of_the_mean_length_in_the_text(make_technique_run):
    for technique in (
        NextThought(length=20, prediction=1.0, target="average"),
        NextThought(cut="tokens", length=8, prediction=1.0),
        NextThought(cut="tokens", length=8),
    ):
        run = make_technique_run(techniques=[technique])
        mean = mean_thought(run.tokens_folder, technique)
        # The sentences of the corpus have about thirty bytes, each with an end of text.
        assert 5 < mean < 20 if technique.length == 20 else 5 < mean < 8
        model = build_on_meta(run.model, (technique,))
        thoughts, route = 32 / mean, model.route
        forward = route.flops_through(model.blocks, 32, mean) + forward_flops(model.output, 32)
        predict = 2 * 32 * 32 * thoughts
        expected = 3 * forward + (3 if technique.prediction else 2) * predict
        if technique.target:
            expected += thoughts * forward_flops(model.blocks[0], mean)
        assert 32 * run.flops_per_token == pytest.approx(expected)
        missing = run.model_copy(update={"corpus": "not tokenized"})
        assert mean_thought(missing.tokens_folder, technique) is None and missing.flops_per_token > 0
        assert technique.extra_bytes_per_token(run, 4) < 0
        assert (technique.extra_bytes(run) < 0) == (technique.target == "average")


# Training and evaluation

LOSSES = NextThought(cut="tokens", length=2, prediction=0.5, target="average", variance=0.1)


def test_a_run_learns_and_is_scored_on_the_same_bytes(make_technique_run, capsys, tmp_path):
    plain = make_technique_run("plain", {"layers": 3}, steps=2)
    run = make_technique_run(
        "run",
        {"layers": 3, "dropout": 0.1},
        [LOSSES],
        steps=12,
        watch_every=4,
        batch_size=16,
        validation_bytes=700,
    )
    for one in (plain, run):
        train(one)
        evaluate_run(one, EvaluationConfig(benchmarks=["synthetic_pairs"] if one is run else []))
    curve = curve_of(run)
    losses = [float(row["train_next_token"]) for row in curve if row["train_loss"]]
    assert losses[-1] < losses[0]
    for row in curve:
        parts = [float(row[f"train_{name}"]) for name in ("next_token", "prediction", "variance")]
        assert float(row["train_loss"]) == pytest.approx(sum(parts), abs=1e-4)
    last = curve[-1]
    assert 0 < float(last["val_latent_variance"]) <= 1 and 0.01 <= float(last["val_reciprocal_rank"]) <= 1
    # A row may end within a thought.
    assert 1.5 < float(last["val_thought_tokens"]) < 2.1 and float(last["val_predicted_error"]) > 0
    own, other = (read_json(one.folder / "evaluation.json") for one in (run, plain))
    scored = [next(reversed(one["checkpoints"].values())) for one in (own, other)]
    assert len({tuple(one["perplexity"][key] for key in ("bytes", "tokens", "chars")) for one in scored}) == 1
    assert 0 < scored[0]["perplexity"]["bits_per_byte"] < 8
    model, _ = load_checkpoint(last_checkpoint(run))
    assert model.route.ends.nonzero().tolist() == [[256]] and why_not(model) is not None
    with pytest.raises(UserError, match=r"next_thought does not support export"):
        export_llama(last_checkpoint(run), tmp_path / "llama")
    capsys.readouterr()
    assert main(["generate", "test/run", "1 2 3", "--tokens", "40"]) != 0
    assert "next_thought does not support generation with a cache" in capsys.readouterr().err
    assert main(["generate", "test/run", "1 2 3", "--tokens", "40", "--no-cache"]) == 0
    assert capsys.readouterr().out.startswith("1 2 3")


def test_stopped_and_resumed_is_the_same(make_technique_run):
    whole, stopped = (
        make_technique_run(
            name, {"layers": 3, "dropout": 0.1}, [LOSSES], steps=6, optimizer="muon", accumulation=2
        )
        for name in ("whole", "stopped")
    )
    train(whole)
    train_in_parts(stopped, 4)
    assert curve_of(whole) == curve_of(stopped) and same_weights(whole, stopped)


@pytest.mark.slow
def test_two_processes_train_as_one(make_technique_run):
    one, two = (make_technique_run(name, {"layers": 3}, [LOSSES], steps=4) for name in ("one", "two"))
    train(one)
    train_in_two_processes(two)
    weights = [load_checkpoint(last_checkpoint(run))[0].state_dict() for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-5, rtol=1e-3)


def test_layers_may_share_weights():
    technique = NextThought(length=4, prediction=1.0, target="average", encoder=2)
    sharing = {"what": "all", "order": "groups", "group": 2}
    model = random_model(technique, sharing=sharing)
    parts = parts_of(model, technique, some_tokens())
    sum(parts.values()).backward()
    assert len({id(block.attention.qkv.weight) for block in model.blocks}) == 2
    copies = model.route.target.parts
    assert copies[0].attention.qkv.weight is copies[1].attention.qkv.weight
    technique.after_step(model, 1, 1)


# What is refused


def test_other_rows_are_refused():
    model, tokens_BL = random_model(KINDS["sentences"]), some_tokens()
    with pytest.raises(UserError, match="next_thought does not support reading other rows"):
        model.hidden(tokens_BL, Documents.of(tokens_BL, EOT))
    with pytest.raises(UserError, match="next_thought does not support reading blocks"):
        model.residuals(tokens_BL, CausalRows(L), after=[0])


def load(project, keys: str, more: str = ""):
    text = (project / "params" / "smoke.yaml").read_text()
    more = more if "model:" in more else f"    model: {{layers: 3}}\n{more}"
    variant = f"  own:\n    label: Own\n    techniques: {{next_thought: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)
    return load_study("smoke")


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ("{length: 100000}", "", r"next_thought\.length: found 100000, expected at most model.context, \d+"),
        ("{length: 0}", "", r"next_thought\.length: .*found 0"),
        (
            "{encoder: 9}",
            "",
            r"next_thought\.encoder: found 9 with decoder: 1, which leave no core of model.layers: \d; "
            r"expected at most \d together",
        ),
        ("{target: live}", "", "target: found live, expected null: only a loss of the predicted vector"),
        (
            "{target: average, prediction: 1, codes: 4}",
            "",
            "target: found average, expected null: only a loss",
        ),
        ("{decay: 0.5, prediction: 1}", "", "decay: found 0.5 with target: null, expected null: only"),
        ("{levels: 5}", "", "levels: found 5 without codes; expected null"),
        ("{codes: 4, levels: 2}", "", r"levels: .*found 2"),
        ("{codes: 4, variance: 1}", "", r"variance: found 1, expected 0 with codes"),
        (
            "{}",
            "    model: {layers: 3, positions: learned}\n",
            "cut: model.positions: found learned, expected",
        ),
        ("{}", "    model: {layers: 3, value_embeddings: 1}\n", "cut: model.value_embeddings: found 1"),
        ("{}", "    model: {layers: 3, attention_dropout: 0.1}\n", "cut: model.attention_dropout: found 0.1"),
        ("{}", "    data: {attention: within}\n", "does not support attention within documents"),
        (
            "{}",
            "    model: {layers: 2}\n    training: {start_from: baseline}\n",
            "does not support weights of another run",
        ),
        ("{}", "    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
    ],
)
def test_what_does_not_fit_is_refused(keys, more, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys, more)


def test_it_is_loaded_from_a_study(project):
    study = load(project, "{codes: 4, prediction: 0.5}")
    assert study.runs["own"].techniques["next_thought"] == NextThought(codes=4, prediction=0.5)
    assert json.loads(NextThought().model_dump_json())["cut"] == "sentences"
