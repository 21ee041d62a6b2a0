"""Quantization: what is rounded, how it is stored, trained and refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained_runs import curve_of, last_checkpoint, same_weights, train_in_parts, train_in_two_processes

from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.fidelity import compare_with_start
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json, sha256
from stlm.generation.generate import generate
from stlm.generation.sampling import Sampling
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.model.flops import forward_flops
from stlm.model.importance import mean_loss, second_moments
from stlm.model.inference import why_not
from stlm.model.llama import llama_weights
from stlm.model.quantized import Quantized, matrices
from stlm.model.quantizers import Grid, gptq, round_tokens
from stlm.model.transformer import Transformer
from stlm.report.schema import EvaluationRecord
from stlm.study.load import load_study
from stlm.techniques.base import CAPABILITIES
from stlm.techniques.quantization import Quantization
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import checkpoint_name, load_checkpoint, save_checkpoint
from stlm.training.dependencies import Dependency
from stlm.training.loop import Trainer, train

L = 16
TINY = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context": L, "dropout": 0.0}
TOKENIZER = ByteTokenizer()
MODELS = {
    "plain": {},
    "untied, learned positions, layernorm": {"tied": False, "positions": "learned", "norm": "layernorm"},
    "value embeddings, shift": {"value_embeddings": 2, "qkv_shift": True},
    "low rank": {"low_rank": {"ffn": 8}, "embedding_rank": 9, "tied": False},
    "shared layers": {"layers": 4, "sharing": {"what": "all", "order": "groups", "group": 2}},
}
SETTINGS = {
    "8 bits": {},
    "4 bits, zero points": {"bits": 4, "zero_points": True},
    "3 bits, a row": {"bits": 3, "group": None},
    "2 bits, embeddings of 8": {"bits": 2, "group": 16, "embedding_bits": 8},
    "ternary": {"bits": "ternary", "method": "learned"},
    "blocks alone": {"bits": 4, "embedding_bits": 32},
}
each_setting = pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
each_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def some_rows(count: int = 6) -> Tensor:
    return torch.randint(1, 257, (count, L + 1), generator=torch.Generator().manual_seed(2))


def random_model(technique: Quantization | None = None, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts; not yet rounded."""
    torch.manual_seed(1)
    techniques = () if technique is None else (technique,)
    model = build_model(ModelConfig(**({"vocab_size": 257} | TINY | options)), techniques)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 0.7))
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


def rounded_model(technique: Quantization, **options: object) -> Transformer:
    model = random_model(technique, **options)
    technique.at_start(model, None, lambda length: some_rows())
    return model


@each_model
@each_setting
def test_matrices_are_rounded_and_all_else_is_left(keys, options):
    technique = Quantization(**keys)
    plain, model = random_model(**options), rounded_model(technique, **options)
    kinds, before = technique.kinds(model), dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        kind = kinds.get(name)
        if kind is None:
            assert torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, Grid.of(before[name], kind).rounded(before[name])), name
    left = {name for name in before if name not in kinds}
    outside = {name for name, parameter, within in matrices(plain) if not within}
    vectors = {name for name, parameter in before.items() if parameter.dim() == 1}
    assert left == vectors | {name for name in before if name.startswith("positions")} | (
        outside if technique.embedding_bits == 32 else set()
    )
    if options.get("tied", True):
        assert model.output.weight is model.embedding.weight


