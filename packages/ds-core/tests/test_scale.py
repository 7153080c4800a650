"""Loss scales: exact sequences of values."""

from __future__ import annotations

import pytest
import torch

from ds_core.train.scale import DynamicScale, StaticScale


def run(scale: DynamicScale, overflows: str) -> list[float]:
    values = []
    for mark in overflows:
        scale.update(overflow=mark == "x")
        values.append(scale.value)
    return values


def test_halves_after_hysteresis_and_doubles_after_a_clean_window() -> None:
    scale = DynamicScale(16.0, window=2, hysteresis=2)
    assert run(scale, "xx") == [16.0, 8.0]
    assert run(scale, "..") == [8.0, 16.0]
    assert run(scale, "x.x") == [16.0, 16.0, 8.0]


def test_hysteresis_refills_on_clean_steps_only_if_asked() -> None:
    stubborn = DynamicScale(16.0, window=100, hysteresis=2)
    assert run(stubborn, "x.x") == [16.0, 16.0, 8.0]
    patient = DynamicScale(16.0, window=100, hysteresis=2, consecutive_hysteresis=True)
    assert run(patient, "x.x") == [16.0, 16.0, 16.0]


def test_stops_at_the_minimum_with_a_reason() -> None:
    scale = DynamicScale(4.0, hysteresis=1, minimum=1.0)
    assert run(scale, "xx") == [2.0, 1.0]
    with pytest.raises(FloatingPointError, match="smallest loss scale, 1"):
        scale.update(overflow=True)


def test_state_round_trip_goes_on_exactly() -> None:
    scale = DynamicScale(16.0, window=3, hysteresis=2)
    run(scale, "x..")
    other = DynamicScale(16.0, window=3, hysteresis=2)
    other.load_state_dict(scale.state_dict())
    assert run(scale, ".xx...") == run(other, ".xx...")


def test_scales_the_loss() -> None:
    assert float(StaticScale(8.0).scale(torch.tensor(2.0))) == 16.0
    assert float(DynamicScale(4.0).scale(torch.tensor(2.0))) == 8.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: StaticScale(0.0),
        lambda: DynamicScale(1.0, minimum=2.0),
        lambda: DynamicScale(window=0),
        lambda: DynamicScale(hysteresis=0),
    ],
)
def test_impossible_settings_are_refused(build: object) -> None:
    with pytest.raises(ValueError, match="got"):
        build()  # type: ignore[operator]
