"""The study that config names, and what the rules ask of it. No rule here, no function elsewhere."""

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
from stlm.layout import CONTAMINATION, EVALUATION, METRICS, REPORT, TRAINING, Output, names
from stlm.manifests import Manifests, named_mirror
from stlm.study.load import load_study

# Keys of --config that choose what runs; every other key overrides one of params/<study>.yaml.
CHOICES = {"study", "mirror", "processes", "set"}


def flatten(value: object, path: str) -> Iterator[str]:
    """A nested override as `key.path=value` texts: {"training": {"steps": 50}} -> training.steps=50."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from flatten(below, f"{path}.{key}")
    else:
        yield f"{path}={value if isinstance(value, str) else json.dumps(value)}"


def overrides() -> list[str]:
    """The overrides of --config, from `set='a.b=1 c=2'` and from keys like `training='{steps: 50}'`."""
    listed = config.get("set", [])
    given = shlex.split(listed) if isinstance(listed, str) else list(listed)
    for key in sorted(config.keys() - CHOICES):
        given += flatten(config[key], key)
    return given


def load():
    """The study to run, and what it fetches: of --config study=NAME, else the active one, else smoke."""
    try:
        name = config.get("study") or engines.active_study() or "smoke"
        study = load_study(name, overrides())
        return study, engines.fetched(study)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def canonical(content: object) -> str:
    """The same text for the same content: Snakemake runs a job again when the text changes."""
    return json.dumps(content, sort_keys=True)


def outputs(folder: str, listed: tuple[Output, ...]) -> list[str]:
    """A stage's outputs in its folder, the folders among them marked as such for Snakemake."""
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
    """What decides which items are looked at."""
    return canonical(STUDY.evaluation.model_dump(mode="json", include={"benchmarks", "limit", "limit_seed"}))


def study_params(wildcards) -> str:
    return canonical(STUDY.model_dump(mode="json"))


def processes() -> int:
    """Processes that train each run, of --config processes=N."""
    found = config.get("processes", 1)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        print(
            f"error: --config processes={found}: expected a whole number of 1 or more, for example processes=2",
            file=sys.stderr,
        )
        sys.exit(2)
    return found


def on_gpus(count: int) -> str:
    """What stands before a command that `count` GPUs of its own belong to. A cluster gives its jobs theirs."""
    return f"python -m stlm.gpus {count} " if GPUS and workflow.is_main_process else ""


def launch(wildcards, threads) -> str:
    """How training is started. Asks for `threads` as `set_arguments` does: the results are the same."""
    if PROCESSES == 1:
        return f"{on_gpus(1)}stlm"
    own = max(1, threads // PROCESSES)
    torchrun = f"torchrun --standalone --nproc_per_node={PROCESSES} -m stlm"
    return f"OMP_NUM_THREADS={own} {on_gpus(PROCESSES)}{torchrun}"


def launch_alone(wildcards, threads) -> str:
    """How evaluation is started, in one process."""
    return f"{on_gpus(1)}stlm"


def set_arguments(wildcards, threads) -> str:
    """The overrides as arguments of a verb.

    A parameter that asks for `threads` is none that Snakemake compares: a job is run again for what an
    override changes in it, which its other parameters have, and not because there is an override.
    """
    return "".join(f" --set {shlex.quote(override)}" for override in STUDY.overrides)


def fetch_inputs(wildcards) -> list[str]:
    """The manifest of what `stlm fetch` reads, written as the files are now.

    They are looked at once, before jobs are chosen: nodes of a cluster may not have them.
    """
    name = wildcards.name
    if workflow.is_main_process and name not in LOOKED_AT:
        LOOKED_AT.add(name)
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
    """Before the first job: let no second Snakemake in, and show DVC the same study.

    The lock goes with the process, however it ends; Snakemake's own outlives a kill and is switched off in
    the profile, so that an interrupted study goes on with the same command.
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
    """Whether params/ has changed since the start: each job reads them when its turn comes."""
    try:
        return load_study(STUDY.name) != STUDY or engines.fetched(STUDY) != FETCHED
    except UserError:
        return True


def finish() -> None:
    """After the last job: record the results in DVC, where they are what params/ describes, all of it."""
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
UNRECORDED = workflow.is_main_process and recording.unrecorded(STUDY)
# Threads asked for by the rules that can use them all: Snakemake scales them down to --cores.
MACHINE = os.cpu_count() or 1
CORES = workflow.resource_settings.cores or MACHINE
# Runs take turns on the GPUs, of which the profile allows one unless --resources gpu=N says more. Each takes an
# equal part of the cores, and one part is left to what runs beside (fetch, tokenize, contamination). Without a
# GPU runs share the cores: tiny models train faster side by side on few threads each than one after the other
# on all (docs/log.md).
GPUS = 1 if shutil.which("nvidia-smi") else 0
PROCESSES = processes()
SHARES = (workflow.resource_settings.resources.get("gpu").value or 1) + 1 if GPUS else len(STUDY.runs)
RUN_THREADS = max(1, CORES // SHARES)
BESIDE_THREADS = max(1, CORES // SHARES if GPUS else CORES)

# A signal lets training save its state and end. What stands around it waits for that end: the shell here,
# `tee` by ignoring the signal, which it gets too. This takes the place of Snakemake's prefix, the first command.
shell.prefix("set -euo pipefail; trap : INT TERM USR1; ")

# Jobs start `stlm` by name: the one of the environment that runs Snakemake, activated or not.
os.environ.update(
    PATH=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
)
# Progress reaches the terminal and the log as it is printed, although both are behind a pipe.
os.environ.update(PYTHONUNBUFFERED="1")
if config.get("mirror"):
    # Not an argument: where the bytes came from is no part of the command, which is DVC's too.
    os.environ.update(STLM_MIRROR=str(config["mirror"]))
LOOKED_AT: set[str] = set()
MANIFESTS = Manifests(mirror=named_mirror())
