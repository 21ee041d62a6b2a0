"""What all tests share: a project folder of their own, and the mirror of real data where there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from real_data import find_mirror

# Tests are many and their tensors small: threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MIRROR = pytest.StashKey[Path | None]()
# The files that take longest, longest first.
ORDER = (
    "test_engines.py",
    "test_sources.py",
    "test_distributed.py",
    "test_build.py",
    "test_scheduling.py",
    "test_own_text.py",
    "test_parity.py",
    "test_loop.py",
)

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Find the mirror while the working directory is the caller's: tests change it."""
    config.stash[MIRROR] = find_mirror(ROOT, os.environ.get("STLM_MIRROR"))
    _do_not_wait_for_the_disk()


def _do_not_wait_for_the_disk() -> None:
    """Make `os.fsync` do nothing, here and in processes of Python that tests start.

    A training flushes some twenty files, a report some two hundred; nothing of a test outlasts a power cut.
    """
    os.fsync = lambda descriptor: None
    folder, others = str(ROOT / "tests" / "without_fsync"), os.environ.get("PYTHONPATH", "")
    if folder not in others.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, others]))


def pytest_report_header(config: pytest.Config) -> str:
    """Say whether the tests of real data will run."""
    return f"mirror of the real data: {config.stash[MIRROR] or 'none, its tests are skipped'}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take minutes first: one that began last would keep one worker busy alone."""

    def rank(item: pytest.Item) -> int:
        return ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER)

    items.sort(key=rank)


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test as where there are no kernels: torch counts no FLOPs in them, and they round otherwise."""
    from stlm.kernels import library

    monkeypatch.setattr(library, "kernels", lambda: library.Found({}, "switched off by a test"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_mirror(pytestconfig: pytest.Config) -> Path:
    """The mirror of the real data; what needs it is skipped without."""
    folder = pytestconfig.stash[MIRROR]
    if folder is None:
        pytest.skip("needs a mirror of the real data: set STLM_MIRROR")
    return folder


@pytest.fixture(scope="session")
def mirror(real_mirror: Path) -> Path:
    """The real one, where a test makes none of its own."""
    return real_mirror


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with the repository's params/, as the working directory."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STLM_MIRROR", raising=False)
    return tmp_path
