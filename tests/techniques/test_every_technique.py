"""What holds for every technique that there is."""

from __future__ import annotations

import shutil
from itertools import combinations

import pytest
import torch

from stlm.errors import UserError
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.study.checks import check_techniques
from stlm.study.load import load_study
from stlm.study.runs import Study
from stlm.techniques.base import CAPABILITIES, Technique, refuse
from stlm.techniques.registry import load_techniques, technique_class, technique_names
from stlm.training.divergence import Part, locate
from stlm.training.loop import Trainer

# The keys that a technique has no default for.
NEEDED = {
    "distillation": {"teacher": "teacher", "weight": 0.0},
    "self_play": {"opponent": "teacher", "prompt": 8, "continuation": 8},
}
# What a run with it must have besides.
BESIDES = {
    "continuous_thoughts": "data: {attention: within}, training: {steps: 20}, ",
    "pruning": "training: {start_from: teacher}, ",
    "quantization": "training: {start_from: baseline, steps: 0}, ",
}
# Its text must be questions with written steps.
NO_TEXT = {"continuous_thoughts"}
NAMES = technique_names()
STUDY = """
description: Techniques together.
corpus: synthetic
tokenizer: bpe-1280
model: {layers: 4, width: 32, heads: 2, kv_heads: 1, ffn_width: 48, context: 32}
training: {steps: 4, warmup_steps: 1}
evaluation: {benchmarks: {}}
variants:
  baseline: {}
  teacher: {}
"""


def make(name: str) -> Technique:
    return load_techniques({name: NEEDED.get(name, {})}, "params/any.yaml", "techniques")[name]


def load(project, variants: str):
    (project / "params" / "together.yaml").write_text(STUDY + variants)
    return load_study("together")


def test_there_are_techniques():
    assert {"mixture_of_depths", "early_exit", "distillation", "series_activation"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name):
    kind, technique = technique_class(name), make(name)
    assert kind.__doc__ and all(field.description for field in kind.model_fields.values())
    assert technique.key() == name and technique == make(name) and hash(technique) == hash(make(name))
    assert technique.supports <= CAPABILITIES.keys()
    for capability in CAPABILITIES.keys() - technique.supports:
        with pytest.raises(UserError, match=f"techniques.{name} does not support"):
            refuse([technique], capability)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_models_weights_are_those_of_its_seed(name):
    config = ModelConfig(layers=4, width=32, heads=2, kv_heads=1, ffn_width=48, context=32, vocab_size=61)
    models = []
    for techniques in ((), (make(name),)):
        torch.manual_seed(0)
        models.append(build_model(config, techniques))
    weights = [{id(p): p for p in model.parameters()} for model in models]
    plain, others = ([p for p in parameters.values()] for parameters in weights)
    for parameter in plain:
        assert any(torch.equal(parameter, other) for other in others if other.shape == parameter.shape)


def combine(one: Technique, other: Technique) -> bool:
    return other.key() in one.combines_with or one.key() in other.combines_with


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory) -> Study:
    """A study of runs without techniques."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(root / "params", folder / "params")
    (folder / "params" / "together.yaml").write_text(STUDY)
    return load_study("together", root=folder)


@pytest.mark.parametrize("names", list(combinations(NAMES, 2)), ids="-".join)
def test_two_that_do_not_name_each_other_are_refused_together(plain, names):
    one, other = map(make, names)
    both = plain.runs["baseline"].model_copy(
        update={"techniques": dict(zip(names, (one, other), strict=True))}
    )
    if combine(one, other):
        check_techniques("params/together.yaml", both, plain.runs, {}, [])
    else:
        with pytest.raises(UserError, match=f"techniques.{names[0]} and techniques.{names[1]} cannot be"):
            check_techniques("params/together.yaml", both, plain.runs, {}, [])


def test_a_study_with_two_that_do_not_combine_is_refused(project):
    pairs = combinations([name for name in NAMES if name not in NEEDED], 2)
    one, other = next(names for names in pairs if not combine(*map(make, names)))
    with pytest.raises(UserError, match=f"run both: techniques.{one} and techniques.{other} cannot be"):
        load(project, f"  both: {{techniques: {{{one}: {{}}, {other}: {{}}}}}}\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_starts_from_one_with_it_is_refused_unless_it_is_supported(project, name):
    keys = str(NEEDED.get(name, {})).replace("'", "")
    if name in NEEDED:
        pytest.skip("a start that depends on a run itself is refused for that")
    besides = BESIDES.get(name, "")
    variants = f"  origin: {{{besides}techniques: {{{name}: {keys}}}}}\n"
    variants += "  next: {training: {start_from: origin}}\n"
    if "start_from" in make(name).supports:
        assert load(project, variants).runs["next"].depends == {"start": "origin"}
    else:
        with pytest.raises(UserError, match=f"start_from: 'origin': its techniques.{name} does not support"):
            load(project, variants)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDED.keys() | NO_TEXT])
def test_a_divergence_is_traced_as_without_it(make_technique_run, name):
    run = make_technique_run(techniques=[make(name)])
    trainer = Trainer(run)
    trainer.setup.objective.before_step(trainer.setup.model, 8)
    tokens_BM = torch.from_numpy(trainer.setup.micro_batches.rows.batch(0, 0, 1))
    model = trainer.setup.model.train()
    # A head that overflows: all activations are finite, the loss is not.
    with torch.no_grad():
        model.embedding.weight.mul_(1e3)
        model.norm.weight.fill_(1e36)
    part = Part(0, 0, trainer.setup.rows(tokens_BM, 8))
    place = locate(model, lambda rows: trainer.setup.loss_again(rows, 8), [part])
    assert place.sentence == "all activations are finite, the loss of the head is not"
    assert sorted(place.rows) == list(range(len(tokens_BM)))
