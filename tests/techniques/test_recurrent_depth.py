"""Recurrent depth: a group of blocks passed several times, with one set of weights."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, train_in_parts, train_in_two_processes, weights_of

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.readouts import find_readout, readouts_of
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.find import load_generator
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_counts, parameter_groups
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.layout import CausalRows
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.recurrent_depth import Pass, RecurrentDepth
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.distributed import Group
from stlm.training.loop import train
from stlm.training.memory import training_memory
from stlm.training.objective import Objective, total
from stlm.training.optimizers import build_optimizer

OPTIONS = {
    "plain": {},
    "learned": {"positions": "learned"},
    "values, shift": {"value_embeddings": 1, "qkv_shift": True, "qk_norm": True},
    "soft cap, untied": {"logit_softcap": 4.0, "tied": False},
    "shared": {"sharing": {"what": "all", "order": "sandwich"}, "lora": {"rank": 3}},
}
LAYERS, CONTEXT, EOT = 4, 16, 0
THREE = RecurrentDepth(first=2, blocks=2, passes=3)
DRAWN = RecurrentDepth(first=2, blocks=2, passes=2, drawn=(1, 4))
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_norms = pytest.mark.parametrize("norms", ["shared", "each"])


def config(**options: object) -> ModelConfig:
    sizes = {"layers": LAYERS, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
    return ModelConfig(**{"vocab_size": 257, **sizes, **options})


def new_model(*techniques: RecurrentDepth, **options: object) -> Transformer:
    torch.manual_seed(1)
    return build_model(config(**options), techniques)


def random_model(*techniques: RecurrentDepth, **options: object) -> Transformer:
    """A model whose next token depends on all of its parts."""
    model = new_model(*techniques, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


def tokens(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(2))


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    read = tokens(4, CONTEXT + 1)
    loss = model.train().loss(read[:, :-1], read[:, 1:])
    loss.backward()
    model.eval()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@each_option
def test_one_pass_is_the_plain_model_to_the_bit(options):
    neutral = RecurrentDepth(passes=1)
    assert neutral.neutral() and not THREE.neutral() and not RecurrentDepth(passes=1, drawn=(1, 2)).neutral()
    plain, model = random_model(**options), random_model(neutral, **options)
    assert torch.equal(model(tokens()), plain(tokens()))
    expected, found = gradients(plain), gradients(model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def by_hand(model: Transformer, passes: int) -> torch.Tensor:
    """Logits of a plain model whose blocks 2 and 3 are run so many times."""
    plain = build_model(model.config)
    own, group = model.state_dict(), len(model.blocks) - LAYERS + 2
    for name in plain.state_dict():
        head, _, rest = name.partition(".")
        if head == "blocks" and rest.startswith("3."):
            own[name] = own.pop(f"blocks.{1 + group}.{rest[2:]}")
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    plain.eval()
    blocks = list(plain.blocks)
    x = plain.embedding(tokens())
    rope = plain.cos_LE[:CONTEXT, None], plain.sin_LE[:CONTEXT, None]
    for block in [blocks[0], *blocks[1:3] * passes, blocks[3]]:
        x = block(x, rope, CausalRows(CONTEXT))
    return plain.head(plain.finish(x))


@pytest.mark.parametrize("passes", [1, 2, 3, 5])
def test_the_group_is_passed_so_many_times_and_no_other_block_is(passes):
    model = random_model(THREE)
    other = find_readout(model, f"passes-{passes}")
    torch.testing.assert_close(other(tokens()), by_hand(model, passes), atol=1e-5, rtol=1e-5)
    if passes == 3:
        assert torch.equal(other(tokens()), model(tokens()))
    else:
        assert (other(tokens()) - model(tokens())).abs().max() > 1e-2
    assert torch.equal(find_readout(other, "passes-3")(tokens()), model(tokens()))


@each_option
@each_norms
def test_weights_are_stored_once_and_start_as_the_plain_models(options, norms):
    technique = THREE.model_copy(update={"norms": norms})
    model, plain = new_model(technique, **options), new_model(**options)
    assert len(model.blocks) == LAYERS + 2 * 2
    parameters, originals = ([*one.parameters()] for one in (model, plain))
    assert all(any(torch.equal(p, q) for q in parameters if q.shape == p.shape) for p in originals)
    gains = sum(p.numel() for n, p in plain.blocks[1].named_parameters() if "norm" in n or "_gain" in n)
    further = 0 if norms == "shared" else 2 * 2 * gains
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in originals) + further
    assert parameter_counts(config(**options), (technique,)).total == sum(p.numel() for p in parameters)
    groups, counted = parameter_groups(model), parameter_groups(plain)
    assert groups == counted | {"norms": counted["norms"] + further}
    # Gains of their own are equal at the start.
    shared = new_model(THREE, **options).eval()
    assert torch.equal(model.eval()(tokens()), shared(tokens()))


def test_each_pass_learns_gains_of_its_own():
    model = random_model(RecurrentDepth(passes=2, norms="each"))
    first, second = (model.blocks[number].ffn_norm.weight for number in (1, 2))
    assert first is not second and model.blocks[1].ffn.down.weight is model.blocks[2].ffn.down.weight
    found = gradients(model)
    assert not torch.equal(found["blocks.1.ffn_norm.weight"], found["blocks.2.ffn_norm.weight"])


@each_option
@each_norms
def test_no_pass_sees_later_tokens_and_a_cache_changes_nothing(options, norms):
    model = random_model(THREE.model_copy(update={"norms": norms}), **options)
    changed = tokens()
    changed[:, 9] = changed[:, 9] % 256 + 1
    for own in (*readouts_of(model).values(), model):
        with torch.inference_mode():
            whole, other = own.hidden(tokens()), own.hidden(changed)
            assert torch.equal(whole[:, :9], other[:, :9]) and not torch.equal(whole[:, 9:], other[:, 9:])
            cache = Cache.of(own, 3, torch.device("cpu"))
            for _ in range(2):  # the second time over what the first left
                parts = tokens().split([1, 5, 1, 9], dim=1)
                found = torch.cat([own.hidden(part, cache.extend(part.shape[1])) for part in parts], dim=1)
                torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-3)
                cache.clear()


@torch.inference_mode()
def test_a_cache_of_too_few_layers_would_be_noticed():
    model = random_model(THREE)
    cache = Cache(model.config, 3, torch.device("cpu"))
    with pytest.raises(IndexError):
        model.hidden(tokens(), cache.extend(CONTEXT))


@torch.no_grad()
def test_documents_in_a_row_do_not_see_one_another():
    model, read = random_model(THREE, qkv_shift=True), tokens(4)
    read[:, 7] = EOT
    whole = model.hidden(read, Documents.of(read, EOT))
    second = model.hidden(read[:, 7:], Documents.of(read[:, 7:], EOT))
    torch.testing.assert_close(whole[:, 7:], second, atol=1e-4, rtol=1e-4)


@each_norms
def test_packed_in_a_trie_as_in_single_rows(norms):
    model = random_model(THREE.model_copy(update={"norms": norms}), context=48)
    requests = [Request("the cat", f" {a}{b}") for a in ("sat", "ran") for b in ("", " home", " on")]
    for own in (*readouts_of(model).values(), model):
        scorer = TokenModel(own, RequestEncoder(ByteTokenizer()))
        assert scorer.packs
        packed = [score.logprob for score in scorer.loglikelihoods(requests)]
        scorer.packs = False
        single = [score.logprob for score in scorer.loglikelihoods(requests)]
        assert packed == pytest.approx(single, abs=1e-3)
        half = TokenModel(own, RequestEncoder(ByteTokenizer()), precision="bfloat16")
        assert [s.logprob for s in half.loglikelihoods(requests)] == pytest.approx(single, rel=0.05)


def test_a_token_is_written_with_the_cache_as_without():
    model = random_model(DRAWN)
    for own in (model, find_readout(model, "passes-6")):
        texts = []
        for cached in (True, False):
            generator, numbers = (
                TokenGenerator(own, ByteTokenizer(), cached),
                torch.Generator().manual_seed(5),
            )
            logits_V = generator.start("Once")
            texts.append([])
            while len(texts[-1]) < 3 * CONTEXT:
                texts[-1].append(int(Sampling(temperature=1.0).choose(logits_V, numbers)) % generator.eot)
                logits_V = generator.next(texts[-1][-1])
        assert texts[0] == texts[1] and len(set(texts[0])) > 2


def test_some_positions_alone_are_those_of_all():
    rows = torch.tensor([0, 7, 40])
    last = RecurrentDepth(first=3, blocks=2, passes=2, drawn=(1, 3))  # the last block is skipped at times
    for technique in (THREE, last):
        model = random_model(technique)
        technique.prepare(SimpleNamespace(seed=0), None, None)
        for step in (1, 2, 3):
            technique.before_step(model.train(), step, 3)
            expected = model.hidden(tokens()).flatten(0, 1)[rows]
            torch.testing.assert_close(model.hidden(tokens(), None, rows), expected, atol=1e-5, rtol=1e-5)


# Drawn passes


def test_every_number_is_drawn_once_a_lap_in_an_order_of_the_seed():
    orders = set()
    for lap in range(20):
        found = [DRAWN.passes_at(0, step) for step in range(4 * lap + 1, 4 * lap + 5)]
        assert sorted(found) == [1, 2, 3, 4]
        orders.add(tuple(found))
    assert len(orders) > 8
    assert [DRAWN.passes_at(0, step) for step in range(1, 21)] != [
        DRAWN.passes_at(1, s) for s in range(1, 21)
    ]
    for steps in (1, 3, 4, 11):
        found = [DRAWN.passes_at(7, step) for step in range(1, steps + 1)]
        assert DRAWN.mean_passes(7, steps) == pytest.approx(sum(found) / steps)
    assert THREE.mean_passes(0, 5) == THREE.passes_at(0, 5) == 3


def test_a_run_draws_by_its_seed(make_technique_run):
    run = make_technique_run(techniques=[RecurrentDepth(drawn=(1, 4))]).model_copy(update={"seed": 3})
    (technique,) = run.techniques.values()
    objective, made = Objective(run), []
    objective.prepare(torch.device("cpu"), Group())
    model = build_model(run.model, [technique]).train()
    for step in range(1, 13):
        objective.before_step(model, step)
        made.append(model.blocks[1].passes_in_training)
    assert made == [technique.passes_at(3, step) for step in range(1, 13)]
    assert made != [technique.passes_at(0, step) for step in range(1, 13)]


def test_training_makes_the_drawn_passes_and_inference_its_own(make_technique_run):
    run = make_technique_run(techniques=[DRAWN], model={"context": CONTEXT})
    DRAWN.prepare(run, None, None)
    model, seen = random_model(DRAWN).train(), []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda *_: seen.append(1))
    for step in range(1, 9):
        DRAWN.before_step(model, step, 8)
        seen.clear()
        trained = model(tokens())
        passes = DRAWN.passes_at(run.seed, step)
        assert len(seen) == 2 + 2 * passes
        same = find_readout(model.eval(), f"passes-{passes}")(tokens())
        torch.testing.assert_close(trained, same, atol=1e-4, rtol=1e-4)
        seen.clear()
        model.eval()(tokens())
        assert len(seen) == 2 + 2 * 2
        model.train()


# Cost


def counted_flops(model: Transformer) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens(1))
    return counter.get_total_flops()


@each_norms
def test_flops_are_torchs_but_for_the_upper_half_of_attention(norms, torch_operations):
    model = random_model(RecurrentDepth(blocks=2, passes=3, drawn=(2, 5), norms=norms))
    for own, passes in ((model, 3), *((find_readout(model, f"passes-{n}"), n) for n in (1, 2, 4, 5))):
        upper_half = (2 + 2 * passes) * 2 * 32 * CONTEXT**2
        assert forward_flops(own, CONTEXT) == counted_flops(own) - upper_half
    assert forward_flops(build_on_meta(config(), (THREE,)), CONTEXT) == forward_flops(
        random_model(THREE), CONTEXT
    )


def test_training_costs_what_torch_counts(make_technique_run, torch_operations):
    """Six steps of one to four passes; without attention, whose kernels for training torch does not count."""
    run = make_technique_run(techniques=[DRAWN], steps=6)
    objective = Objective(run)
    objective.prepare(torch.device("cpu"), Group())
    model = build_model(run.model, [DRAWN]).train()
    read, counted = torch.randint(257, (1, run.model.context + 1)), 0
    for step in range(1, 7):
        objective.before_step(model, step)
        with FlopCounterMode(display=False) as counter:
            total(objective(objective.forward(model, read, None, step))).backward()
        counts = counter.get_flop_counts()["Global"]
        counted += sum(n for operation, n in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    context = run.model.context
    mean = DRAWN.mean_passes(run.seed, 6)
    attention = 3 * (2 + 2 * mean) * 2 * run.model.width * context
    assert run.flops_per_token == pytest.approx(counted / 6 / context + attention, rel=1e-9)
    plain = run.model_copy(update={"techniques": {}})
    assert run.parameters == plain.parameters and run.flops_per_token > plain.flops_per_token


def test_memory_is_that_of_a_model_with_as_many_blocks(make_technique_run):
    """At the step with the most passes, of those that are drawn."""
    for technique, steps, layers in (
        (THREE, 8, 8),
        (DRAWN, 4, 10),
        (DRAWN, 1, 2 + 2 * DRAWN.passes_at(0, 1)),
    ):
        run = make_technique_run(techniques=[technique], steps=steps, warmup_steps=1)
        deep = make_technique_run(model={"layers": layers}, steps=steps, warmup_steps=1)
        own, other = (training_memory(one, "float32", False, 4) for one in (run, deep))
        assert own.sequence == other.sequence and own.gradients < other.gradients


def test_matrices_of_all_passes_are_one_of_the_optimizers(make_technique_run):
    training = make_technique_run(optimizer="muon").training
    for norms, further in (("shared", 0), ("each", 2 * 2 * 2)):
        models = new_model(THREE.model_copy(update={"norms": norms})), new_model()
        groups = [build_optimizer(model, training, torch.float32).param_groups for model in models]
        counts = [[len(group["params"]) for group in own] for own in groups]
        counts[1][1] += further  # gains
        assert counts[0] == counts[1]


# Training and evaluation


def test_a_run_is_trained_and_scored_at_other_numbers_of_passes(make_technique_run, capsys):
    technique = DRAWN.model_copy(update={"scored": (1, 2, 6)})
    run = make_technique_run(techniques=[technique], steps=12, checkpoints=[6], watch_every=4)
    train(run)
    record = read_json(run.folder / "train.json")
    assert record["flops"] == run.tokens * run.flops_per_token
    losses = [float(row["train_loss"]) for row in curve_of(run) if row["train_loss"]]
    assert losses[-1] < losses[0]
    with (run.folder / "watch.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["step"] == "12"]
    # Two blocks outside of the group, and those of four passes, of which two are made without training.
    made = [row["layer"] for row in last if row["layer"].startswith("block") and row["ffn_rms"]]
    assert len(made) == 2 + 2 * 2 and sum(row["layer"].startswith("block") for row in last) == 2 + 2 * 4
    evaluate_run(run, EvaluationConfig(benchmarks=["synthetic_pairs"]))
    found = read_json(run.folder / "evaluation.json")
    assert list(found["readouts"]) == ["passes-1", "passes-6"], "two passes are the model itself"
    own = found["checkpoints"]["step-0000012"]
    bits = {name: one["perplexity"]["bits_per_byte"] for name, one in found["readouts"].items()}
    assert own["perplexity"]["bits_per_byte"] != bits["passes-1"] != bits["passes-6"]
    flops = [one["flops_per_token"] for one in found["readouts"].values()]
    two = forward_flops(build_on_meta(run.model, (technique,)), run.model.context) / run.model.context
    assert flops[1] - two == pytest.approx(4 * (two - flops[0]))
    assert {one["parameters"] for one in found["readouts"].values()} == {run.parameters.total}

    capsys.readouterr()
    texts = {}
    for flags in (
        (),
        ("--readout", "passes-2"),
        ("--readout", "passes-7"),
        ("--readout", "passes-7", "--no-cache"),
    ):
        assert main(["generate", "test/run", "1 2 3", "--tokens", "20", *flags]) == 0
        texts[flags] = capsys.readouterr().out
    plain, same, more, uncached = texts.values()
    assert plain == same and more == uncached
    assert main(["generate", "test/run", "1", "--readout", "passes"]) == 2
    assert "'passes' is no readout of the model (did you mean 'passes-" in capsys.readouterr().err


def test_a_neutral_run_is_the_plain_one(make_technique_run):
    plain, own = make_technique_run("plain"), make_technique_run("own", techniques=[RecurrentDepth(passes=1)])
    for run in (plain, own):
        train(run)
    assert curve_of(plain) == curve_of(own)
    assert all(torch.equal(value, weights_of(own)[name]) for name, value in weights_of(plain).items())


@each_norms
def test_a_resumed_run_is_the_one_that_was_not_stopped(norms, make_technique_run):
    technique = RecurrentDepth(blocks=2, passes=2, drawn=(1, 3), norms=norms)
    sizes = {"techniques": [technique], "data": DataConfig(attention="within"), "accumulation": 2}
    plain, stopped = make_technique_run("plain", **sizes), make_technique_run("stopped", **sizes)
    train(plain)
    train_in_parts(stopped, 5)
    assert curve_of(plain) == curve_of(stopped)
    assert all(torch.equal(value, weights_of(stopped)[name]) for name, value in weights_of(plain).items())


@pytest.mark.slow
def test_two_processes_train_as_one(make_technique_run):
    technique = RecurrentDepth(passes=2, drawn=(1, 3), norms="each")
    sizes = {"techniques": [technique], "accumulation": 2}
    one, two = make_technique_run("one", **sizes), make_technique_run("two", **sizes)
    train(one)
    train_in_two_processes(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(two)[name], atol=2e-5, rtol=1e-3)
    for first, second in zip(curve_of(one), curve_of(two), strict=True):
        assert float(first["train_loss"]) == pytest.approx(float(second["train_loss"]), rel=2e-5)


def test_a_checkpoint_is_read_and_not_exported(tmp_path):
    model = random_model(THREE.model_copy(update={"norms": "each"}), **OPTIONS["shared"])
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    ByteTokenizer().save(tmp_path / "checkpoints" / "tokenizer")
    loaded, _ = load_checkpoint(checkpoint)
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert sum(isinstance(block, Pass) for block in loaded.blocks) == 2 * 3
    for name in ("passes-4", "passes-0", "passes-01", "passes-x"):
        with pytest.raises(UserError, match=f"--readout: .*'{name}' is no readout.*did you mean 'passes-"):
            load_generator(checkpoint, torch.device("cpu"), readout=name)
    with pytest.raises(UserError, match="recurrent_depth does not support export"):
        export_llama(checkpoint, tmp_path / "llama")


# Keys


def load(project, keys: str, model: str = "layers: 4", more: str = ""):
    text = (project / "params" / "smoke.yaml").read_text().replace("layers: 2", model)
    variant = f"  again:\n    label: Again\n    techniques: {{recurrent_depth: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)
    return load_study("smoke")


def test_it_is_loaded_from_a_study(project):
    study = load(project, "{first: 1, blocks: 3, passes: 2, drawn: [1, 4], scored: [1, 8]}")
    found = study.runs["again"].techniques["recurrent_depth"]
    assert found == RecurrentDepth(first=1, blocks=3, passes=2, drawn=(1, 4), scored=(1, 8))
    plain, own = (study.runs[name] for name in ("baseline", "again"))
    assert own.parameters == plain.parameters and own.flops_per_token > plain.flops_per_token


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        (
            "{first: 5}",
            "layers: 4",
            r"recurrent_depth\.first: found 5, expected at most the 4 of model.layers",
        ),
        ("{blocks: 4}", "layers: 4", r"blocks: 4, from block 2 on, reach block 5 of 4; expected at most 3"),
        (
            "{blocks: 3}",
            "layers: 4\n  value_embeddings: 1",
            r"blocks: block 4 .* ends with block 3 or before",
        ),
        ("{passes: 0}", "layers: 4", r"passes: .*found 0"),
        ("{passes: 10000}", "layers: 4", r"passes: 10000: expected at most 9997"),
        ("{scored: [10000]}", "layers: 4", r"scored: 10000: expected at most 9997"),
        ("{drawn: [2, 2]}", "layers: 4", r"drawn: \[2, 2\]: expected the least number"),
        ("{drawn: [0, 2]}", "layers: 4", r"drawn: \[0, 2\]: expected the least number"),
        ("{drawn: [1, 20000]}", "layers: 4", r"drawn: 20000: expected at most 9997"),
        ("{scored: [1, 1]}", "layers: 4", r"scored: \[1, 1\]: expected numbers of at least 1, each once"),
        ("{scored: [0]}", "layers: 4", r"scored: \[0\]: expected numbers of at least 1"),
        ("{norms: each, scored: [4]}", "layers: 4", r"scored: 4: with norms: each.* 2 passes"),
        ("{norms: each, passes: 4, drawn: [1, 3]}", "layers: 4", r"passes: 4: with norms: each.* 3 passes"),
        ("{norm: each}", "layers: 4", r"norm: no such key \(did you mean 'norms'"),
    ],
)
def test_what_does_not_fit_is_refused(keys, model, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys, model)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("    training: {compile: true}\n", "does not support torch.compile"),
        ("    training: {start_from: baseline}\n", "does not support weights of another run"),
    ],
)
def test_what_it_does_not_support_is_refused(more, message, project):
    with pytest.raises(UserError, match=f"techniques.recurrent_depth {message}"):
        load(project, "{}", more=more)
