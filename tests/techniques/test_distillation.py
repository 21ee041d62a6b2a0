"""Distillation: its loss against a plain one in float64, and whole trainings with a teacher."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stlm.engines import train_inputs
from stlm.errors import UserError
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.transformer import Transformer
from stlm.report.schema import TrainRecord
from stlm.study.load import load_study
from stlm.study.runs import Run
from stlm.teaching import divergence as module
from stlm.teaching import loss as taught_loss_module
from stlm.teaching.divergence import divergence as of_teacher
from stlm.techniques.distillation import Distillation
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.loop import Trainer, train
from stlm.training.objective import Forward, Objective, total

N, V, D, E = 150, 101, 16, 24
LAST = "step-0000012"
PARTS = ["train_next_token", "train_distillation"]


# The divergence.


def inputs(scale: float = 1.0) -> list[torch.Tensor]:
    """Hidden states and heads of student and teacher: [N, D], [V, D], [N, E], [V, E]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (N, E), (V, E))
    x, weight, teacher, head = (torch.randn(shape, generator=generator) * scale for shape in shapes)
    return [x.requires_grad_(), weight.requires_grad_(), teacher, head]


def plain(x, weight, teacher, head, softcaps=(0.0, 0.0), T=1.0) -> torch.Tensor:
    """The divergence by its definition, in float64, without chunks."""

    def log_softmax(hidden, weight, softcap):
        logits = hidden.double() @ weight.double().T
        return torch.log_softmax((softcap * torch.tanh(logits / softcap) if softcap else logits) / T, dim=1)

    log_p, log_q = log_softmax(x, weight, softcaps[0]), log_softmax(teacher, head, softcaps[1])
    return (log_q.exp() * (log_q - log_p)).sum(dim=1).mean()


def divergence(x, weight, teacher, head, softcaps=(0.0, 0.0), T=1.0, sampled=None) -> torch.Tensor:
    return of_teacher(x, weight, teacher, head, softcaps, T, sampled, None)


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("softcaps", [(0.0, 0.0), (4.0, 0.0), (0.0, 6.0), (4.0, 6.0)])
def test_value_and_gradients_are_those_of_a_plain_implementation(monkeypatch, softcaps, T):
    monkeypatch.setitem(module._LOGITS, "cpu", 64 * V)
    ours, theirs = inputs(), inputs()
    found, expected = divergence(*ours, softcaps, T), plain(*theirs, softcaps, T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (3 * found).backward()
    (3 * expected).backward()
    for own, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, teacher, head = inputs()
    with torch.no_grad():
        value = divergence(x, weight, teacher, head).item()
    assert divergence(x, weight, teacher, head).item() == value
    divergence(x.detach(), weight, teacher, head).backward()
    assert x.grad is None and weight.grad is not None
    divergence(x, weight.detach(), teacher, head).backward()
    assert x.grad is not None


def test_under_autocast_it_is_near_to_float32():
    exact, rounded = inputs(0.3), inputs(0.3)
    divergence(*exact).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence(*rounded)
    loss.backward()
    assert loss.item() == pytest.approx(divergence(*exact).item(), rel=0.02)
    for own, other in zip(rounded[:2], exact[:2], strict=True):
        assert own.grad.dtype == torch.float32
        assert (own.grad - other.grad).norm() < 0.02 * other.grad.norm()


@pytest.mark.parametrize("positions", [1, 7, 64, 10**6])
def test_it_does_not_depend_on_the_positions_computed_at_once(monkeypatch, positions):
    expected = inputs()
    divergence(*expected).backward()
    monkeypatch.setitem(module._LOGITS, "cpu", positions * V)
    found = inputs()
    loss = divergence(*found)
    loss.backward()
    assert loss.item() == pytest.approx(divergence(*expected).item(), rel=1e-6)
    for own, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(own.grad, other.grad)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("sampled", [None, 5])
def test_no_tensor_holds_the_logits_of_all_positions(monkeypatch, sampled):
    for parts in (module._LOGITS, taught_loss_module._LOGITS):
        monkeypatch.setitem(parts, "cpu", 40 * V)
    with Largest() as largest:
        divergence(*inputs(), (3.0, 3.0), 2.0, sampled).backward()
    assert largest.numel == 40 * V < N * V
    with Largest() as largest:
        plain(*inputs())
    assert largest.numel == N * V, "the measure sees them where they are"


def test_a_teacher_equal_to_the_student_teaches_nothing():
    x, weight, _, _ = inputs(0.3)
    loss = divergence(x, weight, x.detach().clone(), weight.detach().clone(), (5.0, 5.0), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert x.grad.abs().max() < 1e-8 and weight.grad.abs().max() < 1e-7


@pytest.mark.parametrize("sampled", [1, 4])
def test_sampled_tokens_are_an_unbiased_estimate(sampled):
    """Mean of 400 draws: of the value, and of the gradients in one direction each."""
    exact = inputs(0.5)
    value = divergence(*exact, (5.0, 0.0), 2.0)
    value.backward()
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in exact[:2]]

    def projections(tensors):
        return [(x.grad * y).sum().item() for x, y in zip(tensors[:2], directions, strict=True)]

    expected = torch.tensor([value.item(), *projections(exact)], dtype=torch.float64)
    torch.manual_seed(2)
    found = []
    for _ in range(400):
        drawn = inputs(0.5)
        loss = divergence(*drawn, (5.0, 0.0), 2.0, sampled)
        loss.backward()
        found.append([loss.item(), *projections(drawn)])
    found = torch.tensor(found, dtype=torch.float64)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - expected) / error).abs().max() < 4.5
    assert (error > 0).all() and error[0] < 0.05 * expected[0]


