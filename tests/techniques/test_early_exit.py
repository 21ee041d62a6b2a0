"""Early exit: layer dropout, the exits' losses, and the exits as language models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, train_in_parts, train_in_two_processes, weights_of

from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.readouts import readouts_of
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.find import load_generator
from stlm.model.block import Block
from stlm.model.build import build_model
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, training_flops_per_token
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.inherit import inherit
from stlm.model.layout import CausalRows
from stlm.study.load import load_study
from stlm.techniques.early_exit import EarlyExit, SkippedBlock, first_blocks
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import save_checkpoint
from stlm.training.loop import train
from stlm.training.objective import Forward, Objective, total

OPTIONS = {
    "plain": {},
    "learned": {"positions": "learned"},
    "values": {"value_embeddings": 2, "qkv_shift": True, "qk_norm": True},
    "soft cap, untied": {"logit_softcap": 4.0, "tied": False},
    "factorized": {"embedding_rank": 9},
    "shared": {"sharing": {"what": "all", "order": "sandwich"}, "lora": {"rank": 3}},
}
LAYERS, CONTEXT = 5, 16


def config(**options: object) -> ModelConfig:
    sizes = {"layers": LAYERS, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
    return ModelConfig(**{"vocab_size": 257, **sizes, **options})


def random_model(*techniques: EarlyExit, **options: object):
    """A model whose next token depends on all of its parts."""
    torch.manual_seed(1)
    model = build_model(config(**options), techniques)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def tokens(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(2))


def losses(
    technique: EarlyExit, model, step: int = 1, steps: int = 1, layout=None
) -> dict[str, torch.Tensor]:
    read = tokens(4, CONTEXT + 1)
    return technique.objective(Forward(model, read[:, :-1], read[:, 1:], layout, step, steps))


# Layer dropout


def test_the_share_that_skips_grows_with_depth():
    technique = EarlyExit(p_max=0.3)
    assert technique.skipped(1, 9) == 0
    assert technique.skipped(5, 9) == pytest.approx(0.3 * 0.41421356)
    assert technique.skipped(9, 9) == pytest.approx(0.3)
    for layer in range(9):
        assert technique.skipped(layer + 1, 9) == pytest.approx(0.3 * (math.exp(layer * math.log(2) / 8) - 1))


def test_the_share_that_skips_grows_over_training():
    technique = EarlyExit(p_max=0.3)
    model = random_model(technique)
    shares = {}
    for step in (1, 6, 11):
        technique.before_step(model, step, 11)
        shares[step] = [block.skipped for block in model.blocks]
    assert shares[1] == [0] * LAYERS
    assert shares[6][-1] == pytest.approx(0.3 * 0.41421356)
    assert shares[11] == pytest.approx([technique.skipped(n, LAYERS) for n in range(1, LAYERS + 1)])
    constant = EarlyExit(p_max=0.3, p_schedule="constant")
    constant.before_step(model, 1, 11)
    assert model.blocks[-1].skipped == pytest.approx(0.3)


@pytest.mark.parametrize("layout", ["rows", "documents"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_that_skip_a_block_pass_to_the_bit_and_the_others_are_as_alone(options, layout):
    model = random_model(EarlyExit(p_max=1.0, p_schedule="constant"), **options).train()
    read = tokens(16)
    read[:, 5] = 0
    given = CausalRows(CONTEXT) if layout == "rows" else Documents.of(read, 0)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    torch.manual_seed(3)
    with torch.no_grad():
        model.residuals(read, given)
        torch.manual_seed(3)
        for block, (inputs, output) in zip(model.blocks, seen, strict=True):
            x, rope, layout, rows, added = inputs
            kept = torch.ones(16, dtype=torch.bool)
            if block.skipped:
                kept = torch.rand(16) >= block.skipped
            whole = Block.forward(block, x, rope, layout, rows, added)
            assert torch.equal(output[~kept], x[~kept])
            torch.testing.assert_close(output[kept], whole[kept], atol=2e-5, rtol=1e-4)
            assert not kept.any() or not torch.equal(output[kept], x[kept])
    # The last block is skipped by all: it keeps no row, and is not run.
    assert torch.equal(seen[-1][1], seen[-1][0][0])


def test_flat_positions_of_the_last_block_are_those_of_all():
    model = random_model(EarlyExit(p_max=0.5, p_schedule="constant")).train()
    rows = torch.tensor([0, 7, 40])
    torch.manual_seed(3)
    whole = model.hidden(tokens())
    torch.manual_seed(3)
    assert torch.equal(model.hidden(tokens(), None, rows), whole.flatten(0, 1)[rows])


def test_nothing_is_skipped_outside_of_training():
    model = random_model(EarlyExit(p_max=1.0, p_schedule="constant"))
    assert torch.equal(model(tokens()), random_model()(tokens()))


def test_weights_keep_their_names_and_values():
    torch.manual_seed(0)
    plain = build_model(config()).state_dict()
    torch.manual_seed(0)
    own = build_model(config(), [EarlyExit()])
    assert all(isinstance(block, SkippedBlock) for block in own.blocks)
    assert list(own.state_dict()) == list(plain)
    assert all(torch.equal(value, plain[name]) for name, value in own.state_dict().items())
    assert parameter_counts(config(), (EarlyExit(),)) == parameter_counts(config())


# Losses of exits

CURRICULA = [
    EarlyExit(),
    EarlyExit(period=2),
    EarlyExit(period=9),
    EarlyExit(curriculum="gradual"),
    EarlyExit(curriculum=None, scale=1.0),
    EarlyExit(exits=(4, 2), period=1),
    EarlyExit(scale=0.0),
]


@pytest.mark.parametrize("technique", CURRICULA, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_weights_sum_to_one_and_the_last_block_always_has_one(technique, steps):
    counted = dict.fromkeys(technique.blocks(LAYERS), 0)
    for step in range(1, steps + 1):
        weights = technique.weights(step, steps, LAYERS)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
        assert list(weights) == sorted(weights) and list(weights)[-1] == LAYERS
        assert list(weights.values()) == sorted(weights.values()), "weights grow with depth"
        for block in technique.enabled(step, steps, LAYERS):
            counted[block] += 1
    assert counted == {block: technique.steps_enabled(block, steps, LAYERS) for block in counted}
    grown = [technique.growth(step, steps) for step in range(1, steps + 1)]
    assert technique.mean_growth(steps) == pytest.approx(np.mean(grown), rel=1e-9)


def test_the_weights_are_those_of_the_paper():
    """Layers 0 to 4: the sums of 0 to l are 0, 1, 3, 6; the last has 4 + 0.2 x 6."""
    found = EarlyExit(curriculum=None, scale=0.2).weights(1, 1, 5)
    own = {2: 0.2 * 1, 3: 0.2 * 3, 4: 0.2 * 6, 5: 4 + 0.2 * 6}
    assert found == pytest.approx({block: weight / sum(own.values()) for block, weight in own.items()})


def test_a_rotation_visits_all_exits():
    technique = EarlyExit(period=2)
    assert [technique.enabled(step, 10, LAYERS) for step in (1, 2, 3)] == [[1, 3], [2, 4], [1, 3]]
    assert [EarlyExit().enabled(step, 10, LAYERS) for step in range(1, 6)] == [[1], [2], [3], [4], [1]]


def test_gradually_exits_are_enabled_from_the_last_to_the_first():
    technique = EarlyExit(curriculum="gradual")
    found = [technique.enabled(step, 16, LAYERS) for step in range(1, 17)]
    assert found[:9:2] == [[], [4], [3, 4], [2, 3, 4], [1, 2, 3, 4]]
    assert found[9:] == [[1, 2, 3, 4]] * 7


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_parts_are_the_weighted_losses_of_the_exits(options):
    technique = EarlyExit(curriculum=None, p_max=0.0)
    model = random_model(technique, **options)
    read = tokens(4, CONTEXT + 1)
    parts = losses(technique, model)
    weights = technique.weights(1, 1, LAYERS)
    expected = {
        block: weight
        * F.cross_entropy(first_blocks(model, block)(read[:, :-1]).flatten(0, 1), read[:, 1:].flatten())
        for block, weight in weights.items()
    }
    torch.testing.assert_close(parts["next_token"], expected.pop(LAYERS))
    torch.testing.assert_close(parts["exits"], sum(expected.values()))


def test_gradients_reach_the_blocks_before_an_exit_the_norm_and_the_head():
    technique = EarlyExit(p_max=0.0, exits=(2,), curriculum=None)
    model = random_model(technique, tied=False)
    losses(technique, model)["exits"].backward()
    reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert reached == [True, True, False, False, False]
    for parameter in (model.norm.weight, model.output.weight, model.embedding.weight):
        assert parameter.grad.any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_off_is_off(options):
    """Neutral: logits, loss and gradients are the plain model's, and no random number is drawn."""
    technique = EarlyExit(p_max=0.0, scale=0.0)
    assert technique.neutral() and not EarlyExit().neutral()
    plain, own = random_model(**options).train(), random_model(technique, **options).train()
    read = tokens(4, CONTEXT + 1)
    torch.manual_seed(0)
    technique.before_step(own, 1, 10)
    parts = losses(technique, own)
    assert parts.keys() == {"next_token"}
    loss = plain.loss(read[:, :-1], read[:, 1:])
    assert torch.equal(total(parts), loss)
    loss.backward()
    total(parts).backward()
    for one, other in zip(plain.parameters(), own.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert torch.initial_seed() == 0 and torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())


