"""A cache of the session's own: the first use builds, and nothing of the user's is read or written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ds_kernels.aio.choice import NAMES, EngineName
from ds_kernels.aio.front import AsyncIO


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point DS_KERNELS_CACHE at a temporary folder; let no setting of the shell choose an implementation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_KERNELS_CACHE", str(tmp_path_factory.mktemp("kernels")))
        for name in ("DS_KERNELS", "DS_KERNELS_ISA", "DS_AIO"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest) -> EngineName:
    """Each aio engine that can be had here; the others say why not."""
    name: EngineName = request.param
    try:
        AsyncIO(engine=name).close()
    except RuntimeError as error:
        pytest.skip(str(error))
    return name
