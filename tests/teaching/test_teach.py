"""The stage `teach`, and training on its answers: as asking the teacher, resumed, refused, counted."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stlm.engines import taught, teach_inputs, train_inputs
from stlm.errors import UserError
from stlm.export.llama import llama_weights
from stlm.files import read_json, read_record, write_record
from stlm.model.build import build_model
from stlm.model.counts import parameter_groups
from stlm.model.transformer import Transformer
from stlm.preflight import check_answers
from stlm.report.architecture import module_tree
from stlm.report.schema import TrainRecord
from stlm.study.load import load_study
from stlm.study.runs import Run
from stlm.teaching import teach as module
from stlm.teaching.config import StatesConfig, TaughtConfig
from stlm.teaching.names import taught_folder
from stlm.teaching.plan import parts_of
from stlm.teaching.shards import Answers, TaughtText, keys_of, open_answers, write_answers
from stlm.teaching.teach import teach
from stlm.techniques.distillation import Distillation
from stlm.tokens.batches import Batches
from stlm.tokens.config import DataConfig
from stlm.training.checkpoints import load_checkpoint
from stlm.training.loop import Trainer, train
from stlm.training.memory import training_memory

WIDER = {"layers": 2, "width": 48, "heads": 4, "ffn_width": 64}
PLAIN = {"dropout": 0.0}


def student(make_run, name="student", taught=None, keys=None, data=None, model=None, teacher=None):
    """A run that is taught by `teacher`, itself not trained yet."""
    wider = make_run("teacher", model=WIDER | PLAIN | (teacher or {}), steps=6, warmup_steps=1)
    settings = {"teacher": "teacher", "taught": TaughtConfig(**(taught or {"tokens": 4}))}
    technique = Distillation(**settings | (keys or {}))
    technique.set_others({"teacher": wider})
    update = {"techniques": {"distillation": technique}} | ({"data": data} if data else {})
    return make_run(name, model=PLAIN | (model or {})).model_copy(update=update), wider


def rows_of(run: Run) -> list[dict[str, str]]:
    with (run.folder / "curve.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def shards_of(folder: Path) -> dict[str, bytes]:
    """The answers of a folder's shards, without how long they took."""
    found = {}
    for path in sorted(folder.glob("*.arrow")):
        shard = open_answers(path, 32)
        arrays = (shard.chunks_R, shard.keys_R, shard.answers.ids_RLK, shard.answers.log_q_RLK)
        found[path.name] = b"".join(array.tobytes() for array in arrays)
    return found


def network(run: Run) -> Transformer:
    return load_checkpoint(run.folder / "checkpoints" / "step-0000006")[0]


def test_answers_are_the_teachers_for_every_row_that_training_reads(make_run):
    states = StatesConfig(layers=((1, 1), (2, 1)), width=48)
    run, wider = student(make_run, taught={"top_k": 256, "states": states})
    train(wider)
    folder = teach(run, progress=False)
    assert folder == taught_folder(run)
    text, teacher = TaughtText(folder), network(wider)
    batches = Batches(run.tokens_folder, 32, 4, seed=0)
    for step in range(12):
        tokens = batches.batch(step)[:, :-1]
        answers = text.answers(tokens)
        with torch.no_grad():
            first, last = teacher.residuals(torch.from_numpy(tokens), after=[0])
            log_q = torch.log_softmax(teacher.head(teacher.finish(last)), dim=-1)
        kept = torch.from_numpy(answers.log_q_RLK.astype(np.float32))
        ids = torch.from_numpy(answers.ids_RLK.astype(np.int64))
        torch.testing.assert_close(kept, log_q.gather(2, ids), atol=1e-2, rtol=2e-3)
        assert (ids.sort(dim=2).values.diff(dim=2) > 0).all()
        for layer, expected in ((1, first), (2, last)):
            state = torch.from_numpy(answers.states[layer].astype(np.float32))
            torch.testing.assert_close(state, expected, atol=1e-2, rtol=1e-3)