# Exits as language models


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_exit_is_the_model_of_the_first_blocks(options):
    model = random_model(EarlyExit(), **options)
    exits = readouts_of(model)
    assert list(exits) == ["exit-1", "exit-2", "exit-3", "exit-4"]
    residuals = model.residuals(tokens(), after=range(LAYERS))
    for number, own in enumerate(exits.values()):
        expected = model.head(model.finish(residuals[number]))
        assert torch.equal(own(tokens()), expected)
        flat = own.hidden(tokens()).flatten(0, 1)
        picked = own.logit(flat, tokens().flatten())
        torch.testing.assert_close(
            picked, expected.flatten(0, 1).gather(1, tokens().flatten()[:, None])[:, 0], atol=1e-4, rtol=1e-4
        )
        assert own.config.layers == number + 1 == len(own.blocks)
        assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in model.parameters())
        assert forward_flops(own, CONTEXT) < forward_flops(model, CONTEXT)
        ModelConfig.model_validate(own.config.model_dump())
    assert torch.equal(first_blocks(model, LAYERS)(tokens()), model(tokens()))
    assert len(model.blocks) == LAYERS == model.config.layers, "the model itself is left as it was"


def test_an_exit_costs_what_a_model_of_as_many_layers_does():
    model = random_model(EarlyExit(), value_embeddings=2)
    for layers, tables in ((2, 0), (4, 1)):
        plain = build_model(config(layers=layers, value_embeddings=tables))
        own = first_blocks(model, layers)
        assert forward_flops(own, CONTEXT) == forward_flops(plain, CONTEXT)
        assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_exit_sees_later_tokens_and_a_cache_changes_nothing(options):
    model = random_model(EarlyExit(), **options)
    changed = tokens()
    changed[:, 9] = (changed[:, 9] + 1) % 257
    for own in (*readouts_of(model).values(), model):
        with torch.inference_mode():
            whole, other = own.hidden(tokens()), own.hidden(changed)
            assert torch.equal(whole[:, :9], other[:, :9]) and not torch.equal(whole[:, 9:], other[:, 9:])
            cache = Cache(own.config, 3, torch.device("cpu"))
            parts = tokens().split([1, 5, 1, 9], dim=1)
            found = torch.cat([own.hidden(part, cache.extend(part.shape[1])) for part in parts], dim=1)
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_exit_scores_packed_as_in_single_rows(precision):
    model = random_model(EarlyExit(), value_embeddings=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    requests = [Request("A cat", f" ran {end}") for end in ("home", "away", "to a hen", "h")]
    for own in readouts_of(model).values():
        scorer = TokenModel(own, RequestEncoder(ByteTokenizer()), precision=precision)
        assert scorer.packs
        packed = scorer.loglikelihoods(requests)
        scorer.packs = False
        for one, other in zip(packed, scorer.loglikelihoods(requests), strict=True):
            tolerance = 1e-4 if precision == "float32" else 0.3
            assert one.logprob == pytest.approx(other.logprob, abs=tolerance)


# Cost


def step_flops(model, objective: Objective, step: int) -> int:
    read = tokens(4, CONTEXT + 1)
    with FlopCounterMode(display=False) as counter:
        total(objective(objective.forward(model, read, None, step))).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "options", [{}, {"embedding_rank": 9}, {"embedding_rank": 9, "tied": False}], ids=str
)
@pytest.mark.parametrize("technique", CURRICULA, ids=str)
def test_the_exits_cost_what_torch_counts(technique, options, make_technique_run, torch_operations):
    """Six steps in all; beside the plain model's, the steps multiply with the further heads alone."""
    technique = technique.model_copy(update={"p_max": 0.0})
    run = make_technique_run(
        model={"layers": LAYERS, "context": CONTEXT, **options}, techniques=[technique], steps=6
    )
    plain = run.model_copy(update={"techniques": {}})
    counted = []
    for own in (run, plain):
        model = build_model(own.model, own.techniques.values()).train()
        counted.append(sum(step_flops(model, Objective(own), step) for step in range(1, 7)))
    further = (counted[0] - counted[1]) / (6 * 4 * CONTEXT)
    assert technique.extra_flops_per_token(run) == pytest.approx(further, rel=1e-12, abs=1e-9)
    assert run.flops_per_token == training_flops_per_token(plain.model) + technique.extra_flops_per_token(run)


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
def test_what_rows_skip_is_left_out(schedule, make_technique_run):
    """The rows that blocks are handed, over many steps; each costs what a row of the block does."""
    technique = EarlyExit(p_max=0.6, p_schedule=schedule, scale=0.0)
    run = make_technique_run(model={"layers": LAYERS}, techniques=[technique], steps=60)
    model = build_model(run.model, [technique]).train()
    handed = [0] * LAYERS
    for number, block in enumerate(model.blocks):

        def count(module, inputs, number=number):
            handed[number] += len(inputs[0])

        block.attention.register_forward_pre_hook(count)
    read, rows = tokens(64, 4), 60 * 64
    torch.manual_seed(0)
    with torch.no_grad():
        for step in range(1, 61):
            technique.before_step(model, step, 60)
            model.hidden(read)
    per_row = [forward_flops(block, run.model.context) / run.model.context for block in model.blocks]
    left_out = 3 * sum((1 - own / rows) * flops for own, flops in zip(handed, per_row, strict=True))
    assert technique.extra_flops_per_token(run) == pytest.approx(-left_out, rel=0.05)
    assert handed[0] == rows > handed[-1]