@each_model
@each_setting
def test_a_checkpoint_holds_codes_and_gives_the_same_weights(keys, options, tmp_path):
    technique = Quantization(**keys)
    model = rounded_model(technique, **options)
    folders = [tmp_path / name / checkpoint_name(1) for name in ("one", "two")]
    save_checkpoint(folders[0], model, {"step": 1, "tokens": 1})
    loaded, description = load_checkpoint(folders[0])
    assert description["techniques"]["quantization"] == technique.model_dump(mode="json")
    found = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found.pop(name), parameter), name
    assert not found
    assert torch.equal(loaded(some_rows()[:, :-1]), model(some_rows()[:, :-1]))
    save_checkpoint(folders[1], loaded, {"step": 1, "tokens": 1})
    assert sha256(folders[0] / "model.safetensors") == sha256(folders[1] / "model.safetensors")
    stored, kinds = load_file(folders[0] / "model.safetensors"), technique.kinds(model)
    for name, parameter in model.named_parameters():
        if name not in kinds:
            assert torch.equal(stored.pop(name), parameter)
            continue
        Y, X = parameter.shape
        kind = kinds[name]
        scales = 1 if kind.ternary else Y * kind.groups(X)
        own = {part: stored.pop(name + part) for part in (".codes", ".scales")}
        assert own[".codes"].numel() == Y * kind.packed_bytes(X) and own[".codes"].dtype == torch.uint8
        assert own[".scales"].numel() == scales and own[".scales"].dtype == torch.float16
        if kind.zero_points:
            assert stored.pop(name + ".zeros").numel() == Y * kind.packed_bytes(kind.groups(X))
    assert not stored


def test_bytes_on_disk_are_those_of_the_bits(tmp_path):
    sizes = {}
    for bits in (8, 4, 3, 2):
        folder = tmp_path / f"bits-{bits}"
        save_checkpoint(folder, rounded_model(Quantization(bits=bits), width=64, ffn_width=192), {"step": 1})
        model = random_model(width=64, ffn_width=192)
        numbers = sum(weight.numel() for _, weight, _ in matrices(model))
        left = sum(p.numel() for p in model.parameters()) - numbers
        header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        sizes[bits] = (folder / "model.safetensors").stat().st_size - header
        assert sizes[bits] == numbers * bits / 8 + numbers / 32 * 2 + left * 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t.pop("blocks.0.attention.qkv.weight.codes"),
            "no tensor blocks.0.attention.qkv.weight.codes",
        ),
        (
            lambda t: t.update({"embedding.weight.scales": t["embedding.weight.scales"].float()}),
            r"embedding.weight.scales is torch.float32 .*expected torch.float16",
        ),
        (
            lambda t: t.update({"embedding.weight.codes": t["embedding.weight.codes"][:5]}),
            r"embedding.weight.codes is torch.uint8 \[5, 16\], expected torch.uint8 \[257, 16\]",
        ),
        (lambda t: t.update({"other": torch.zeros(1)}), "numbers, expected"),
        (
            lambda t: t["embedding.weight.scales"].fill_(torch.inf),
            "embedding.weight has NaN or infinite values",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, reason, tmp_path):
    save_checkpoint(tmp_path / "c", rounded_model(Quantization(bits=4)), {"step": 1, "tokens": 1})
    path = tmp_path / "c" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    config = read_json(tmp_path / "c" / "config.json") | {"weights_sha256": sha256(path)}
    config.pop("checksum", None)
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        load_checkpoint(tmp_path / "c")


@each_model
def test_counts_and_flops_are_the_plain_models(options):
    config = ModelConfig(**({"vocab_size": 257} | TINY | options))
    technique = Quantization(activations=8)
    plain, model = build_on_meta(config), build_on_meta(config, (technique,))
    assert parameter_groups(model) == parameter_groups(plain)
    assert forward_flops(model, L) == forward_flops(plain, L)
    rounded = rounded_model(technique, **options)
    assert parameter_groups(rounded) == parameter_groups(plain)
    assert forward_flops(rounded, L) == forward_flops(plain, L)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize(
    "options", [value for key, value in MODELS.items() if key != "shared layers"], ids=str
)
def test_gptq_sees_what_the_quantized_blocks_before_give(options, activations):
    """The same by whole passes of the model, one for each block."""
    technique = Quantization(bits=3, method="gptq", activations=activations)
    expected = random_model(technique, **options)
    kinds, rows_NM = technique.kinds(expected), some_rows(40)
    Quantized({name: kind for name, kind in kinds.items() if not name.startswith("blocks")}).round(expected)
    for number, block in enumerate(expected.blocks):
        modules = {name: one for name, one in block.named_modules() if isinstance(one, torch.nn.Linear)}
        moments = second_moments(expected, rows_NM, modules)
        for name, module in modules.items():
            kind = kinds[f"blocks.{number}.{name}.weight"]
            with torch.no_grad():
                module.weight.copy_(gptq(module.weight, moments[name], kind)[1])
    model = random_model(technique, **options)
    record = technique.at_start(model, None, lambda length: rows_NM)
    same = [
        (model.get_parameter(name) == weight).float().mean().item()
        for name, weight in expected.named_parameters()
        # Sums in another order round a few weights otherwise, and then more activations in each block.
        if activations is None or not name.startswith(("blocks.1", "blocks.2"))
    ]
    assert min(same) > 0.95
    assert record["extra_flops"] == 2 * 40 * sum(forward_flops(block, L) for block in model.blocks)


