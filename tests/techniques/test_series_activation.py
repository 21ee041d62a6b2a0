"""Series activation: the sum, its plain start, and that nothing else of a model changes."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, last_checkpoint, same_weights, train_in_parts

from stlm.errors import UserError
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.model.documents import Documents
from stlm.model.feed_forward import FFNS
from stlm.model.flops import forward_flops
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.base import CAPABILITIES, refuse
from stlm.techniques.series_activation import Series, SeriesActivation
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import checkpoint_name, load_checkpoint, save_checkpoint
from stlm.training.loop import train
from stlm.training.optimizers import build_optimizer

L, EOT = 16, 0
TINY = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": L, "dropout": 0.0}
TOKENIZER = ByteTokenizer()
OPTIONS = {
    **{ffn: {"ffn": ffn} for ffn in FFNS},
    "learned, shift, value embeddings": {"positions": "learned", "qkv_shift": True, "value_embeddings": 2},
    "shared layers": {
        "layers": 4,
        "sharing": {"what": "all", "order": "groups", "group": 2},
        "lora": {"rank": 3},
    },
    "low rank": {"low_rank": {"ffn": 8}},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def new_model(*techniques: SeriesActivation, **options: object) -> Transformer:
    torch.manual_seed(1)
    return build_model(ModelConfig(**({"vocab_size": 257} | TINY | options)), techniques)


def random_model(*techniques: SeriesActivation, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts."""
    model = new_model(*techniques, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 0.7))
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


def some_tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 257, (rows, L), generator=torch.Generator().manual_seed(2))


def same_results(model: Transformer, plain: Transformer, **close: float) -> None:
    """Logits, loss, and gradients of the parameters that both have."""
    tokens_BL = some_tokens()
    torch.testing.assert_close(model(tokens_BL), plain(tokens_BL), **close)
    losses = [one.train().loss(tokens_BL[:, :-1], tokens_BL[:, 1:]) for one in (model, plain)]
    torch.testing.assert_close(*losses, **close)
    for loss in losses:
        loss.backward()
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, **close, msg=name)


@each_option
def test_one_term_is_the_plain_model_to_the_bit(options):
    neutral = SeriesActivation(terms=1)
    assert neutral.neutral() and not SeriesActivation().neutral()
    plain, model = random_model(**options), random_model(neutral, **options)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    same_results(model, plain, atol=0, rtol=0)


