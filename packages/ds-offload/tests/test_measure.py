"""Figures are those of what was measured, everything is given back, and predictions follow from figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_offload.measure import Bandwidths, measure_bandwidths, predict_step, predict_update
from ds_offload.volume import Volume

MIB = 1 << 20
FIGURES = Bandwidths(host_copy=1e10, host_copy_one=5e9, read=2e9, write=1e9, mixed=2e9, update=1e9)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path)
    yield made
    made.close()


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, foreach=False)


def test_what_is_given_is_measured_and_given_back(volume: Volume) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = measure_bandwidths(volume, adamw, seconds=0.01, max_bytes=2 * MIB)
    for name in ("host_copy", "host_copy_one", "read", "write", "mixed", "update"):
        assert getattr(found, name) > 1e5, name
    assert found.to_device is None
    assert found.to_host is None
    assert (volume.used, volume.size) == (0, 0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert "read " in str(found)
    assert "to device" not in str(found)


def test_host_memory_alone() -> None:
    found = measure_bandwidths(seconds=0.01, max_bytes=MIB)
    assert (found.read, found.write, found.mixed, found.update) == (None, None, None, None)
    assert found.host_copy > 0


def test_figures_are_bytes_over_seconds(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that sleeps, so that its bandwidth is known: never more, and not much less on a busy machine."""
    read, write = volume.read, volume.write

    def slowly(real: Any, pause: float) -> Any:
        def request(offset: int, tensor: Tensor) -> Any:
            time.sleep(pause)
            return real(offset, tensor)

        return request

    monkeypatch.setattr(volume, "read", slowly(read, 0.03))
    monkeypatch.setattr(volume, "write", slowly(write, 0.06))
    found = measure_bandwidths(volume, seconds=0.01, max_bytes=2 * MIB)
    assert found.read is not None
    assert found.write is not None
    assert found.mixed is not None
    assert found.read <= MIB / 0.03
    assert found.write <= MIB / 0.06
    assert found.mixed <= 2 * MIB / 0.09
    assert found.read > MIB / 3


def test_the_optimizer_gets_a_parameter_with_a_gradient() -> None:
    seen: list[Tensor] = []

    class Sleeps(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            (param,) = self.param_groups[0]["params"]
            seen.append(param)
            assert param.grad is not None
            time.sleep(0.02)

    found = measure_bandwidths(make_optimizer=lambda p: Sleeps(p, lr=0.1), seconds=0.01, max_bytes=4 * MIB)
    assert found.update is not None
    assert found.update <= seen[0].numel() / 0.02
    assert seen[0].numel() == MIB // 4


def test_the_time_is_bounded(volume: Volume) -> None:
    begin = time.perf_counter()
    measure_bandwidths(volume, adamw, seconds=0.02, max_bytes=MIB)
    assert time.perf_counter() - begin < 10  # six figures of 0.02 s, and a machine that others use


def test_a_disk_that_fails_leaves_no_extent(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(offset: int, tensor: Tensor) -> Any:
        raise OSError("gone")

    monkeypatch.setattr(volume, "read", fail)
    with pytest.raises(OSError, match="gone"):
        measure_bandwidths(volume, seconds=0.01, max_bytes=MIB)
    assert volume.used == 0


@pytest.mark.parametrize("settings", [{"seconds": 0}, {"seconds": -1}, {"max_bytes": 1000}])
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*allowed"):
        measure_bandwidths(**settings)


def test_one_chunk_hides_nothing() -> None:
    got = predict_update(10**9, 4 * 10**9, 3 * 10**9, FIGURES, chunks=1)
    assert got == pytest.approx(2 + 1 + 3)  # seconds of fetch, update, flush


def test_many_chunks_take_as_long_as_the_slower_side() -> None:
    # mixed: 2 s for 2 + 2 GB that take 1 + 2 s one after the other, so the two at once are 1.5 times as fast
    disk = (2 + 3) / 1.5
    got = predict_update(10**9, 4 * 10**9, 3 * 10**9, FIGURES, chunks=1000)
    assert got == pytest.approx(disk, rel=0.01)
    slow = replace(FIGURES, update=1e8)
    assert predict_update(10**9, 4 * 10**9, 3 * 10**9, slow, chunks=1000) == pytest.approx(10, rel=0.01)


def test_fill_and_drain_by_hand() -> None:
    # slots: f0 | u0 f1 | u1 f2 b0 | u2 b1 | b2
    assert predict_step([1, 2, 3], [4, 1, 1], [1, 1, 5]) == 1 + 4 + (3 + 1) + 1 + 5
    assert predict_step([1, 2, 3], [4, 1, 1], [1, 1, 5], duplex=2) == 1 + 4 + 3 + 1 + 5
    assert predict_step([], [], []) == 0


def test_more_chunks_are_never_slower_and_nothing_beats_each_side() -> None:
    times = [predict_update(10**9, 2**32, 2**31, FIGURES, chunks=n) for n in (1, 2, 4, 64, 1024)]
    assert times == sorted(times, reverse=True)
    assert times[-1] >= max(2**32 / 2e9, 2**31 / 1e9, 1.0)


def test_without_a_figure_only_what_needs_none() -> None:
    bare = Bandwidths(host_copy=1, host_copy_one=1, update=1e9)
    assert predict_update(10**9, 0, 0, bare, chunks=4) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"bandwidths\.read was not measured"):
        predict_update(10**9, 1, 0, bare, chunks=4)


@pytest.mark.parametrize(
    ("numbers", "chunks"), [((-1, 0, 0), 1), ((0, -1, 0), 1), ((0, 0, -1), 1), ((1, 1, 1), 0)]
)
def test_numbers_that_cannot_be(numbers: tuple[int, int, int], chunks: int) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        predict_update(*numbers, FIGURES, chunks=chunks)
    with pytest.raises(ValueError, match="one of each"):
        predict_step([1.0], [], [])
