"""params/: what a study resolves to, and what a mistake in it is told."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import yaml

from stlm.docs_pages.readmes import PARAMS_README, README, params_readme, readme_with_results
from stlm.engines import dvc_stages, train_inputs, use
from stlm.errors import UserError
from stlm.evaluation.benchmarks import BENCHMARKS, data_names
from stlm.study.catalogues import load_benchmarks
from stlm.study.listing import runs_table
from stlm.study.load import load_study
from stlm.study.strict import read_yaml
from stlm.tokens.names import vocabulary_size

ROWS = ["baseline", "sincos", "learned", "simple-ffn", "dropout-free"]


@pytest.mark.parametrize("name", ["smoke", "desk", "paper"])
def test_the_studies_have_the_papers_rows(name, project):
    study = load_study(name)
    rows = {run.variant: run for run in study.runs.values()}
    assert set(ROWS) <= set(rows)
    assert [rows[key].paper_row for key in ROWS] == [
        "Baseline",
        "SinCos PE",
        "Learned PE",
        "Simple FFN",
        "DropoutFree",
    ]
    base = rows["baseline"].model
    assert (base.positions, base.ffn, base.norm, base.tied) == ("rope", "swiglu", "rmsnorm", True)
    assert base.dropout == 0.1
    # As published: the 47M rows have a feed-forward network of 1320 / 1536 of the baseline's width.
    for key in ("sincos", "learned", "dropout-free"):
        assert rows[key].model.ffn_width == round(base.ffn_width * 1320 / 1536)
    # GELU's two matrices of 1.5 times the width are as large as SwiGLU's three.
    assert rows["simple-ffn"].parameters == rows["baseline"].parameters
    assert rows["dropout-free"].model.dropout == rows["dropout-free"].model.attention_dropout == 0


def test_the_paper_study_is_table_1(project):
    run = load_study("paper").runs["baseline"]
    assert run.parameters.total == 49_857_536
    assert run.training.tokens_per_step(run.model.context) == 245_760
    assert (run.training.steps, run.training.warmup_steps) == (25000, 5000)
    assert (run.training.learning_rate, run.training.min_learning_rate) == (6e-4, 6e-5)
    assert run.model.attention_dropout == 0.1


def edit(project, old, new, name="smoke"):
    """Replace a text, which must be there, in a study's file; `key: *` is the key with its value."""
    path = project / "params" / f"{name}.yaml"
    pattern = re.escape(old.removesuffix("*")) + (".*" if old.endswith(": *") else "")
    text, found = re.subn(pattern, lambda _: new, path.read_text(), count=1)
    assert found
    path.write_text(text)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  layers: *", "  layrs: 4", r"params/smoke.yaml: model.layrs: no such key.*'layers'"),
        ("  layers: *", '  layers: "4"', r"params/smoke.yaml: model.layers: .*integer.*found '4'"),
        ("  layers: *", "  layers: 4.5", r"params/smoke.yaml: model.layers: .*integer"),
        ("  layers: *", "  layers: true", r"params/smoke.yaml: model.layers: .*integer.*found True"),
        (
            "  heads: *",
            "  heads: 7",
            r"params/smoke.yaml: .*heads: 7 does not divide width: \d+ \(nearest that does: \d+\)",
        ),
        ("  kv_heads: *", "  kv_heads: 3", r"params/smoke.yaml: .*kv_heads: 3 does not divide heads: \d+.*"),
        (
            "  warmup_steps: *",
            "  warmup_steps: 9999",
            r"warmup_steps: 9999 is longer than .*steps: (\d+).*\1",
        ),
        ("corpus: synthetic", "corpus: synthtic", r"params/smoke.yaml: corpus: .*'synthtic'.*'synthetic'"),
        ("tokenizer: *", "tokenizer: bpe1024", r"params/smoke.yaml: tokenizer: 'bpe1024'.*bpe-4096"),
        ("tokenizer: *", "tokenizer: bpe-100", r"tokenizer: 'bpe-100' is too small"),
        ("  ffn: swiglu", "  ffn: swigul", r"params/smoke.yaml: model.ffn: .*'swiglu'"),
        ("synthetic_choice,", "synthetic_choise,", r"unknown benchmark.*did you mean 'synthetic_choice'"),
        ("{ffn: gelu,", "{fnn: gelu,", r"params/smoke.yaml: variants.simple-ffn.model.fnn.*'ffn'"),
        ("    label: Learned PE", "    lable: Learned PE", r"variants.learned.lable: no such key.*'label'"),
        ("baseline: baseline", "baseline: bsaeline", r"baseline: 'bsaeline'.*did you mean 'baseline'"),
        (
            "  steps: *",
            "  steps: 700\n  steps: 500",
            r"params/smoke.yaml, line \d+: .*'steps' is given twice",
        ),
        ("seeds: [0]", "seeds: [0, 0]", r"seeds: a seed is given twice"),
        ("  checkpoints: *", "  checkpoints: [100, 9999]", r"checkpoints: 9999 is outside"),
        ("  steps: *", "  steps: {", r"params/smoke.yaml, line \d+: not valid YAML"),
        ("  modes: [harness, paper]", "  modes: [harnes]", r"evaluation.modes.*'harness'"),
        ("  dropout: *", "  dropout: 1.0", r"params/smoke.yaml: model.dropout: .*less than 1.*found 1.0"),
        ("seeds: [0]", "seeds: [-1]", r"params/smoke.yaml: seeds.0: .*greater than or equal to 0.*found -1"),
        ("  learning_rate: *", "  learning_rate: .inf", r"training.learning_rate: .*finite number"),
        ("  learning_rate: *", "  learning_rate: 2026-01-01", r"training.learning_rate: .*2026-01-01"),
        (
            "evaluation:",
            "evaluation:\n  perplexity: {stride: 200}",
            r"evaluation.perplexity.stride: 200 is above model.context: 128",
        ),
        (
            "  validation_bytes: *",
            "  validation_tokens: 1000",
            r"params/smoke.yaml: training.validation_tokens: .*replaced by validation_bytes.*about "
            r"validation_bytes: 3500",
        ),
        (
            "  validation_bytes: *",
            "  validation_documents: 5",
            r"params/smoke.yaml: training.validation_documents: .*replaced by validation_bytes",
        ),
        (
            "evaluation:",
            "evaluation:\n  perplexity: {max_tokens: 1000}",
            r"params/smoke.yaml: evaluation.perplexity.max_tokens: .*replaced by max_bytes.*3500",
        ),
        ("  dropout: *", "  dropout: .nan", r"params/smoke.yaml: model.dropout: "),
        (
            "  positions: rope",
            "  positions: rope\n  vocab_size: 99",
            r"vocab_size: the tokenizer bpe-\d+ has",
        ),
    ],
)
def test_a_mistake_names_file_key_and_nearest_choice(old, new, expected, project):
    edit(project, old, new)
    with pytest.raises(UserError) as error:
        load_study("smoke")
    assert re.search(expected, str(error.value)), str(error.value)