def trained_model(make_technique_run) -> tuple:
    run = make_technique_run("base", steps=40, batch_size=8, model={"layers": 2, "dropout": 0.0})
    train(run)
    rows_NM = torch.from_numpy(Trainer(run).setup.micro_batches.rows.batch(0))
    return run, load_checkpoint(last_checkpoint(run))[0], rows_NM


def test_gptq_is_no_worse_than_rounding_on_the_text_it_measures(make_technique_run):
    _, plain, rows_NM = trained_model(make_technique_run)
    losses, weights = {}, plain.state_dict()
    for method in ("round", "gptq"):
        technique = Quantization(bits=2, method=method, embedding_bits=32)
        model = build_model(plain.config, (technique,))
        model.load_state_dict(weights)
        technique.at_start(model, None, lambda length: rows_NM)
        losses[method] = mean_loss(model, rows_NM)
    assert mean_loss(plain, rows_NM) < losses["gptq"] < losses["round"]


# Activations


def with_activations(**options: object) -> Transformer:
    return rounded_model(Quantization(activations=8), **options)


@each_model
def test_inputs_of_the_blocks_matrices_are_rounded_by_token(options):
    model, plain = with_activations(**options), rounded_model(Quantization(), **options)
    tokens_BL, seen = some_rows()[:, :-1], []
    for module in plain.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: seen.append(1) or (round_tokens(args[0]),))
    with torch.no_grad():
        logits_BLV = model(tokens_BL)
        torch.testing.assert_close(logits_BLV, plain(tokens_BL))
    assert seen and not torch.equal(logits_BLV, rounded_model(Quantization(), **options)(tokens_BL))
    assert "has a hook" in why_not(model)


