"""The parts that both workflow engines share: the inputs of each stage, and DVC's stages.

Snakemake's rules are in workflow/rules/. ``stlm use`` writes DVC's stages to ``dvc.yaml``, because DVC's
templates cannot hold lists of dependencies, while a stage reads as many benchmarks or runs as the study
names. Both engines run the same commands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from stlm.errors import UserError
from stlm.evaluation.benchmarks import data_names
from stlm.files import disk_errors, write_text
from stlm.manifests import Manifests, model_manifest, refresh_all
from stlm.outputs import CONTAMINATION, EVALUATION, METRICS, REPORT, TRAINING, Output, names
from stlm.study.catalogues import load_benchmarks, load_corpora, load_models, load_vocabularies
from stlm.study.load import load_study
from stlm.study.runs import PublishedModel, Run, Study
from stlm.study.strict import read_yaml
from stlm.tokens.names import hf_name

DVC_FILE = Path("dvc.yaml")
# Stages with this prefix list what DVC watches on this machine; they differ on other machines.
WATCH = "fingerprint-"
_OPTIONAL = ("evaluation.limit", "evaluation.limit_seed")
_HEADER = """\
# The stages of the study `{study}` for DVC, the same as Snakemake's. Written by `stlm use {study}` from
# params/{study}.yaml: do not edit, run it again when runs, corpora or benchmarks come or go.
# {digests}
"""
# With hundreds of runs, parsing this file takes seconds, so its head states its content. libyaml writes the
# same text as PyYAML's own code in a quarter of the time, but not every installation has it.
_HEAD = re.compile(rb"# [^\n]*\n# [^\n]*\n# ([^\n]*)\nvars:\n- study: ([a-z0-9_-]+)\nstages:\n")
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def fetch_inputs(name: str, manifests: Manifests) -> list[str]:
    """The files that ``stlm fetch`` reads: the manifest of the local files, if the source is local."""
    path = manifests.path(name)
    return [] if path is None else [str(path)]


def tokenize_inputs(corpus: str, tokenizer: str, vocabularies: Collection[str] | None = None) -> list[str]:
    """The folders that ``stlm tokenize`` reads: the corpus and, for a published tokenizer, its vocabulary or
    its model.

    ``vocabularies``: the names of the published ones, if they have been read already.
    """
    if (found := hf_name(tokenizer)) is not None:
        published = [found.model]
    else:
        known = load_vocabularies() if vocabularies is None else vocabularies
        published = [tokenizer] if tokenizer in known else []
    return [f"data/raw/{name}" for name in (corpus, *published)]


def tokenize_stage(corpus: str, tokenizer: str) -> str:
    """The name of DVC's stage that tokenizes ``corpus``; DVC allows no colon: hf:NAME:N is hf-NAME-N."""
    if (found := hf_name(tokenizer)) is not None:
        tokenizer = f"hf-{found.model}-{found.size or 'all'}"
    return f"tokenize-{corpus}-{tokenizer}"


def train_inputs(study: Study, run: Run) -> list[str]:
    """The folders that ``stlm train`` reads: tokens, weights, teachers' answers."""
    return [*teach_inputs(study, run), *_answers(run)]


def teach_inputs(study: Study, run: Run) -> list[str]:
    """The folders that ``stlm teach`` reads: those of training but for the answers, which it writes."""
    others = dict.fromkeys(study.runs[name].folder for name in run.depends.values())
    models = dict.fromkeys(f"data/raw/{name}" for name in run.sources.values())
    return [str(run.tokens_folder), *(f"{folder}/checkpoints" for folder in others), *models]


def _answers(run: Run) -> list[str]:
    return [str(folder) for technique in run.techniques.values() for folder in technique.inputs(run)]


def taught(study: Study) -> dict[str, Run]:
    """The folders of teachers' answers that the study's runs train on; the first of its runs makes each."""
    found: dict[str, Run] = {}
    for run in study.runs.values():
        for folder in _answers(run):
            found.setdefault(folder, run)
    return found


