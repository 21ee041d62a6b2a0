"""A GPU's first day: whatever has never run on one, in a few minutes.

    make gpu-check                                         # the same, in an environment of its own
    python benchmarks/gpu_check.py                         # all checks
    python benchmarks/gpu_check.py --check muon --output muon.json

Each check (benchmarks/gpu_checks.py) is a process of its own with a time limit: one that fails, hangs or
takes the device down stops no other. What a check needs and the machine lacks is skipped by name. Without a
GPU they run on the CPU at tiny shapes, and the file says so.

Writes results/benchmarks/gpu.json anew after each check: killed, it leaves what it has. The exit status is 1
where a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from stlm.cpu_runtime import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from gpu_checks import CHECKS, Check, Skip  # noqa: E402
from machine import machine  # noqa: E402

from stlm.files import read_json, write_json  # noqa: E402

OUTPUT = Path("results/benchmarks/gpu.json")
SECONDS = 450.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="append", choices=tuple(CHECKS), help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all; default: {SECONDS:g}")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times each check's own limit, on a busy machine"
    )
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT}")
    options = parser.parse_args()
    if options.check and not options.output:
        parser.error(f"a part of {OUTPUT} would replace it; name another file with --output")
    output = (options.output or OUTPUT).resolve()
    code = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
    return all_checks(options.check or list(CHECKS), options.seconds, options.patience, output)


def all_checks(names: list[str], seconds: float, patience: float, output: Path) -> int:
    """Run the checks one after the other, and write after each; 1 where one failed."""
    begin = time.perf_counter()
    found = in_time(Check(hardware), min(60 * patience, seconds))
    content: dict[str, Any] = {
        "command": " ".join(["benchmarks/gpu_check.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **(found.get("figures") or {"device": f"unknown: {found['why']}"}),
        "machine": machine(),
        "seconds": 0.0,
        "summary": {},
        "checks": {name: {"result": "not run"} for name in names},
    }
    for name in names:
        left = seconds - (time.perf_counter() - begin)
        if left < 5:
            found = {"result": "skipped", "why": f"the {seconds:g} s for all checks are over"}
        else:
            found = in_time(CHECKS[name], min(CHECKS[name].seconds * patience, left))
        content["checks"][name] = found
        results = [check["result"] for check in content["checks"].values()]
        content["summary"] = {result: results.count(result) for result in sorted(set(results))}
        content["seconds"] = round(time.perf_counter() - begin, 1)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, content)
        print(f"{found['result']:8} {name}: {found.get('why') or json.dumps(found['figures'])}", flush=True)
    print(f"{content['device']}, {content['seconds']:.0f} s: {content['summary']}; {output}")
    return 1 if "failed" in content["summary"] else 0


def hardware() -> dict[str, Any]:
    """What the checks run on."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "cuda": None, "gpus": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def in_time(check: Check, seconds: float) -> dict[str, Any]:
    """A check's result, from a process that is ended, with all it started, when its time is over.

    It is a fork of this one, which has loaded torch but never asks for CUDA.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place, log = Path(folder), Path(folder) / "log"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _alone(check, place, log)
        status = None
        while status is None and time.perf_counter() - begin < seconds:
            time.sleep(0.05)
            ended, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what a check may have left behind
        if status is None:
            os.waitpid(child, 0)
        said = log.read_text(errors="replace")[-1000:] if log.exists() else ""
        if (result := place / "result.json").exists():
            found = read_json(result)
        elif status is None:
            found = {"result": "failed", "why": f"not done after {seconds:.0f} s: {said}"}
        else:
            found = {"result": "failed", "why": f"ended with status {status}: {said}"}
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


def _alone(check: Check, place: Path, log: Path) -> NoReturn:
    """Run a check in this process, in an empty folder of its own; write its result, and end."""
    try:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        (place / "work").mkdir()
        os.chdir(place / "work")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        try:
            if gpus < check.gpus:
                raise Skip(f"needs {check.gpus} GPU{'s' * (check.gpus > 1)}, found {gpus}")
            found = {"result": "ok", "figures": check.function()}
        except Skip as skip:
            found = {"result": "skipped", "why": str(skip)}
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error}"[:1500]
            found = {"result": "failed", "why": f"{why} ({Path(where.filename).name}:{where.lineno})"}
        write_json(place / "result.json", found)
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