def test_fewer_rows_are_fewer_flops_by_torchs_counter(torch_operations):
    model = random_model(EarlyExit(p_max=1.0, p_schedule="constant", scale=0.0)).train()
    matrices = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)

    def multiplied(skipped: float) -> int:
        for block in model.blocks:
            block.skipped = skipped
        torch.manual_seed(0)
        with FlopCounterMode(display=False) as counter:
            model.hidden(tokens(8)).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(
            count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm")
        )

    torch.manual_seed(0)
    kept = sum(int((torch.rand(8) >= 0.5).sum()) for _ in range(LAYERS))
    whole, half = multiplied(0.0), multiplied(0.5)
    assert whole == 6 * LAYERS * 8 * CONTEXT * matrices
    assert half == whole * kept / (8 * LAYERS)


# Training and evaluation


def test_a_run_is_trained_and_its_exits_are_scored(make_technique_run):
    technique = EarlyExit(exits=(1, 3), period=1, p_schedule="constant", p_max=0.5)
    run = make_technique_run(techniques=[technique], steps=40, checkpoints=[20])
    train(run)
    for row in curve_of(run):
        together = float(row["train_next_token"]) + float(row["train_exits"])
        assert float(row["train_loss"]) == pytest.approx(together, abs=3e-6)
    record = read_json(run.folder / "train.json")
    assert record["techniques"]["early_exit"]["exits"] == [1, 3]
    assert record["flops"] == run.tokens * run.flops_per_token
    evaluate_run(run, EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"]))
    found = read_json(run.folder / "evaluation.json")
    assert list(found["readouts"]) == ["exit-1", "exit-3"]
    last = found["checkpoints"]["step-0000040"]
    costs = [own["flops_per_token"] for own in found["readouts"].values()]
    assert costs == sorted(costs) and len(set(costs)) == 2
    for own in found["readouts"].values():
        assert own["weights_sha256"] == last["weights_sha256"]
        assert own["benchmarks"].keys() == last["benchmarks"].keys()
        assert own["perplexity"]["bits_per_byte"] > 0
    # Block 3 has learned from its exit, block 1 has not.
    bits = [own["perplexity"]["bits_per_byte"] for own in found["readouts"].values()]
    assert bits[1] < bits[0]


def test_neutral_training_is_the_plain_one(make_technique_run):
    plain, own = (
        make_technique_run("plain"),
        make_technique_run("own", techniques=[EarlyExit(p_max=0.0, scale=0.0)]),
    )
    for run in (plain, own):
        train(run)
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(own)[name]), name
    assert curve_of(plain) == curve_of(own)