@each_option
@pytest.mark.parametrize("terms", [2, 3, 4])
def test_it_starts_as_the_plain_model_of_the_same_seed(options, terms):
    plain, model = new_model(**options), new_model(SeriesActivation(terms=terms), **options)
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(own.pop(name), parameter), name
    assert {name.rpartition(".")[2] for name in own} == {"scale", "shift"}
    same_results(model, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ffn", FFNS)
def test_the_network_is_the_papers_sum(ffn):
    network = random_model(SeriesActivation(terms=3), ffn=ffn, layers=1).blocks[0].ffn
    x_ND = torch.randn(5, 32)
    a_TF, b_TF = network.activation.scale.view(3, 48), network.activation.shift.view(3, 48)

    def series(x):
        sigma = {"swiglu": F.silu, "gelu": F.gelu, "relu2": lambda x: x.clamp(min=0) ** 2}[ffn]
        return torch.stack([a_TF[i] * sigma(x + b_TF[i]) for i in range(3)]).sum(dim=0)

    if ffn == "swiglu":
        gate_NF, up_NF = network.gate_up(x_ND).split(48, dim=-1)
        hidden_NF = series(gate_NF) * up_NF
    else:
        hidden_NF = series(network.up(x_ND))
    torch.testing.assert_close(network(x_ND), network.down(hidden_NF))


@pytest.mark.parametrize("terms", range(1, 8))
def test_shifts_start_different_and_within_the_spread(terms):
    shifts = SeriesActivation(terms=terms, spread=0.7).shifts()
    assert len(set(shifts)) == terms and shifts[0] == 0
    assert max(map(abs, shifts)) == pytest.approx(0.7 if terms > 1 else 0)


def test_scales_and_shifts_are_trained_as_gains_are_and_matrices_as_before(make_run):
    training = make_run(optimizer="muon").training
    rates = []
    for techniques in ((), (SeriesActivation(),)):
        model = new_model(*techniques)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = build_optimizer(model, training, torch.float32).param_groups
        rates.append(
            {
                names[id(p)]: (group["weight_decay"], group.get("matrices"))
                for group in groups
                for p in group["params"]
            }
        )
        parts = {rows: len(own) for rows, own in model.matrix_parts().items()}
        assert parts[48, 48] == 3
    plain, with_series = rates
    added = {with_series.pop(name) for name in with_series.keys() - plain.keys()}
    assert added == {plain["blocks.0.ffn_norm.weight"]}
    assert with_series == plain


@each_option
def test_later_tokens_move_nothing(options):
    model, tokens_BL = random_model(SeriesActivation(), **options), some_tokens(4)
    changed_BL = tokens_BL.clone()
    changed_BL[:, L // 2 :] = tokens_BL[:, L // 2 :] % 256 + 1  # another one
    before, after = slice(L // 2), slice(L // 2, None)
    for training in (False, True):
        logits_BLV, changed_BLV = model.train(training)(tokens_BL), model(changed_BL)
        torch.testing.assert_close(changed_BLV[:, before], logits_BLV[:, before])
        assert (changed_BLV[:, after] - logits_BLV[:, after]).abs().max() > 1e-2


@each_option
@torch.inference_mode()
def test_a_cache_and_some_positions_alone_change_nothing(options):
    model, tokens_BL = random_model(SeriesActivation(), **options), some_tokens()
    whole_BLD = model.hidden(tokens_BL)
    cache = Cache(model.config, 3, torch.device("cpu"))
    found = [model.hidden(part, cache.extend(part.shape[1])) for part in tokens_BL.split([1, 5, 4, 6], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole_BLD, atol=2e-4, rtol=1e-3)
    rows_N = torch.tensor([0, 5, 17, 47])
    expected_ND = whole_BLD.flatten(0, 1)[rows_N]
    torch.testing.assert_close(model.hidden(tokens_BL, None, rows_N), expected_ND, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_documents_in_a_row_do_not_see_one_another():
    model, tokens_BL = random_model(SeriesActivation()), some_tokens(4)
    tokens_BL[:, 7] = EOT
    whole_BLD = model.hidden(tokens_BL, Documents.of(tokens_BL, EOT))
    second_BLD = model.hidden(tokens_BL[:, 7:], Documents.of(tokens_BL[:, 7:], EOT))
    torch.testing.assert_close(whole_BLD[:, 7:], second_BLD, atol=1e-4, rtol=1e-4)


def test_packed_in_a_trie_as_in_single_rows():
    model = random_model(SeriesActivation(), context=48)
    requests = [
        Request("the cat", f" {one}{other}") for one in ("sat", "ran") for other in ("", " home", " on")
    ]
    scorer = TokenModel(model, RequestEncoder(TOKENIZER))
    assert scorer.packs
    packed = [score.logprob for score in scorer.loglikelihoods(requests)]
    scorer.packs = False
    single = [score.logprob for score in scorer.loglikelihoods(requests)]
    assert packed == pytest.approx(single, abs=1e-3)
    half = TokenModel(model, RequestEncoder(TOKENIZER), precision="bfloat16").loglikelihoods(requests)
    assert all(score.logprob < 0 for score in half)


@pytest.mark.parametrize("ffn", FFNS)
def test_in_bfloat16_hidden_units_stay_so_and_gradients_are_finite(ffn):
    model, kept = random_model(SeriesActivation(), ffn=ffn).train(), []
    model.blocks[0].ffn.down.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(some_tokens()[:, :-1], some_tokens()[:, 1:]).backward()
    assert kept == [torch.bfloat16]
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.parametrize("ffn", FFNS)
def test_in_one_graph_it_is_the_same(ffn):
    """Traced whole, which raises where the compiler would have to leave the graph."""
    torch._dynamo.reset()  # it compiles the same code for eight models at most
    network = random_model(SeriesActivation(), ffn=ffn, layers=1).blocks[0].ffn
    x_BLD = torch.randn(2, 3, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_BLD), network(x_BLD))


@pytest.mark.parametrize("ffn", FFNS)
def test_flops_are_torchs_but_for_the_upper_half_of_attention(ffn, torch_operations):
    model, plain = random_model(SeriesActivation(), ffn=ffn), random_model(ffn=ffn)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(some_tokens(1))
    upper_half = 3 * 2 * 32 * L**2
    assert forward_flops(model, L) == counter.get_total_flops() - upper_half
    assert forward_flops(model, L) == forward_flops(plain, L)


@each_option
def test_counts_on_meta_are_the_models(options):
    config = ModelConfig(**({"vocab_size": 257} | TINY | options))
    groups = parameter_groups(build_on_meta(config, (SeriesActivation(),)))
    assert groups == parameter_groups(new_model(SeriesActivation(), **options))
    assert groups.pop("series activation") == config.layers * 2 * 3 * 48
    assert groups == parameter_groups(new_model(**options))


def with_series(run, **keys):
    return run.model_copy(
        update={
            "techniques": {"series_activation": SeriesActivation(**keys)},
            "data": DataConfig(attention="within"),
        }
    )


def test_a_run_learns_and_stopped_and_resumed_is_the_same(make_run):
    """With Muon, attention within documents, dropout and the watch."""
    recipe = {"optimizer": "muon", "watch_every": 3, "steps": 8}
    whole, stopped = (with_series(make_run(name, {"layers": 2}, **recipe)) for name in ("whole", "stopped"))
    train(whole)
    train_in_parts(stopped, 4)
    assert curve_of(whole) == curve_of(stopped)
    assert same_weights(whole, stopped)
    losses = [float(row["train_loss"]) for row in curve_of(whole) if row["train_loss"]]
    assert losses[-1] < losses[0]
    model, description = load_checkpoint(last_checkpoint(whole))
    assert description["techniques"] == {"series_activation": SeriesActivation().model_dump()}
    started = SeriesActivation().shifts()
    for block in model.blocks:
        scale_TF, shift_TF = block.ffn.activation.scale.view(3, -1), block.ffn.activation.shift.view(3, -1)
        for t in range(3):
            assert (scale_TF[t] != float(t == 0)).all() and (shift_TF[t] != started[t]).any()


def test_a_neutral_run_is_the_plain_one(make_run):
    plain, neutral = make_run("plain"), make_run("neutral")
    neutral = neutral.model_copy(update={"techniques": {"series_activation": SeriesActivation(terms=1)}})
    for run in (plain, neutral):
        train(run)
    assert curve_of(plain) == curve_of(neutral)
    assert load_checkpoint(last_checkpoint(plain))[0].state_dict().keys() == (
        load_checkpoint(last_checkpoint(neutral))[0].state_dict().keys()
    )


def test_a_checkpoint_is_read_and_not_exported(tmp_path):
    model = random_model(SeriesActivation(terms=2), **OPTIONS["shared layers"])
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(1)
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    TOKENIZER.save(tmp_path / "checkpoints" / "tokenizer")
    loaded, _ = load_checkpoint(checkpoint)
    assert isinstance(loaded.blocks[0].ffn.activation, Series)
    assert torch.equal(loaded(some_tokens()), model(some_tokens()))
    with pytest.raises(UserError, match="series_activation does not support export"):
        export_llama(checkpoint, tmp_path / "llama")


STUDY = {
    "description": "Series.",
    "corpus": "synthetic",
    "tokenizer": "bpe-1280",
    "seeds": [0],
    "baseline": "plain",
    "model": {**TINY, "context": 64},
    "training": {"steps": 4, "warmup_steps": 1},
    "evaluation": {"benchmarks": ["synthetic_pairs"], "modes": ["paper"]},
    "variants": {"plain": {}, "series": {"techniques": {"series_activation": {}}}},
}


def load(project, **changes):
    (project / "params" / "series.yaml").write_text(yaml.safe_dump(STUDY | changes))
    return load_study("series")


def test_a_study_switches_it_on(project):
    plain, series = load(project).runs.values()
    assert plain.techniques == {} and series.techniques == {"series_activation": SeriesActivation(terms=3)}
    assert series.flops_per_token == plain.flops_per_token
    assert series.parameters.total == plain.parameters.total + 3 * 2 * 3 * 48


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            {"techniques": {"series_activations": {}}},
            "'series_activations' is no technique.*series_activation",
        ),
        ({"techniques": {"series_activation": {"term": 3}}}, r"series_activation\.term: no such key.*terms"),
        ({"techniques": {"series_activation": {"terms": 0}}}, r"series_activation\.terms: .*found 0"),
        ({"techniques": {"series_activation": {"spread": 0}}}, r"series_activation\.spread: .*found 0"),
        (
            {"techniques": {"series_activation": {}}, "model": {"bytes": {}}, "tokenizer": "words"},
            "series_activation does not support byte-level models",
        ),
        (
            {"techniques": {"series_activation": {}}, "training": {"start_from": "plain"}},
            "series_activation does not support weights of another run",
        ),
        (
            {"techniques": {"series_activation": {}, "mixture_of_depths": {}}},
            "techniques.series_activation and techniques.mixture_of_depths cannot be combined"
            "|techniques.mixture_of_depths and techniques.series_activation cannot be combined",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(project, variant, message):
    with pytest.raises(UserError, match=message):
        load(project, variants={"plain": {}, "wrong": variant})


def test_a_network_without_an_activation_is_refused_by_name(project, monkeypatch):
    class Linear(FFNS["gelu"]):
        def __init__(self, config):
            super().__init__(config)
            del self.activation

    monkeypatch.setitem(FFNS, "gelu", Linear)
    build_on_meta.cache_clear()
    variant = {"techniques": {"series_activation": {}}, "model": {"ffn": "gelu"}}
    with pytest.raises(UserError, match=r"series_activation\.terms: model\.ffn: gelu has no activation"):
        load(project, variants={"plain": {}, "wrong": variant})
    build_on_meta.cache_clear()


def test_all_that_it_does_not_name_is_refused():
    assert CAPABILITIES.keys() - SeriesActivation.supports == {"bytes", "export", "start_from"}
    for capability in CAPABILITIES.keys() - SeriesActivation.supports:
        with pytest.raises(UserError, match=r"techniques\.series_activation does not support"):
            refuse([SeriesActivation()], capability)
