"""Mixture of depths: what is chosen, what passes by, and that inference looks at no later token."""

from __future__ import annotations

import csv

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, last_checkpoint, same_weights, train_in_parts

from stlm.errors import UserError
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.find import load_generator
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import active_parameters, parameter_groups
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.base import refuse
from stlm.techniques.mixture_of_depths import MixtureOfDepths, RoutedBlock, routed_blocks
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import checkpoint_name, load_checkpoint, save_checkpoint
from stlm.training.loop import train
from stlm.training.objective import Objective, total

L, EOT = 16, 0
TINY = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": L, "dropout": 0.0}
TOKENIZER = ByteTokenizer()
OPTIONS = {
    "rope": {},
    "learned": {"positions": "learned"},
    "qkv shift, value embeddings": {"qkv_shift": True, "value_embeddings": 2, "qk_norm": True},
    "shared layers": {"sharing": {"what": "all", "order": "groups", "group": 2}, "lora": {"rank": 3}},
}
THRESHOLDS = ("auxiliary", "predictor")


def random_model(technique: MixtureOfDepths | None = None, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts, and whose routers choose about half."""
    torch.manual_seed(1)
    model = build_model(
        ModelConfig(**({"vocab_size": 257} | TINY | options)), () if technique is None else (technique,)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router_bias") or name.endswith("predictor_bias"):
                continue
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def routed(threshold: str = "auxiliary", capacity: float = 0.25, **options: object) -> Transformer:
    return random_model(MixtureOfDepths(capacity=capacity, threshold=threshold), **options)


def take_all(model: Transformer) -> None:
    """Have every router choose every token with weight 1, which float32's sigmoid of 100 is."""
    with torch.no_grad():
        for block in routed_blocks(model):
            block.router.zero_()
            block.router_bias.fill_(100.0)


def some_tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 257, (rows, L), generator=torch.Generator().manual_seed(2))


def shares(model: Transformer) -> list[float]:
    return [float(block.chosen_BL.double().mean()) for block in routed_blocks(model)]


def test_every_second_block_is_routed_and_which_is_a_key():
    def numbers(**keys: object) -> list[int]:
        model = build_model(ModelConfig(**TINY, vocab_size=9), [MixtureOfDepths(**keys)])
        return [n for n, block in enumerate(model.blocks) if isinstance(block, RoutedBlock)]

    assert numbers() == [1, 3]
    assert numbers(first=1, every=3) == [0, 3]
    assert numbers(every=1) == [1, 2, 3]


def test_capacity_1_is_the_plain_model():
    neutral = MixtureOfDepths(capacity=1.0)
    assert neutral.neutral() and not MixtureOfDepths().neutral()
    plain, model = random_model(), random_model(neutral)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    tokens_BL = some_tokens()
    assert torch.equal(plain(tokens_BL), model(tokens_BL))


