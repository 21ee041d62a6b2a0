"""Runs that depend on others: what training records of them, and what their training cost."""

from __future__ import annotations

import pytest
from technique_runs import with_techniques

from stlm.errors import UserError
from stlm.files import read_json, write_record
from stlm.report.schema import TrainRecord
from stlm.report.settings_check import check_trained
from stlm.study.checks import check_cycles, check_dependencies
from stlm.techniques.base import Technique
from stlm.tokens.config import DataConfig
from stlm.training.dependencies import Dependency
from stlm.training.loop import Trainer, train


class Taught(Technique):
    """Depends on a teacher, which it does not read."""

    teacher: str
    role: str = "teacher"

    def depends(self) -> dict[str, str]:
        return {self.role: self.teacher}


def checked(*runs) -> None:
    """The checks of a study's runs by themselves."""
    by_name = {run.name: run for run in runs}
    for run in runs:
        check_dependencies("params/test.yaml", run, by_name)
    check_cycles("params/test.yaml", by_name)


def record(run) -> TrainRecord:
    return TrainRecord.model_validate(read_json(run.folder / "train.json"))


def test_every_role_is_recorded_and_each_run_counts_once(make_run):
    """`student` starts from `baseline` and learns from `teacher`, which started from `baseline` too."""
    baseline, teacher = make_run("baseline"), make_run("teacher", start_from="baseline")
    student = with_techniques(
        make_run("student", start_from="baseline"), distillation=Taught(teacher="teacher")
    )
    assert student.depends == {"start": "baseline", "teacher": "teacher"}
    for run in (baseline, teacher, student):
        train(run)
    depends = read_json(student.folder / "train.json")["depends"]
    last = read_json(teacher.folder / "train.json")["checkpoints"][-1]
    assert {key: depends["teacher"][key] for key in ("run", "step", "tokens", "weights_sha256", "flops")} == {
        "run": "teacher",
        **{key: last[key] for key in ("step", "tokens", "weights_sha256")},
        "flops": teacher.flops,
    }
    assert depends["teacher"]["depends"]["start"]["run"] == "baseline"
    assert record(student).total_flops == baseline.flops + teacher.flops + student.flops
    assert record(student).start.run == "baseline"


def test_a_reference_is_a_cost(make_run):
    reference = make_run("reference")
    data = DataConfig(order="difficulty", reference="reference")
    run = make_run("easy").model_copy(update={"data": data})
    for one in (reference, run):
        train(one)
    assert record(run).depends["reference"].flops == reference.flops
    # Its training, and reading the text that it orders, which is a third of training on it.
    read = read_json(run.folder / "train.json")["prepared"]["data.reference"]["extra_flops"]
    assert read % (run.flops_per_token / 3) == 0 and read >= run.tokens / 3 * run.flops_per_token
    assert record(run).total_flops == reference.flops + read + run.flops
    assert record(reference).depends == {} and record(reference).total_flops == reference.flops


def test_the_fingerprint_has_the_weights_of_every_role(make_run):
    train(make_run("teacher"))
    student = with_techniques(make_run("student"), distillation=Taught(teacher="teacher"))
    first = Trainer(student).setup.fingerprint
    assert first != Trainer(make_run("student")).setup.fingerprint
    train(make_run("teacher", learning_rate=2e-2))
    assert Trainer(student).setup.fingerprint != first


def test_a_teacher_without_its_checkpoint_says_what_to_run(make_run):
    with pytest.raises(UserError, match="no checkpoint; run: stlm train test teacher"):
        Trainer(with_techniques(make_run(), distillation=Taught(teacher="teacher")))


def test_a_record_of_an_earlier_version_is_read(make_run):
    train(make_run("baseline"))
    run = make_run("run", start_from="baseline")
    train(run)
    content = read_json(run.folder / "train.json")
    former = {**content, "start": content["depends"]["start"]}
    del former["depends"]
    assert TrainRecord.model_validate(former).depends == TrainRecord.model_validate(content).depends


def test_chains_of_roles_are_allowed_and_cycles_are_not(make_run):
    data = DataConfig(order="difficulty", reference="teacher")
    baseline, teacher = make_run("baseline"), make_run("teacher", start_from="baseline")
    student = with_techniques(make_run("student"), distillation=Taught(teacher="teacher"))
    checked(baseline, teacher, student, make_run("hard").model_copy(update={"data": data}))
    cycle = "(student -> teacher -> student|teacher -> student -> teacher)"
    with pytest.raises(UserError, match=f"test.yaml: run .* a run cannot depend on itself: {cycle}"):
        checked(baseline, make_run("teacher", start_from="student"), student)


@pytest.mark.parametrize(
    ("techniques", "expected"),
    [
        ({"d": Taught(teacher="techer")}, "techniques.d.teacher: 'techer' is no variant.*'teacher'"),
        (
            {"a": Taught(teacher="teacher"), "b": Taught(teacher="teacher")},
            "techniques.b.teacher: techniques.a.teacher has the role 'teacher' already",
        ),
        (
            {"a": Taught(teacher="teacher", role="start")},
            "techniques.a.start: training.start_from has the role 'start' already",
        ),
    ],
)
def test_mistakes_in_dependencies_are_told(make_run, techniques, expected):
    run = with_techniques(make_run("student", start_from="teacher"), **techniques)
    with pytest.raises(UserError, match=f"run student: {expected}"):
        checked(make_run("teacher"), run)


def test_a_record_says_its_techniques_and_the_report_compares_them(make_run):
    train(make_run("teacher"))
    plain = make_run("student")
    run = with_techniques(plain, distillation=Taught(teacher="teacher"))
    train(run)
    trained = record(run)
    assert trained.techniques == {"distillation": {"teacher": "teacher", "role": "teacher"}}
    path = run.folder / "train.json"
    check_trained(run, trained, path, "stlm train")
    for other, expected in (
        (plain, r"techniques: \['distillation'\], the study asks for \[\]"),
        (with_techniques(plain, distillation=Taught(teacher="other")), "techniques.distillation.teacher"),
    ):
        with pytest.raises(UserError, match=expected):
            check_trained(other, trained, path, "stlm train")


def test_a_checkpoint_that_does_not_say_its_cost_is_counted(make_run):
    origin = make_run("baseline")
    train(origin)
    path = origin.folder / "checkpoints" / "step-0000012" / "config.json"
    said = read_json(path)
    del said["flops"]
    write_record(path, said)
    found = Dependency.read(make_run("run", model={"low_rank": {"ffn": 9}}, start_from="baseline"), "start")
    assert found.record["flops"] == origin.flops