def test_all_mistakes_are_told_at_once(project):
    edit(project, "  layers: *", "  layrs: 4")
    edit(project, "description:", "decsription:")
    with pytest.raises(UserError) as error:
        load_study("smoke")
    assert "'description'" in str(error.value)


def test_an_unknown_study_names_the_nearest(project):
    with pytest.raises(UserError, match=r"params/smok.yaml: no such study.*'smoke'"):
        load_study("smok")


def test_a_catalogue_is_no_study(project):
    with pytest.raises(UserError, match="no such study"):
        load_study("corpora")


def test_overrides_reach_every_run_and_own_keys_of_variants_stay(project):
    study = load_study("smoke", ["training.steps=50", "training.warmup_steps=5", "training.checkpoints=[]"])
    assert {run.training.steps for run in study.runs.values()} == {50}
    study = load_study("smoke", ["model.ffn_width=100", "variants.sincos.model.layers=1"])
    assert study.runs["baseline"].model.ffn_width == 100
    of_file = load_study("smoke").runs
    assert study.runs["sincos"].model.ffn_width == of_file["sincos"].model.ffn_width != 100
    assert study.runs["sincos"].model.layers == 1
    assert study.runs["learned"].model.layers == of_file["learned"].model.layers != 1


@pytest.mark.parametrize("name", ["smoke", "desk", "paper"])
def test_the_overrides_that_the_documentation_shows_are_valid(name, project):
    study = load_study(name, ["training.learning_rate=1e-3", "model.layers=2"])
    assert {(run.training.learning_rate, run.model.layers) for run in study.runs.values()} == {(1e-3, 2)}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stps=50", r"training.stps: no such key.*'steps'"),
        ("training.steps", r"--set training.steps: expected key.path=value"),
        ("training.steps.more=3", r"training.steps is a value"),
        ("training.steps=fifty", r"training.steps: .*found 'fifty'"),
    ],
)
def test_a_mistaken_override_is_told(override, expected, project):
    with pytest.raises(UserError, match=expected):
        load_study("smoke", [override])


def test_seeds_make_a_run_each(project):
    edit(project, "seeds: [0]", "seeds: [0, 7]")
    study = load_study("smoke")
    assert len(study.runs) == 10
    assert study.baseline == "baseline-s0"
    assert study.runs["learned-s7"].seed == 7


def with_variant(project, name, settings):
    edit(project, "variants:\n", f"variants:\n  {name}: {settings}\n")


