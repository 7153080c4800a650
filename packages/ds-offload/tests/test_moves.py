"""Moves on a host: reads and writes that are under way until they are waited for, in order."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from ds_kernels.aio import AioError, AsyncIO
from ds_offload.home import Home
from ds_offload.moves import Moves
from ds_offload.volume import Volume

NUMEL = 3 * 4096 + 10


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path, AsyncIO(queue_depth=4))
    yield made
    made.close()
    made.io.close()


@pytest.mark.parametrize("on_disk", [0, NUMEL - 4096, NUMEL])
def test_there_and_back(on_disk: int, volume: Volume) -> None:
    home, moves = Home(NUMEL, torch.bfloat16, on_disk, volume), Moves()
    for turn in range(5):
        values = torch.randn(NUMEL).to(torch.bfloat16)
        moves.to_home(home, 0, values)
        out = torch.empty(NUMEL - 7, dtype=torch.bfloat16)
        ticket = moves.from_home(home, 7, out)
        ticket.wait()
        ticket.wait()
        assert torch.equal(out, values[7:]), turn
        moves.to_home(home, 100, values[:50])
        home.settle()
        values[100:150] = values[:50].clone()
        assert torch.equal(home.tensor, values), turn
    moves.settle()
    home.settle()


def test_a_read_that_fails_is_raised_by_whoever_waits(volume: Volume) -> None:
    home, moves = Home(NUMEL, torch.float32, NUMEL, volume), Moves()
    failed: Future[int] = Future()

    def broken(offset: int, tensor: torch.Tensor) -> Future[int]:
        return failed

    volume.read = broken  # type: ignore[assignment,method-assign]
    ticket = moves.from_home(home, 0, torch.empty(NUMEL))
    failed.set_exception(AioError(5, "planted", path=volume.path, offset=0, wanted=1, got=0))
    with pytest.raises(AioError, match="planted"):
        ticket.wait()
