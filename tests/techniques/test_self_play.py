"""Self-play: the loss against a plain one, what the opponent writes, and whole trainings in two rounds."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from published_folder import MODEL, write_published, write_published_tokens
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, same_weights, train_in_parts, weights_of

from stlm.errors import UserError
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation import together
from stlm.generation.sampling import Sampling
from stlm.generation.together import continuations
from stlm.model import log_probs
from stlm.model.activations import block_activations
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.inference import why_not
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.study.runs import SourceModel
from stlm.techniques.next_thought import NextThought
from stlm.techniques.self_play import SelfPlay
from stlm.tokens.bpe import train_bpe
from stlm.training.checkpoints import save_checkpoint
from stlm.training.loop import Trainer, train
from stlm.training.memory import training_memory
from stlm.training.objective import Forward, Objective, total

WIDTH, LAYERS, CONTEXT, V = 32, 2, 20, 61
SIZES = {"layers": LAYERS, "width": WIDTH, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
OPTIONS = {
    "plain": {},
    "recipe": {
        "value_embeddings": 1,
        "qkv_shift": True,
        "qk_norm": True,
        "logit_softcap": 4.0,
        "tied": False,
    },
    "shared": {"sharing": {"what": "all", "order": "one"}, "embedding_rank": 9, "positions": "learned"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# Two pieces of ten tokens in a row of twenty.
P, C = 6, 4
KEYS = {"opponent": "before", "prompt": P, "continuation": C}


def random_model(seed: int, **options: object) -> Transformer:
    """A model whose predictions depend on all of its parts."""
    model = Transformer(ModelConfig(**{"vocab_size": V, **SIZES, **options}))
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers) * 0.3)
    return model.eval()


def against(opponent: Transformer, **keys: object) -> SelfPlay:
    technique = SelfPlay(**(KEYS | keys))
    technique._opponent = opponent.requires_grad_(False)
    return technique


def rows(count: int = 3) -> torch.Tensor:
    return torch.randint(V, (count, CONTEXT + 1), generator=torch.Generator().manual_seed(2))


def parts_of(technique: SelfPlay, model: Transformer, read: torch.Tensor) -> dict[str, torch.Tensor]:
    """The objective's parts, with the same random numbers each time."""
    torch.manual_seed(7)
    return technique.objective(Forward(model, read[:, :-1], read[:, 1:], None, 1, 1))


# Log-probabilities


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_log_probabilities_and_their_gradients_are_those_of_a_softmax(monkeypatch, softcap):
    numbers = torch.Generator().manual_seed(0)
    targets_N, upstream_N = torch.randint(V, (50,), generator=numbers), torch.randn(50, generator=numbers)
    x_ND, weight_VD = torch.randn(50, 8, generator=numbers), torch.randn(V, 8, generator=numbers)

    def exact(x_ND, weight_VD):
        logits = x_ND.double() @ weight_VD.double().T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return logits.log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]

    inputs = [tensor.clone().requires_grad_() for tensor in (x_ND, weight_VD)]
    expected = exact(*inputs)
    (expected * upstream_N).sum().backward()
    for positions in (1, 7, 10**6):
        monkeypatch.setitem(log_probs._LOGITS, "cpu", positions * V)
        own = [tensor.clone().requires_grad_() for tensor in (x_ND, weight_VD)]
        found = log_probs.token_log_probs(*own, targets_N, softcap)
        (found * upstream_N).sum().backward()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(own, inputs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = log_probs.token_log_probs(*own, targets_N, softcap)
    half.sum().backward()
    assert half.dtype == own[0].grad.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.2)


# The loss


@each_option
def test_it_starts_at_ln_2(options):
    opponent = random_model(0, **options)
    model = copy.deepcopy(opponent).train()
    for keys in ({}, {"scale": 5.0, "temperature": 0.0}, {"weight": 3.0, "temperature": 2.0}):
        technique = against(opponent, **keys)
        found = parts_of(technique, model, rows())
        # Training and scoring have kernels of their own, whose sums differ in the last digits.
        error = technique.weight * technique.scale * 1e-3
        assert list(found) == ["next_token", "self_play"] and found["next_token"] == 0
        assert found["self_play"].item() == pytest.approx(technique.weight * math.log(2), abs=error)
    other = parts_of(against(random_model(1, **options)), model, rows())["self_play"].item()
    assert abs(other - math.log(2)) > 1e-3, "with another opponent it does not"