def test_the_plain_models_weights_are_those_of_its_seed():
    models = []
    for techniques in ((), (MixtureOfDepths(),)):
        torch.manual_seed(0)
        models.append(build_model(ModelConfig(**TINY, vocab_size=257), techniques))
    plain = dict(models[0].named_parameters())
    same = {name.replace(".block.", "."): p for name, p in models[1].named_parameters()}
    assert all(torch.equal(parameter, same[name]) for name, parameter in plain.items())
    assert len(same) == len(plain) + 2 * len(routed_blocks(models[1]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_tokens_with_weight_1_are_the_dense_model(options):
    """0.99 of 16 tokens is 16, rounded up: the way through router, selection and weight changes nothing."""
    plain, model = random_model(**options), routed(capacity=0.99, **options)
    take_all(model)
    plain_parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" not in name:
                parameter.copy_(plain_parameters[name.replace(".block.", ".")])
    tokens_BL = some_tokens()
    torch.testing.assert_close(model(tokens_BL), plain(tokens_BL), atol=1e-4, rtol=1e-4)
    for one in (plain, model):
        one.train()
        one.loss(tokens_BL[:, :-1], tokens_BL[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        if "router" not in name:
            expected = plain_parameters[name.replace(".block.", ".")].grad
            torch.testing.assert_close(parameter.grad, expected, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_tokens_that_are_not_chosen_pass_to_the_bit(training):
    model = routed().train(training)
    streams = model.residuals(some_tokens(), after=range(4))
    for number in (1, 3):
        same_BL = (streams[number] == streams[number - 1]).all(dim=-1)
        if training:
            assert same_BL.sum(dim=1).tolist() == [L - 4] * 3
        else:
            assert torch.equal(~same_BL, model.blocks[number].chosen_BL)
            assert 0 < same_BL.sum() < same_BL.numel()


def test_a_token_uses_capacity_of_the_routed_blocks():
    model = routed(capacity=0.25)
    blocks = sum(p.numel() for routed_block in routed_blocks(model) for p in routed_block.block.parameters())
    total_count = sum(p.numel() for p in model.parameters())
    assert blocks > 0 and active_parameters(model) == total_count - 0.75 * blocks


def test_ceil_of_capacity_times_length_are_chosen():
    block = MixtureOfDepths(capacity=0.1)
    model = build_model(ModelConfig(**TINY, vocab_size=9), [block])
    chosen = routed_blocks(model)[0].chosen
    assert [chosen(length) for length in (1, 10, 11, 30, 31)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_who_gets_a_gradient(make_run, threshold):
    technique = MixtureOfDepths(threshold=threshold, capacity=0.25)
    run = make_run(model=TINY).model_copy(update={"techniques": {"mixture_of_depths": technique}})
    model = routed(threshold).train()
    tokens_BM = torch.cat([some_tokens(), some_tokens()[:, :1]], dim=1)
    objective = Objective(run)
    parts = objective(objective.forward(model, tokens_BM, None, 1))
    assert parts.keys() == {"router", "next_token"}
    block = model.blocks[1]
    assert block.loss is None
    # By way of its weight, the next-token loss alone moves the router.
    (gradient,) = torch.autograd.grad(parts["next_token"], [block.router], retain_graph=True)
    assert gradient.norm() > 0
    of_loss = torch.autograd.grad(parts["router"], list(model.parameters()), allow_unused=True)
    moved = {n for (n, _), g in zip(model.named_parameters(), of_loss, strict=True) if g is not None}
    if threshold == "predictor":
        own = ("predictor_up", "predictor", "predictor_bias")
        assert moved == {f"blocks.{number}.{name}" for number in (1, 3) for name in own}
    else:
        assert {"blocks.1.router", "blocks.1.router_bias", "blocks.0.ffn.down.weight"} <= moved


def test_the_part_is_the_weighted_mean_of_the_blocks_cross_entropies(make_run):
    technique = MixtureOfDepths(capacity=0.25, weight=0.5)
    run = make_run(model=TINY).model_copy(update={"techniques": {"mixture_of_depths": technique}})
    model = routed().train()
    with torch.no_grad():
        for block in routed_blocks(model):
            block.router.zero_()
            block.router_bias.fill_(1.0)
    objective = Objective(run)
    tokens_BM = torch.cat([some_tokens(), some_tokens()[:, :1]], dim=1)
    parts = objective(objective.forward(model, tokens_BM, None, 1))
    p = torch.tensor(1.0).sigmoid()
    assert parts["router"].item() == pytest.approx(float(-0.5 * (p.log() / 4 + (1 - p).log() * 3 / 4)))
    assert total(parts) == parts["router"] + parts["next_token"]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_later_tokens_move_nothing_in_evaluation_and_do_under_top_k(threshold):
    model, tokens_BL = routed(threshold), some_tokens(8)
    changed_BL = tokens_BL.clone()
    changed_BL[:, L // 2 :] = tokens_BL[:, L // 2 :] % 256 + 1  # another one
    before = slice(L // 2)
    torch.testing.assert_close(model(changed_BL)[:, before], model(tokens_BL)[:, before])
    model.train()  # no dropout: top-k is all that differs
    assert (model(changed_BL)[:, before] - model(tokens_BL)[:, before]).abs().max() > 1e-2


@torch.no_grad()
def test_documents_in_a_row_do_not_see_one_another():
    model, tokens_BL = routed(qkv_shift=True), some_tokens(4)
    tokens_BL[:, 7] = EOT
    whole_BLD = model.hidden(tokens_BL, Documents.of(tokens_BL, EOT))
    second_BLD = model.hidden(tokens_BL[:, 7:], Documents.of(tokens_BL[:, 7:], EOT))
    torch.testing.assert_close(whole_BLD[:, 7:], second_BLD, atol=1e-4, rtol=1e-4)
    assert (model.hidden(tokens_BL) - whole_BLD).abs().max() > 1e-2
    # In training, by the kernels for it, the same tokens attend to the same ones.
    for block in routed_blocks(model):
        block._choose_top = block._choose_above
    trained_BLD = model.train().hidden(tokens_BL, Documents.of(tokens_BL, EOT))
    assert model.blocks[1].chosen_BL.sum(dim=1).unique().numel() > 1, "rows without padding show less"
    torch.testing.assert_close(trained_BLD, whole_BLD, atol=1e-4, rtol=1e-4)


def test_padding_at_the_right_does_not_matter():
    model, tokens_BL = routed(), some_tokens()
    expected = [model.hidden(tokens_BL[b : b + 1, :n])[0] for b, n in enumerate((5, 16, 9))]
    for filler in (0, 77):
        padded_BL = tokens_BL.clone()
        padded_BL[0, 5:], padded_BL[2, 9:] = filler, filler
        hidden_BLD = model.hidden(padded_BL)
        for b, one in enumerate(expected):
            torch.testing.assert_close(hidden_BLD[b, : len(one)], one, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_head_may_read_some_positions_alone():
    model, tokens_BL = routed(), some_tokens()
    rows_N = torch.tensor([0, 5, 17, 47])
    expected = model.hidden(tokens_BL).flatten(0, 1)[rows_N]
    torch.testing.assert_close(model.hidden(tokens_BL, None, rows_N), expected)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cache_changes_nothing(options, threshold):
    model, tokens_BL = routed(threshold, **options), some_tokens()
    cache = Cache(model.config, 3, torch.device("cpu"))
    with torch.inference_mode():
        whole_BLD = model.hidden(tokens_BL)
        for _ in range(2):  # the second time over what the first left
            parts = tokens_BL.split([1, 5, 1, 1, 3, 2, 1, 2], dim=1)
            found = [model.hidden(part, cache.extend(part.shape[1])) for part in parts]
            torch.testing.assert_close(torch.cat(found, dim=1), whole_BLD, atol=2e-4, rtol=1e-3)
            cache.clear()
    texts = []
    for cached in (True, False):
        generator = TokenGenerator(model, TOKENIZER, cached)
        logits_V, numbers = generator.start("Once"), torch.Generator().manual_seed(5)
        texts.append([])
        while len(texts[-1]) < 3 * L:
            texts[-1].append(int(Sampling(temperature=1.0).choose(logits_V, numbers)) % generator.eot)
            logits_V = generator.next(texts[-1][-1])
    assert texts[0] == texts[1] and len(set(texts[0])) > 2


@torch.inference_mode()
def test_where_no_token_is_chosen_all_pass():
    plain, model, tokens_BL = random_model(layers=2), routed(layers=2), some_tokens()
    model.blocks[1].router_bias.fill_(-100.0)
    model.norm, model.embedding = plain.norm, plain.embedding
    stream, last = model.residuals(tokens_BL, after=[0])
    assert torch.equal(stream, last) and shares(model) == [0.0]
    cache = Cache(model.config, 3, torch.device("cpu"))
    parts = [model.residuals(part, cache.extend(part.shape[1]))[-1] for part in tokens_BL.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), last, atol=1e-4, rtol=1e-4)


def test_packed_in_a_trie_as_in_single_rows():
    model = routed("predictor", context=48, qkv_shift=True)
    model(some_tokens())
    assert all(0.2 < share < 0.8 for share in shares(model))
    requests = [
        Request("the cat", f" {one}{other}")
        for one in ("sat", "ran", "was")
        for other in ("", " home", " on")
    ]
    scorer = TokenModel(model, RequestEncoder(TOKENIZER))
    assert scorer.packs
    packed = [score.logprob for score in scorer.loglikelihoods(requests)]
    scorer.packs = False
    single = [score.logprob for score in scorer.loglikelihoods(requests)]
    assert packed == pytest.approx(single, abs=1e-3)
    # A copy with its linear layers in bfloat16, routers and predictors in float32.
    half = TokenModel(model, RequestEncoder(TOKENIZER), precision="bfloat16").loglikelihoods(requests)
    assert all(score.logprob < 0 for score in half)


def test_bfloat16_leaves_the_router_in_float32():
    model = routed("predictor").train()
    kept = []
    for block in routed_blocks(model):
        scores = block._scores
        block._scores = lambda x, scores=scores: kept.append(scores(x)) or kept[-1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(some_tokens()[:, :-1], some_tokens()[:, 1:])
    assert {logits.dtype for pair in kept for logits in pair} == {torch.float32}
    (loss + sum(block.take_loss() for block in routed_blocks(model))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("capacity", [0.125, 0.3])
def test_flops_are_torchs_but_for_the_upper_half_of_attention(threshold, capacity, torch_operations):
    model, dense = routed(threshold, capacity), random_model()
    for block in routed_blocks(model):
        block.training = True  # top-k, while attention is torch's
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(some_tokens(1))
    chosen = routed_blocks(model)[0].chosen(L)
    upper_half = 2 * 32 * 2 * (L**2 + chosen**2)
    assert forward_flops(model, L) == counter.get_total_flops() - upper_half
    assert forward_flops(model, L) < forward_flops(dense, L)
    groups = parameter_groups(model)
    assert groups.pop("router") == 2 * (33 if threshold == "auxiliary" else 33 + 8 * 33 + 1)
    assert groups == parameter_groups(dense)


def test_training_is_one_graph_for_the_compiler():
    """What torch.compile traces, run without code generation: no break, and the cross-entropies come out."""
    model, tokens_BL = routed("predictor", layers=2, qkv_shift=True).train(), some_tokens()
    tokens_BL[:, 7] = EOT
    layout = Documents.of(tokens_BL, EOT)
    hidden_BLD, loss = model.hidden(tokens_BL, layout), model.blocks[1].take_loss()
    compiled = torch.compile(model.hidden, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens_BL, layout), hidden_BLD, atol=1e-5, rtol=1e-4)
    compiled_loss = model.blocks[1].take_loss()
    torch.testing.assert_close(compiled_loss, loss)
    compiled_loss.backward()
    assert model.blocks[1].predictor_up.grad.norm() > 0


def with_technique(run, **keys):
    return run.model_copy(update={"techniques": {"mixture_of_depths": MixtureOfDepths(**keys)}})


def test_a_run_stopped_and_resumed_is_the_same(make_run):
    """With Muon, attention within documents, dropout and the watch."""
    recipe = {"optimizer": "muon", "watch_every": 3, "steps": 8}
    shape = {"layers": 2, "qkv_shift": True, "value_embeddings": 1}
    whole, stopped = (
        with_technique(make_run(name, shape, **recipe), threshold="predictor", capacity=0.25).model_copy(
            update={"data": DataConfig(attention="within")}
        )
        for name in ("whole", "stopped")
    )
    train(whole)
    train_in_parts(stopped, 5)
    rows = [curve_of(run) for run in (whole, stopped)]
    for row in (*rows[0], *rows[1]):
        assert float(row.pop("train_router")) > 0 and float(row.pop("train_next_token")) > 0
        assert 0 <= float(row.pop("val_share") or 0) <= 1
    assert rows[0] == rows[1]
    assert same_weights(whole, stopped)
    model, description = load_checkpoint(last_checkpoint(whole))
    assert description["techniques"] == {
        "mixture_of_depths": MixtureOfDepths(threshold="predictor", capacity=0.25).model_dump()
    }
    assert isinstance(model.blocks[1], RoutedBlock) and not model.training
    assert "val_share" in read_json(whole.folder / "train.json")["final"]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_after_training_the_threshold_takes_about_the_capacity(make_run, threshold):
    recipe = {"steps": 60, "validate_every": 60, "log_every": 60, "save_every": 60}
    run = make_run("share", {"layers": 2, "dropout": 0.0}, **recipe)
    run = with_technique(run, threshold=threshold, capacity=0.25)
    train(run)
    assert float(curve_of(run)[-1]["val_share"]) == pytest.approx(0.25, abs=0.1)


def test_the_share_is_of_the_tokens_that_count():
    model, counted_BL = routed(), torch.zeros(3, L, dtype=torch.bool)
    counted_BL[0, :5] = counted_BL[2, 3] = True
    tokens_BL = some_tokens()
    model(tokens_BL)
    expected = [int((block.chosen_BL & counted_BL).sum()) for block in routed_blocks(model)]
    found = model.techniques[0].validated(model, tokens_BL, tokens_BL, counted_BL)
    taken, count = found["share"].tolist()
    assert (taken, count) == (sum(expected), 12)


def test_the_watch_looks_into_routed_blocks(make_run):
    run = with_technique(make_run(model={"layers": 2}, watch_every=2, steps=4), capacity=0.5)
    train(run)
    with (run.folder / "watch.csv").open() as file:
        rows = {(row["step"], row["layer"]): row for row in csv.DictReader(file)}
    routed_row = rows["4", "block 2"]
    assert all(float(routed_row[name]) > 0 for name in ("residual_rms", "ffn_rms", "weight_rms", "grad_norm"))


def test_a_checkpoint_is_read_and_generated_from_and_not_exported(tmp_path):
    model = routed("predictor", **OPTIONS["shared layers"])
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(1)
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    TOKENIZER.save(tmp_path / "checkpoints" / "tokenizer")
    loaded, _ = load_checkpoint(checkpoint)
    assert torch.equal(loaded(some_tokens()), model(some_tokens()))
    assert load_generator(checkpoint, torch.device("cpu")).start("a").shape == (257,)
    with pytest.raises(UserError, match="mixture_of_depths does not support export"):
        export_llama(checkpoint, tmp_path / "llama")


STUDY = {
    "description": "Depths.",
    "corpus": "synthetic",
    "tokenizer": "bpe-1280",
    "seeds": [0],
    "baseline": "plain",
    "model": {**TINY, "context": 64},
    "training": {"steps": 4, "warmup_steps": 1},
    "techniques": {"mixture_of_depths": {"capacity": 0.5}},
    "evaluation": {"benchmarks": ["synthetic_pairs"], "modes": ["paper"]},
    "variants": {
        "plain": {"techniques": {"mixture_of_depths": None}},
        "depths": {"techniques": {"mixture_of_depths": {"every": 1}}},
        "half": {},
    },
}


def load(project, **changes):
    (project / "params" / "depths.yaml").write_text(yaml.safe_dump(STUDY | changes))
    return load_study("depths")


def test_a_study_switches_it_on(project):
    runs = load(project).runs
    assert runs["plain"].techniques == {}
    assert runs["half"].techniques == {"mixture_of_depths": MixtureOfDepths(capacity=0.5)}
    assert runs["depths"].techniques == {"mixture_of_depths": MixtureOfDepths(capacity=0.5, every=1)}
    flops = [runs[name].flops_per_token for name in ("depths", "half", "plain")]
    assert flops == sorted(flops)
    assert runs["half"].parameters.total == runs["plain"].parameters.total + 2 * 33


@pytest.mark.parametrize(
    ("techniques", "model", "message"),
    [
        ({"mixture_of_depth": {}}, {}, "'mixture_of_depth' is no technique.*mixture_of_depths"),
        ({"mixture_of_depths": {"capacty": 0.5}}, {}, r"mixture_of_depths\.capacty: no such key.*capacity"),
        ({"mixture_of_depths": {"capacity": 1.5}}, {}, r"mixture_of_depths\.capacity: .*found 1\.5"),
        ({"mixture_of_depths": {"threshold": "auxilary"}}, {}, "threshold: .*auxiliary"),
        (
            {"mixture_of_depths": {"first": 5}},
            {},
            r"mixture_of_depths\.first: found 5, expected at most the 4",
        ),
        ({"mixture_of_depths": {}}, {"bytes": {}}, "mixture_of_depths does not support byte-level models"),
    ],
)
def test_what_is_wrong_is_refused_by_name(project, techniques, model, message):
    variants = {"plain": STUDY["variants"]["plain"], "wrong": {"techniques": techniques, "model": model}}
    if model:
        variants["wrong"]["tokenizer"] = "words"
    with pytest.raises(UserError, match=message):
        load(project, variants=variants, techniques={})


def test_what_it_does_not_support_yet_is_said():
    for capability in ("bytes", "export", "start_from"):
        with pytest.raises(UserError, match=r"techniques\.mixture_of_depths does not support"):
            refuse([MixtureOfDepths()], capability)