# The objective, with models that are not trained.

SIZES = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "kv_heads": 1,
    "ffn_width": 48,
    "context": 32,
    "vocab_size": 257,
}


def model(seed: int = 0, **keys) -> Transformer:
    torch.manual_seed(seed)
    made = Transformer(ModelConfig(**SIZES | {"dropout": 0.0} | keys))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return made


def taught(technique: Distillation, student: Transformer, teacher: Transformer, rows, step=1, steps=6):
    """The parts of the objective for the tokens [B, L + 1] of some rows."""
    technique._teacher = teacher.eval().requires_grad_(False)
    forward = Forward(student, rows[:, :-1], rows[:, 1:], None, step, steps)
    return technique.objective(forward)


def tokens(rows: int = 4) -> torch.Tensor:
    return torch.randint(257, (rows, 33), generator=torch.Generator().manual_seed(3))


def test_the_loss_is_the_weighted_sum_that_the_key_says():
    student, teacher = model(0, logit_softcap=9.0), model(1, width=48, heads=4, dropout=0.5)
    rows = tokens()
    technique = Distillation(teacher="teacher", weight=0.3, temperature=2.0)
    parts = taught(technique, student, teacher, rows)
    assert list(parts) == ["next_token", "distillation"]
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(one(rows[:, :-1]).double() / 2, dim=-1) for one in (student, teacher.eval())
        )
        kl = (log_q.exp() * (log_q - log_p)).sum(dim=-1).mean().item()
        cross_entropy = student.loss(rows[:, :-1], rows[:, 1:]).item()
    assert parts["next_token"].item() == pytest.approx(0.7 * cross_entropy, rel=1e-5)
    assert parts["distillation"].item() == pytest.approx(0.3 * 4 * kl, rel=1e-5)


def test_with_all_the_weight_the_next_token_counts_nothing(monkeypatch):
    student, teacher, rows = model(0), model(1), tokens()
    technique = Distillation(teacher="teacher", weight=1.0)
    monkeypatch.setattr(student, "hidden_loss", lambda *arguments: pytest.fail("computed in vain"))
    parts = taught(technique, student, teacher, rows)
    assert parts["next_token"].item() == 0 < parts["distillation"].item()
    total(parts).backward()
    other = rows.clone()
    other[:, -1] = 0  # a target alone
    assert taught(technique, student, teacher, other)["distillation"].item() == parts["distillation"].item()


def test_it_does_not_depend_on_how_a_batch_is_cut():
    student, teacher, rows = model(0), model(1), tokens()
    technique = Distillation(teacher="teacher", weight=0.5)
    whole = taught(technique, student, teacher, rows)
    halves = [taught(technique, student, teacher, rows[part]) for part in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-5)