def test_it_starts_near_ln_2_in_bfloat16():
    opponent = random_model(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = parts_of(against(opponent), copy.deepcopy(opponent).train(), rows())["self_play"]
    assert loss.item() == pytest.approx(math.log(2), abs=0.02)


def naive(technique: SelfPlay, model, opponent, read, made) -> torch.Tensor:
    """The loss by a loop over pieces and tokens. `made`: the continuations, in the order of the pieces."""
    losses, made = [], iter(made)
    for row in read:
        for begin in (0, P + C):
            prompt, real = row[begin : begin + P], row[begin + P : begin + P + C]
            margin = 0.0
            for sign, continuation in ((1, real), (-1, next(made))):
                for one, way in ((model, sign), (opponent, -sign)):
                    for n in range(C):
                        text = torch.cat([prompt, continuation[:n]])
                        log_p_V = one(text[None])[0, -1].log_softmax(dim=0)
                        margin = margin + way * log_p_V[continuation[n]]
            losses.append(torch.log(1 + torch.exp(-technique.scale * margin)))
    return technique.weight * sum(losses) / len(losses)


@each_option
def test_loss_and_gradients_are_those_of_a_plain_loop(options):
    opponent, model = random_model(0, **options), random_model(1, **options)
    technique, read = against(opponent, scale=0.7, weight=2.0), rows()
    torch.manual_seed(7)
    pieces = technique.pieces(read)
    made = technique.made(pieces)[:, P:]
    assert made.shape == (6, C) and (made != pieces[:, P:]).any(dim=1).all()
    own, plain = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    loss = parts_of(technique, own, read)["self_play"]
    expected = naive(technique, plain, opponent, read, made)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, one), other in zip(own.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=2e-4, rtol=2e-3, msg=name)
    assert all(parameter.grad is None for parameter in opponent.parameters())


def test_supervised_training_is_added_or_alone():
    opponent, model, read = random_model(0), random_model(1).train(), rows()
    plain = model.loss(read[:, :-1], read[:, 1:])
    both = parts_of(against(opponent, supervised=0.5), model, read)
    assert both["next_token"].item() == pytest.approx(0.5 * plain.item(), rel=1e-6)
    assert both["self_play"].item() == parts_of(against(opponent), model, read)["self_play"].item()
    technique = SelfPlay(**KEYS, weight=0.0, supervised=1.0)
    assert technique.neutral() and not SelfPlay(**KEYS).neutral()
    alone = parts_of(technique, model, read)
    assert list(alone) == ["next_token"] and torch.equal(total(alone), plain)
    gradients = []
    for loss in (total(alone), plain):
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_few_steps_raise_the_margin():
    opponent = random_model(0)
    model, technique = copy.deepcopy(opponent).train(), against(opponent)
    real, margins = technique.pieces(rows()), []
    torch.manual_seed(3)
    made = technique.made(real)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(5):
        margin_R = technique.margins(model, real, made)
        margins.append(margin_R.mean().item())
        optimizer.zero_grad()
        torch.nn.functional.softplus(-margin_R).mean().backward()
        optimizer.step()
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins == sorted(margins) and margins[-1] > 0.1


# What the opponent writes, and where


def successor() -> Transformer:
    """A model that says that token t is followed by t + 1, of 16 tokens, with near certainty."""
    model = random_model(0, vocab_size=16, tied=False)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.ffn.down.weight.zero_()
        model.norm.weight.fill_(1)
        model.embedding.weight.copy_(torch.eye(16, WIDTH))
        model.output.weight.copy_(5 * torch.eye(16, WIDTH).roll(1, 0))
    return model


def test_continuations_follow_their_prompts_and_take_the_real_ones_places():
    opponent = successor()
    technique, read = against(opponent), torch.arange(2 * (CONTEXT + 1)).view(2, -1) % 16
    read[:, P] = 3  # the first real continuation of each row is not what the opponent writes
    pieces = technique.pieces(read)
    assert pieces.tolist() == [row[begin : begin + P + C] for row in read.tolist() for begin in (0, P + C)]
    made = technique.made(pieces)
    assert torch.equal(made[:, :P], pieces[:, :P])
    for own in made.tolist():
        assert own[P:] == [(own[P - 1] + n) % 16 for n in range(1, C + 1)]
    assert [a == b for a, b in zip(made.tolist(), pieces.tolist(), strict=True)] == [False, True] * 2
    likely = technique.log_probs(opponent, pieces).exp()
    assert (likely > 0.9).tolist() == [False, True, False, True]
    # Each token of a continuation counts, with the last one of the prompt, and no other.
    for place in range(P + C):
        other = pieces[1:2].clone()
        other[0, place] = (other[0, place] + 5) % 16
        assert (technique.log_probs(opponent, other).exp() < 0.1).item() == (place >= P - 1)


