"""Snakemake and DVC, driven for real: the same work, and each knows what the other has done."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import signal
import time

import pandas as pd
import pytest
import yaml

pytestmark = pytest.mark.engine

EVERYTHING = [
    "stlm contamination smoke",
    "stlm evaluate smoke baseline",
    "stlm evaluate smoke learned",
    "stlm fetch synthetic",
    "stlm fetch synthetic_pairs",
    "stlm report smoke",
    "stlm tokenize synthetic bytes",
    "stlm train smoke baseline",
    "stlm train smoke learned",
]
OF_LEARNED = ["stlm evaluate smoke learned", "stlm report smoke", "stlm train smoke learned"]
LEARNED = "positions: learned}\n"


def snakemake_jobs(project) -> dict[str, tuple[set[str], set[str]]]:
    """What Snakemake would run: command -> inputs, outputs."""
    printed = project.run("snakemake", "-n", "--forceall", "--printshellcmds", "all")
    jobs = {}
    for block in re.split(r"\n(?=(?:local)?rule )", printed):
        command = re.search(r"^Shell command: (stlm .*?) 2>&1", block, re.MULTILINE)
        if command:
            listed = {
                key: set(found[1].split(", "))
                if (found := re.search(rf"^    {key}: (.*)$", block, re.M))
                else set()
                for key in ("input", "output")
            }
            jobs[command[1]] = (listed["input"], listed["output"])
    return jobs


def dvc_jobs(project) -> dict[str, tuple[set[str], set[str]]]:
    """What DVC's stages say: command -> dependencies, outputs."""
    stages = yaml.safe_load((project.folder / "dvc.yaml").read_text())["stages"].values()
    return {
        stage["cmd"]: (
            set(stage.get("deps", [])),
            {
                path
                for kind in ("outs", "metrics")
                for entry in stage.get(kind, [])
                for path in ([entry] if isinstance(entry, str) else entry)
            },
        )
        for stage in stages
    }


def weights(project, run: str) -> list[str]:
    """The digests of a run's checkpoints."""
    record = json.loads((project.folder / f"results/smoke/runs/{run}/train.json").read_text())
    return [checkpoint["weights_sha256"] for checkpoint in record["checkpoints"]]


def test_both_have_the_same_stages_commands_inputs_and_outputs(fresh):
    jobs = snakemake_jobs(fresh)
    assert sorted(jobs) == EVERYTHING
    assert jobs == dvc_jobs(fresh)


def test_dvc_lists_the_stages_that_are_in_dvc_yaml(fresh):
    names = [line.split()[0] for line in fresh.run("dvc", "stage", "list").splitlines()]
    assert names == list(yaml.safe_load((fresh.folder / "dvc.yaml").read_text())["stages"])


def test_after_snakemake_dvc_has_nothing_to_do(by_snakemake):
    assert json.loads(by_snakemake.run("dvc", "status", "--json")) == {}
    assert "Nothing to be done" in by_snakemake.run("snakemake", "-n", "all")
    assert by_snakemake.repro() == []
    assert by_snakemake.run("git", "status", "--porcelain") == ""


def test_git_holds_the_small_results_alone(by_snakemake):
    kept = by_snakemake.run("git", "ls-files", "results", "data").splitlines()
    assert "results/smoke/metrics.json" in kept
    assert [path for path in kept if path.startswith("results/smoke/runs/learned/")] == [
        "results/smoke/runs/learned/curve.csv"
    ]
    folders = {path.split("/")[2] for path in kept if path.startswith("results/smoke/")}
    assert folders == {"runs", "tables", "plots", "records", "contamination.json", "metrics.json"}
    assert {path.rsplit(".")[-1] for path in kept if path.startswith("results/smoke/tables/")} == {
        "csv",
        "md",
        "json",
    }
    assert "results/smoke/records/documents.parquet" in kept
    large = [path for path in kept if path.endswith((".parquet", ".safetensors", ".arrow", ".gitignore"))]
    assert large == ["results/smoke/records/documents.parquet"]
    assert not [path for path in kept if ".snakemake" in path]


@pytest.mark.parametrize(
    "left",
    [
        *(
            "dvc_plots/index.html",
            ".snakemake/log/a.log",
            "logs/smoke/report.log",
            ".dvc/tmp/lock",
            "report.html",
        ),
        *(
            "report.zip",
            "results/smoke/.tables.x1.partial/a.csv",
            "results/smoke/.plots.x1.old/content/a.svg",
        ),
        *(
            "results/smoke/runs/learned/.curve.csv.x1.partial",
            ".dvc.yaml.x1.partial",
            ".state/recorded/smoke.json",
        ),
    ],
)
def test_git_ignores_what_the_engines_and_kills_leave(fresh, left):
    assert fresh.run("git", "check-ignore", left).strip() == left


