"""What all tests share: a project folder of their own, and the mirror of real data where there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Tests are many and their tensors small: threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder that STLM_MIRROR names, or ../shared/data; tests of real data are skipped without."""
    folder = Path(os.environ.get("STLM_MIRROR") or ROOT.parent / "shared" / "data")
    if not (folder / "corpora").is_dir():
        pytest.skip("needs a mirror of the real data: set STLM_MIRROR")
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with the repository's params/, as the working directory."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STLM_MIRROR", raising=False)
    return tmp_path