@pytest.mark.parametrize("in_c", [True, False])
@each_option
def test_written_at_once_with_a_cache_is_as_alone_without(options, in_c):
    model, prompts = random_model(0, **options), rows()[:, :P]
    if in_c and why_not(model) is not None:
        pytest.skip("no kernels")
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.7)):
        torch.manual_seed(4)
        expected = prompts
        with torch.no_grad():
            for _ in range(C):
                symbols = sampling.choose(model(expected)[:, -1])
                expected = torch.cat([expected, symbols[:, None]], dim=1)
        if not in_c:
            model.norm.register_forward_hook(lambda *_: None)
        assert (why_not(model) is None) == in_c
        torch.manual_seed(4)
        found = continuations(model, prompts, C, sampling)
        assert torch.equal(found, expected[:, P:])
    torch.manual_seed(5)
    assert not torch.equal(continuations(model, prompts, C, sampling), found), "other numbers, other text"
    assert continuations(model, prompts, 1, Sampling(temperature=0)).shape == (3, 1)
    full = rows()[:, : CONTEXT - 3]
    assert continuations(model, full, 3, Sampling(temperature=0)).shape == (3, 3)


# Cost


def self_play_run(make_technique_run, name="run", keys=None, before=None, **given):
    technique = SelfPlay(**(KEYS | {"prompt": 12, "continuation": 4} | (keys or {})))
    before = before or make_technique_run("before", model={"layers": 2}, **given)
    technique.set_others({"start": before})
    return make_technique_run(name, model={"layers": 2}, techniques=[technique], **given), before