def evaluate_inputs(study: Study, run: Run) -> list[str]:
    """The folders that ``stlm evaluate`` reads: weights, test text and benchmarks."""
    benchmarks = [f"data/raw/{name}" for name in data_names(study.benchmarks)]
    return [f"{run.folder}/checkpoints", str(run.tokens_folder), *benchmarks]


def contamination_inputs(study: Study) -> list[str]:
    """The folders that ``stlm contamination`` reads: tokenized training text, and benchmarks."""
    benchmarks = [f"data/raw/{name}" for name in data_names(study.benchmarks)]
    return [*map(str, study.training_texts.values()), *benchmarks]


def published_inputs(study: Study, published: PublishedModel) -> list[str]:
    """The inputs of ``stlm evaluate`` for a published model: its files, test text and benchmarks.

    A fetched model's files are its folder; another's are known by their manifest.
    """
    benchmarks = [f"data/raw/{name}" for name in data_names(study.benchmarks)]
    files = model_manifest(published) if published.model is None else published.place
    return [str(files), str(published.tokens_folder), *benchmarks]


def report_inputs(study: Study) -> list[str]:
    """The inputs of ``stlm report``: the results of every run except its weights, the study's contamination,
    and the sources and sizes of the runs' text."""
    files = [output.name for output in (*TRAINING, *EVALUATION) if not output.is_folder]
    run_outputs = [f"{run.folder}/{name}" for run in study.runs.values() for name in files]
    published_outputs = [
        f"{published.results_folder}/{name}"
        for published in study.published.values()
        for name in names(EVALUATION)
    ]
    tokens = list(dict.fromkeys(str(run.tokens_folder) for run in study.runs.values()))
    texts = [*(f"data/raw/{corpus}" for corpus in study.corpora), *tokens]
    return [*run_outputs, *published_outputs, f"{study.folder}/contamination.json", *texts]


def _catalogues(root: Path) -> dict[str, Mapping[str, Any]]:
    """The data listed in params/: file stem -> name -> entry."""
    return {
        "corpora": load_corpora(root),
        "benchmarks": load_benchmarks(root),
        "vocabularies": load_vocabularies(root),
        "models": load_models(root),
    }


def source_entries(name: str, root: Path = Path()) -> dict[str, dict[str, Any]]:
    """The entries in params/ for the data ``name``: file stem -> key -> entry; a mix with its components."""
    return _source_entries(name, _catalogues(root))