def test_the_teacher_gets_no_gradient_and_draws_no_random_numbers():
    student, teacher = model(0), model(1, dropout=0.5)
    before = torch.get_rng_state()
    total(taught(Distillation(teacher="teacher"), student, teacher, tokens())).backward()
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize(
    ("keys", "asked"),
    [({}, [1, 2, 3, 4, 5, 6]), ({"begin": 0.3, "end": 0.7}, [3, 4]), ({"end": 0.5}, [1, 2, 3])],
)
def test_the_teacher_is_asked_between_begin_and_end(monkeypatch, keys, asked):
    student, teacher, rows = model(0), model(1), tokens()
    technique, calls = Distillation(teacher="teacher", **keys), []
    hidden = teacher.hidden
    monkeypatch.setattr(teacher, "hidden", lambda *arguments: calls.append(step) or hidden(*arguments))
    plain_loss = student.loss(rows[:, :-1], rows[:, 1:]).item()
    for step in range(1, 7):
        parts = taught(technique, student, teacher, rows, step)
        assert list(parts) == ["next_token", "distillation"]
        assert (parts["next_token"].item() == plain_loss) == (step not in asked)
        assert (parts["distillation"].item() == 0) == (step not in asked)
    assert calls == asked


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.5), (0.6, 0.5)])
def test_an_end_before_the_beginning_is_refused(begin, end):
    with pytest.raises(ValueError, match=f"end: {end} is not above begin: {begin}"):
        Distillation(teacher="teacher", begin=begin, end=end)


# Whole trainings.

WIDER = {"layers": 2, "width": 48, "heads": 4, "ffn_width": 64}


def distilled(make_run, name="student", data=None, model=None, teacher_model=None, keys=None, **training):
    """A student, and the teacher that it depends on."""
    teacher = make_run("teacher", model=WIDER | (teacher_model or {}), **training)
    technique = Distillation(**{"teacher": "teacher"} | (keys or {}))
    technique.set_others({"teacher": teacher})
    update = {"techniques": {"distillation": technique}} | ({"data": data} if data else {})
    return make_run(name, model=model, **training).model_copy(update=update), teacher


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoints" / LAST / "model.safetensors")