def test_both_make_the_same_weights(by_snakemake, by_dvc):
    assert weights(by_snakemake, "baseline") == weights(by_dvc, "baseline")
    assert weights(by_snakemake, "learned") == weights(by_dvc, "learned")
    assert weights(by_dvc, "baseline") != weights(by_dvc, "learned")


def test_after_dvc_alone_sync_gives_snakemake_its_records(by_dvc, tmp_path):
    project = by_dvc.copy(tmp_path / "project")
    assert "missing provenance" in project.run("snakemake", "-n", "all")
    project.run("stlm", "sync")
    assert project.snakemake("-n", "all") == []
    # The records are of today's parameters, not of none: a change is seen.
    project.edit(LEARNED, f"{LEARNED}    training: {{learning_rate: 2.0e-3}}\n")
    assert project.snakemake("-n", "all") == OF_LEARNED


def test_sync_refuses_where_dvc_is_not_clean(done):
    done.edit(LEARNED, f"{LEARNED}    training: {{learning_rate: 2.0e-3}}\n")
    printed = done.run("stlm", "sync", status=2)
    assert printed.startswith("error: `dvc status` is not clean: train-smoke-learned")
    assert "Traceback" not in printed
    assert done.snakemake("-n", "all") == OF_LEARNED


@pytest.fixture(scope="module")
def changed(by_snakemake, tmp_path_factory):
    """The finished project with one variant changed, run by Snakemake and committed; and what that ran."""
    project = by_snakemake.copy(tmp_path_factory.mktemp("changed") / "project")
    project.edit(LEARNED, f"{LEARNED}    training: {{learning_rate: 2.0e-3}}\n")
    ran = project.snakemake("all")
    project.commit("a higher learning rate")
    return project, ran


def test_snakemake_runs_what_a_changed_variant_touches(changed, by_snakemake):
    project, ran = changed
    assert ran == OF_LEARNED
    assert weights(project, "learned") != weights(by_snakemake, "learned")
    assert json.loads(project.run("dvc", "status", "--json")) == {}


def test_dvc_runs_what_a_changed_variant_touches_and_sync_tells_snakemake(done, changed):
    done.edit(LEARNED, f"{LEARNED}    training: {{learning_rate: 2.0e-3}}\n")
    assert done.repro() == OF_LEARNED
    assert weights(done, "learned") == weights(changed[0], "learned")
    assert done.snakemake("-n", "all") == OF_LEARNED, "its records are of the old parameters"
    done.run("stlm", "sync")
    assert "Nothing to be done" in done.run("snakemake", "-n", "all")


def test_dvc_compares_commits(changed):
    project, _ = changed
    metrics = json.loads(project.run("dvc", "metrics", "diff", "--json", "HEAD~1", "HEAD"))
    metrics = metrics["results/smoke/metrics.json"]
    assert {"learned.test_bits_per_byte", "learned.test_char_perplexity"} <= set(metrics)
    assert all(name.startswith("learned.") for name in metrics)
    params = json.loads(project.run("dvc", "params", "diff", "--json", "HEAD~1", "HEAD"))
    assert params == {
        "params/smoke.yaml": {"variants.learned.training.learning_rate": {"old": None, "new": 0.002}}
    }
    plots = json.loads(project.run("dvc", "plots", "diff", "--json", "--out", "shown", "HEAD~1", "HEAD"))
    drawn = plots["data"]["validation bits per byte"][0]["content"]
    # Most steps are not validated: drawn without a filter, their blanks would be zeros.
    assert "datum['val_bits_per_byte'] !== ''" in drawn["transform"][0]["filter"]
    points = [point for point in drawn["data"]["values"] if "learned" in point["filename"]]
    curves = {
        revision: [p["val_bits_per_byte"] for p in points if p["rev"] == revision and p["val_bits_per_byte"]]
        for revision in ("HEAD~1", "HEAD")
    }
    assert len(curves["HEAD"]) == len(curves["HEAD~1"]) == 2
    assert curves["HEAD"] != curves["HEAD~1"]
    assert "results/smoke/plots/figure1.svg" in plots["data"]
    project.run("dvc", "plots", "diff", "HEAD~1", "HEAD")
    assert (project.folder / "dvc_plots").is_dir()
    assert "dvc_plots" not in project.run("git", "status", "--porcelain")


TRAINED = "results/smoke/runs/learned/train.json"


