"""Both ways of the operations that have kernels."""

from __future__ import annotations

import pytest

from stlm.kernels import library


@pytest.fixture(params=["kernels", "torch"])
def operations(request: pytest.FixtureRequest) -> str:
    """Run a test with kernels, where there are some, and with torch's operations."""
    if request.param == "torch":
        request.getfixturevalue("torch_operations")
    elif not library.kernels().by_type:
        pytest.skip(f"no kernels: {library.kernels().why_none}")
    return request.param