def test_a_variant_has_fewer_seeds_than_its_study(project):
    edit(project, "seeds: [0]", "seeds: [0, 7]")
    with_variant(project, "once", "{seeds: [7], training: {start_from: baseline}}")
    study = load_study("smoke")
    assert [run.seed for run in study.runs.values() if run.variant == "once"] == [7]
    assert study.runs["once-s7"].depends == {"start": "baseline-s7"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{seeds: [7, 3]}", r"variants.once.seeds: expected some of the study's seeds \[0, 7\].*3 is none"),
        ("{seeds: [7, 7]}", r"variants.once.seeds: .*each once; found \[7, 7\]"),
        ("{seeds: []}", r"variants.once.seeds"),
    ],
)
def test_seeds_that_are_not_the_studys_are_refused(settings, expected, project):
    edit(project, "seeds: [0]", "seeds: [0, 7]")
    with_variant(project, "once", settings)
    with pytest.raises(UserError, match=expected):
        load_study("smoke")


def test_the_baseline_has_every_seed(project):
    edit(project, "seeds: [0]", "seeds: [0, 7]")
    edit(project, "  baseline:\n", "  baseline:\n    seeds: [0]\n")
    with pytest.raises(UserError, match=r"variants.baseline.seeds: the baseline needs a run with every seed"):
        load_study("smoke")


def test_a_run_cannot_start_from_a_seed_that_is_left_out(project):
    edit(project, "seeds: [0]", "seeds: [0, 7]")
    with_variant(project, "once", "{seeds: [7]}")
    with_variant(project, "both", "{training: {start_from: once}}")
    with pytest.raises(UserError, match=r"run both-s0: training.start_from: 'once' has no run with seed 0"):
        load_study("smoke")


def test_a_mix_must_name_corpora_that_are_there(project):
    path = project / "params" / "corpora.yaml"
    text = (
        path.read_text() + "\nown_mix:\n  description: d\n  licence: l\n  mix: {synthetic: 1.0, nope: 2.0}\n"
    )
    path.write_text(text)
    with pytest.raises(UserError, match=r"params/corpora.yaml: own_mix.mix.nope: no such corpus"):
        load_study("smoke")


def test_every_benchmark_in_params_can_be_scored_and_every_one_that_reads_files_is_there(project):
    assert set(load_benchmarks()) == set(data_names(BENCHMARKS))


def test_a_benchmark_without_any_of_the_modes_is_refused(project):
    load_study("smoke", ["evaluation.benchmarks=[last_word]", "evaluation.modes=[paper, harness]"])
    with pytest.raises(UserError, match=r"evaluation.modes: paper, but last_word has harness only"):
        load_study("smoke", ["evaluation.benchmarks=[last_word]", "evaluation.modes=[paper]"])


def test_vocabulary_sizes():
    assert [vocabulary_size(name) for name in ("gpt2", "bytes", "bpe-4096")] == [50257, 257, 4096]


def test_the_listing_counts_without_training(project):
    text = runs_table(load_study("paper"))
    assert "49,857,536" in text
    assert "6.14B" in text
    # 6 N D, with N the matrices: 6 * 49.8M * 6.14G = 1.84e18, and attention.
    assert "1.91e+18" in text


def test_the_parameters_page_is_the_schemas(root):
    page = (root / PARAMS_README).read_text(encoding="utf-8")
    assert page == params_readme(), "params/README.md is out of date: run `stlm document`"


def test_the_results_in_the_readme_are_the_committed_ones(root):
    changed = subprocess.run(
        ["git", "status", "--porcelain", "README.md", "results/desk"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if changed.returncode or changed.stdout or not (root / "results" / "desk" / "tables").is_dir():
        pytest.skip("not a clean clone: results of a study run here are not the committed ones")
    page = (root / README).read_text(encoding="utf-8")
    assert page == readme_with_results(root), "README.md is out of date: run `stlm document`"


def variants(project, **data):
    """The study smoke with two more variants: `easy` orders by difficulty, `own` has the keys given."""
    path = project / "params" / "smoke.yaml"
    content = yaml.safe_load(path.read_text())
    content["variants"]["easy"] = {"data": {"order": "difficulty", "reference": "baseline"}}
    content["variants"]["own"] = {"data": data, **({} if data else {"model": {"context": 256}})}
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def test_a_reference_is_trained_first_in_both_engines(project):
    variants(project)
    study = load_study("smoke", ["seeds=[3, 4]"])
    run = study.runs["easy-s4"]
    assert run.depends == {"reference": "baseline-s4"}
    assert train_inputs(study, run) == [
        "data/tokens/synthetic/bpe-1280",
        "results/smoke/runs/baseline-s4/checkpoints",
    ]
    stages = dvc_stages(load_study("smoke"))
    assert "results/smoke/runs/baseline/checkpoints" in stages["train-smoke-easy"]["deps"]
    assert stages["train-smoke-baseline"]["deps"] == ["data/tokens/synthetic/bpe-1280"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"order": "difficulty", "reference": "baselin"}, "own: data.reference: 'baselin' is no.*'baseline'"),
        ({"order": "difficulty", "reference": "own"}, "a run cannot depend on itself: own -> own"),
        ({"order": "lenght"}, "variants.own.data.order.*'lenght'.*'length'"),
        ({"weights": {"synthetik": 1}}, "data.weights: synthetic has no component 'synthetik'.*'synthetic'"),
        ({"sequence": ["synthetic", "synthetic"]}, "is not each component trained on once: synthetic"),
    ],
)
def test_mistakes_in_data_name_what_is_near(data, expected, project):
    variants(project, **data)
    with pytest.raises(UserError, match=expected):
        load_study("smoke")