@pytest.mark.parametrize("supervised", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"embedding_rank": 9, "tied": False}], ids=str)
def test_flops_are_torchs_but_for_the_upper_half_of_attention(
    options, supervised, make_technique_run, torch_operations
):
    sizes = {**SIZES, **options}
    before = make_technique_run("before", model=sizes)
    technique = SelfPlay(**KEYS, supervised=supervised)
    technique.set_others({"start": before})
    run = make_technique_run(model=sizes, techniques=[technique])
    opponent = build_model(before.model).eval().requires_grad_(False)
    opponent.norm.register_forward_hook(lambda *_: None)  # in torch, which counts
    technique._opponent = opponent
    model, objective = build_model(run.model, [technique]).eval(), Objective(run)
    read = rows(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total(objective(objective.forward(model, read, None, 1))).backward()
    M, pair = P + C, 2 * WIDTH * LAYERS  # a pair of positions costs twice that
    # Passes compute all pairs, of which half are counted: two pieces with gradients and two without.
    upper_half = 2 * (2 * 3 + 2) * pair * (M - 1) ** 2
    # Writing computes all pairs of the prompt, and then those up to each token.
    upper_half += 2 * (2 * pair * (P**2 + sum(range(P + 1, M))) - pair * (M - 1) ** 2)
    upper_half += 3 * pair * CONTEXT**2 if supervised else 0
    # Not counted either: the last block does not finish a prompt's tokens but for the last.
    unfinished = 2 * (P - 1) * 2 * (WIDTH**2 + 3 * WIDTH * 40)
    assert run.flops_per_token * CONTEXT - unfinished == counter.get_total_flops() - upper_half
    alone = technique.model_copy(update={"weight": 0.0, "supervised": 1.0})
    alone.set_others({"start": before})
    assert alone.extra_flops_per_token(run) == alone.extra_bytes(run) == 0


def test_memory_is_the_opponents_and_both_pieces(make_technique_run):
    run, before = self_play_run(make_technique_run)
    own, other = (training_memory(one, "float32", False, 4) for one in (run, before))
    assert own.weights - other.weights == 4 * before.parameters.total
    tokens = 8 * run.model.context
    assert own.sequence - tokens == pytest.approx((other.sequence - tokens) * 2 * 2 * 15 / 32, abs=1)
    assert run.parameters == before.parameters


WIDE = {"kv_heads": 2, "qkv_shift": True, "ffn_width": 8}  # as large a cache as blocks of a width can have


@pytest.mark.parametrize("options", [{}, WIDE], ids=str)
def test_writings_cache_is_freed_before_the_pieces_are_read_and_smaller(
    options, make_technique_run, monkeypatch
):
    technique = self_play_run(make_technique_run)[0].techniques["self_play"]
    run = make_technique_run("again", model={"layers": 2, **options}, techniques=[technique])
    sizes, held = [], []

    class Watched(Cache):
        def __init__(self, *arguments, **keys):
            super().__init__(*arguments, **keys)
            sizes.append(4 * (self.kv.numel() + self.unshifted.numel()))
            weakref.finalize(self, held.append, "freed")

    monkeypatch.setattr(together, "Cache", Watched)
    technique._opponent = build_model(run.model).eval()
    margins = SelfPlay.margins
    monkeypatch.setattr(SelfPlay, "margins", lambda *given: held.append("read") or margins(*given))
    model, objective = build_model(run.model, [technique]), Objective(run)
    objective(objective.forward(model, torch.randint(1, 257, (4, 33)), None, 1))
    assert held == ["freed", "read"]
    kept = 2 * 4 * 2 * 15 * 2 * block_activations(run.model, narrow=2)  # both pieces, two of them a row
    assert 0 < sizes[0] < kept


# Trainings


def test_two_rounds_of_self_play(make_technique_run):
    recipe = {"steps": 4, "warmup_steps": 1, "log_every": 1, "accumulation": 2, "learning_rate": 1e-4}
    recipe |= {"min_learning_rate": 1e-5, "save_every": 2}
    run, before = self_play_run(make_technique_run, **recipe)
    stopped, _ = self_play_run(make_technique_run, "stopped", before=before, **recipe)
    second, _ = self_play_run(make_technique_run, "second", {"opponent": "run"}, before=run, **recipe)
    train(before)
    train(run)
    train_in_parts(stopped, 3)
    assert same_weights(run, stopped) and curve_of(run) == curve_of(stopped)
    train(second)
    assert not same_weights(run, before) and not same_weights(run, second)
    for one in (run, second):
        curve = curve_of(one)
        assert float(curve[0]["train_self_play"]) == pytest.approx(math.log(2), abs=1e-4)
        assert all(float(row["train_next_token"]) == 0 for row in curve)
        assert float(curve[0]["train_loss"]) == float(curve[0]["train_self_play"])
    record = read_json(second.folder / "train.json")
    start = record["depends"]["start"]
    assert start["run"] == "run" and start["depends"]["start"]["run"] == "before"
    assert record["flops"] == second.tokens * second.flops_per_token
    # The opponent is the run before, as it was; what it wrote was drawn anew for each micro-batch.
    setup = Trainer(second).setup
    (technique,) = second.techniques.values()
    opponent = technique._opponent.state_dict()
    assert all(torch.equal(value, opponent[name]) for name, value in weights_of(run).items())
    written = [
        technique.made(technique.pieces(tokens))[:, 12:].tolist()
        for step in (1, 1, 2)
        for tokens in setup.micro_batches.of_step(step, setup.share)
    ]
    assert written[:2] == written[2:4] and written[0] != written[1] != written[4]


def test_the_control_is_the_run_that_starts_from_the_opponent(make_technique_run):
    recipe = {"steps": 3, "warmup_steps": 1}
    run, before = self_play_run(make_technique_run, keys={"weight": 0.0, "supervised": 1.0}, **recipe)
    plain = make_technique_run("plain", model={"layers": 2}, start_from="before", **recipe)
    for one in (before, run, plain):
        train(one)
    assert same_weights(run, plain) and curve_of(run) == curve_of(plain)


@pytest.mark.parametrize("tokenizer", ["hf:made", "hf:made:290"])
def test_the_opponent_may_be_a_published_model_without_the_tokens_that_the_run_lacks(
    tokenizer, make_run, tmp_path
):
    parent = write_published(tmp_path)
    write_published_tokens(tmp_path, "hf:made", tokenizer)
    size = int(tokenizer.rpartition(":")[2]) if tokenizer.count(":") > 1 else parent.config.vocab_size
    technique = SelfPlay(opponent="made", prompt=8, continuation=4, scale=1.0)
    technique.set_others({"start": SourceModel(name="made", model=parent.config)})
    layout = {**MODEL, "vocab_size": size, "dropout": 0.0}
    made = {"tokenizer": tokenizer, "sources": {"start": "made"}, "techniques": {"self_play": technique}}
    run = make_run("own", model=layout).model_copy(update=made)
    setup = Trainer(run).setup
    (tokens_BM,) = setup.micro_batches.of_step(1, setup.share)
    assert setup.loss(tokens_BM, 1).item() == pytest.approx(math.log(2), abs=1e-3)
    assert technique._opponent.config.vocab_size == size
    assert technique.extra_bytes(run) == 4 * run.parameters.total
    assert technique.extra_flops_per_token(run) > 0


def test_the_model_is_the_plain_one_and_is_exported(tmp_path):
    tokenizer = train_bpe("bpe-270", ["The hen ran home to eat with nine owls."] * 3)
    files = []
    for name, techniques in (("plain", ()), ("own", (SelfPlay(**KEYS),))):
        torch.manual_seed(0)
        model = build_model(ModelConfig(vocab_size=270, **SIZES), techniques).eval()
        assert why_not(model) == why_not(random_model(0))
        checkpoint = tmp_path / name / "checkpoints" / "step-0000001"
        save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
        tokenizer.save(checkpoint.parent / "tokenizer")
        export_llama(checkpoint, tmp_path / name / "llama")
        files += [load_file(checkpoint / "model.safetensors")]
        files += [load_file(tmp_path / name / "llama" / "model.safetensors")]
    for one, other in ((files[0], files[2]), (files[1], files[3])):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Through a study

STUDY = """
description: Rounds of self-play.
corpus: synthetic
tokenizer: bpe-1280
baseline: before
model: {layers: 2, width: 96, heads: 4, kv_heads: 2, ffn_width: 256, context: 128}
training: {steps: 10, batch_size: 8, warmup_steps: 2}
evaluation: {benchmarks: []}
variants:
  before: {}
  first:
    techniques: {self_play: {opponent: before}}
  second:
    techniques: {self_play: {opponent: first, scale: 5}}
"""


def study(project, *overrides: str):
    (project / "params" / "played.yaml").write_text(STUDY)
    return load_study("played", overrides)


def test_a_study_knows_the_opponents(project):
    runs = study(project).runs
    assert [runs[name].depends for name in runs] == [{}, {"start": "before"}, {"start": "first"}]
    assert runs["first"].parameters == runs["before"].parameters
    assert runs["first"].flops_per_token == runs["second"].flops_per_token > runs["before"].flops_per_token
    control = study(
        project, "variants.first.techniques.self_play={opponent: before, weight: 0, supervised: 1}"
    )
    assert control.runs["first"].flops_per_token == runs["before"].flops_per_token


def test_an_opponent_that_writes_without_a_cache_is_refused(make_technique_run):
    run, before = self_play_run(make_technique_run)
    technique = run.techniques["self_play"]
    opponent = before.model_copy(update={"techniques": {"next_thought": NextThought()}})
    technique.set_others({"start": opponent})
    with pytest.raises(ValueError, match=r"opponent: found .before., whose techniques.next_thought does not"):
        technique.check(run, {})


PLAY = "variants.first.techniques.self_play"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants.first.tokenizer=bpe-1024", r"self_play\.opponent: 'before' has the tokenizer bpe-1280"),
        (
            "variants.first.model.width=192",
            r"self_play\.opponent: 'before' has model\.width: 96, the run 192",
        ),
        ("variants.first.model.layers=1", r"opponent: 'before' is larger.*only training.start_from cuts"),
        (
            f"{PLAY}.continuation=65",
            r"continuation: found 65 after prompt: 64, 129 tokens together; expected at most model.context, ",
        ),
        (f"{PLAY}.opponent=befor", r"self_play\.opponent: 'befor' is no variant.*'before'"),
        (f"{PLAY}.opponent=second", r"a run cannot depend on itself"),
        (f"{PLAY}.weight=0", r"supervised: found 0 with weight: 0, .*expected one above 0"),
        (f"{PLAY}.prompt=0", r"self_play\.prompt: .*found 0"),
        (
            "variants.first.model.dropout=0.1",
            r"self_play\.weight: found model\.dropout: 0\.1, expected 0, as",
        ),
        ("variants.first.data.attention=within", r"self_play does not support attention within documents"),
        ("variants.first.training.compile=true", r"self_play does not support torch\.compile"),
        ("variants.first.training.start_from=before", r"has the role 'start' already"),
        ("variants.first.model.context=256", None),
        (
            f"variants.first.model.context=256 {PLAY}.continuation=65",
            r"129 tokens together; expected at most the opponent's context, 128",
        ),
    ],
    ids=lambda value: value.partition("=")[0].rpartition(".")[2] if value else "",
)
def test_what_does_not_fit_is_refused(project, override, message):
    if message is None:
        assert study(project, *override.split()).runs["first"].model.context == 256
        return
    with pytest.raises(UserError, match=message):
        study(project, *override.split())
