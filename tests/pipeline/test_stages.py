"""The stages written to dvc.yaml, without running an engine."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml
from dvc.fs import LocalFileSystem

from stlm import dvc_command, engines, recording
from stlm.errors import UserError
from stlm.study import strict
from stlm.study.load import load_study
from stlm.study.names import study_names

STUDIES = ["smoke", "desk", "paper"]


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def paths(entries) -> set[str]:
    return {path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}


def test_the_dvc_yaml_of_the_repository_is_current(root):
    """For whatever study: running one makes it the active one."""
    engines.check_active(load_study(engines.active_study(root), root=root), root)


def test_the_stages_of_smoke_are_its_commands(project):
    engines.use("smoke")
    content = yaml.safe_load((project / "dvc.yaml").read_text())
    assert content["vars"] == [{"study": "smoke"}]
    smoke = yaml.safe_load((project / "params/smoke.yaml").read_text())
    runs = smoke["variants"]
    assert [stage["cmd"] for stage in content["stages"].values()] == [
        "stlm fetch synthetic",
        "stlm fetch synthetic_pairs",
        "stlm fetch synthetic_choice",
        f"stlm tokenize synthetic {smoke['tokenizer']}",
        *(f"stlm {verb} smoke {run}" for run in runs for verb in ("train", "evaluate")),
        "stlm contamination smoke",
        "stlm report smoke",
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_every_dependency_is_the_output_of_one_stage(root, name):
    stages = engines.dvc_stages(load_study(name, root=root), root)
    made = [path for stage in stages.values() for path in paths([*stage["outs"], *stage.get("metrics", [])])]
    assert len(made) == len(set(made))
    needed = {path for stage in stages.values() for path in stage.get("deps", [])}
    # Manifests are inputs as params/ are: no stage writes them where the files that they speak of are not.
    assert {path for path in needed if not path.startswith("data/sources/")} <= set(made)


def test_the_three_studies_are_there(root):
    assert set(STUDIES) <= set(study_names(root))


def test_a_published_vocabulary_is_fetched_and_read(root):
    stages = engines.dvc_stages(load_study("paper", root=root), root)
    assert stages["fetch-gpt2"]["params"] == [{"params/vocabularies.yaml": ["gpt2"]}]
    assert "data/raw/gpt2" in stages["tokenize-openwebtext-gpt2"]["deps"]


def test_a_model_of_the_catalogue_is_fetched_once_and_read(project):
    """Whether it is scored, started from or only lends its tokenizer."""
    with (project / "params/smoke.yaml").open("a") as file:
        file.write("published:\n  parent: {model: smollm2_135m}\n")
    stages = engines.dvc_stages(load_study("smoke"))
    assert stages["fetch-smollm2_135m"] == {
        "cmd": "stlm fetch smollm2_135m",
        "params": [{"params/models.yaml": ["smollm2_135m"]}],
        "outs": ["data/raw/smollm2_135m"],
    }
    assert stages["evaluate-smoke-parent"]["deps"][0] == "data/raw/smollm2_135m"
    assert not any("files.json" in dep for dep in stages["evaluate-smoke-parent"]["deps"])
    edit(project / "params/smoke.yaml", "  parent: {model: smollm2_135m}", "  parent: {folder: models/a}")
    assert "fetch-smollm2_135m" not in engines.dvc_stages(load_study("smoke"))
    edit(project / "params/smoke.yaml", "\ntokenizer: ", "\ntokenizer: hf:smollm2_135m:2048 # ")
    stages = engines.dvc_stages(load_study("smoke"))
    assert [name for name in stages if name.startswith("fetch-s")].count("fetch-smollm2_135m") == 1


def test_a_training_depends_on_its_own_variant_alone(root):
    stage = engines.dvc_stages(load_study("smoke", root=root), root)["train-smoke-sincos"]
    assert stage["params"] == [{"params/smoke.yaml": ["model", "training", "seeds", "variants.sincos"]}]


def test_benchmarks_that_share_data_or_make_their_own_add_no_dependency(project):
    with_all = load_study("desk", ["evaluation.benchmarks=[mmlu_cloze, last_word, mmlu]"])
    stages = engines.dvc_stages(with_all)
    fetches = [name for name in stages if name.startswith("fetch-")]
    assert fetches == ["fetch-gutenberg_children", "fetch-mmlu"]
    read = [path for path in stages["evaluate-desk-baseline-s0"]["deps"] if path.startswith("data/raw")]
    assert read == ["data/raw/mmlu"]
    alone = engines.dvc_stages(load_study("desk", ["evaluation.benchmarks=[mmlu_cloze]"]))
    assert alone["evaluate-desk-baseline-s0"]["deps"] == stages["evaluate-desk-baseline-s0"]["deps"]


def test_another_seed_leaves_the_runs_of_earlier_seeds_alone(project):
    edit(project / "params/smoke.yaml", "seeds: [0]", "seeds: [0, 1]")
    two = engines.dvc_stages(load_study("smoke"))
    edit(project / "params/smoke.yaml", "seeds: [0, 1]", "seeds: [0, 1, 2]")
    three = engines.dvc_stages(load_study("smoke"))
    assert "train-smoke-baseline-s2" in three and "train-smoke-baseline-s2" not in two
    runs = [name for name in two if name.startswith(("train-", "evaluate-"))]
    assert {name: two[name] for name in runs} == {name: three[name] for name in runs}
    assert "seeds" not in two["train-smoke-baseline-s0"]["params"][0]["params/smoke.yaml"]


def test_a_mix_depends_on_its_components(project):
    entries = engines.source_entries("paper_mix")
    corpora = yaml.safe_load((project / "params/corpora.yaml").read_text())
    assert set(entries["corpora"]) == {"paper_mix", *corpora["paper_mix"]["mix"]}


def test_an_unknown_name_is_refused(project):
    with pytest.raises(UserError, match="'gutenberg' is in none of params/"):
        engines.source_entries("gutenberg")


def test_use_writes_once_and_switches(project):
    assert engines.active_study() is None
    assert engines.use("smoke") is True
    assert engines.use("smoke") is False
    assert engines.use("desk") is True
    assert engines.active_study() == "desk"


def test_a_stale_dvc_yaml_is_refused_with_the_command_that_mends_it(project):
    engines.use("smoke")
    edit(project / "params/smoke.yaml", "variants:\n", "variants:\n  extra: {model: {layers: 2}}\n")
    with pytest.raises(UserError, match="run `stlm use smoke`"):
        engines.check_active(load_study("smoke"))
    engines.use("smoke")
    engines.check_active(load_study("smoke"))


def test_a_number_changed_in_params_leaves_dvc_yaml_current(project):
    engines.use("smoke")
    edit(project / "params/smoke.yaml", "model:\n", "model:\n  rope_theta: 5000.0\n")
    engines.check_active(load_study("smoke"))


def test_a_study_that_is_not_active_and_overrides_are_not_compared(project):
    engines.use("smoke")
    engines.check_active(load_study("desk"))
    engines.check_active(load_study("smoke", ["variants.extra.model.layers=2"]))


def test_sync_needs_an_active_study(project):
    with pytest.raises(UserError, match="run `stlm use STUDY`"):
        recording.sync()


def test_a_damaged_dvc_yaml_is_named(project):
    (project / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(UserError, match=r"dvc\.yaml: not as `stlm use` writes it"):
        engines.active_study()


def test_nothing_is_recorded_outside_a_repository(project):
    assert recording.record_in_dvc().startswith("DVC: nothing recorded, this folder is not")


def test_a_published_model_is_evaluated_and_reported(project):
    edit(
        project / "params/smoke.yaml",
        "\nvariants:",
        "\npublished:\n  tiny-llama: {folder: models/tiny-llama}\nvariants:",
    )
    study = load_study("smoke")
    stages = engines.dvc_stages(study)
    stage = stages["evaluate-smoke-tiny-llama"]
    assert stage["cmd"] == "stlm evaluate smoke tiny-llama"
    manifest = "results/smoke/published/tiny-llama/files.json"
    assert {manifest, str(study.runs["baseline"].tokens_folder)} <= set(stage["deps"])
    assert stage["params"] == [{"params/smoke.yaml": ["evaluation", "published.tiny-llama"]}]
    assert paths(stage["outs"]) <= set(stages["report-smoke"]["deps"])


def with_runs(project, count: int) -> None:
    """Give smoke `count` variants."""
    path = project / "params/smoke.yaml"
    text = path.read_text()
    variants = "".join(f"  v{number}: {{training: {{warmup_steps: {number}}}}}\n" for number in range(count))
    path.write_text(f"{text[: text.index('variants:')]}variants:\n  baseline:\n{variants}")


def test_params_and_dvc_yaml_are_parsed_as_often_for_many_runs_as_for_one(project, monkeypatch):
    read: list[str] = []
    parse = strict.parse_yaml

    def counted(text, source):
        read.append(source)
        return parse(text, source)

    monkeypatch.setattr(strict, "parse_yaml", counted)
    counts = []
    for runs in (1, 20):
        with_runs(project, runs)
        read.clear()
        engines.use("smoke")
        engines.check_active(load_study("smoke"))
        engines.active_study()
        counts.append(len(read))
        assert "dvc.yaml" not in read, "its head is enough"
    assert counts[0] == counts[1]


def test_a_dvc_yaml_that_was_edited_by_hand_is_compared_by_what_it_lists(project):
    engines.use("smoke")
    path = project / "dvc.yaml"
    edit(path, "stages:\n", "# a remark\nstages:\n")
    engines.check_active(load_study("smoke"))
    edit(path, "cmd: stlm train smoke sincos", "cmd: stlm train smoke learned")
    with pytest.raises(UserError, match="run `stlm use smoke`"):
        engines.check_active(load_study("smoke"))


def test_libyaml_writes_the_same_dvc_yaml(project, monkeypatch):
    with_runs(project, 3)
    engines.use("smoke")
    written = (project / "dvc.yaml").read_text()
    monkeypatch.setattr(engines, "_DUMPER", yaml.SafeDumper)
    assert engines.use("smoke") is False
    assert (project / "dvc.yaml").read_text() == written


def test_dvc_reads_a_file_of_parameters_once_and_writes_its_lock_whole(project, monkeypatch):
    param = pytest.importorskip("dvc.dependency.param")
    common = importlib.import_module("dvc.utils.serialize._common")
    for module, name in ((param, "load_path"), (param, "read_param_file"), (common, "_dump_data")):
        monkeypatch.setattr(module, name, getattr(module, name))
    reads: list[str] = []
    load = param.load_path
    monkeypatch.setattr(param, "load_path", lambda path, *rest: (reads.append(path), load(path, *rest))[1])
    dvc_command.read_parameters_once()
    dvc_command.write_whole()
    path = str(project / "params/smoke.yaml")
    system = LocalFileSystem()
    first, second = (param.read_param_file(system, path, ["training"], flatten=True) for _ in range(2))
    assert first == second and first["training"] is not second["training"]
    assert reads == [path]
    edit(project / "params/smoke.yaml", "  steps: ", "  steps: 1")
    assert param.read_param_file(system, path, ["training"], flatten=True) != first
    assert reads == [path, path]

    def half(data, stream):
        stream.write("half")
        raise KeyboardInterrupt

    lock = project / "dvc.lock"
    lock.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        common._dump_data(lock, {}, half)
    assert lock.read_text() == "before"


def test_dvc_parses_faster_to_the_same_content(monkeypatch):
    serialize = importlib.import_module("dvc.utils.serialize._yaml")
    strict = importlib.import_module("dvc.utils.strictyaml")
    plain = serialize.parse_yaml
    for module in (serialize, strict):
        monkeypatch.setattr(module, "parse_yaml", plain)
    dvc_command.parse_fast()
    assert strict.parse_yaml is serialize.parse_yaml is not plain
    root = Path(__file__).parents[2]
    texts = [(root / name).read_text(encoding="utf-8") for name in ("dvc.lock", "dvc.yaml")]
    for text in (*texts, "a: 6e-05\nb: [010, '1e3', on, ~, 1.0, .5, 12:30]\n", "true: 1\n", ""):
        assert repr(strict.parse_yaml(text, "a.yaml")) == repr(plain(text, "a.yaml"))
    with pytest.raises(serialize.YAMLFileCorruptedError):
        strict.parse_yaml("a: [", "a.yaml")