@each_model
@torch.inference_mode()
def test_a_cache_and_later_tokens_change_nothing(options):
    model, tokens_BL = with_activations(**options), some_rows()[:, :-1]
    whole_BLD = model.hidden(tokens_BL)
    cache = Cache(model.config, len(tokens_BL), torch.device("cpu"))
    found = [model.hidden(part, cache.extend(part.shape[1])) for part in tokens_BL.split([1, 5, 4, 6], dim=1)]
    # Sums in another order may round a number the other way: a part in 127 of a token's largest.
    torch.testing.assert_close(torch.cat(found, dim=1), whole_BLD, atol=0.1, rtol=0.1)
    changed_BL = tokens_BL.clone()
    changed_BL[:, L // 2 :] = tokens_BL[:, L // 2 :] % 256 + 1
    torch.testing.assert_close(model.hidden(changed_BL)[:, : L // 2], whole_BLD[:, : L // 2])


def test_packed_in_a_trie_as_in_single_rows():
    model = with_activations(context=48)
    requests = [
        Request("the cat", f" {one}{other}") for one in ("sat", "ran") for other in ("", " home", " on")
    ]
    scorer = TokenModel(model, RequestEncoder(TOKENIZER))
    assert scorer.packs
    packed = [score.logprob for score in scorer.loglikelihoods(requests)]
    scorer.packs = False
    assert packed == pytest.approx([s.logprob for s in scorer.loglikelihoods(requests)], rel=0.01)


@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_in_one_graph_it_is_the_same(ffn):
    torch._dynamo.reset()
    network = with_activations(ffn=ffn, layers=1).blocks[0].ffn
    x_BLD = torch.randn(2, 3, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_BLD), network(x_BLD))


def test_in_bfloat16_gradients_are_finite():
    model = with_activations().train()
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(some_rows()[:, :-1], some_rows()[:, 1:]).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# Training


LEARNED = {"8 bits": {"bits": 8}, "2 bits": {"bits": 2, "zero_points": True}, "ternary": {"bits": "ternary"}}


@pytest.mark.parametrize("keys", LEARNED.values(), ids=LEARNED)
def test_gradients_at_rounded_weights_move_the_exact_ones(keys, make_technique_run):
    """As a loop does that keeps the exact weights, and puts rounded ones in their place for each pass."""
    technique = Quantization(method="learned", **keys)
    run = make_technique_run(techniques=[technique], weight_decay=0.0, steps=6)
    found, plain = Trainer(run), Trainer(run.model_copy(update={"techniques": {}, "name": "plain"}))
    model = plain.setup.model
    kinds = technique.kinds(model)
    own = {name: weight for name, weight in model.named_parameters() if name in kinds}
    steps = type(plain)._backward

    def backward(self, step):
        exact = {name: weight.detach().clone() for name, weight in own.items()}
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(Grid.of(weight, kinds[name]).rounded(weight))
        result = steps(self, step)
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(exact[name])
        return result

    for _ in range(4):
        found.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_backward", backward)
            plain.step()
    quantized = found.setup.model.quantized
    for name, weight in found.setup.model.named_parameters():
        expected = dict(model.named_parameters())[name]
        if name in kinds:
            exact = weight + quantized._kept(name)
            torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-3, msg=name)
            assert not torch.equal(exact, weight)
        else:
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("keys", LEARNED.values(), ids=LEARNED)
def test_a_run_learns_and_stopped_and_resumed_is_the_same(keys, make_technique_run):
    techniques = [Quantization(method="learned", activations=8, **keys)]
    recipe = {"optimizer": "muon", "watch_every": 3, "steps": 24, "techniques": techniques}
    whole, stopped = (make_technique_run(name, **recipe) for name in ("whole", "stopped"))
    train(whole)
    train_in_parts(stopped, 4)
    assert curve_of(whole) == curve_of(stopped)
    assert same_weights(whole, stopped)
    losses = [float(row["train_loss"]) for row in curve_of(whole) if row["train_loss"]]
    assert losses[-1] < 0.8 * losses[0]
    model, _ = load_checkpoint(last_checkpoint(whole))
    for name, kind in techniques[0].kinds(model).items():
        grid = model.quantized.grid(name)
        weight = model.get_parameter(name)
        assert torch.equal(grid.values(grid.read(weight)), weight)
        if kind.ternary:
            assert len(weight.unique()) == 3


def test_two_processes_train_the_same(make_technique_run):
    techniques = [Quantization(bits=4, method="learned")]
    one, two = (make_technique_run(name, techniques=techniques, batch_size=4) for name in ("one", "two"))
    train(one)
    train_in_two_processes(two)
    found, expected = (load_checkpoint(last_checkpoint(run))[0] for run in (two, one))
    for name, weight in expected.named_parameters():
        assert (found.get_parameter(name) - weight).abs().mean() <= 0.02 * weight.abs().mean() + 1e-6, name


# Whole runs


def start_from(run, origin, technique, **training):
    """A run that starts from another of its study."""
    training = run.training.model_copy(update={"start_from": origin.name, **training})
    return run.model_copy(update={"training": training, "techniques": {technique.key(): technique}})


def test_a_run_of_no_steps_is_trained_evaluated_and_written_with(make_technique_run, capsys):
    base, _, _ = trained_model(make_technique_run)
    config = EvaluationConfig(benchmarks=["synthetic_pairs"])
    evaluate_run(base, config)
    assert "fidelity" not in read_json(base.folder / "evaluation.json")
    bits, sizes, near = {}, {}, {}
    bits[32] = read_json(base.folder / "evaluation.json")["checkpoints"][last_checkpoint(base).name]
    sizes[32] = (last_checkpoint(base) / "model.safetensors").stat().st_size
    for number, method in ((8, "round"), (4, "gptq"), (2, "round")):
        technique = Quantization(bits=number, method=method)
        run = start_from(make_technique_run(f"bits-{number}"), base, technique, steps=0, warmup_steps=0)
        run = run.model_copy(update={"model": base.model})
        train(run)
        evaluate_run(run, config)
        record = read_json(run.folder / "train.json")
        sizes[number] = (last_checkpoint(run) / "model.safetensors").stat().st_size
        assert record["checkpoints"][0]["bytes"] == sizes[number]
        prepared = record["prepared"]["quantization"]
        assert 0 < prepared["relative_error"] < {8: 0.01, 4: 0.15, 2: 0.6}[number]
        assert [one["name"] for one in prepared["by_matrix"]] == list(technique.kinds(build_model(run.model)))
        assert (prepared["extra_flops"] > 0) == (method == "gptq") and record["steps"] == 0
        assert record["parameters"] == read_json(base.folder / "train.json")["parameters"]
        evaluation = read_json(run.folder / "evaluation.json")
        bits[number] = evaluation["checkpoints"][last_checkpoint(run).name]
        near[number] = EvaluationRecord.model_validate(evaluation).fidelity
    measured = {number: result["perplexity"]["bits_per_byte"] for number, result in bits.items()}
    assert abs(measured[8] - measured[32]) < 0.01 < measured[2] - measured[32]
    assert abs(measured[8] - measured[32]) < abs(measured[4] - measured[32]) < 0.2
    assert 0 < near[8].kl_divergence < near[4].kl_divergence < near[2].kl_divergence
    assert near[8].agreement > near[2].agreement and near[8].agreement > 0.95 and near[8].of == "base"
    assert sizes[2] < sizes[4] < sizes[8] < sizes[32] / 2
    train(base.model_copy(update={"seed": 1}))
    with pytest.raises(UserError, match=r"other weights than bits-2 started from .*stlm train test bits-2"):
        compare_with_start(run, HasDocuments, 0, "cpu")
    capsys.readouterr()
    generate(str(base.folder.with_name("bits-8")), "one two", Sampling(), 5)
    assert capsys.readouterr().out


def test_a_run_that_starts_from_a_quantized_one_begins_with_its_weights(make_technique_run):
    technique = Quantization(bits=4, method="learned")
    origin = make_technique_run("origin", techniques=[technique])
    train(origin)
    run = make_technique_run("next", start_from="origin")
    loaded = Dependency.read(run, "start").load()
    assert not hasattr(loaded, "quantized")
    model = Trainer(run).setup.model
    for name, weight in load_checkpoint(last_checkpoint(origin))[0].named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    train(run)


def test_it_is_exported_with_its_weights_unless_activations_are_rounded(tmp_path, monkeypatch):
    # Of the tokenizer, which is none that transformers knows.
    monkeypatch.setattr("stlm.export.llama.tokenizer_json", lambda tokenizer: "{}")
    for name, technique in (("plain", Quantization(bits=4)), ("rounded", Quantization(activations=8))):
        checkpoint = tmp_path / name / "checkpoints" / checkpoint_name(1)
        model = rounded_model(technique)
        save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
        TOKENIZER.save(checkpoint.parent / "tokenizer")
        if technique.activations:
            with pytest.raises(UserError, match=r"techniques\.quantization does not support export"):
                export_llama(checkpoint, tmp_path / "llama")
        else:
            export_llama(checkpoint, tmp_path / "exported")
            found, expected = load_file(tmp_path / "exported/model.safetensors"), llama_weights(model)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class HasDocuments:
    documents = ()


STUDY = {
    "description": "Quantized.",
    "corpus": "synthetic",
    "tokenizer": "bpe-1280",
    "seeds": [0],
    "baseline": "plain",
    "model": {**TINY, "context": 64},
    "training": {"steps": 4, "warmup_steps": 1},
    "evaluation": {"benchmarks": ["synthetic_pairs"], "modes": ["paper"]},
    "variants": {"plain": {}},
}
AT_ONCE = {"start_from": "plain", "steps": 0}


def load(project, keys, **variant):
    variants = {"plain": {}, "small": {"techniques": {"quantization": keys}, **variant}}
    (project / "params" / "small.yaml").write_text(yaml.safe_dump(STUDY | {"variants": variants}))
    return load_study("small")


def test_a_study_switches_it_on(project):
    plain, small = load(project, {"bits": 4, "group": 64}, training=AT_ONCE).runs.values()
    assert small.techniques == {"quantization": Quantization(bits=4, group=64)}
    assert small.parameters == plain.parameters and small.flops == 0
    assert small.depends == {"start": "plain"}
    learned = load(project, {"bits": "ternary", "method": "learned", "activations": 8}).runs["small"]
    assert learned.flops_per_token == plain.flops_per_token


@pytest.mark.parametrize(
    ("keys", "variant", "message"),
    [
        ({"bits": 5}, {"training": AT_ONCE}, r"quantization\.bits: .*found 5"),
        ({"bit": 4}, {"training": AT_ONCE}, r"quantization\.bit: no such key.*bits"),
        ({"group": 4}, {"training": AT_ONCE}, r"quantization\.group: .*found 4"),
        ({}, {}, r"quantization\.method: round rounds once, and training\.steps is 4; expected .*learned"),
        ({"method": "learned"}, {"training": AT_ONCE}, r"method: learned trains, and training\.steps is 0"),
        ({"bits": "ternary"}, {"training": AT_ONCE}, r"method: round: ternary weights are trained"),
        (
            {"method": "learned"},
            {"model": {"lora": {"rank": 2}, "sharing": {"what": "all", "order": "groups", "group": 3}}},
            r"quantization\.bits: model\.lora: adapters are not merged",
        ),
        (
            {"method": "learned"},
            {"model": {"bytes": {}}, "tokenizer": "words"},
            "quantization does not support byte-level models",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(project, keys, variant, message):
    with pytest.raises(UserError, match=message):
        load(project, keys, **variant)


def test_gptq_of_layers_that_share_is_refused_by_name(project):
    run = load(project, {"method": "learned"}).runs["small"]
    sharing = {"what": "all", "order": "groups", "group": 3}
    model = ModelConfig(**(run.model.model_dump() | {"sharing": sharing}))
    run = run.model_copy(update={"model": model, "training": run.training.model_copy(update={"steps": 0})})
    with pytest.raises(ValueError, match=r"method: gptq: model\.sharing: layers share matrices"):
        Quantization(method="gptq").check(run, {})


def test_weights_beyond_a_scale_are_refused_by_name(make_technique_run, monkeypatch):
    run = make_technique_run(techniques=[Quantization()])
    monkeypatch.setattr("stlm.training.setup.build_model", _huge)
    with pytest.raises(
        UserError, match=r"run: techniques\.quantization\.bits: embedding\.weight: weights too large"
    ):
        Trainer(run)


def _huge(config, techniques):
    model = build_model(config, techniques)
    with torch.no_grad():
        model.embedding.weight.fill_(1e8)
    return model


def test_all_that_it_does_not_name_is_refused():
    assert CAPABILITIES.keys() - Quantization.supports == {"bytes"}
    assert Quantization(activations=8).supported == Quantization.supports - {"export"}
