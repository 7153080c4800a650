"""Borrowing a tensor that lives elsewhere: what was written comes back, if it was said that it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_kernels.aio import AsyncIO
from ds_offload.home import Home
from ds_offload.lease import MovedLease
from ds_offload.volume import Volume


@pytest.mark.parametrize("on_disk", [0, 1000])
def test_on_the_host_the_tensor_is_the_home_itself(on_disk: int, tmp_path: Path) -> None:
    volume = Volume(tmp_path, AsyncIO(queue_depth=4))
    home = Home(1000, torch.float32, on_disk, volume)
    home.write(0, torch.ones(1000))
    with MovedLease(home, torch.device("cpu")) as lease:  # waits for what is under way
        assert bool((lease.tensor == 1).all())
        lease.tensor[5] = 7.0
        lease.dirty = True
    assert home.pending == []
    out = torch.empty(10)
    for future in home.read(0, out):
        future.result(20)
    assert out.tolist() == [1.0] * 5 + [7.0] + [1.0] * 4
    volume.close()
    volume.io.close()


@pytest.mark.parametrize("dirty", [False, True])
def test_elsewhere_it_is_a_copy_that_goes_back_if_dirty(dirty: bool) -> None:
    home = Home(10, torch.float32, 0, None)
    home.tensor.zero_()
    with MovedLease(home, torch.device("cpu")) as lease:
        lease.tensor = home.tensor.clone()  # as from a device
        lease.tensor.fill_(3.0)
        lease.dirty = dirty
    assert home.tensor.tolist() == [3.0 * dirty] * 10