@pytest.mark.parametrize(
    ("command", "ask", "answer"),
    [
        (("snakemake", "--cores", "1", TRAINED), ("snakemake", "-n", TRAINED), "Nothing to be done"),
        (("dvc", "repro", "train-smoke-learned"), ("dvc", "status", "train-smoke-learned"), "up to date"),
    ],
    ids=["snakemake", "dvc"],
)
def test_training_killed_goes_on(done, command, ask, answer):
    done.edit(LEARNED, f"{LEARNED}    training: {{steps: 300}}\n")
    process = done.start(*command, start_new_session=True)
    state = done.folder / ".state/smoke/learned/state.pt"
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert state.exists(), "killed before the first state, or after the end"
    printed = done.run(*command)
    resumed = re.search(r"resuming after step (\d+)", printed)
    assert resumed and 0 < int(resumed[1]) < 300
    assert "train smoke baseline" not in printed
    with (done.folder / "results/smoke/runs/learned/curve.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == sorted(
            {*range(2, 301, 2), *range(5, 301, 5)}
        )
    assert answer in done.run(*ask)


def test_a_recording_that_was_cut_short_is_made_up_for(done):
    lock = (done.folder / "dvc.lock").read_text()
    done.edit("description: a study", "description: one study")
    with done.start("snakemake", "--cores", "1", "all", start_new_session=True) as process:
        for line in process.stdout:
            if (
                "1 of 2 steps" in line or "(50%) done" in line
            ):  # the report is made, `all` and recording are left
                os.killpg(process.pid, signal.SIGKILL)
    assert (done.folder / "dvc.lock").read_text() == lock
    assert json.loads(done.run("dvc", "status", "--json")) != {}
    assert "Results are not recorded in DVC yet" in done.run("snakemake", "-n", "all")
    assert (done.folder / "dvc.lock").read_text() == lock, "a dry run records nothing"
    printed = done.run("snakemake", "--cores", "1", "all")
    assert "DVC: results recorded" in printed
    assert "stlm report" not in printed
    assert done.repro() == []
    assert "Nothing to be done" in done.run("snakemake", "--cores", "1", "all")


def test_all_after_a_part_is_recorded_and_a_part_is_not(done):
    done.edit(LEARNED, f"{LEARNED}    training: {{learning_rate: 2.0e-3}}\n")
    assert "nothing recorded" in done.run("snakemake", "--cores", "1", "all", "--until", "report")
    forced = ("--until", "report", "--forcerun", "report")
    assert "nothing recorded" in done.run("snakemake", "--cores", "1", "all", *forced)
    assert "train-smoke-learned" in json.loads(done.run("dvc", "status", "--json"))
    assert done.snakemake("all") == []
    assert json.loads(done.run("dvc", "status", "--json")) == {}
    assert done.repro() == []


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        (
            LEARNED,
            f"{LEARNED}    training: {{learning_rate: 2.0e-3}}\n",
            "runs/learned/train.json was trained",
        ),
        ("modes: [paper]", "modes: [harness]", "runs/baseline/evaluation.json was scored"),
    ],
)
def test_results_of_other_parameters_are_not_recorded_though_touched(done, old, new, refused):
    lock = (done.folder / "dvc.lock").read_text()
    done.edit(old, new)
    done.run("snakemake", "--cores", "1", "--touch", "all")
    printed = done.run("snakemake", "--cores", "1", "all")
    assert f"nothing recorded: results/smoke/{refused} with" in printed
    assert (done.folder / "dvc.lock").read_text() == lock


def test_pushed_results_are_not_made_again_in_a_clone(done, tmp_path):
    store = str(tmp_path / "store")
    done.run("dvc", "remote", "add", "--local", "--default", "store", store)
    done.run("dvc", "push", "--quiet")
    clone = done.clone(tmp_path / "clone")
    clone.run("dvc", "remote", "add", "--local", "--default", "store", store)
    assert "dvc status" in clone.run("stlm", "sync", status=2)
    clone.run("dvc", "pull", "--quiet")
    clone.run("stlm", "sync")
    assert clone.snakemake("-n", "all") == []
    assert clone.repro() == []
    assert "Nothing to be done" in clone.run("snakemake", "-n", "all")
    assert clone.run("git", "status", "--porcelain") == ""
    assert weights(clone, "learned") == weights(done, "learned")
    clone.edit("size: 300", "size: 301", "params/corpora.yaml")
    assert clone.snakemake("-n", "all") == sorted(set(EVERYTHING) - {"stlm fetch synthetic_pairs"})