@pytest.mark.parametrize("attention", ["across", "within"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(attention, make_technique_run):
    sizes = {"techniques": [EarlyExit(p_max=0.8)], "data": DataConfig(attention=attention), "accumulation": 2}
    plain, stopped = make_technique_run("plain", **sizes), make_technique_run("stopped", **sizes)
    train(plain)
    train_in_parts(stopped, 5)
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(stopped)[name]), name


@pytest.mark.slow
def test_two_processes_train_as_one(make_technique_run):
    sizes = {"techniques": [EarlyExit(p_max=0.6, p_schedule="constant")], "accumulation": 2}
    one, two = make_technique_run("one", **sizes), make_technique_run("two", **sizes)
    train(one)
    train_in_two_processes(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(two)[name], atol=2e-5, rtol=1e-3)
    for first, second in zip(curve_of(one), curve_of(two), strict=True):
        for column in ("train_loss", "train_next_token", "train_exits"):
            assert float(first[column]) == pytest.approx(float(second[column]), rel=2e-5)


def test_the_model_is_exported_as_the_plain_one(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = train_bpe("bpe-270", ["The hen ran home to eat with nine owls."] * 3)
    model = random_model(EarlyExit(), vocab_size=tokenizer.vocab_size)
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    tokenizer.save(checkpoint.parent / "tokenizer")
    export_llama(checkpoint, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(exported(tokens()).logits, model(tokens()), atol=1e-3, rtol=1e-3)


def test_an_exit_writes_text(tmp_path):
    model = random_model(EarlyExit())
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    ByteTokenizer().save(checkpoint.parent / "tokenizer")
    cpu = torch.device("cpu")
    for cached in (True, False):
        generator = load_generator(checkpoint, cpu, cached, "exit-2")
        logits = generator.start("a")
        read = [generator.eot, ord("a")]
        for symbol in (98, 99, 100):
            expected = first_blocks(model, 2)(torch.tensor([read]))[0, -1]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            assert (model(torch.tensor([read]))[0, -1] - logits).abs().max() > 1e-2
            logits = generator.next(symbol)
            read.append(symbol)
    with pytest.raises(UserError, match=r"--readout: .*'exit-5' is no readout .*did you mean 'exit-"):
        load_generator(checkpoint, cpu, readout="exit-5")


def test_a_run_starts_from_the_weights_of_another():
    plain, own = random_model(), build_model(config(), [EarlyExit()])
    inherit(own, plain)
    assert torch.equal(own.eval()(tokens()), plain(tokens()))


# Keys


def write_study(project, keys: str, model: str = "layers: 4", more: str = "") -> None:
    text = (project / "params" / "smoke.yaml").read_text().replace("layers: 2", model)
    variant = f"  exits:\n    label: Exits\n    techniques: {{early_exit: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)


def test_it_is_loaded_from_a_study(project):
    write_study(project, "{exits: [3, 2], period: 2, p_max: 0.25}")
    study = load_study("smoke")
    found = study.runs["exits"].techniques["early_exit"]
    assert found == EarlyExit(exits=(3, 2), period=2, p_max=0.25)
    assert found.blocks(4) == [2, 3]
    plain, own = (study.runs[name] for name in ("baseline", "exits"))
    assert own.parameters == plain.parameters
    assert own.flops_per_token == plain.flops_per_token + found.extra_flops_per_token(own)


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        ("{exits: [4]}", "layers: 4", r"techniques\.early_exit\.exits: 4: expected blocks from 1 to 3"),
        ("{exits: [0]}", "layers: 4", r"exits: 0: expected blocks from 1 to 3"),
        ("{exits: [2, 2]}", "layers: 4", r"exits: \[2, 2\]: expected numbers of blocks, each once"),
        ("{exits: []}", "layers: 4", r"exits: \[\]: expected numbers of blocks"),
        ("{}", "layers: 1", r"exits: model.layers is 1"),
        ("{}", "layers: 2", r"exits: \[1\]: the weight of block 1 is 0"),
        ("{curriculum: gradual, period: 2}", "layers: 4", r"period: 2: only the curriculum rotational"),
        ("{curriculum: rotation}", "layers: 4", r"curriculum.*'rotational'"),
        ("{p_maximum: 0.1}", "layers: 4", r"p_maximum: no such key \(did you mean 'p_max'"),
    ],
)
def test_what_does_not_fit_is_refused(keys, model, message, project):
    write_study(project, keys, model)
    with pytest.raises(UserError, match=message):
        load_study("smoke")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("    training: {compile: true}\n", "does not support torch.compile"),
    ],
)
def test_what_it_does_not_support_is_refused(more, message, project):
    write_study(project, "{}", more=more)
    with pytest.raises(UserError, match=f"techniques.early_exit {message}"):
        load_study("smoke")