def test_a_reference_must_be_able_to_read_the_run(project):
    variants(project)
    overrides = ["variants.own.data={order: difficulty, reference: baseline}"]
    with pytest.raises(UserError, match="a context of 128, shorter than the run's 256"):
        load_study("smoke", overrides)
    with pytest.raises(UserError, match="has the tokenizer bpe-1280, the run bytes"):
        load_study("smoke", [*overrides, "variants.own.model.context=128", "variants.own.tokenizer=bytes"])
    overrides += ["variants.own.model.context=128", "variants.own.corpus=wikitext2"]
    with pytest.raises(UserError, match="trained on synthetic, with another vocabulary"):
        load_study("smoke", overrides)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "../params/smoke",
        "./smoke",
        "params/smoke.yaml",
        "smoke.yaml",
        "/etc/x",
        "smoke\n",
        "Smoke",
        "smоke",
        "s" * 101,
        "s" * 300,
        "s\0",
    ],
)
def test_a_study_is_a_name_and_never_a_path(name, project):
    with pytest.raises(UserError, match="no study's name") as error:
        load_study(name)
    assert len(str(error.value)) < 400
    with pytest.raises(UserError, match="no study's name"):
        use(name)
    assert not (project / "results").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("010", "put it in quotes: '010'"),
        ("~", "put it in quotes: '~'"),
        ("true", "put it in quotes: 'true'"),
        ("1:30", "'1:30': a name is"),
        ("2026-02-31", "'2026-02-31': a name is"),
        ("../learned", "a name is"),
        ("a" * 101, "at most 100"),
    ],
)
def test_a_variants_name_is_what_is_written_or_refused(name, said, project):
    edit(project, "  learned:\n", f"  {name}:\n")
    with pytest.raises(UserError, match=re.escape(said)):
        load_study("smoke")


@pytest.mark.parametrize("name", ["off", "yes", "no", "on", "y"])
def test_words_of_yaml_1_1_are_names(name, project):
    edit(project, "  learned:\n", f"  {name}:\n")
    assert name in load_study("smoke").runs
    use("smoke")
    assert f"train-smoke-{name}" in read_yaml(project / "dvc.yaml")["stages"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=1_000", "training.steps: .*'1_000'"),
        ("model.layers=1000000000000", "model.layers: .*10000"),
        ("model.layers=" + "9" * 5000, "5,000 digits"),
        ("model.bytes={encoder_layers: 1000000}", "encoder_layers"),
        ("variants.baseline.model.layers.more=1", "model.layers"),
        (".".join("k" * 200) + "=1", "no parameter is so deep"),
        ("evaluation.benchmarks=[[a]]", "expected names"),
        ("tokenizer=bpe-0300", "is none of"),
        ("tokenizer=bpe-99999999999", "at most 1,000,000"),
        ("tokenizer=stride-04", "expected words, spaces or stride-N"),
        ("corpus=no", "unknown corpus 'no'"),
    ],
)
def test_values_out_of_bounds_are_told_shortly(override, said, project):
    with pytest.raises(UserError, match=said) as error:
        load_study("smoke", [override])
    assert len(str(error.value)) < 1000


def test_of_many_mistakes_the_first_are_told(project):
    variants = "".join(f"  v{n}: {{nonsense: 1}}\n" for n in range(500))
    edit(project, "  learned:\n", f"{variants}  learned:\n")
    with pytest.raises(UserError, match="and 491 problems more") as error:
        load_study("smoke")
    assert len(str(error.value).splitlines()) == 10


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(project):
    (project / "params" / "smoke.yaml").chmod(0)
    with pytest.raises(UserError, match=r"params/smoke.yaml: cannot be read: permission denied"):
        load_study("smoke")


def test_a_folder_in_a_files_place_is_named(project):
    (project / "params" / "smoke.yaml").unlink()
    (project / "params" / "smoke.yaml").mkdir()
    with pytest.raises(UserError, match=r"params/smoke.yaml: cannot be read: a folder stands"):
        load_study("smoke")