def test_each_chunk_is_asked_about_once_however_often_it_is_read(make_run):
    run, wider = student(make_run, data=DataConfig(unique_tokens=5 * 32), keys={"begin": 0.25, "end": 0.75})
    train(wider)
    folder = teach(run, progress=False)
    meta = read_json(folder / "meta.json")
    assert meta["positions"] == meta["tokens"] == 5 * 32
    whole, _ = student(make_run, keys={"begin": 0.25, "end": 0.75})
    assert read_json(teach(whole, progress=False) / "meta.json")["positions"] == 6 * 4 * 32
    (part,) = parts_of(whole, Batches(run.tokens_folder, 32, 4, seed=0), whole.techniques["distillation"])
    read = Batches(run.tokens_folder, 32, 4, seed=0)
    expected = sorted({start // 32 for step in range(3, 9) for _, start in read.sources(step)})
    assert part.chunks.tolist() == expected


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_all_tokens_kept_is_training_that_asks_the_teacher(make_run, weight):
    """The 256 most likely of 257 tokens: the losses of every step agree up to float16."""
    run, wider = student(make_run, taught={"top_k": 256}, keys={"weight": weight})
    train(wider)
    teach(run, progress=False)
    train(run)
    asked, _ = student(make_run, "asked", keys={"weight": weight, "taught": None})
    train(asked)
    for one, other in zip(rows_of(run), rows_of(asked), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if value:
                assert float(value) == pytest.approx(float(other[name]), rel=5e-3, abs=2e-3), name


def test_without_weight_nothing_is_asked(make_run):
    run, wider = student(make_run, keys={"weight": 0.0})
    assert taught_folder(run) is None
    with pytest.raises(UserError, match="run student: nothing to teach"):
        teach(run)
    train(wider)
    train(run)
    plain = make_run("plain", model=PLAIN)
    train(plain)
    assert [row["train_loss"] for row in rows_of(run)] == [row["train_loss"] for row in rows_of(plain)]


def test_a_killed_stage_goes_on_and_loses_at_most_a_shard(make_run, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_POSITIONS", 5 * 32)
    monkeypatch.setitem(module._BATCH_TOKENS, "cpu", 2 * 32)
    run, wider = student(make_run)
    train(wider)
    folder = teach(run, progress=False)
    whole = shards_of(folder)
    assert len(whole) == 10
    shutil.rmtree(folder)
    write, written = module.write_answers, []

    def killed(path, *arguments):
        write(path, *arguments)
        written.append(path.name)
        if len(written) == 4:
            (path.parent / f".{path.name}.x.partial").write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_answers", killed)
        teach(run, progress=False)
    assert not folder.exists()
    partial = folder.parent / f".{folder.name}.partial" / "shards"
    path = partial / written[2]
    path.write_bytes(path.read_bytes()[:-50])  # a disk that lost something
    asked = []
    monkeypatch.setattr(module, "write_answers", lambda path, *a: asked.append(path.name) or write(path, *a))
    assert teach(run, progress=False) == folder
    assert sorted(asked) == sorted(set(whole) - {written[0], written[1], written[3]})
    assert shards_of(folder) == whole
    assert not partial.parent.exists()
    asked.clear()
    teach(run, progress=False)
    assert not asked, "what is there is not asked for again"


@pytest.mark.parametrize("threads", [1, 3])
def test_answers_do_not_depend_on_threads(make_run, monkeypatch, threads):
    monkeypatch.setitem(module._BATCH_TOKENS, "cpu", 2 * 32)
    run, wider = student(make_run)
    train(wider)
    before = torch.get_num_threads()
    found = shards_of(teach(run, progress=False))
    shutil.rmtree(taught_folder(run))
    torch.set_num_threads(threads)
    try:
        assert shards_of(teach(run, progress=False)) == found
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_wider_context_of_the_teacher(make_run):
    """The second half of a window is predicted after the first."""
    run, wider = student(make_run, taught={"top_k": 3, "context": 64}, teacher={"context": 64})
    train(wider)
    folder = teach(run, progress=False)
    teacher = network(wider)
    (path,) = folder.glob("*.arrow")
    shard = open_answers(path, 32)
    (component,) = Batches(run.tokens_folder, 32, 4, seed=0).components
    for chunk, ids in zip(shard.chunks_R.tolist(), shard.answers.ids_RLK, strict=True):
        tokens = np.empty(32 * (chunk % 2 + 1), np.int64)
        component.read(32 * (chunk - chunk % 2), tokens)
        logits = teacher(torch.from_numpy(tokens)[None]).detach()[0, -32:]
        top = logits.topk(4).values.diff(dim=1).abs().min(dim=1).values > 1e-4
        assert torch.equal(logits.topk(3).indices[top], torch.from_numpy(ids.astype(np.int64))[top])
    assert read_json(folder / "meta.json")["tokens"] > len(shard.chunks_R) * 32


def test_documents_are_read_within_themselves(make_run):
    run, wider = student(make_run, taught={"top_k": 3}, data=DataConfig(attention="within"))
    train(wider)
    teach(run, progress=False)
    across, _ = student(make_run, taught={"top_k": 3})
    assert taught_folder(across) != taught_folder(run)
    teach(across, progress=False)
    assert shards_of(taught_folder(across)) != shards_of(taught_folder(run))


def test_the_cost_is_the_runs_own(make_run):
    run, wider = student(make_run)
    train(wider)
    before = run.flops_per_token
    folder = teach(run, progress=False)
    meta = read_json(folder / "meta.json")
    assert run.flops_per_token == before, "all rows are different"
    plain = make_run("plain", model=PLAIN)
    assert run.flops == pytest.approx(plain.flops + meta["flops"])
    train(run)
    record = TrainRecord.model_validate(read_json(run.folder / "train.json"))
    spent = read_json(run.folder / "train.json")["prepared"]["distillation"]
    assert {key: spent[key] for key in ("flops", "seconds", "positions")} == {
        key: meta[key] for key in ("flops", "seconds", "positions")
    }
    assert record.seconds >= meta["seconds"] > 0
    assert record.total_flops == run.flops + wider.flops
    with (run.folder / "curve.csv").open() as file:
        assert all(float(row["seconds"]) >= meta["seconds"] for row in csv.DictReader(file))


def test_a_teacher_that_is_asked_again_leaves_the_runs_fingerprint(make_run):
    run, wider = student(make_run)
    train(wider)
    folder, technique = teach(run, progress=False), run.techniques["distillation"]
    first, seconds = technique.prepared(run), read_json(folder / "meta.json")["seconds"]
    shutil.rmtree(folder)
    teach(run, progress=False)
    assert technique.prepared(run)["sha256"] == first["sha256"]
    assert read_json(folder / "meta.json")["seconds"] != seconds
    path = min(folder.glob("*.arrow"))
    shard = open_answers(path, 32)
    other = Answers(shard.answers.ids_RLK[::-1].copy(), shard.answers.log_q_RLK, None, {})
    write_answers(path, shard.chunks_R, shard.keys_R, other, shard.seconds)
    assert open_answers(path, 32).digest != shard.digest


def test_a_run_that_stops_ends_as_one_that_does_not(make_run, monkeypatch):
    whole, wider = student(make_run, "whole", keys={"begin": 0.2, "end": 0.8})
    broken, _ = student(make_run, "broken", keys={"begin": 0.2, "end": 0.8})
    train(wider)
    assert teach(whole, progress=False) == taught_folder(broken), "two runs share the answers"
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
    assert rows_of(whole) == rows_of(broken)
    files = [run.folder / "checkpoints" / "step-0000012" / "model.safetensors" for run in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_changed_teacher_or_text_is_noticed(make_run, tokens_folder, tmp_path):
    run, wider = student(make_run)
    train(wider)
    folder = teach(run, progress=False)
    mark = Trainer(run).setup.fingerprint
    train(wider.model_copy(update={"seed": 3}))
    with pytest.raises(UserError, match=r"meta.json: the teacher's weights changed.*stlm teach test student"):
        Trainer(run)
    assert teach(run, progress=False) == folder
    assert Trainer(run).setup.fingerprint != mark
    # Another text under the same name.
    tokens = tmp_path / "data" / "tokens" / "tiny" / "bytes"
    tokens.unlink()
    shutil.copytree(tokens_folder, tokens)
    meta = read_json(tokens / "meta.json")
    write_record(tokens / "meta.json", {**meta, "note": "tokenized again"})
    with pytest.raises(UserError, match="the text's tokens changed"):
        Trainer(run)
    text = TaughtText(folder)
    with pytest.raises(UserError, match="not asked about 1 of 2 rows"):
        text.answers(np.stack([Batches(tokens_folder, 32, 4, seed=0).batch(0)[0, :-1], np.full(32, 7)]))


def test_damage_is_noticed(make_run):
    run, wider = student(make_run)
    train(wider)
    folder = teach(run, progress=False)
    (path,) = folder.glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"arrow: damaged"):
        Trainer(run)
    path.unlink()
    with pytest.raises(UserError, match=r"arrow: no such file; run: stlm teach STUDY RUN"):
        Trainer(run)


def test_a_disk_without_room_is_refused_before_anything_is_asked(make_run, monkeypatch):
    run, wider = student(make_run)
    train(wider)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(module, "write_answers", lambda *a: pytest.fail("asked in vain"))
    with pytest.raises(UserError, match=r"answers take .* and .* are free"):
        teach(run, progress=False)


def test_answers_take_as_many_bytes_as_said(make_run, capsys):
    run, wider = student(make_run, taught={"top_k": 8, "states": StatesConfig(layers=((2, 1),), width=48)})
    train(wider)
    folder = teach(run, progress=False)
    positions = 12 * 4 * 32
    each = 8 * (2 + 2) + 2 + 2 * 48
    assert f"{positions:,} positions" in capsys.readouterr().err
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    assert each * positions < size < 1.1 * each * positions


def test_hidden_states_are_imitated_through_a_map_that_no_export_has(make_run):
    states = StatesConfig(layers=((1, 1), (2, 1)), width=48, weight=2.0, loss="mse")
    run, wider = student(make_run, taught={"tokens": 4, "states": states})
    train(wider)
    teach(run, progress=False)
    train(run)
    curve = rows_of(run)
    assert float(curve[-1]["train_states"]) < float(curve[0]["train_states"])
    plain = make_run("plain", model=PLAIN)
    assert run.flops_per_token > plain.flops_per_token
    model, _ = load_checkpoint(run.folder / "checkpoints" / "step-0000012")
    stored = load_file(run.folder / "checkpoints" / "step-0000012" / "model.safetensors")
    assert {name for name in stored if "state" in name} == {"state_projections.maps.1.weight"}
    assert not [name for name in llama_weights(model) if "state" in name]
    bare = Transformer(run.model)
    own = model.state_dict()
    bare.load_state_dict({name: own[name].clone() for name in bare.state_dict()})
    tokens = torch.arange(32)[None]
    assert torch.equal(bare.eval()(tokens), model(tokens))
    # Nor has a run that starts from it, with or without a teacher.
    further = make_run("further", model=PLAIN, start_from="student", steps=1, warmup_steps=1)
    train(further)


def test_maps_of_hidden_states_are_no_parameters_of_the_model(make_run, capsys):
    """Tables and figures count the model that is scored; training, its memory and its disk all there is."""
    states = StatesConfig(layers=((1, 1), (2, 1)), width=48)
    run, wider = student(make_run, taught={"tokens": 4, "states": states})
    plain, maps = make_run("plain", model=PLAIN), 32 * 48
    assert run.parameters == plain.parameters._replace(training_only=maps)
    assert run.parameters.in_training == plain.parameters.total + maps
    need, less = (training_memory(one, "float32", False, 4) for one in (run, plain))
    # The weight and AdamW's two moments; gradients are counted apart.
    assert (need.weights - less.weights, need.gradients - less.gradients) == (12 * maps, 4 * maps)
    built, bare = (build_model(run.model, tuple(techniques)) for techniques in (run.techniques.values(), ()))
    assert parameter_groups(built) == parameter_groups(bare)
    assert module_tree(built) == module_tree(bare)
    train(wider)
    teach(run, progress=False)
    train(run)
    assert f"{run.parameters.total:,} parameters and {maps:,} in training alone" in capsys.readouterr().err
    record = read_record(run.folder / "train.json", TrainRecord)
    assert record.parameters.model_dump() == run.parameters._asdict()
    model, _ = load_checkpoint(run.folder / "checkpoints" / "step-0000012")
    assert sum(p.numel() for p in model.parameters()) == run.parameters.in_training


def test_keys_are_those_of_the_tokens_alone():
    rows = np.arange(12).reshape(3, 4)
    assert np.array_equal(keys_of(rows), keys_of(rows.astype(np.uint16)))
    assert len(set(keys_of(rows).tolist())) == 3 and keys_of(rows)[0] == keys_of(rows[:1])[0]


# Through a study.

STUDY = """
description: A teacher that is asked once.
corpus: synthetic
tokenizer: bpe-1280
baseline: baseline
model: {layers: 2, width: 96, heads: 4, kv_heads: 2, ffn_width: 256, context: 128}
training: {steps: 10, batch_size: 8, warmup_steps: 2}
evaluation: {benchmarks: []}
variants:
  baseline: {}
  large: {model: {width: 192, context: 256}}
  student: {techniques: {distillation: {teacher: large, taught: {tokens: 8}}}}
  narrow: {model: {width: 48}, techniques: {distillation: {teacher: large, taught: {tokens: 8}}}}
"""
TAUGHT = "variants.student.techniques.distillation.taught"


def study(project, *overrides: str):
    (project / "params" / "asked.yaml").write_text(STUDY)
    return load_study("asked", overrides)


def test_a_study_knows_the_stage(project):
    loaded = study(project)
    run, narrow = loaded.runs["student"], loaded.runs["narrow"]
    folder = taught_folder(run)
    assert folder == taught_folder(narrow) and folder.parent == Path("data/taught/synthetic/bpe-1280")
    assert {name: made.name for name, made in taught(loaded).items()} == {str(folder): "student"}
    assert train_inputs(loaded, run) == [*teach_inputs(loaded, run), str(folder)]
    assert teach_inputs(loaded, run)[-1] == "results/asked/runs/large/checkpoints"
    for change in (
        f"{TAUGHT}.tokens=9",
        "seeds=[3]",
        "training.steps=11",
        "variants.student.data={order: source}",
        "variants.student.techniques.distillation.end=0.5",
        f"{TAUGHT}.context=256",
    ):
        other = next(run for run in study(project, change).runs.values() if run.variant == "student")
        assert taught_folder(other) != folder, change
    for change in ("training.learning_rate=0.1", "variants.student.techniques.distillation.weight=0.9"):
        assert taught_folder(study(project, change).runs["student"]) == folder, change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (f"{TAUGHT}.tokens=null", r"taught: tokens: None and top_k: None: expected one"),
        (f"{TAUGHT}={{tokens: 2, top_k: 3}}", r"taught: tokens: 2 and top_k: 3: expected one"),
        (f"{TAUGHT}={{tokens: null, top_k: 1024}}", None),
        (
            f"{TAUGHT}.context=200",
            r"taught\.context: 200 is no multiple of the run's context, 128; nearest: 256",
        ),
        (f"{TAUGHT}.context=512", r"taught\.context: 512 is above the teacher's, 256"),
        (f"{TAUGHT}.states={{layers: [[3, 1]]}}", r"states\.layers: 3: the teacher has 2 layers"),
        (f"{TAUGHT}.states={{layers: [[2, 3]]}}", r"states\.layers: 3: the run has 2 layers"),
        (
            f"{TAUGHT}.states={{layers: [[0, 1]]}}",
            r"taught\.states\.layers\.0\.0: .*greater than or equal to 1",
        ),
        (f"{TAUGHT}.states={{layers: [[2, 2]]}}", r"states\.width: None is not the teacher's.*expected 192"),
        (f"{TAUGHT}.states={{layers: [[2, 2]], width: 192}}", None),
        ("variants.student.techniques.distillation.sampled_tokens=3", r"with taught, set taught\.tokens"),
    ],
)
def test_what_does_not_fit_is_refused(project, change, message):
    if message is None:
        assert study(project, change).runs["student"].techniques["distillation"].taught
        return
    with pytest.raises(UserError, match=message):
        study(project, change)


def test_training_says_what_is_missing(project):
    with pytest.raises(UserError, match=r"data/taught/.*no such folder; run: stlm teach asked student"):
        check_answers(study(project).runs["student"])