def rows(run: Run) -> list[dict[str, str]]:
    """The curve without wall-clock times."""
    with (run.folder / "curve.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def equal(one: Run, other: Run) -> bool:
    theirs = weights(other)
    return all(torch.equal(weight, theirs[name]) for name, weight in weights(one).items())


def test_a_teacher_and_its_student(make_run, tmp_path):
    student, teacher = distilled(make_run, keys={"temperature": 2.0})
    for run in (teacher, student):
        train(run)
    record = read_json(student.folder / "train.json")
    kept = read_json(teacher.folder / "train.json")["checkpoints"][-1]
    depends = record["depends"]["teacher"]
    assert (depends["run"], depends["weights_sha256"]) == ("teacher", kept["weights_sha256"])
    assert depends["flops"] == teacher.flops
    trained = TrainRecord.model_validate(record)
    assert trained.flops == student.flops
    assert trained.total_flops == student.flops + teacher.flops
    settings = {"teacher": "teacher", "weight": 0.5, "temperature": 2.0, "sampled_tokens": None}
    assert record["techniques"] == {"distillation": {**settings, "begin": 0.0, "end": 1.0}}
    curve = rows(student)
    for row in curve:
        assert float(row["train_loss"]) == pytest.approx(sum(float(row[part]) for part in PARTS), abs=2e-6)
        assert float(row["train_distillation"]) > 0
    assert float(curve[-1]["train_loss"]) < float(curve[0]["train_loss"])
    # The student's checkpoint is a plain model, and of no other run.
    (tmp_path / teacher.folder).rename(tmp_path / "away")
    checkpoint = student.folder / "checkpoints" / LAST
    loaded, _ = load_checkpoint(checkpoint)
    bare = Transformer(student.model)
    bare.load_state_dict({name: value.clone() for name, value in loaded.state_dict().items()})
    inputs = tokens()[:, :-1]
    assert torch.equal(loaded(inputs), bare.eval()(inputs))
    assert sum(parameter.numel() for parameter in loaded.parameters()) == student.parameters.total


def test_without_weight_it_is_the_plain_run_to_the_bit(make_run):
    student, teacher = distilled(make_run, keys={"weight": 0.0})
    plain_run = make_run("plain")
    for run in (teacher, student, plain_run):
        train(run)
    assert equal(student, plain_run)
    assert [row["train_loss"] for row in rows(student)] == [row["train_loss"] for row in rows(plain_run)]
    assert student.techniques["distillation"].neutral()
    assert student.flops == plain_run.flops


@pytest.mark.parametrize("keys", [{"begin": 0.2, "end": 0.8}, {"weight": 1.0, "sampled_tokens": 3}], ids=str)
def test_a_run_that_stops_ends_as_one_that_does_not(make_run, monkeypatch, keys):
    whole, teacher = distilled(make_run, "whole", keys=keys)
    broken, _ = distilled(make_run, "broken", keys=keys)
    train(teacher)
    train(whole)
    step = Trainer.step

    def interrupted(self):
        step(self)
        if self.state.progress.step == 5:
            self.state.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        train(broken)
    train(broken)
    assert equal(whole, broken)
    assert rows(whole) == rows(broken)


def test_other_weights_of_the_teacher_make_another_run(make_run):
    student, teacher = distilled(make_run)
    train(teacher)
    first = Trainer(student).setup.fingerprint
    assert Trainer(distilled(make_run)[0]).setup.fingerprint == first
    train(distilled(make_run, learning_rate=2e-2)[1])
    assert Trainer(student).setup.fingerprint != first


def test_the_teacher_reads_the_students_layout(make_run, monkeypatch):
    """Attention within documents: what the teacher says of a document depends on no other."""
    student, teacher = distilled(make_run, data=DataConfig(attention="within"))
    train(teacher)
    setup = Trainer(student).setup
    (batch,) = setup.micro_batches.of_step(1, setup.share)
    network, seen = student.techniques["distillation"]._teacher, []
    assert not network.training
    hidden = network.hidden
    monkeypatch.setattr(network, "hidden", lambda *given: seen.append(given) or hidden(*given))
    forward = setup.objective.forward(setup.model, batch, setup.micro_batches.layout(batch[:, :-1]), 1)
    setup.objective(forward)
    ((inputs, layout),) = seen
    assert layout is forward.layout is not None
    assert torch.equal(inputs, batch[:, :-1])


def test_flops_are_torchs_but_for_the_upper_half_of_attention(make_run, torch_operations):
    """One step of one row: the student's passes, both of its heads, the teacher's forward pass."""
    student, teacher = distilled(
        make_run, model={"dropout": 0.0, "embedding_rank": 8, "tied": False}, keys={"end": 0.5}
    )
    setup_model, network = Transformer(student.model), Transformer(teacher.model)
    technique, context = student.techniques["distillation"], student.model.context
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # In evaluation mode attention is torch's, whose FLOPs it counts.
        total(taught(technique, setup_model.eval(), network, tokens(1), 1, 12)).backward()
    upper = 3 * upper_half(student) + upper_half(teacher)
    plain_run = make_run("plain", model={"dropout": 0.0, "embedding_rank": 8, "tied": False})
    extra = student.flops_per_token - plain_run.flops_per_token
    assert extra == technique.extra_flops_per_token(student)
    # Half of the steps are taught.
    found = (plain_run.flops_per_token + 2 * extra) * context
    assert found == counter.get_total_flops() - upper
    whole = Distillation(teacher="teacher", end=0.5, weight=1.0)
    whole.set_others({"teacher": teacher})
    assert extra - whole.extra_flops_per_token(student) == 0.5 * 6 * 8 * 257


def upper_half(run: Run) -> int:
    """Half of the FLOPs of attention's two products over all pairs of positions."""
    return 2 * run.model.layers * run.model.context**2 * run.model.width


def test_another_tokenizer_beside_the_teacher_is_refused(make_run):
    student, teacher = distilled(make_run)
    train(teacher)
    folder = teacher.folder / "checkpoints" / "tokenizer"
    train_bpe("bpe-262", ["a hen sat on a mat. " * 9]).save(folder)
    with pytest.raises(UserError, match=r"teacher/checkpoints/tokenizer: another tokenizer"):
        Objective(student).prepare(torch.device("cpu"), None)


def test_a_student_is_exported(tmp_path):
    config = ModelConfig(**SIZES | {"vocab_size": 262})
    student = build_model(config, [Distillation(teacher="teacher")])
    train_bpe("bpe-262", ["a hen sat on a mat. " * 9]).save(tmp_path / "checkpoints" / "tokenizer")
    checkpoint = tmp_path / "checkpoints" / LAST
    save_checkpoint(checkpoint, student, {"step": 12, "tokens": 9})
    assert read_json(checkpoint / "config.json")["techniques"]["distillation"]["teacher"] == "teacher"
    export_llama(checkpoint, tmp_path / "llama")
    exported = load_file(tmp_path / "llama" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], student.embedding.weight)


