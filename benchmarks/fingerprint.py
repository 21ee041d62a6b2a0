"""How long it takes to see that 10,000 files are unchanged: `python benchmarks/fingerprint.py [FILES]`.

Prints the time of the first look, which reads every file, and of a later one, which asks the file system for
each file's state alone; then that of `dvc status` on the same folder, whose hashes DVC keeps likewise. In
seconds by the clock, and of the processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from stlm.corpora.config import CorpusEntry
from stlm.corpora.fingerprint import Digests, look


def write_files(folder: Path, count: int) -> None:
    """Text files of about 4 kB, a hundred a folder."""
    for number in range(count):
        path = folder / f"{number // 100:03d}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"A line of the file {number}.\n" * 150)


def timed(work: Callable[[], None], times: int = 1) -> str:
    """The fastest of several runs: by the clock, and of the processor, children included."""
    fastest = []
    for _ in range(times):
        begin, used = time.perf_counter(), sum(os.times()[:4])
        work()
        fastest.append((time.perf_counter() - begin, sum(os.times()[:4]) - used))
    return f"{min(fastest)[0]:.2f} s, processor {min(used for _, used in fastest):.2f} s"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        write_files(project / "texts", count)
        time.sleep(2.5)  # files that changed a moment ago are read again
        source = {"kind": "folder", "path": "texts", "files": {"train": "**/*.txt"}}
        entry = CorpusEntry(name="texts", description="texts", licence="none", sources=[source])

        def fingerprint() -> None:
            digests = Digests(project / "fingerprints.json")
            found = look(entry, None, None, project, digests)
            assert found is not None and found.fingerprint.files == count
            digests.save()

        print(f"{count:,} files, first look:      {timed(fingerprint)}")
        print(f"{count:,} files, unchanged:       {timed(fingerprint, 3)}")

        def dvc(*arguments: str) -> None:
            command = [sys.executable, "-m", "dvc", *arguments]
            subprocess.run(command, cwd=project, check=True, capture_output=True)

        dvc("init", "--no-scm")
        print(f"`dvc status`, nothing to watch: {timed(lambda: dvc('status'), 3)}")
        stage = {"cmd": "echo seen > seen", "deps": ["texts"], "outs": ["seen"]}
        (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"look": stage}}))
        dvc("repro")
        print(f"`dvc status`, of these files:   {timed(lambda: dvc('status'), 3)}")


if __name__ == "__main__":
    main()
