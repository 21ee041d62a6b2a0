"""What a study of hundreds of runs costs the engines: `python benchmarks/many_runs.py --runs 100 500`.

Makes a study of so many runs whose results are stand-ins of a few bytes, and measures, each in a process of
its own: `stlm use`, what a stage does before its work (it loads the study and compares dvc.yaml with it),
`snakemake -n all` before and after all is made, the recording in DVC, and `dvc status`: as a user calls it,
and by `python -m stlm.dvc_command status`, which reads params/ once. Parsing dvc.yaml and dvc.lock alone is
the least that DVC spends. Times are seconds by the clock and of the processor, children included.

Writes results/benchmarks/many_runs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from command import command
from machine import machine

from stlm.engines import dvc_stages
from stlm.errors import UserError
from stlm.files import write_json
from stlm.study.load import load_study

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("results/benchmarks/many_runs.json")
START = (
    "from stlm.study.load import load_study; from stlm.engines import check_active; "
    "check_active(load_study('many'))"
)
PARSE = (
    "from ruamel.yaml import YAML; from pathlib import Path; "
    "[YAML(typ='safe').load(Path(f'dvc.{end}').read_text()) for end in ('yaml', 'lock')]"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 500], help="default: 100 500")
    parser.add_argument(
        "--limit", type=int, default=1800, help="seconds that a command may take; default: 1800"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> None:
    """Measure each number of runs and write the results."""
    measured: dict[str, Any] = {}
    for runs in options.runs:
        with tempfile.TemporaryDirectory() as name:
            measured[str(runs)] = measure(Path(name) / "project", runs, options.limit)
        content = {"machine": machine(), "runs": measured}
        write_json(options.output, content)
    print(json.dumps(measured, indent=1))


def measure(project: Path, runs: int, limit: int) -> dict[str, Any]:
    """Every measurement of one study, by name."""
    make_project(project, runs)
    python = sys.executable
    snakemake = (python, "-m", "snakemake", "--config", "study=many", "--quiet")
    found: dict[str, Any] = {}

    def timed(name: str, *words: str) -> None:
        begin, used = time.perf_counter(), sum(os.times()[:4])
        try:
            done = subprocess.run(
                words, cwd=project, capture_output=True, text=True, timeout=limit, env=environment()
            )
        except subprocess.TimeoutExpired:
            found[name] = {"more_than_seconds": limit}
        else:
            if done.returncode:
                raise UserError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
            seconds, processor = time.perf_counter() - begin, sum(os.times()[:4]) - used
            found[name] = {"seconds": round(seconds, 2), "processor": round(processor, 2)}
        print(runs, name, found[name], file=sys.stderr)

    timed("stlm use", python, "-m", "stlm", "use", "many")
    timed("start of a stage", python, "-c", START)
    timed("snakemake -n all, nothing made", *snakemake, "-n", "all")
    make_results(project)
    timed("snakemake --touch all", *snakemake, "--touch", "--cores", "1", "--no-hooks", "all")
    timed("recording", python, "-m", "stlm.dvc_command", "commit", "--force", "--quiet")
    timed("snakemake -n all, all made", *snakemake, "-n", "all")
    timed("stlm.dvc_command status", python, "-m", "stlm.dvc_command", "status")
    timed("parsing dvc.yaml and dvc.lock", python, "-c", PARSE)
    timed("dvc status", python, "-m", "dvc", "status")
    for name in ("dvc.yaml", "dvc.lock"):
        found[f"bytes of {name}"] = (project / name).stat().st_size
    return found


def environment() -> dict[str, str]:
    """This process's, with this package's code."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def make_project(project: Path, runs: int) -> None:
    """A folder with the repository's workflow and smoke's study in as many variants."""
    project.mkdir()
    for name in ("workflow", "profiles", ".dvc", "params"):
        ignore = shutil.ignore_patterns("cache", "tmp", "config.local")
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=ignore)
    for name in ("Snakefile", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, project / name)
    content = yaml.safe_load((ROOT / "params/smoke.yaml").read_text(encoding="utf-8"))
    rates = {
        f"rate-{number}": {"training": {"learning_rate": 1e-3 + number / 1e6}} for number in range(runs - 1)
    }
    content["variants"] = {content["baseline"]: {}, **rates}
    (project / "params/many.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)


def make_results(project: Path) -> None:
    """A stand-in for every output."""
    for stage in dvc_stages(load_study("many", root=project), project).values():
        for entry in (*stage["outs"], *stage.get("metrics", ())):
            path = project / (entry if isinstance(entry, str) else next(iter(entry)))
            if not path.suffix:
                path /= "content"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(str(path)))


if __name__ == "__main__":
    sys.exit(main())