# Through a study.

STUDY = """
description: A teacher and its student.
corpus: synthetic
tokenizer: bpe-1280
baseline: baseline
model: {layers: 2, width: 96, heads: 4, kv_heads: 2, ffn_width: 256, context: 128}
training: {steps: 10, batch_size: 8, warmup_steps: 2}
evaluation: {benchmarks: []}
variants:
  baseline: {}
  large: {model: {width: 192}}
  student:
    techniques: {distillation: {teacher: large}}
"""


def study(project, *overrides: str):
    (project / "params" / "taught.yaml").write_text(STUDY)
    return load_study("taught", overrides)


def test_a_study_knows_the_teacher(project):
    loaded = study(project)
    student, baseline = loaded.runs["student"], loaded.runs["baseline"]
    assert student.depends == {"teacher": "large"}
    assert train_inputs(loaded, student)[-1] == "results/taught/runs/large/checkpoints"
    assert student.parameters == baseline.parameters
    head = 6 * 96 * 1280
    forward = loaded.runs["large"].flops_per_token / 3
    assert student.flops_per_token == pytest.approx(baseline.flops_per_token + forward + head)
    early = study(project, "variants.student.techniques.distillation.end=0.3").runs["student"]
    assert early.flops_per_token == pytest.approx(baseline.flops_per_token + 0.3 * (forward + head))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["variants.student.techniques.distillation.teacher=lrge"],
            r"teacher: 'lrge' is no variant.*'large'",
        ),
        (
            ["variants.large.tokenizer=bpe-1024"],
            r"distillation\.teacher: 'large' has the tokenizer bpe-1024, the run bpe-1280; they",
        ),
        (["variants.large.corpus=tinystories"], r"teacher: 'large' was trained on tinystories.*on synthetic"),
        (
            ["variants.large.model.context=64"],
            r"distillation\.teacher: 'large' has a context of 64, shorter than the run's 128",
        ),
        (
            ["variants.large.model.bytes={}"],
            r"distillation\.teacher: 'large' is byte-level; expected a model",
        ),
        (
            ["variants.student.techniques.distillation.teacher=student"],
            r"teacher: 'student': a run cannot depend on itself: student -> student",
        ),
        (
            ["variants.student.model.bytes={}"],
            r"run student: techniques\.distillation does not support byte-level models",
        ),
        (
            ["variants.student.training.compile=true"],
            r"techniques\.distillation does not support torch\.compile",
        ),
        (
            ["variants.student.techniques.distillation={teacher: large, begin: 0.51, end: 0.54}"],
            r"distillation\.end: between 0\.51 and 0\.54 of 10 steps there is none",
        ),
        (["variants.student.techniques.distillation.weight=1.5"], r"distillation\.weight: .*1"),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused(project, overrides, message):
    with pytest.raises(UserError, match=message):
        study(project, *overrides)


def test_a_vocabulary_that_is_the_same_everywhere_may_be_of_another_corpus(project):
    loaded = study(project, "tokenizer=bytes", "variants.large.corpus=tinystories")
    assert loaded.runs["student"].depends == {"teacher": "large"}