def test_lint_finds_nothing(fresh):
    assert "good condition" in fresh.run("snakemake", "--lint")


def test_a_misspelt_key_is_named_once_before_any_work(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    project.edit("warmup_steps", "warmup_step")
    for command in (("snakemake", "--cores", "1", "all"), ("stlm", "train", "smoke", "baseline")):
        printed = project.run(*command, status=2)
        assert printed.count("params/smoke.yaml: training.warmup_step: no such key") == 1
        assert "did you mean 'warmup_steps'?" in printed
        assert "Traceback" not in printed
    assert not (project.folder / "data").exists()


def test_an_unknown_study_is_answered_with_the_nearest(fresh):
    printed = fresh.run("snakemake", "-n", "all", "--config", "study=smok", status=2)
    assert "did you mean 'smoke'?" in printed


@pytest.mark.parametrize("override", ["set=evaluation.modes=[harness]", "evaluation={modes: [harness]}"])
def test_an_override_runs_what_it_touches(done, override):
    would = done.snakemake("-n", "all", "--config", override)
    assert [command.split(" --set ")[0] for command in would] == [
        "stlm evaluate smoke baseline",
        "stlm evaluate smoke learned",
        "stlm report smoke",
    ]
    assert all("evaluation.modes=" in command and "harness" in command for command in would)


def test_results_with_overrides_are_not_recorded_in_dvc(done):
    before = (done.folder / "dvc.lock").read_text()
    printed = done.run("snakemake", "--cores", "1", "all", "--config", "set=evaluation.modes=[harness]")
    assert "nothing recorded, params/ does not describe results made with overrides" in printed
    assert (done.folder / "dvc.lock").read_text() == before
    scored = json.loads((done.folder / "results/smoke/runs/learned/evaluation.json").read_text())
    benchmarks = next(iter(scored["checkpoints"].values()))["benchmarks"]
    assert list(benchmarks["synthetic_pairs"]["modes"]) == ["harness"]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        pytest.param("smoke", "trains within a second", "trains fast", marks=pytest.mark.exhaustive),
        ("benchmarks", "minimal pairs", "pairs"),
    ],
)
def test_params_changed_while_snakemake_ran_are_not_recorded_in_dvc(done, file, old, new):
    before = (done.folder / "dvc.lock").read_text()
    # The description stands in the report alone: nothing else is made again.
    done.edit("description: a study", "description: one study")
    with done.start("snakemake", "--cores", "1", "--printshellcmds", "all") as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if "Shell command: stlm report" in line:
                done.edit(old, new, f"params/{file}.yaml")
    assert process.returncode == 0, printed
    assert "nothing recorded, params/ changed meanwhile; run `snakemake all` again" in printed
    assert (done.folder / "dvc.lock").read_text() == before


def test_config_names_the_mirror(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    mirrored = tmp_path / "mirror" / "copied"
    mirrored.mkdir(parents=True)
    pd.DataFrame({"text": ["Once upon a time.", "The end."]}).to_parquet(mirrored / "train.parquet")
    project.snakemake("data/raw/copied", "--config", f"mirror={mirrored.parent}")
    record = json.loads((project.folder / "data/raw/copied/source.json").read_text())
    assert (record["source"]["kind"], record["rows"]) == ("mirror", 2)


def test_a_second_snakemake_is_refused_while_one_is_at_work(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    (project.folder / ".snakemake").mkdir(exist_ok=True)
    with (project.folder / ".snakemake/stlm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = project.run("snakemake", "--cores", "1", "all", status=1)
    assert "another Snakemake is at work in this folder" in printed
    assert not (project.folder / "data").exists()


def test_a_new_run_must_be_put_into_dvc_yaml(done):
    done.edit("  learned:\n", "  more:\n    model: {layers: 2}\n  learned:\n")
    assert "run `stlm use smoke`" in done.run("dvc", "repro", status=255)
    done.run("stlm", "use", "smoke")
    would = done.run("dvc", "status")
    assert "train-smoke-more" in would and "train-smoke-baseline" not in would
    assert done.snakemake("-n", "all") == [
        "stlm evaluate smoke more",
        "stlm report smoke",
        "stlm train smoke more",
    ]


def test_the_html_report_is_written(by_snakemake, tmp_path):
    page = tmp_path / "report.html"
    by_snakemake.run("snakemake", "--report", str(page))
    text = page.read_text()
    assert "Hyper-parameters as run" in text, "the caption of Table 1"
    assert "Validation perplexity per character" in text, "the caption of Figure 1"
    assert "align-items: flex-start" in text, "the style by which what is high begins at the window's top"
