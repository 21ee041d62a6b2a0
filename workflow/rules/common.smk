"""The configured study, and the functions of the rules: no rules are in this file, no functions in others."""

import fcntl
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.enums import RerunTrigger
from stlm import engines, recording
from stlm.errors import UserError
from stlm.outputs import CONTAMINATION, EVALUATION, METRICS, REPORT, TRAINING, Output, names
from stlm.manifests import Manifests, named_mirror
from stlm.study.load import load_study

# Keys of --config that select what runs; all other keys override those of params/<study>.yaml.
CHOICES = {"study", "mirror", "processes", "set"}


def flatten(value: object, path: str) -> Iterator[str]:
    """Yield a nested override as texts `key.path=value`: {"training": {"steps": 50}} -> training.steps=50."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from flatten(below, f"{path}.{key}")
    else:
        yield f"{path}={value if isinstance(value, str) else json.dumps(value)}"


def overrides() -> list[str]:
    """The overrides in --config, from `set='a.b=1 c=2'` and from keys like `training='{steps: 50}'`."""
    listed = config.get("set", [])
    given = shlex.split(listed) if isinstance(listed, str) else list(listed)
    for key in sorted(config.keys() - CHOICES):
        given += flatten(config[key], key)
    return given


def load():
    """The study to run, and the data it fetches: --config study=NAME, else the active study, else smoke."""
    try:
        name = config.get("study") or engines.active_study() or "smoke"
        study = load_study(name, overrides())
        return study, engines.fetched(study)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def canonical(content: object) -> str:
    """A canonical text of the content: Snakemake runs a job again if the text changes."""
    return json.dumps(content, sort_keys=True)


def outputs(folder: str, listed: tuple[Output, ...]) -> list[str]:
    """A stage's outputs in `folder`; those that are folders are declared as such to Snakemake."""
    paths = [(f"{folder}/{output.name}", output.is_folder) for output in listed]
    return [directory(path) if is_folder else path for path, is_folder in paths]


def source_params(wildcards) -> str:
    known = FETCHED.get(wildcards.name)
    return canonical(engines.source_entries(wildcards.name) if known is None else known)


def run_params(wildcards) -> str:
    return canonical(STUDY.run(wildcards.run).model_dump(mode="json"))


def evaluation_params(wildcards) -> str:
    return canonical(STUDY.evaluation.model_dump(mode="json"))


def items_params(wildcards) -> str:
    """The settings that select the items to search."""
    return canonical(STUDY.evaluation.model_dump(mode="json", include={"benchmarks", "limit", "limit_seed"}))


def study_params(wildcards) -> str:
    return canonical(STUDY.model_dump(mode="json"))


def processes() -> int:
    """The number of processes that train each run, from --config processes=N."""
    found = config.get("processes", 1)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        print(
            f"error: --config processes={found}: expected a whole number of 1 or more, for example processes=2",
            file=sys.stderr,
        )
        sys.exit(2)
    return found


def on_gpus(count: int) -> str:
    """The prefix that reserves `count` GPUs for a command; on a cluster, the scheduler assigns GPUs."""
    return f"python -m stlm.gpus {count} " if GPUS and workflow.is_main_process else ""