def _source_entries(name: str, catalogues: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    for stem, catalogue in catalogues.items():
        if name in catalogue:
            names = [name, *(getattr(catalogue[name], "mix", None) or {})]
            return {stem: {key: catalogue[key].model_dump(mode="json") for key in names}}
    raise UserError(f"{name!r} is in none of params/{{{','.join(catalogues)}}}.yaml")


def _study_params(study: Study, present: Mapping[str, Any], *keys: str) -> dict[str, list[str]]:
    """The keys of the study's file that a stage depends on; DVC knows no parameter for a missing section.

    ``present``: the content of the file.
    """
    file = f"params/{study.name}.yaml"
    there = [key for key in keys if key.split(".")[0] in present]
    # Single keys of `evaluation`, which a study may leave out.
    return {
        file: [key for key in there if key not in _OPTIONAL or key.split(".")[1] in present["evaluation"]]
    }


def fetched(study: Study, root: Path = Path()) -> dict[str, dict[str, dict[str, Any]]]:
    """The data that must be fetched for the study: name -> its ``source_entries``."""
    catalogues = _catalogues(root)
    tokenizers = {run.tokenizer for run in study.runs.values()}
    vocabularies = [name for name in catalogues["vocabularies"] if name in tokenizers]
    names = (*study.corpora, *vocabularies, *data_names(study.benchmarks), *study.models)
    return {name: _source_entries(name, catalogues) for name in names}


def watch_stages(study: Study, root: Path = Path()) -> dict[str, dict[str, Any]]:
    """DVC's stages that update the manifests of this machine's files when they change."""
    manifests = Manifests(root)
    watched = {
        (f"{WATCH}{name}", f"stlm fingerprint {name}", str(manifests.path(name))): manifests.watched(name)
        for name in fetched(study, root)
    }
    for name, model in study.published.items():
        key = (f"{WATCH}{study.name}-{name}", f"stlm fingerprint {study.name} {name}")
        if model.folder is not None:
            here = (root / model.folder).is_dir()
            watched[*key, str(model_manifest(model))] = [model.folder] if here else []
    return {
        stage: {"cmd": command, "deps": deps, "outs": [{path: {"cache": False, "persist": True}}]}
        for (stage, command, path), deps in watched.items()
        if deps
    }


def dvc_stages(study: Study, root: Path = Path()) -> dict[str, dict[str, Any]]:
    """The study's stages as in ``dvc.yaml``. Data has one stage, shared by all studies."""
    runs = study.runs.values()
    tokens = list(dict.fromkeys((run.corpus, run.tokenizer) for run in runs))
    manifests = Manifests(root)
    present = read_yaml(root / f"params/{study.name}.yaml")
    vocabularies = load_vocabularies(root)
    stages: dict[str, dict[str, Any]] = {}
    for name, entries in fetched(study, root).items():
        deps = fetch_inputs(name, manifests)
        stages[f"fetch-{name}"] = {
            "cmd": f"stlm fetch {name}",
            **({"deps": deps} if deps else {}),
            "params": [{f"params/{stem}.yaml": list(keys)} for stem, keys in entries.items()],
            "outs": [f"data/raw/{name}"],
        }
    for corpus, tokenizer in tokens:
        stages[tokenize_stage(corpus, tokenizer)] = {
            "cmd": f"stlm tokenize {corpus} {tokenizer}",
            "deps": tokenize_inputs(corpus, tokenizer, vocabularies),
            "outs": [f"data/tokens/{corpus}/{tokenizer}"],
        }
    for folder, run in taught(study).items():
        # No parameters: the folder's name stands for them. It persists: the stage itself knows what to keep.
        stages[f"teach-{study.name}-{run.name}"] = {
            "cmd": f"stlm teach {study.name} {run.name}",
            "deps": teach_inputs(study, run),
            "outs": [{folder: {"persist": True}}],
        }
    for run in runs:
        stages |= _run_stages(study, run, present)
    for published in study.published.values():
        stages |= _published_stage(study, published, present)
    stages[f"contamination-{study.name}"] = {
        "cmd": f"stlm contamination {study.name}",
        "deps": contamination_inputs(study),
        "params": [
            _study_params(
                study, present, *(f"evaluation.{key}" for key in ("benchmarks", "limit", "limit_seed"))
            )
        ],
        "outs": _outputs(study.folder, CONTAMINATION),
    }
    stages[f"report-{study.name}"] = {
        "cmd": f"stlm report {study.name}",
        "deps": report_inputs(study),
        # The whole file, so that this stage runs at any change; its command then finds out whether dvc.yaml
        # still lists the right runs.
        "params": [{f"params/{study.name}.yaml": None}],
        "outs": _outputs(study.folder, REPORT),
        "metrics": _outputs(study.folder, [METRICS]),
    }
    return stages


def dvc_plots(study: Study) -> list[Any]:
    """The content of `dvc plots`: two columns of curve.csv, with a line for each run, and Figure 1.

    The template is DVC's `linear` without the steps at which a column is blank, which it would draw as zero.
    """
    curves = {"validation bits per byte": "val_bits_per_byte", "training loss": "train_loss"}
    return [
        {
            title: {
                "template": "curve",
                "x": "step",
                "y": {f"{run.folder}/curve.csv": curve for run in study.runs.values()},
                "x_label": "step",
                "y_label": title,
            }
        }
        for title, curve in curves.items()
    ] + [f"{study.folder}/plots/figure1.svg"]


def _run_stages(study: Study, run: Run, present: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that train and evaluate one run."""
    variant = f"variants.{run.variant}"
    # With several seeds, the run's name contains its seed: adding another seed does not affect it.
    seeds = ["seeds"] if run.name == run.variant else []
    return {
        f"train-{study.name}-{run.name}": {
            "cmd": f"stlm train {study.name} {run.name}",
            "deps": train_inputs(study, run),
            "params": [
                _study_params(study, present, "model", "training", "data", "techniques", *seeds, variant)
            ],
            "outs": _outputs(run.folder, TRAINING),
        },
        f"evaluate-{study.name}-{run.name}": {
            "cmd": f"stlm evaluate {study.name} {run.name}",
            "deps": evaluate_inputs(study, run),
            "params": [_study_params(study, present, "evaluation", variant)],
            "outs": _outputs(run.folder, EVALUATION),
        },
    }


def _published_stage(
    study: Study, published: PublishedModel, present: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The stage that evaluates a published model."""
    return {
        f"evaluate-{study.name}-{published.name}": {
            "cmd": f"stlm evaluate {study.name} {published.name}",
            "deps": published_inputs(study, published),
            "params": [_study_params(study, present, "evaluation", f"published.{published.name}")],
            "outs": _outputs(published.results_folder, EVALUATION),
        },
    }


def _outputs(folder: Path, outputs: Iterable[Output]) -> list[Any]:
    """Outputs in the form of `dvc.yaml`: DVC caches those that git does not keep."""
    return [
        {f"{folder}/{output.name}": {"cache": False}} if output.in_git else f"{folder}/{output.name}"
        for output in outputs
    ]


def _dvc_content(study: Study, root: Path) -> dict[str, Any]:
    """The content of ``dvc.yaml`` except for the stages that watch files of this machine."""
    return {"vars": [{"study": study.name}], "stages": dvc_stages(study, root), "plots": dvc_plots(study)}


def _digests(content: Mapping[str, Any], body: bytes) -> str:
    """The digests of stages and text in the head of ``dvc.yaml``.

    ``content`` excludes the stages that watch files of this machine.
    """
    stages = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return f"{stages[:32]} {hashlib.sha256(body).hexdigest()[:32]}"


def active_study(root: Path = Path()) -> str | None:
    """The study whose stages are in ``dvc.yaml``; None if there is no such file."""
    path = root / DVC_FILE
    if not path.exists():
        return None
    with suppress(OSError), path.open("rb") as file:
        if head := _HEAD.match(file.read(2000)):
            return head[2].decode()
    content = read_yaml(path)
    try:
        name = content["vars"][0]["study"]
    except (KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str) or not isinstance(content.get("stages") or {}, dict):
        raise UserError(f"{path}: not as `stlm use` writes it; run `stlm use STUDY`")
    return name


def use(name: str, root: Path = Path()) -> bool:
    """Make ``name`` the active study: write its stages to ``dvc.yaml``, and manifests of its local files.

    Returns whether ``dvc.yaml`` changed.
    """
    study = load_study(name, root=root)
    refresh_all(study, fetched(study, root), root)
    asked = _dvc_content(study, root)
    listed = {**asked, "stages": {**watch_stages(study, root), **asked["stages"]}}
    body = yaml.dump(listed, Dumper=_DUMPER, sort_keys=False, width=110, allow_unicode=True)
    text = _HEADER.format(study=name, digests=_digests(asked, body.encode())) + body
    path = root / DVC_FILE
    with disk_errors(path):
        if path.exists() and path.read_bytes() == text.encode():
            return False
    write_text(path, text)
    return True


def check_active(study: Study, root: Path = Path()) -> None:
    """Refuse to work on the active study if ``dvc.yaml`` lists other stages than params/ asks for.

    Otherwise ``dvc repro`` would silently miss a run that was added to params/. Overridden parameters are in
    no file and are not compared.
    """
    if study.overrides or active_study(root) != study.name:
        return
    asked = _dvc_content(study, root)
    text = (root / DVC_FILE).read_bytes()
    head = _HEAD.match(text)
    if head and head[1].decode(errors="replace") == _digests(asked, text[head.end(1) + 1 :]):
        return
    # Edited, or written by another version: compare the content, not the text.
    listed = read_yaml(root / DVC_FILE)
    stages = {
        name: stage for name, stage in (listed.get("stages") or {}).items() if not name.startswith(WATCH)
    }
    if {**listed, "stages": stages} != asked:
        raise UserError(
            f"dvc.yaml does not list the stages that params/{study.name}.yaml asks for: "
            f"run `stlm use {study.name}`, then this again"
        )
