"""A cache of the session's own: the first use builds, and nothing of the user's is read or written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point DS_KERNELS_CACHE at a temporary folder; let no setting of the shell choose an implementation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_KERNELS_CACHE", str(tmp_path_factory.mktemp("kernels")))
        for name in ("DS_KERNELS", "DS_KERNELS_ISA"):
            patch.delenv(name, raising=False)
        yield