def launch(wildcards, threads) -> str:
    """The command that starts training. Takes `threads` like `set_arguments`: results do not depend on it."""
    if PROCESSES == 1:
        return f"{on_gpus(1)}stlm"
    process_threads = max(1, threads // PROCESSES)
    torchrun = f"torchrun --standalone --nproc_per_node={PROCESSES} -m stlm"
    return f"OMP_NUM_THREADS={process_threads} {on_gpus(PROCESSES)}{torchrun}"


def launch_alone(wildcards, threads) -> str:
    """The command that starts evaluation, in one process."""
    return f"{on_gpus(1)}stlm"


def set_arguments(wildcards, threads) -> str:
    """The overrides as command-line arguments.

    Snakemake does not compare parameters whose function takes `threads`. A job is therefore run again only if
    an override changes its other parameters, and not merely because an override is given.
    """
    return "".join(f" --set {shlex.quote(override)}" for override in STUDY.overrides)


def fetch_inputs(wildcards) -> list[str]:
    """The manifest of the files that `stlm fetch` reads, updated to their present state.

    The files are inspected once, before jobs are selected, as a cluster's nodes may not have them.
    """
    name = wildcards.name
    if workflow.is_main_process and name not in INSPECTED:
        INSPECTED.add(name)
        MANIFESTS.refresh(name)
        if MANIFESTS.out_of_reach(name):
            print(
                f"{name}: the files in {MANIFESTS.folders(name)} have changed; they are fetched again where "
                "the mirror is named (--config mirror=FOLDER or STLM_MIRROR)",
                file=sys.stderr,
            )
    return engines.fetch_inputs(name, MANIFESTS)


def tokenize_inputs(wildcards) -> list[str]:
    return engines.tokenize_inputs(wildcards.corpus, wildcards.tokenizer)


def teach_inputs(wildcards) -> list[str]:
    return engines.teach_inputs(STUDY, taught_run(wildcards))


def taught_run(wildcards):
    """The first of the runs that train on these answers of a teacher."""
    return TAUGHT[f"data/taught/{wildcards.corpus}/{wildcards.tokenizer}/{wildcards.answers}"]


def teach_arguments(wildcards, threads) -> str:
    """The study and the run, as arguments of `stlm teach`.

    Takes `threads` like `set_arguments`: the folder's name stands for all that the answers depend on,
    whichever run asks for them.
    """
    return f"{STUDY.name} {taught_run(wildcards).name}"


def train_inputs(wildcards) -> list[str]:
    return engines.train_inputs(STUDY, STUDY.run(wildcards.run))


def evaluate_inputs(wildcards) -> list[str]:
    return engines.evaluate_inputs(STUDY, STUDY.run(wildcards.run))


def contamination_inputs(wildcards) -> list[str]:
    return engines.contamination_inputs(STUDY)


def published_inputs(wildcards) -> list[str]:
    published = STUDY.published[wildcards.published]
    if workflow.is_main_process:
        MANIFESTS.refresh_model(published)
    return engines.published_inputs(STUDY, published)


def published_params(wildcards) -> str:
    return canonical(STUDY.published[wildcards.published].model_dump(mode="json"))


def report_inputs(wildcards) -> list[str]:
    return engines.report_inputs(STUDY)


def begin() -> None:
    """Before the first job: lock out other Snakemake processes, and activate the study for DVC.

    The lock is released when the process ends, however it ends. Snakemake's own lock outlives a kill; the
    profile turns it off, so that the same command continues an interrupted study.
    """
    global LOCK
    LOCK = Path(".snakemake/stlm.lock").open("w")
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkflowError("another Snakemake is at work in this folder; wait for it, or stop it") from None
    if not STUDY.overrides and engines.use(STUDY.name):
        print(f"dvc.yaml: now lists the stages of the study {STUDY.name}", file=sys.stderr)


def edited() -> bool:
    """Whether params/ has changed since the start: each job reads it when the job starts."""
    try:
        return load_study(STUDY.name) != STUDY or engines.fetched(STUDY) != FETCHED
    except UserError:
        return True


def finish() -> None:
    """After the last job: record the results in DVC if they are all that params/ describes."""
    asked = workflow.dag_settings
    if STUDY.overrides:
        note = "DVC: nothing recorded, params/ does not describe results made with overrides"
    elif workflow.touch or not set(asked.targets) <= {"all"} or asked.until or asked.omit_from or asked.batch:
        note = "DVC: nothing recorded, only part of the study was asked for; run `snakemake all`"
    elif asked.rerun_triggers != RerunTrigger.all():
        note = "DVC: nothing recorded, not all of --rerun-triggers were in force"
    elif edited():
        note = "DVC: nothing recorded, params/ changed meanwhile; run `snakemake all` again"
    else:
        note = recording.record_in_dvc()
    print(note, file=sys.stderr)


STUDY, FETCHED = load()
TAUGHT = engines.taught(STUDY)
UNRECORDED = workflow.is_main_process and recording.unrecorded(STUDY)
# Rules that can use all threads request this number; Snakemake reduces it to --cores.
MACHINE = os.cpu_count() or 1
CORES = workflow.resource_settings.cores or MACHINE
# Runs take turns on the GPUs; the profile allows one GPU unless --resources gpu=N says more. Each run gets an
# equal share of the cores, and one share is left for other jobs (fetch, tokenize, contamination). Without a GPU,
# runs share the cores: tiny models train faster in parallel, with few threads each, than one after the other
# with all threads (docs/log.md).
GPUS = 1 if shutil.which("nvidia-smi") else 0
PROCESSES = processes()
SHARES = (workflow.resource_settings.resources.get("gpu").value or 1) + 1 if GPUS else len(STUDY.runs)
RUN_THREADS = max(1, CORES // SHARES)
DATA_THREADS = max(1, CORES // SHARES if GPUS else CORES)

# At a signal, training saves its state and ends. The shell waits for that by this trap, and `tee`, which gets
# the signal, too, by ignoring it. This prefix replaces Snakemake's own, its first command.
shell.prefix("set -euo pipefail; trap : INT TERM USR1; ")

# Jobs start `stlm` by name: it must be that of Snakemake's environment, whether activated or not.
os.environ.update(
    PATH=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
)
# Progress reaches the terminal and the log immediately, although both are behind a pipe.
os.environ.update(PYTHONUNBUFFERED="1")
if config.get("mirror"):
    # Not an argument: the command, which DVC runs too, does not include the source of the files.
    os.environ.update(STLM_MIRROR=str(config["mirror"]))
INSPECTED: set[str] = set()
MANIFESTS = Manifests(mirror=named_mirror())
